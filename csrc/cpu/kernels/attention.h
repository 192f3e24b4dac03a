// Attention of a few query rows over a range of stored tokens: flash-style, a stretch of 128 tokens
// at a time (Dao et al. 2022; online softmax: Milakov & Gimelshein 2018), whose keys lie in tiles
// of 16.
//
// A row's arithmetic depends on its own position and on where tiles, stretches and ranges begin,
// which are absolute multiples of constants; so chunks and batches do not change its bits. A token
// that a row does not see, but a neighbouring row does, has a weight of exactly 0.
//
// Over float32 and int8 caches all is float32, and weights are e^(score - greatest score). Over a
// bf16 cache (attention_bf16.h) both products are of bf16 numbers, and weights are
// 2^(score - whole number): see reference/ops.py.

constexpr int kStretchTiles = 8;
constexpr std::int64_t kStretch = kStretchTiles * kLanes;

// Tokens of a stretch, counted from its beginning: [low, high).
struct Visible {
  std::int64_t low, high;
};

inline Visible visible_to(const AttendTask& task, int row, std::int64_t stretch) {
  const std::int64_t position = task.position[row];
  const std::int64_t low = task.window > 0 ? position - task.window + 1 - stretch : 0;
  const std::int64_t end = position + 1 < task.end ? position + 1 : task.end;
  const std::int64_t high = end - stretch < kStretch ? end - stretch : kStretch;
  return {low < 0 ? 0 : low, high};
}

// Some rows of a task, over the stretch that begins at token `stretch`.
struct StretchRows {
  const AttendTask& task;
  int first, count;
  std::int64_t stretch;

  Visible visible(int row) const {
    return visible_to(task, first + (row < count ? row : count - 1), stretch);
  }
  // Positions grow from row to row, by one at most.
  Visible seen_by_any() const { return {visible(0).low, visible(count - 1).high}; }
  Visible seen_by_all() const { return {visible(count - 1).low, visible(0).high}; }
};

// One tile of stored tokens of one KV head. The scales are null except for int8.
template <class Item>
struct Tile {
  static constexpr bool kHasScales = sizeof(Item) == 1;
  const Item* keys;
  const Item* values;
  const float* key_scales;
  const float* value_scales;
};

template <class Item>
inline Tile<Item> find_tile(const AttendTask& task, std::int64_t token) {
  const KvLayout& layout = task.layout;
  const std::int64_t within = token % layout.block_size;
  const std::int64_t block = task.block_table[token / layout.block_size];
  const unsigned char* head = task.kv + block * layout.block_bytes();
  const Item* items = reinterpret_cast<const Item*>(head);
  const float* scales = nullptr;
  if (Tile<Item>::kHasScales)
    scales = reinterpret_cast<const float*>(head + layout.scales_at()) + within;
  return {items + layout.key_item(within, 0), items + layout.value_item(within, 0), scales,
          scales ? scales + layout.block_size : nullptr};
}

// Scores of R query rows against the keys of T tiles: one chain over the dimensions a key. R x T
// chains run at a time, enough to hide the latency of additions. Not inlined: within its caller too
// few registers are left for the rows' addresses.
template <int R, int T, class Item>
[[gnu::noinline]] void tile_scores(const float* const* q, const Tile<Item>* tiles,
                                   std::int64_t head_dim, float* scores) {
  Vec sum[R][T];
  OCTAVO_UNROLL
  for (int r = 0; r < R; ++r) {
    OCTAVO_UNROLL
    for (int t = 0; t < T; ++t) sum[r][t] = zero();
  }
  for (std::int64_t d = 0; d < head_dim; ++d) {
    Vec key[T];
    OCTAVO_UNROLL
    for (int t = 0; t < T; ++t) key[t] = load(tiles[t].keys + d * kLanes);
    // Few rows: memory limits the speed, and the values are needed next.
    for (int t = 0; R < 8 && t < T; ++t) prefetch(tiles[t].values + d * kLanes);
    OCTAVO_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec element = splat(q[r][d]);
      OCTAVO_UNROLL
      for (int t = 0; t < T; ++t) sum[r][t] = fma(element, key[t], sum[r][t]);
    }
  }
  OCTAVO_UNROLL
  for (int r = 0; r < R; ++r) {
    OCTAVO_UNROLL
    for (int t = 0; t < T; ++t) store(scores + r * kStretch + t * kLanes, sum[r][t]);
  }
}

// Scores of some rows over a stretch: row r's of tile t are the 16 numbers at(r, t).
struct Scores {
  float* first;
  std::int64_t row_stride, tile_stride;
  float* at(int row, int tile) const { return first + row * row_stride + tile * tile_stride; }
};

// How scores become weights over a float32 or int8 cache: e^(score - greatest score so far).
template <class Item>
struct PowersOfE {
  static constexpr float kUnit = 1.0f;
  static constexpr bool kHasScales = Tile<Item>::kHasScales;
  const Tile<Item>* tiles;
  Vec scale;
  Scores scores;

  Vec scaled(Vec score, int t) const {
    if (kHasScales) score = mul(score, load(tiles[t].key_scales));
    return mul(score, scale);
  }
  static Vec subtracted(Vec greatest) { return greatest; }
  static Vec power(Vec x) { return exp_negative(x); }
  void store_weight(int r, int t, Vec weight) const {
    store(scores.at(r, t), kHasScales ? mul(weight, load(tiles[t].value_scales)) : weight);
  }
};

// A rule over scores that are capped: cap * tanh(score / cap).
template <class Rule>
struct Capped : Rule {
  Vec cap;

  Capped(const Rule& rule, const AttendTask& task)
      : Rule(rule), cap(splat(task.softcap * Rule::kUnit)) {
    this->scale = splat(task.scale / task.softcap);
  }
  Vec scaled(Vec score, int t) const {
    return mul(hyperbolic_tangent(Rule::scaled(score, t)), cap);
  }
};

// R rows' softmax over tiles [first_tile, last_tile) of one more stretch: passes each weight to the
// rule, and gives each row the correction by which its earlier results are multiplied. sum_lanes:
// the denominators, still in 16 lanes. corrections: 16 numbers, R of them used. R may exceed the
// number of `rows`: results of rows after the last are not used.
template <int R, class Rule>
inline void weights_by_rule(const StretchRows& rows, float* greatest, Vec* sum_lanes,
                            const Scores& scores, const Rule& rule, int first_tile, int last_tile,
                            float* corrections) {
  static const float kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec numbers = load(kLaneNumbers);
  const Vec nothing = splat(-std::numeric_limits<float>::infinity());
  const Visible by_all = rows.seen_by_all();
  Vec largest[R];
  OCTAVO_UNROLL
  for (int r = 0; r < R; ++r) largest[r] = nothing;
  for (int t = first_tile; t < last_tile; ++t) {
    const std::int64_t begin = t * kLanes;
    const bool is_whole = by_all.low <= begin && begin + kLanes <= by_all.high;
    OCTAVO_UNROLL
    for (int r = 0; r < R; ++r) {
      Vec score = rule.scaled(load(scores.at(r, t)), t);
      if (!is_whole) {
        const Visible visible = rows.visible(r);
        const Vec low = splat(static_cast<float>(visible.low - begin));
        const Vec high = splat(static_cast<float>(visible.high - begin));
        score = select_less(numbers, low, nothing, select_less(numbers, high, score, nothing));
      }
      store(scores.at(r, t), score);
      largest[r] = max(largest[r], score);
    }
  }
  const Vec before = load(greatest);
  const Vec now = max(before, rule.subtracted(max_of_each(largest)));
  store(greatest, select_less(numbers, splat(float{R}), now, before));
  // For a row that has seen no token yet, so that weights are exp(-inf) = 0, not exp(-inf + inf).
  // Before a row's first token its result is 0, so any correction is right.
  const Vec least = splat(std::numeric_limits<float>::lowest());
  const Vec base = select_less(now, least, zero(), now);
  store(corrections, rule.power(select_less(before, least, zero(), sub(before, base))));
  float bases[kLanes];
  store(bases, base);
  Vec sums[R];
  OCTAVO_UNROLL
  for (int r = 0; r < R; ++r) sums[r] = zero();
  for (int t = first_tile; t < last_tile; ++t) {
    OCTAVO_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec weight = rule.power(sub(load(scores.at(r, t)), splat(bases[r])));
      sums[r] = add(sums[r], weight);
      rule.store_weight(r, t, weight);
    }
  }
  for (int r = 0; r < R; ++r) sum_lanes[r] = add(mul(sum_lanes[r], splat(corrections[r])), sums[r]);
}

// Not inlined: code between that most models do not run would cost all of them registers.
template <int R, class Rule>
[[gnu::noinline]] void capped_weights(const StretchRows& rows, float* greatest, Vec* sum_lanes,
                                      const Scores& scores, const Rule& rule, int first_tile,
                                      int last_tile, float* corrections) {
  weights_by_rule<R>(rows, greatest, sum_lanes, scores, Capped<Rule>(rule, rows.task), first_tile,
                     last_tile, corrections);
}

template <int R, class Rule>
inline void stretch_weights(const StretchRows& rows, float* greatest, Vec* sum_lanes,
                            const Scores& scores, const Rule& rule, int first_tile, int last_tile,
                            float* corrections) {
  if (rows.task.softcap != 0.0f)
    return capped_weights<R>(rows, greatest, sum_lanes, scores, rule, first_tile, last_tile,
                             corrections);
  weights_by_rule<R>(rows, greatest, sum_lanes, scores, rule, first_tile, last_tile, corrections);
}

// The tiles of a stretch with tokens that are seen.
template <class Item>
struct SeenTiles {
  int first, last;
  Tile<Item> tiles[kStretchTiles];

  SeenTiles(const AttendTask& task, std::int64_t stretch, const Visible& seen)
      : first(static_cast<int>(seen.low / kLanes)),
        last(static_cast<int>((seen.high + kLanes - 1) / kLanes)) {
    for (int t = first; t < last; ++t) tiles[t] = find_tile<Item>(task, stretch + t * kLanes);
  }
};

// Calls score(count, t) for the tiles, as many at a time as make kChains chains with R rows.
template <int R, int kChains, class Score>
inline void each_tiles(int first, int last, Score&& score) {
  int t = first;
  const auto take = [&](auto count) {  // so many at a time, while they last
    if constexpr (count * R <= kChains || count == 1) {
      for (; t + count <= last; t += count) score(count, t);
    }
  };
  take(std::integral_constant<int, 8>{});
  take(std::integral_constant<int, 4>{});
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

// out = out * correction + sum over the seen tokens of weight x value, for R rows and NV vectors of
// the dimensions from `dim` on. weights: [R][kStretch].
template <int R, int NV, class Item>
inline void add_values(AttendState* states, const Tile<Item>* tiles, std::int64_t padded_dim,
                       std::int64_t dim, const float* weights, Visible seen,
                       const float* corrections) {
  Vec acc[R][NV];
  OCTAVO_UNROLL
  for (int r = 0; r < R; ++r) {
    OCTAVO_UNROLL
    for (int n = 0; n < NV; ++n)
      acc[r][n] = mul(load(states[r].out + dim + n * kLanes), splat(corrections[r]));
  }
  for (std::int64_t token = seen.low; token < seen.high;) {
    const std::int64_t tile = token / kLanes;
    const std::int64_t end = (tile + 1) * kLanes < seen.high ? (tile + 1) * kLanes : seen.high;
    const Item* values = tiles[tile].values + (token - tile * kLanes) * padded_dim + dim;
    for (; token < end; ++token, values += padded_dim) {
      Vec value[NV];
      OCTAVO_UNROLL
      for (int n = 0; n < NV; ++n) value[n] = load(values + n * kLanes);
      OCTAVO_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec weight = splat(weights[r * kStretch + token]);
        OCTAVO_UNROLL
        for (int n = 0; n < NV; ++n) acc[r][n] = fma(weight, value[n], acc[r][n]);
      }
    }
  }
  OCTAVO_UNROLL
  for (int r = 0; r < R; ++r) {
    OCTAVO_UNROLL
    for (int n = 0; n < NV; ++n) store(states[r].out + dim + n * kLanes, acc[r][n]);
  }
}

template <int R, class Item>
inline void add_all_values(AttendState* states, const Tile<Item>* tiles, std::int64_t padded_dim,
                           const float* weights, Visible seen, const float* corrections) {
  std::int64_t dim = 0;
  for (; dim + 4 * kLanes <= padded_dim; dim += 4 * kLanes)
    add_values<R, 4>(states, tiles, padded_dim, dim, weights, seen, corrections);
  for (; dim < padded_dim; dim += kLanes)
    add_values<R, 1>(states, tiles, padded_dim, dim, weights, seen, corrections);
}

// R rows over the stretches of the range.
template <int R, class Item>
inline void attend_rows(const AttendTask& task, int first, AttendState* states, float* greatest,
                        Vec* sum_lanes) {
  constexpr int kValueRowsAtOnce = R < kValueRows ? R : kValueRows;
  static_assert(R % kValueRowsAtOnce == 0);
  for (std::int64_t stretch = task.begin; stretch < task.end; stretch += kStretch) {
    const StretchRows rows{task, first, R, stretch};
    const Visible seen = rows.seen_by_any();
    if (seen.low >= seen.high) continue;
    const SeenTiles<Item> in(task, stretch, seen);

    float memory[R * kStretch];
    const Scores scores{memory, kStretch, kLanes};
    each_tiles<R, kScoreChains>(in.first, in.last, [&](auto count, int t) {
      tile_scores<R, count>(task.q + first, in.tiles + t, task.layout.head_dim, scores.at(0, t));
    });
    float corrections[kLanes];
    const PowersOfE<Item> rule{in.tiles, splat(task.scale), scores};
    stretch_weights<R>(rows, greatest, sum_lanes, scores, rule, in.first, in.last, corrections);
    for (int r = 0; r < R; r += kValueRowsAtOnce)
      add_all_values<kValueRowsAtOnce>(states + r, in.tiles, task.layout.padded_dim,
                                       memory + r * kStretch, seen, corrections + r);
  }
}

// For the rows of a task, while it is computed: the greatest score (or the whole number above it),
// and the sum of the weights, still in 16 lanes. A group of rows may load 16 numbers from its first
// on.
struct RowSums {
  float greatest[kMaxAttendRows + kLanes];
  Vec lanes[kMaxAttendRows];

  // rows: those of the task, and the padding rows that are computed with them.
  RowSums(const AttendTask& task, AttendState* states, int rows) {
    for (float& score : greatest) score = -std::numeric_limits<float>::infinity();
    const auto bytes = static_cast<std::size_t>(task.layout.padded_dim) * sizeof(float);
    for (int r = 0; r < rows; ++r) {
      lanes[r] = zero();
      std::memset(states[r].out, 0, bytes);
    }
  }

  void finish(const AttendTask& task, AttendState* states) const {
    for (int r = 0; r < task.rows; ++r) {
      states[r].max = greatest[r];
      states[r].sum = sum_lanes(lanes[r]);
    }
  }
};

#include "cpu/kernels/attention_bf16.h"

// Goes through all rows, a few at a time.
template <class AttendRows>
inline void attend_all(const AttendTask& task, AttendState* states, AttendRows&& attend_rows) {
  RowSums sums(task, states, task.rows);
  int row = 0;
  const auto rows = [&](auto count) {
    if constexpr (count <= kScoreChains) {
      for (; row + count <= task.rows; row += count)
        attend_rows(count, row, states + row, sums.greatest + row, sums.lanes + row);
    }
  };
  rows(std::integral_constant<int, 8>{});
  rows(std::integral_constant<int, 4>{});
  rows(std::integral_constant<int, 3>{});  // a group of three heads, decoding
  rows(std::integral_constant<int, 2>{});
  rows(std::integral_constant<int, 1>{});
  sums.finish(task, states);
}

void attend(const AttendTask& task, AttendState* states) {
  switch (task.layout.dtype) {
    case DType::f32:
      return attend_all(task, states,
                        [&](auto count, int row, AttendState* some, float* greatest, Vec* sums) {
                          attend_rows<count, float>(task, row, some, greatest, sums);
                        });
    case DType::bf16: {
      const PairQueries queries(task);
      return attend_all(task, states,
                        [&](auto count, int row, AttendState* some, float* greatest, Vec* sums) {
                          attend_pairs<count>(task, queries, row, some, greatest, sums);
                        });
    }
    case DType::int8:
      return attend_all(task, states,
                        [&](auto count, int row, AttendState* some, float* greatest, Vec* sums) {
                          attend_rows<count, std::int8_t>(task, row, some, greatest, sums);
                        });
    default:
      break;  // Runtime admits no other
  }
}

inline float first_lane(Vec x) {
  float lane[kLanes];
  store(lane, x);
  return lane[0];
}

void merge(const KvLayout& layout, AttendState& total, const AttendState& part) {
  if (part.sum == 0.0f) return;  // no token of that range was visible
  const float new_max = total.max > part.max ? total.max : part.max;
  const auto power = [&](float x) {
    return layout.has_pairs() ? exp2_negative(splat(x)) : exp_negative(splat(x));
  };
  const Vec old_scale = power(total.max - new_max), part_scale = power(part.max - new_max);
  total.max = new_max;
  total.sum = total.sum * first_lane(old_scale) + part.sum * first_lane(part_scale);
  for (std::int64_t d = 0; d < layout.padded_dim; d += kLanes)
    store(total.out + d,
          add(mul(load(total.out + d), old_scale), mul(load(part.out + d), part_scale)));
}

// Attention of a few query rows over a range of stored tokens: flash-style, a stretch of 128 tokens
// at a time (Dao et al. 2022; online softmax: Milakov & Gimelshein 2018), whose keys lie in tiles
// of 16.
//
// A row's arithmetic depends on its own position and on where tiles, stretches and ranges begin,
// which are absolute multiples of constants; so chunking and company do not change its bits. A
// token that a row does not see, but a row beside it does, has a weight of exactly 0.

// The greatest score of no token.
inline bool is_nothing(float max) { return max == -std::numeric_limits<float>::infinity(); }

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

// One tile of stored tokens, as one KV head sees it. Only int8 ones have scales; else these are
// null.
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
// chains are under way at a time, enough to hide how long each addition takes. Out of line: within
// its caller too few registers are left for the rows' addresses.
template <int R, int T, class Item>
[[gnu::noinline]] void tile_scores(const float* const* q, const Tile<Item>* tiles,
                                   std::int64_t head_dim, float* scores) {
  Vec sum[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) sum[r][t] = zero();
  }
  for (std::int64_t d = 0; d < head_dim; ++d) {
    Vec key[T];
    for (int t = 0; t < T; ++t) key[t] = load(tiles[t].keys + d * kLanes);
    // Few rows: memory sets the pace, and the values come next.
    if constexpr (R < 8) {
      for (int t = 0; t < T; ++t) prefetch(tiles[t].values + d * kLanes);
    }
    for (int r = 0; r < R; ++r) {
      const Vec element = splat(q[r][d]);
      for (int t = 0; t < T; ++t) sum[r][t] = fma(element, key[t], sum[r][t]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) store(scores + r * kStretch + t * kLanes, sum[r][t]);
  }
}

// R rows' softmax over one more stretch: turns scores into weights where they lie, except that what
// all there was before a row shrinks by its correction. sum_lanes: the denominators, still in 16
// lanes. scores: [R][kStretch]; corrections: 16 numbers, R of them used.
template <int R, class Item>
inline void stretch_weights(const AttendTask& task, AttendState* states, Vec* sum_lanes,
                            float* scores, const Tile<Item>* tiles, int num_tiles,
                            const Visible* visible, float* corrections) {
  static const float kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  constexpr bool kHasScales = Tile<Item>::kHasScales;
  const Vec nothing = splat(-std::numeric_limits<float>::infinity());
  const Vec numbers = load(kLaneNumbers);
  Visible by_all = visible[0];
  for (int r = 1; r < R; ++r) {
    by_all.low = visible[r].low > by_all.low ? visible[r].low : by_all.low;
    by_all.high = visible[r].high < by_all.high ? visible[r].high : by_all.high;
  }
  Vec largest[R];
  for (int r = 0; r < R; ++r) largest[r] = nothing;
  for (int t = 0; t < num_tiles; ++t) {
    const std::int64_t begin = t * kLanes;
    const bool is_whole = by_all.low <= begin && begin + kLanes <= by_all.high;
    for (int r = 0; r < R; ++r) {
      float* at = scores + r * kStretch + begin;
      Vec score = load(at);
      if (kHasScales) score = mul(score, load(tiles[t].key_scales));
      score = mul(score, splat(task.scale));
      if (!is_whole) {
        const Vec low = splat(static_cast<float>(visible[r].low - begin));
        const Vec high = splat(static_cast<float>(visible[r].high - begin));
        score = select_less(numbers, low, nothing, select_less(numbers, high, score, nothing));
      }
      store(at, score);
      largest[r] = max(largest[r], score);
    }
  }
  Vec subtracted[R], sums[R];
  for (int r = 0; r < R; ++r) {
    const float before = states[r].max, in_stretch = max_lanes(largest[r]);
    const float now = before > in_stretch ? before : in_stretch;
    states[r].max = now;
    // What there was before a row's first token is 0, whatever it is multiplied by.
    corrections[r] = is_nothing(before) ? 0.0f : before - now;
    // A row that has seen no token yet: its weights are exp(-inf) = 0, not exp(-inf + inf).
    subtracted[r] = splat(is_nothing(now) ? 0.0f : now);
    sums[r] = zero();
  }
  store(corrections, exp_negative(load(corrections)));
  for (int t = 0; t < num_tiles; ++t) {
    for (int r = 0; r < R; ++r) {
      float* at = scores + r * kStretch + t * kLanes;
      const Vec weight = exp_negative(sub(load(at), subtracted[r]));
      sums[r] = add(sums[r], weight);
      store(at, kHasScales ? mul(weight, load(tiles[t].value_scales)) : weight);
    }
  }
  for (int r = 0; r < R; ++r) sum_lanes[r] = add(mul(sum_lanes[r], splat(corrections[r])), sums[r]);
}

// out = out * correction + sum over the seen tokens of weight x value, for R rows and NV vectors of
// the dimensions from `dim` on. weights: [R][kStretch].
template <int R, int NV, class Item>
inline void add_values(AttendState* states, const Tile<Item>* tiles, std::int64_t padded_dim,
                       std::int64_t dim, const float* weights, Visible seen,
                       const float* corrections) {
  Vec acc[R][NV];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < NV; ++n)
      acc[r][n] = mul(load(states[r].out + dim + n * kLanes), splat(corrections[r]));
  }
  for (std::int64_t token = seen.low; token < seen.high;) {
    const std::int64_t tile = token / kLanes;
    const std::int64_t end = (tile + 1) * kLanes < seen.high ? (tile + 1) * kLanes : seen.high;
    const Item* values = tiles[tile].values + (token - tile * kLanes) * padded_dim + dim;
    for (; token < end; ++token, values += padded_dim) {
      Vec value[NV];
      for (int n = 0; n < NV; ++n) value[n] = load(values + n * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec weight = splat(weights[r * kStretch + token]);
        for (int n = 0; n < NV; ++n) acc[r][n] = fma(weight, value[n], acc[r][n]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
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
inline void attend_rows(const AttendTask& task, int first, AttendState* states, Vec* sum_lanes) {
  constexpr int kValueRowsAtOnce = R < kValueRows ? R : kValueRows;
  static_assert(R % kValueRowsAtOnce == 0);
  states += first;
  sum_lanes += first;
  for (std::int64_t stretch = task.begin; stretch < task.end; stretch += kStretch) {
    Visible visible[R], seen = {kStretch, 0};
    for (int r = 0; r < R; ++r) {
      visible[r] = visible_to(task, first + r, stretch);
      if (visible[r].low >= visible[r].high) continue;
      seen.low = visible[r].low < seen.low ? visible[r].low : seen.low;
      seen.high = visible[r].high > seen.high ? visible[r].high : seen.high;
    }
    if (seen.low >= seen.high) continue;
    const int num_tiles = static_cast<int>((seen.high + kLanes - 1) / kLanes);
    Tile<Item> tiles[kStretchTiles];
    for (int t = 0; t < num_tiles; ++t) tiles[t] = find_tile<Item>(task, stretch + t * kLanes);

    float scores[R * kStretch];
    int t = 0;
    const auto score_tiles = [&](auto count) {  // so many at a time, while they last
      if constexpr (count * R <= kScoreChains || count == 1) {
        for (; t + count <= num_tiles; t += count)
          tile_scores<R, count>(task.q + first, tiles + t, task.layout.head_dim,
                                scores + t * kLanes);
      }
    };
    score_tiles(std::integral_constant<int, 8>{});
    score_tiles(std::integral_constant<int, 4>{});
    score_tiles(std::integral_constant<int, 2>{});
    score_tiles(std::integral_constant<int, 1>{});

    float corrections[kLanes] = {};
    stretch_weights<R>(task, states, sum_lanes, scores, tiles, num_tiles, visible, corrections);
    for (int r = 0; r < R; r += kValueRowsAtOnce)
      add_all_values<kValueRowsAtOnce>(states + r, tiles, task.layout.padded_dim,
                                       scores + r * kStretch, seen, corrections + r);
  }
}

template <class Item>
inline void attend_format(const AttendTask& task, AttendState* states) {
  const KvLayout& layout = task.layout;
  Vec sum_lane[kMaxAttendRows];
  for (int r = 0; r < task.rows; ++r) {
    states[r].max = -std::numeric_limits<float>::infinity();
    sum_lane[r] = zero();
    std::memset(states[r].out, 0, static_cast<std::size_t>(layout.padded_dim) * sizeof(float));
  }
  int row = 0;
  const auto rows = [&](auto count) {
    if constexpr (count <= kScoreChains) {
      for (; row + count <= task.rows; row += count)
        attend_rows<count, Item>(task, row, states, sum_lane);
    }
  };
  rows(std::integral_constant<int, 8>{});
  rows(std::integral_constant<int, 4>{});
  rows(std::integral_constant<int, 3>{});  // a group of three heads, decoding
  rows(std::integral_constant<int, 2>{});
  rows(std::integral_constant<int, 1>{});
  for (int r = 0; r < task.rows; ++r) states[r].sum = sum_lanes(sum_lane[r]);
}

void attend(const AttendTask& task, AttendState* states) {
  switch (task.layout.dtype) {
    case DType::f32:
      return attend_format<float>(task, states);
    case DType::bf16:
      return attend_format<std::uint16_t>(task, states);
    case DType::int8:
      return attend_format<std::int8_t>(task, states);
    default:
      break;  // Runtime admits no other
  }
}

void merge(AttendState& total, const AttendState& part, std::int64_t padded_dim) {
  if (part.sum == 0.0f) return;  // no token of that range was visible
  const float new_max = total.max > part.max ? total.max : part.max;
  const float old_scale = exp_negative(total.max - new_max);
  const float part_scale = exp_negative(part.max - new_max);
  total.max = new_max;
  total.sum = total.sum * old_scale + part.sum * part_scale;
  for (std::int64_t d = 0; d < padded_dim; ++d)
    total.out[d] = total.out[d] * old_scale + part.out[d] * part_scale;
}

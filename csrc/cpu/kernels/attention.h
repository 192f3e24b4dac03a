// Attention of a few query rows over a range of stored tokens: flash-style, a tile of 16 tokens at
// a time (Dao et al. 2022; online softmax: Milakov & Gimelshein 2018).
//
// A row's arithmetic depends on its own position and on where tiles and ranges begin, which are
// absolute multiples of constants; so chunking and company do not change its bits.

constexpr std::int64_t kScoreStride = kScoreChains * kLanes;  // between rows of scores

// The range of a row's tokens within a tile, as lanes [low, high).
struct Visible {
  std::int64_t low, high;
};

inline Visible visible_lanes(const AttendTask& task, int row, std::int64_t tile) {
  const std::int64_t position = task.position[row];
  std::int64_t low = task.window > 0 ? position - task.window + 1 - tile : 0;
  std::int64_t high = position + 1 - tile;
  if (tile + high > task.end) high = task.end - tile;
  low = low < 0 ? 0 : low;
  high = high > kLanes ? kLanes : high;
  return {low, high};
}

// One tile of stored tokens, as one KV head sees it. The scales are null unless they are int8.
template <class Item>
struct Tile {
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
  if (layout.dtype == DType::int8)
    scales = reinterpret_cast<const float*>(head + layout.scales_at()) + within;
  return {items + layout.key_item(within, 0), items + layout.value_item(within, 0), scales,
          scales ? scales + layout.block_size : nullptr};
}

// Scores of R query rows against the keys of T tiles: one chain over the dimensions a key. R x T
// chains are under way at a time, enough to hide how long each addition takes.
template <int R, int T, class Item>
inline void tile_scores(const float* const* q, const Tile<Item>* tiles, std::int64_t head_dim,
                        float* scores) {
  Vec sum[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) sum[r][t] = zero();
  }
  for (std::int64_t d = 0; d < head_dim; ++d) {
    Vec key[T];
    for (int t = 0; t < T; ++t) key[t] = load(tiles[t].keys + d * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec element = splat(q[r][d]);
      for (int t = 0; t < T; ++t) sum[r][t] = fma(element, key[t], sum[r][t]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) store(scores + r * kScoreStride + t * kLanes, sum[r][t]);
  }
}

// out = out * correction + sum over the visible tokens of weight x value, for R rows that see the
// same tokens of a tile. weights: [R][16].
template <int R, int NV, class Item>
inline void add_values(float* const* out, const Item* values, std::int64_t padded_dim,
                       const float* weights, Visible visible, const float* corrections) {
  Vec acc[R][NV];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < NV; ++n) acc[r][n] = mul(load(out[r] + n * kLanes), splat(corrections[r]));
  }
  for (std::int64_t t = visible.low; t < visible.high; ++t) {
    Vec value[NV];
    for (int n = 0; n < NV; ++n) value[n] = load(values + t * padded_dim + n * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec weight = splat(weights[r * kLanes + t]);
      for (int n = 0; n < NV; ++n) acc[r][n] = fma(weight, value[n], acc[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < NV; ++n) store(out[r] + n * kLanes, acc[r][n]);
  }
}

template <int R, class Item>
inline void add_all_values(AttendState* states, const Item* values, std::int64_t padded_dim,
                           const float* weights, Visible visible, const float* corrections) {
  float* out[R];
  for (std::int64_t d = 0; d < padded_dim;) {
    for (int r = 0; r < R; ++r) out[r] = states[r].out + d;
    if (d + 4 * kLanes <= padded_dim) {
      add_values<R, 4>(out, values + d, padded_dim, weights, visible, corrections);
      d += 4 * kLanes;
    } else {
      add_values<R, 1>(out, values + d, padded_dim, weights, visible, corrections);
      d += kLanes;
    }
  }
}

// A row's softmax over one more tile: its weights, and by what all there was before shrinks.
// sum_lane: the denominator, still in 16 lanes.
template <class Item>
inline float tile_weights(const AttendTask& task, AttendState& state, Vec& sum_lane,
                          const float* scores, const Tile<Item>& tile, Visible visible,
                          float* weights) {
  Vec score = load(scores);
  if (tile.key_scales) score = mul(score, load(tile.key_scales));
  score = mul(score, splat(task.scale));
  if (visible.low > 0 || visible.high < kLanes) {
    float lane[16];
    store(lane, score);
    for (std::int64_t t = 0; t < kLanes; ++t) {
      if (t < visible.low || t >= visible.high) lane[t] = -std::numeric_limits<float>::infinity();
    }
    score = load(lane);
  }
  const float tile_max = max_lanes(score);
  const float new_max = state.max > tile_max ? state.max : tile_max;
  // A first tile finds the maximum at minus infinity: e^-inf is 0, and so is all there was.
  const float correction = new_max == state.max ? 1.0f : exp_negative(state.max - new_max);
  const Vec weight = exp_negative(sub(score, splat(new_max)));
  sum_lane = add(mul(sum_lane, splat(correction)), weight);
  state.max = new_max;
  store(weights, tile.value_scales ? mul(weight, load(tile.value_scales)) : weight);
  return correction;
}

// Takes one tile into the states of R rows.
template <int R, class Item>
inline void attend_tile(const AttendTask& task, int first, AttendState* states, Vec* sum_lanes,
                        const float* scores, const Tile<Item>& tile, std::int64_t token) {
  const std::int64_t padded_dim = task.layout.padded_dim;
  float weights[R * kLanes], corrections[R];
  Visible visible[R];
  bool all_alike = true;
  for (int r = 0; r < R; ++r) {
    visible[r] = visible_lanes(task, first + r, token);
    all_alike = all_alike && visible[r].low == visible[0].low && visible[r].high == visible[0].high;
    if (visible[r].low < visible[r].high) {
      corrections[r] =
          tile_weights(task, states[first + r], sum_lanes[first + r], scores + r * kScoreStride,
                       tile, visible[r], weights + r * kLanes);
    }
  }
  if (all_alike) {
    if (visible[0].low >= visible[0].high) return;
    add_all_values<R>(states + first, tile.values, padded_dim, weights, visible[0], corrections);
    return;
  }
  for (int r = 0; r < R; ++r) {
    if (visible[r].low >= visible[r].high) continue;
    add_all_values<1>(states + first + r, tile.values, padded_dim, weights + r * kLanes, visible[r],
                      corrections + r);
  }
}

// R rows over the tiles of the range, T tiles' scores at a time.
template <int R, class Item>
inline void attend_rows(const AttendTask& task, int first, AttendState* states, Vec* sum_lanes) {
  constexpr int T = kScoreChains / R;
  constexpr int kValueRowsAtOnce = R < kValueRows ? R : kValueRows;
  for (std::int64_t token = task.begin; token < task.end;) {
    float scores[R * kScoreStride];
    Tile<Item> tiles[T];
    int num_tiles = 0;
    for (std::int64_t at = token; at < task.end && num_tiles < T; at += kLanes)
      tiles[num_tiles++] = find_tile<Item>(task, at);
    if (num_tiles == T) {
      tile_scores<R, T>(task.q + first, tiles, task.layout.head_dim, scores);
    } else {
      for (int t = 0; t < num_tiles; ++t)
        tile_scores<R, 1>(task.q + first, tiles + t, task.layout.head_dim, scores + t * kLanes);
    }
    for (int t = 0; t < num_tiles; ++t, token += kLanes) {
      for (int r = 0; r < R; r += kValueRowsAtOnce)
        attend_tile<kValueRowsAtOnce>(task, first + r, states, sum_lanes,
                                      scores + r * kScoreStride + t * kLanes, tiles[t], token);
    }
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

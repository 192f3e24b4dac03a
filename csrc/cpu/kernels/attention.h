// Attention of a few query rows over a range of stored tokens: flash-style, a tile of 16 tokens at
// a time (Dao et al. 2022; online softmax: Milakov & Gimelshein 2018).
//
// A row's arithmetic depends on its own position and on where tiles and ranges begin, which are
// absolute multiples of constants; so chunking and company do not change its bits.

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

// Scores of R query rows against the 16 keys of a tile: one chain over the dimensions a key.
template <int R, class Item>
inline void tile_scores(const float* const* q, const Item* keys, std::int64_t head_dim,
                        float* scores) {
  Vec sum[R];
  for (int r = 0; r < R; ++r) sum[r] = zero();
  for (std::int64_t d = 0; d < head_dim; ++d) {
    const Vec key = load(keys + d * kLanes);
    for (int r = 0; r < R; ++r) sum[r] = fma(splat(q[r][d]), key, sum[r]);
  }
  for (int r = 0; r < R; ++r) store(scores + r * kLanes, sum[r]);
}

// out = out * correction + sum over the visible tokens of weight x value.
template <int NV, class Item>
inline void add_values(float* out, const Item* values, std::int64_t padded_dim,
                       const float* weights, Visible visible, Vec correction) {
  Vec acc[NV];
  for (int n = 0; n < NV; ++n) acc[n] = mul(load(out + n * kLanes), correction);
  for (std::int64_t t = visible.low; t < visible.high; ++t) {
    const Vec weight = splat(weights[t]);
    for (int n = 0; n < NV; ++n)
      acc[n] = fma(weight, load(values + t * padded_dim + n * kLanes), acc[n]);
  }
  for (int n = 0; n < NV; ++n) store(out + n * kLanes, acc[n]);
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

// Takes one tile into a row's state. sum_lane: the denominator, still in 16 lanes.
template <class Item>
inline void attend_tile(const AttendTask& task, AttendState& state, Vec& sum_lane,
                        const float* scores, const Tile<Item>& tile, Visible visible) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  float masked[16];
  for (std::int64_t t = 0; t < kLanes; ++t) {
    const bool is_visible = visible.low <= t && t < visible.high;
    const float score = tile.key_scales ? scores[t] * tile.key_scales[t] : scores[t];
    masked[t] = is_visible ? score * task.scale : kHidden;
  }
  const Vec score = load(masked);
  const float tile_max = max_lanes(score);
  const float new_max = state.max > tile_max ? state.max : tile_max;
  // A first tile finds the maximum at minus infinity: e^-inf is 0, and so is all there was.
  const Vec correction = exp_negative(splat(state.max - new_max));
  const Vec weight = exp_negative(sub(score, splat(new_max)));
  sum_lane = add(mul(sum_lane, correction), weight);
  state.max = new_max;
  float weights[16];
  store(weights, tile.value_scales ? mul(weight, load(tile.value_scales)) : weight);
  const std::int64_t padded = task.layout.padded_dim;
  std::int64_t d = 0;
  for (; d + 4 * kLanes <= padded; d += 4 * kLanes)
    add_values<4>(state.out + d, tile.values + d, padded, weights, visible, correction);
  for (; d < padded; d += kLanes)
    add_values<1>(state.out + d, tile.values + d, padded, weights, visible, correction);
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
  for (std::int64_t token = task.begin; token < task.end; token += kLanes) {
    const Tile<Item> tile = find_tile<Item>(task, token);
    for (int first = 0; first < task.rows; first += kScoreRows) {
      float scores[kScoreRows * kLanes];
      const int rows = task.rows - first < kScoreRows ? task.rows - first : kScoreRows;
      if (rows == kScoreRows) {
        tile_scores<kScoreRows>(task.q + first, tile.keys, layout.head_dim, scores);
      } else {
        for (int r = 0; r < rows; ++r)
          tile_scores<1>(task.q + first + r, tile.keys, layout.head_dim, scores + r * kLanes);
      }
      for (int r = 0; r < rows; ++r) {
        const Visible visible = visible_lanes(task, first + r, token);
        if (visible.low >= visible.high) continue;
        attend_tile(task, states[first + r], sum_lane[first + r], scores + r * kLanes, tile,
                    visible);
      }
    }
  }
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

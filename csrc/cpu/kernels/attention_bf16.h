// Attention over a bf16 cache: both products are of bf16 numbers, two in each 32-bit word
// (kernels.h has the layout), in the order that the instruction set has for bf16 (linear_float.h):
// pairs of dimensions for scores, pairs of tokens for values, 32 numbers of either at a time.

constexpr std::int64_t kPairWords = kDepthBlock / 2;  // of 32 numbers

#if defined(OCTAVO_BF16_DOT)

// The factor of a word: two bf16 numbers.
using Pair = std::uint32_t;
constexpr int kPairChains = kScoreChains, kPairRows = kValueRows;
template <int R>
constexpr int kPairVectors = 4;

inline void store_pairs(Pair* to, Vec x) {  // 16 numbers
  store_bf16(reinterpret_cast<std::uint16_t*>(to), x);
}

// sums[r][n] += products of x[r][first .. last - 1] with the words get(index, n), within 16 words
// that begin at a multiple of 16. sums: R rows of N vectors in memory, sum(r) + 16 n. ahead(index,
// n) prefetches what is needed later.
template <int R, int N, class Sum, class Get, class Prefetch>
inline void add_pair_products(Sum&& sum, const Pair* x, std::int64_t x_stride, std::int64_t first,
                              std::int64_t last, Get&& get, Prefetch&& ahead) {
  Vec sums[R][N];
  OCTAVO_UNROLL
  for (int r = 0; r < R; ++r) {
    OCTAVO_UNROLL
    for (int n = 0; n < N; ++n) sums[r][n] = load(sum(r) + n * kLanes);
  }
  for (std::int64_t i = first; i < last; ++i) {
    Words words[N];
    OCTAVO_UNROLL
    for (int n = 0; n < N; ++n) {
      ahead(i, n);
      words[n] = get(i, n);
    }
    OCTAVO_UNROLL
    for (int r = 0; r < R; ++r) {
      const Words pair = splat_word(x[r * x_stride + i]);
      OCTAVO_UNROLL
      for (int n = 0; n < N; ++n) sums[r][n] = dot_bf16(sums[r][n], pair, words[n]);
    }
  }
  OCTAVO_UNROLL
  for (int r = 0; r < R; ++r) {
    OCTAVO_UNROLL
    for (int n = 0; n < N; ++n) store(sum(r) + n * kLanes, sums[r][n]);
  }
}

#else

struct Pair {
  float even, odd;
};
// Rows x vectors of sums under way at a time: those of even or of odd numbers alone.
constexpr int kPairChains = kPairSums, kPairRows = kPairSums < 4 ? kPairSums : 4;
template <int R>
constexpr int kPairVectors = 4 * R <= kPairSums   ? 4
                             : 2 * R <= kPairSums ? 2
                                                  : 1;

inline void store_pairs(Pair* to, Vec x) { store(&to->even, round_to_bf16(x)); }

// sums[r][n] = the products of one half of the words, even or odd numbers, in order from zero.
template <bool odd, int R, int N, class Get, class Prefetch>
inline void multiply_halves(Vec (&sums)[R][N], const Pair* x, std::int64_t x_stride,
                            std::int64_t first, std::int64_t last, Get&& get, Prefetch&& ahead) {
  OCTAVO_UNROLL
  for (int r = 0; r < R; ++r) {
    OCTAVO_UNROLL
    for (int n = 0; n < N; ++n) sums[r][n] = zero();
  }
  for (std::int64_t i = first; i < last; ++i) {
    Vec halves[N];
    OCTAVO_UNROLL
    for (int n = 0; n < N; ++n) {
      if (!odd) ahead(i, n);
      const Words words = get(i, n);
      halves[n] = as_floats(odd ? clear_low_half(words) : shift_left<16>(words));
    }
    OCTAVO_UNROLL
    for (int r = 0; r < R; ++r) {
      const Pair& pair = x[r * x_stride + i];
      const Vec factor = splat(odd ? pair.odd : pair.even);
      OCTAVO_UNROLL
      for (int n = 0; n < N; ++n) sums[r][n] = fma(factor, halves[n], sums[r][n]);
    }
  }
}

// Even numbers first, then odd ones, so that the sums of more rows fit the registers: a word is
// read twice, but widened once for more rows.
template <int R, int N, class Sum, class Get, class Prefetch>
inline void add_pair_products(Sum&& sum, const Pair* x, std::int64_t x_stride, std::int64_t first,
                              std::int64_t last, Get&& get, Prefetch&& ahead) {
  for (std::int64_t block = first / kPairWords * kPairWords; block < last; block += kPairWords) {
    const std::int64_t begin = block < first ? first : block;
    const std::int64_t end = block + kPairWords < last ? block + kPairWords : last;
    Vec even[R][N], odd[R][N];
    multiply_halves<false>(even, x, x_stride, begin, end, get, ahead);
    multiply_halves<true>(odd, x, x_stride, begin, end, get, ahead);
    OCTAVO_UNROLL
    for (int r = 0; r < R; ++r) {
      OCTAVO_UNROLL
      for (int n = 0; n < N; ++n) {
        float* at = sum(r) + n * kLanes;
        store(at, add(load(at), add(even[r][n], odd[r][n])));
      }
    }
  }
}

#endif

// A task's queries, rounded to bf16.
class PairQueries {
 public:
  explicit PairQueries(const AttendTask& task) : stride_(task.layout.padded_dim / 2) {
    static thread_local std::vector<Pair> memory;
    const auto count = static_cast<std::size_t>(task.rows * stride_);
    if (memory.size() < count) memory.resize(count);
    pairs_ = memory.data();
    if (task.goes_on) return;
    const std::int64_t dims = task.layout.head_dim;
    for (int r = 0; r < task.rows; ++r) {
      Pair* row = memory.data() + r * stride_;
      for (std::int64_t d = 0; d < dims; d += kLanes) {
        const std::int64_t left = dims - d;
        store_pairs(row + d / 2,
                    left >= kLanes ? load(task.q[r] + d) : load_tail(task.q[r] + d, left, 0.0f));
      }
    }
  }
  const Pair* row(int r) const { return pairs_ + r * stride_; }
  std::int64_t stride() const { return stride_; }

 private:
  const Pair* pairs_;
  std::int64_t stride_;
};

using PairTile = Tile<std::uint16_t>;

inline const std::uint32_t* as_words(const std::uint16_t* items) {
  return reinterpret_cast<const std::uint32_t*>(items);
}

// Below so many rows of a task memory limits the speed, and all is prefetched. Where more rows pass
// over a stretch it is in a cache already.
constexpr int kFewAttendRows = 8;

// As tile_scores.
template <int R, bool few, int T>
[[gnu::noinline]] void pair_scores(const Pair* q, std::int64_t q_stride, std::int64_t key_words,
                                   const PairTile* tiles, const Scores& scores, int tile) {
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) store(scores.at(r, tile + t), zero());
  }
  const std::uint32_t* keys[T];
  for (int t = 0; t < T; ++t) keys[t] = as_words(tiles[tile + t].keys);
  const auto get = [&](std::int64_t i, int t) { return load_words(keys[t] + i * kLanes); };
  const auto ahead = [&](std::int64_t i, int t) {  // the values are needed next
    if constexpr (few) prefetch(as_words(tiles[tile + t].values) + i * kLanes);
  };
  add_pair_products<R, T>([&](int r) { return scores.at(r, tile); }, q, q_stride, 0, key_words, get,
                          ahead);
}

// How scores become weights over a bf16 cache: 2^(score - a whole number), rounded to bf16.
template <class Store>
struct PowersOfTwo {
  static constexpr float kUnit = 1.44269504088896341f;  // log2(e)
  Vec scale;                                            // that makes scores powers of two
  Store keeper;  // keeper(r, t, weight) stores 16 weights, rounded

  Vec scaled(Vec score, int) const { return mul(score, scale); }
  static Vec subtracted(Vec greatest) { return sub(zero(), floor(sub(zero(), greatest))); }
  static Vec power(Vec x) { return exp2_negative(x); }
  void store_weight(int r, int t, Vec weight) const { keeper(r, t, weight); }
};
template <class Store>
PowersOfTwo(Vec, Store) -> PowersOfTwo<Store>;

inline Vec power_scale(const AttendTask& task) { return splat(task.scale * 1.44269504088896341f); }

// Multiplies earlier results by the corrections for a larger greatest score. Most often there is
// nothing to do: only whole numbers are subtracted, and they seldom change.
inline void correct_values(const AttendTask& task, AttendState& state, float correction) {
  if (correction == 1.0f) return;
  for (std::int64_t d = 0; d < task.layout.padded_dim; d += kLanes)
    store(state.out + d, mul(load(state.out + d), splat(correction)));
}

// The words of a stretch with tokens that are seen, and which halves: the value of a token that no
// row sees may be any bits.
struct SeenWords {
  std::int64_t first, last, first_whole, last_whole;
  std::uint32_t first_mask, last_mask;

  explicit SeenWords(const Visible& seen)
      : first(seen.low / 2),
        last((seen.high + 1) / 2),
        first_whole((seen.low + 1) / 2),
        last_whole(seen.high / 2),
        first_mask(seen.low % 2 ? 0xffff0000u : ~0u),
        last_mask(seen.high % 2 ? 0x0000ffffu : ~0u) {}

  bool is_whole(std::int64_t begin, std::int64_t end) const {
    return first_whole <= begin && end <= last_whole;
  }
  std::uint32_t mask(std::int64_t word) const {
    return (word == first ? first_mask : ~0u) & (word == last - 1 ? last_mask : ~0u);
  }
};

// The keys of the tiles that come after a stretch, as far as there are tokens.
struct NextKeys {
  const std::uint32_t* words[kStretchTiles];

  NextKeys(const AttendTask& task, std::int64_t stretch, const PairTile* tiles) {
    for (int t = 0; t < kStretchTiles; ++t) {
      const std::int64_t token = stretch + kStretch + t * kLanes;
      const bool is_there = token <= task.position[task.rows - 1];
      words[t] = as_words(is_there ? find_tile<std::uint16_t>(task, token).keys : tiles[0].keys);
    }
  }
};

// Adds weight x value of the seen tokens, for R rows and N vectors of dimensions from dim on.
// next: null, or what to prefetch.
template <int R, bool few, int N>
inline void add_pair_values(AttendState* states, const PairTile* tiles, const NextKeys* next,
                            std::int64_t padded_dim, std::int64_t dim, const Pair* weights,
                            const SeenWords& seen) {
  constexpr std::int64_t kTileWords = kLanes / 2, kStride = kStretch / 2;
  const auto words_at = [&](std::int64_t i, int n) {
    const std::uint32_t* values = as_words(tiles[i / kTileWords].values);
    return load_words(values + i % kTileWords * padded_dim + dim + n * kLanes);
  };
  const auto masked = [&](std::int64_t i, int n) {
    return and_words(words_at(i, n), splat_word(seen.mask(i)));
  };
  // A tile has as many words of keys as of values.
  const auto ahead = [&](std::int64_t i, int n) {
    if constexpr (few)
      prefetch(next->words[i / kTileWords] + i % kTileWords * padded_dim + dim + n * kLanes);
  };
  const auto sum = [&](int r) { return states[r].out + dim; };
  for (std::int64_t i = seen.first; i < seen.last;) {
    std::int64_t end = (i / kPairWords + 1) * kPairWords;
    end = end < seen.last ? end : seen.last;
    if (seen.is_whole(i, end))
      add_pair_products<R, N>(sum, weights, kStride, i, end, words_at, ahead);
    else
      add_pair_products<R, N>(sum, weights, kStride, i, end, masked, ahead);
    i = end;
  }
}

// R rows over the stretches of the range.
template <int R, bool few>
inline void attend_pair_rows(const AttendTask& task, const PairQueries& queries, int first,
                             AttendState* states, float* greatest, Vec* sum_lanes) {
  constexpr int kRowsAtOnce = R < kPairRows ? R : kPairRows;
  constexpr int kVectors = kPairVectors<kRowsAtOnce>;
  const std::int64_t padded_dim = task.layout.padded_dim;
  for (std::int64_t stretch = task.begin; stretch < task.end; stretch += kStretch) {
    const StretchRows rows{task, first, R, stretch};
    const Visible seen = rows.seen_by_any();
    if (seen.low >= seen.high) continue;
    const SeenTiles<std::uint16_t> in(task, stretch, seen);

    float memory[R * kStretch];
    const Scores scores{memory, kStretch, kLanes};
    each_tiles<R, kPairChains>(in.first, in.last, [&](auto count, int t) {
      pair_scores<R, few, count>(queries.row(first), queries.stride(), task.layout.key_dim / 2,
                                 in.tiles, scores, t);
    });
    Pair weights[R * kStretch / 2];
    const auto keep = [&](int r, int t, Vec weight) {
      store_pairs(weights + (r * kStretch + t * kLanes) / 2, weight);
    };
    float corrections[kLanes];
    const PowersOfTwo rule{power_scale(task), keep};
    stretch_weights<R>(rows, greatest, sum_lanes, scores, rule, in.first, in.last, corrections);
    const SeenWords words(seen);
    std::optional<NextKeys> next;
    if constexpr (few) next.emplace(task, stretch, in.tiles + in.first);
    for (int r = 0; r < R; ++r) correct_values(task, states[r], corrections[r]);
    for (int r = 0; r < R; r += kRowsAtOnce) {
      const auto add_values = [&](auto count, std::int64_t dim) {
        add_pair_values<kRowsAtOnce, few, count>(states + r, in.tiles, few ? &*next : nullptr,
                                                 padded_dim, dim, weights + r * kStretch / 2,
                                                 words);
      };
      std::int64_t dim = 0;
      for (; dim + kVectors * kLanes <= padded_dim; dim += kVectors * kLanes)
        add_values(std::integral_constant<int, kVectors>{}, dim);
      for (; dim < padded_dim; dim += kLanes) add_values(std::integral_constant<int, 1>{}, dim);
    }
  }
}

template <int R>
inline void attend_pairs(const AttendTask& task, const PairQueries& queries, int first,
                         AttendState* states, float* greatest, Vec* sum_lanes) {
  if constexpr (R < kFewAttendRows) {
    if (task.rows < kFewAttendRows)
      return attend_pair_rows<R, true>(task, queries, first, states, greatest, sum_lanes);
  }
  attend_pair_rows<R, false>(task, queries, first, states, greatest, sum_lanes);
}

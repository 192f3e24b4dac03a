// Products with float32 and bfloat16 weights, by fused multiply-adds.
//
// Within each 32 inputs, those with even and those with odd index are summed apart, in order from
// zero; the two sums are added, and the result is added to the output so far. This is the order of
// AMX's TDPBF16PS, so that a tile kernel gives the same bits.

// Two inputs' weights of one panel.
struct PairsF32 {
  static constexpr int kInputsPerWord = 1;
  static void load_pair(const std::uint32_t* p, Vec& even, Vec& odd) {
    even = load(reinterpret_cast<const float*>(p));
    odd = load(reinterpret_cast<const float*>(p) + 16);
  }
  static void prefetch_pair(const std::uint32_t* p) {
    prefetch(p);
    prefetch(p + kLanes);
  }
};

struct PairsBf16 {
  static constexpr int kInputsPerWord = 2;
  static void load_pair(const std::uint32_t* p, Vec& even, Vec& odd) {
    const Words words = load_words(p);
    even = as_floats(shift_left<16>(words));
    odd = as_floats(clear_low_half(words));
  }
  static void prefetch_pair(const std::uint32_t* p) { prefetch(p); }
};

// The fewest chunks, about as long as each other.
inline std::int64_t next_float_chunk(const LinearTask& task, std::int64_t first) {
  const std::int64_t blocks = task.depth / kDepthBlock;
  const std::int64_t chunks = (task.depth + kDepthChunk - 1) / kDepthChunk;
  return first + (blocks + chunks - 1) / chunks * kDepthBlock;
}

template <class Pairs>
struct FloatFormat {
  static constexpr int kTileRows = kRows, kTilePanels = kPanels, kTilePanelsOneRow = kPanelsOneRow;

  explicit FloatFormat(const LinearTask&) {}

  static std::int64_t next_chunk(const LinearTask& task, std::int64_t first) {
    return next_float_chunk(task, first);
  }

  // The inputs of a block, of MR rows and NR panels.
  template <int MR, int NR>
  struct Block {
    const float* x;
    const std::uint32_t* weight;
    std::int64_t x_stride, panel_words;
    Ahead ahead;

    // Calls sums(at, even, odd), at: a place in [MR][NR][16], with the sums of products of inputs k
    // to k + 31, in order from zero: of even and of odd ones, or of one kind, the other zero.
    template <bool with_even, bool with_odd, class Sums>
    void multiply(std::int64_t k, Sums&& sums) const {
      Vec even[MR][NR], odd[MR][NR];
      OCTAVO_UNROLL
      for (int m = 0; m < MR; ++m) {
        OCTAVO_UNROLL
        for (int n = 0; n < NR; ++n) {
          even[m][n] = zero();
          odd[m][n] = zero();
        }
      }
      for (std::int64_t i = k; i < k + kDepthBlock; i += 2) {
        Vec weight_even[NR], weight_odd[NR];
        OCTAVO_UNROLL
        for (int n = 0; n < NR; ++n) {
          const std::int64_t at = i / Pairs::kInputsPerWord * kLanes;
          const std::uint32_t* pair = weight + n * panel_words + at;
          if (with_even) Pairs::prefetch_pair(pair + ahead.from(at));
          Pairs::load_pair(pair, weight_even[n], weight_odd[n]);
        }
        OCTAVO_UNROLL
        for (int m = 0; m < MR; ++m) {
          const float* pair = x + m * x_stride + i;
          OCTAVO_UNROLL
          for (int n = 0; n < NR; ++n) {
            if (with_even) even[m][n] = fma(splat(pair[0]), weight_even[n], even[m][n]);
            if (with_odd) odd[m][n] = fma(splat(pair[1]), weight_odd[n], odd[m][n]);
          }
        }
      }
      OCTAVO_UNROLL
      for (int m = 0; m < MR; ++m) {
        OCTAVO_UNROLL
        for (int n = 0; n < NR; ++n) sums((m * NR + n) * kLanes, even[m][n], odd[m][n]);
      }
    }
  };

  // Adds inputs [first, last) to acc, [MR][NR][16]: in memory, since even and odd sums fill the
  // registers. Where both are too many for them, odd ones go through the block after the even ones.
  template <int MR, int NR>
  static void accumulate(const LinearTask& task, std::int64_t row, std::int64_t panel,
                         std::int64_t first, std::int64_t last, float* acc) {
    const std::int64_t panel_words = task.depth / Pairs::kInputsPerWord * kLanes;
    const Block<MR, NR> block{static_cast<const float*>(task.x) + row * task.x_stride,
                              task.weight + panel * panel_words, task.x_stride, panel_words,
                              Ahead(kWordsAhead, panel_words, NR)};
    for (std::int64_t k = first; k < last; k += kDepthBlock) {
      if constexpr (2 * MR * NR * kRegistersOfVec <= kNumRegisters - 6) {
        block.template multiply<true, true>(k, [&](int at, Vec even, Vec odd) {
          store(acc + at, add(load(acc + at), add(even, odd)));
        });
      } else {
        alignas(64) float evens[MR * NR * kLanes];
        block.template multiply<true, false>(
            k, [&](int at, Vec even, Vec) { store(evens + at, even); });
        // Without this the compiler keeps them in registers, and some of the odd sums in memory.
        asm volatile("" : : : "memory");
        block.template multiply<false, true>(k, [&](int at, Vec, Vec odd) {
          store(acc + at, add(load(acc + at), add(load(evens + at), odd)));
        });
      }
    }
  }

  static Vec finish(const LinearTask&, Vec sum, std::int64_t, std::int64_t) { return sum; }
};

inline void prepare_f32(float* to, const float* x, std::int64_t inputs, std::int64_t depth) {
  std::memcpy(to, x, static_cast<std::size_t>(inputs) * sizeof *x);
  for (std::int64_t i = inputs; i < depth; ++i) to[i] = 0.0f;
}

// ---- bfloat16 ----

#if defined(OCTAVO_BF16_DOT)
// With VDPBF16PS each word's odd product is added first, then the even one, in one chain through
// all inputs. This is twice as fast as fused multiply-adds, but another order: these are the only
// sums that differ (in rounding) between instruction sets. A row still has the same bits in every
// tile.
struct FormatBf16 {
  static constexpr int kTileRows = kDotRowsOnePass, kTilePanels = kDotPanels,
                       kTilePanelsOneRow = kPanelsOneRow;

  explicit FormatBf16(const LinearTask&) {}

  static std::int64_t next_chunk(const LinearTask& task, std::int64_t first) {
    return next_float_chunk(task, first);
  }

  template <int MR, int NR>
  static void accumulate(const LinearTask& task, std::int64_t row, std::int64_t panel,
                         std::int64_t first, std::int64_t last, float* acc) {
    const std::int64_t x_stride = task.x_stride, panel_words = task.depth / 2 * kLanes;
    const auto* x = static_cast<const std::uint32_t*>(task.x) + row * x_stride;
    const std::uint32_t* weight = task.weight + panel * panel_words;
    const Ahead ahead(kWordsAhead, panel_words, NR);
    Vec sum[MR][NR];
    OCTAVO_UNROLL
    for (int m = 0; m < MR; ++m) {
      OCTAVO_UNROLL
      for (int n = 0; n < NR; ++n) sum[m][n] = load(acc + (m * NR + n) * kLanes);
    }
    for (std::int64_t i = first / 2; i < last / 2; ++i) {
      const std::uint32_t* words = weight + i * kLanes;
      Words pairs[NR];
      OCTAVO_UNROLL
      for (int n = 0; n < NR; ++n) {
        prefetch(words + n * panel_words + ahead.from(i * kLanes));
        pairs[n] = load_words(words + n * panel_words);
      }
      OCTAVO_UNROLL
      for (int m = 0; m < MR; ++m) {
        const Words x_pair = splat_word(x[m * x_stride + i]);
        OCTAVO_UNROLL
        for (int n = 0; n < NR; ++n) sum[m][n] = dot_bf16(sum[m][n], x_pair, pairs[n]);
      }
    }
    OCTAVO_UNROLL
    for (int m = 0; m < MR; ++m) {
      OCTAVO_UNROLL
      for (int n = 0; n < NR; ++n) store(acc + (m * NR + n) * kLanes, sum[m][n]);
    }
  }

  static Vec finish(const LinearTask&, Vec sum, std::int64_t, std::int64_t) { return sum; }
};

inline void prepare_bf16(void* to, const float* x, std::int64_t inputs, std::int64_t depth) {
  auto* out = static_cast<std::uint16_t*>(to);
  for (std::int64_t i = 0; i < inputs; ++i) out[i] = float_to_bf16(x[i]);
  for (std::int64_t i = inputs; i < depth; ++i) out[i] = 0;
}
inline void store_bf16_input(void* row, std::int64_t input, Vec x) {  // 16 inputs
  store_bf16(static_cast<std::uint16_t*>(row) + input, x);
}
#else
using FormatBf16 = FloatFormat<PairsBf16>;

inline void prepare_bf16(void* to, const float* x, std::int64_t inputs, std::int64_t depth) {
  auto* out = static_cast<float*>(to);
  for (std::int64_t i = 0; i < inputs; ++i) out[i] = bf16_to_float(float_to_bf16(x[i]));
  for (std::int64_t i = inputs; i < depth; ++i) out[i] = 0.0f;
}
inline void store_bf16_input(void* row, std::int64_t input, Vec x) {  // 16 inputs
  store(static_cast<float*>(row) + input, round_to_bf16(x));
}
#endif

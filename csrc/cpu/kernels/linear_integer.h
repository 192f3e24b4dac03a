// Products with quantized weights, in whole numbers.
//
// A row of x becomes 16-bit codes a and a scale: x = a * scale, |a| <= 127 * 256 + 127. A block of
// at most 512 inputs, all of one group, is then summed exactly, S = sum of a * level in 32 bits
// (128 * 32639 * 512 < 2^31), and only S becomes a float. So neither the order of the sum nor the
// instructions matter, nor that partial sums may wrap around: every tile and every instruction set
// gives the same bits.
//
// Levels are multiplied as bytes, level + offset; the excess, offset * (sum of the block's codes),
// is subtracted again. A block's S becomes a float, and is multiplied by its group's scale (after
// subtracting zero point * sum of codes), or all of them in the end by the scale of the output.
//
// `Bytes`, `Codes` and `dot` are the instruction set's own (dot_*.h). Where it can only multiply
// bytes, a code of 16 bits is 256 * high + low, and S is made of two sums. `stored_bytes` converts
// stored bytes, level + 128, to those of the instruction set, level + kByteOffset.

template <int kPasses, bool kHasGroups = false>
struct FormatInt8 {
  static constexpr int kParts = 1, kActivationPasses = kPasses;
  static constexpr bool kGrouped = kHasGroups;
  explicit FormatInt8(const LinearTask&) {}
  static constexpr std::uint32_t offset() { return kByteOffset; }
  template <int Part>
  Bytes split(Words raw) const {
    return split_bytes(stored_bytes(raw));
  }
};

// Levels -8 to 7: a code is its level + 8.
struct FormatInt4 {
  static constexpr int kParts = 2, kActivationPasses = 2;
  static constexpr bool kGrouped = true;
  explicit FormatInt4(const LinearTask&) {}
  static constexpr std::uint32_t offset() { return 8; }
  template <int Part>
  Bytes split(Words raw) const {
    return split_nibbles(Part == 0 ? raw : shift_right<4>(raw));
  }
};

// Levels from a table.
struct FormatInt4Levels : FormatInt4 {
  ByteTable table;
  explicit FormatInt4Levels(const LinearTask& task)
      : FormatInt4(task), table(load_byte_table(task.levels)) {}
  static constexpr std::uint32_t offset() { return kByteOffset; }
  template <int Part>
  Bytes split(Words raw) const {
    const Words codes = low_nibbles(Part == 0 ? raw : shift_right<4>(raw));
    return split_bytes(stored_bytes(look_up_bytes(table, codes)));
  }
};

// The scales of 16 outputs, from number `at` on.
inline Vec load_scales(const void* scales, DType dtype, std::int64_t at) {
  if (dtype == DType::f32) return load(static_cast<const float*>(scales) + at);
  const auto* halves = static_cast<const std::uint16_t*>(scales) + at;
  return dtype == DType::bf16 ? load(halves) : load_f16(halves);
}
// Where scale number `at` lies.
inline const void* address_of_scale(const void* scales, DType dtype, std::int64_t at) {
  return static_cast<const unsigned char*>(scales) + at * (dtype == DType::f32 ? 4 : 2);
}

inline std::int64_t smaller(std::int64_t x, std::int64_t y) { return x < y ? x : y; }

// The end of a stretch from input `first` on: the groups that fit so many blocks of 512, or so many
// blocks of one group. A block is never cut.
inline std::int64_t stretch_end(const LinearTask& task, std::int64_t first, std::int64_t blocks) {
  const std::int64_t group = group_inputs(task), inputs = blocks * kIntegerBlock;
  if (group < inputs) return first + inputs / group * group;
  for (; blocks > 0; --blocks) first = block_end(task, first);
  return first;
}

template <class Format>
struct IntegerFormat {
  static constexpr int kPasses = Format::kActivationPasses;
  static constexpr int kSums = kOneSum ? 1 : kPasses;
  static constexpr int kTileRows = kPasses == 1 ? kDotRowsOnePass : kDotRows,
                       kTilePanels = kDotPanels, kTilePanelsOneRow = kPanelsOneRow;

  Format format;
  explicit IntegerFormat(const LinearTask& task) : format(task) {}
  static constexpr std::uint32_t offset() { return Format::offset(); }

  static std::int64_t next_chunk(const LinearTask& task, std::int64_t first) {
    return stretch_end(task, first, kDepthChunk / kIntegerBlock);
  }

  // Adds inputs [first, last) to acc, [MR][NR][16].
  //
  // The task's fields are copied first, since the compiler cannot know that storing a vector does
  // not change them; and loops over sums are unrolled, so that the sums stay in registers.
  template <int MR, int NR>
  void accumulate(const LinearTask& task, std::int64_t row, std::int64_t panel, std::int64_t first,
                  std::int64_t last, float* acc) const {
    constexpr int kInputsPerWord = 4 * Format::kParts;
    const std::int64_t x_stride = task.x_stride, num_blocks = task.num_blocks;
    const std::int64_t group_stride = task.num_groups * kLanes, group_size = group_inputs(task);
    const std::int64_t panel_words = task.depth / kInputsPerWord * kLanes;
    const auto* x = static_cast<const std::uint32_t*>(task.x) + row * x_stride + first / 2;
    const std::uint32_t* words =
        task.weight + panel * panel_words + first / kInputsPerWord * kLanes;
    const std::int32_t* code_sums = task.x_sums + row * num_blocks + block_index(task, first);
    std::int64_t group_end = first / group_size * group_size + group_size;
    std::int64_t group_at = panel * group_stride + first / group_size * kLanes;
    const std::int8_t* zeros = task.zeros;
    const Ahead words_ahead(kWordsAhead, panel_words, NR);
    const Ahead scales_ahead(kScalesAhead, group_stride, NR);
    const DType scale_type = task.scale_type;
    const void* all_scales = task.scales;
    for (std::int64_t k = first; k < last; ++code_sums) {
      const std::int64_t end = smaller(k + kIntegerBlock, smaller(group_end, last));
      // The excess of the levels' offset is subtracted in advance, from the last sum.
      Words sums[kSums][MR][NR];
      OCTAVO_UNROLL
      for (int m = 0; m < MR; ++m) {
        const auto code_sum = static_cast<std::uint32_t>(code_sums[m * num_blocks]);
        OCTAVO_UNROLL
        for (int n = 0; n < NR; ++n) {
          for (int s = 0; s + 1 < kSums; ++s) sums[s][m][n] = splat_word(0);
          sums[kSums - 1][m][n] = splat_word(0u - Format::offset() * code_sum);
        }
      }
      for (; k < end; k += kInputsPerWord, words += kLanes, x += 2 * Format::kParts) {
        const std::int64_t ahead = words_ahead.from(k / kInputsPerWord * kLanes);
        const auto add_part = [&](auto part) {
          OCTAVO_UNROLL
          for (int n = 0; n < NR; ++n) {
            if (part == 0) prefetch(words + n * panel_words + ahead);
            const Words raw = load_words(words + n * panel_words);
            const Bytes bytes = format.template split<part>(raw);
            OCTAVO_UNROLL
            for (int m = 0; m < MR; ++m) {
              OCTAVO_UNROLL
              for (int s = 0; s < kSums; ++s) {
                const Codes codes = load_codes(x + m * x_stride + 2 * part + s);
                sums[s][m][n] = dot(sums[s][m][n], bytes, codes);
              }
            }
          }
        };
        unroll(add_part, std::make_integer_sequence<int, Format::kParts>{});
      }
      // Without this the compiler keeps a copy of acc on the stack from block to block.
      asm volatile("" : : : "memory");
      OCTAVO_UNROLL
      for (int n = 0; n < NR; ++n) {
        const std::int64_t at = group_at + n * group_stride;
        Vec scale = zero();
        if constexpr (Format::kGrouped) {
          const std::int64_t soon = scales_ahead.from(group_at - panel * group_stride);
          prefetch(address_of_scale(all_scales, scale_type, at + soon));
          scale = load_scales(all_scales, scale_type, at);
        }
        OCTAVO_UNROLL
        for (int m = 0; m < MR; ++m) {
          float* sum = acc + (m * NR + n) * kLanes;
          Words whole = sums[0][m][n];
          for (int s = 1; s < kSums; ++s) whole = add_words(shift_left<8>(whole), sums[s][m][n]);
          Vec part = to_floats(whole);
          if constexpr (Format::kGrouped) {
            if (zeros) {
              const auto code_sum = static_cast<float>(code_sums[m * num_blocks]);
              part = fma(sub(zero(), load(zeros + at)), splat(code_sum), part);
            }
            store(sum, fma(part, scale, load(sum)));
          } else {
            store(sum, add(load(sum), part));
          }
        }
      }
      if (k == group_end) {
        group_end += group_size;
        group_at += kLanes;
      }
    }
  }

  static Vec finish(const LinearTask& task, Vec sum, std::int64_t row, std::int64_t panel) {
    const Vec y = mul(sum, splat(task.x_scales[row]));
    if constexpr (Format::kGrouped) return y;
    return mul(y, load(static_cast<const float*>(task.scales) + panel * kLanes));
  }
};

// Computes the `depth` codes of a row of x, the row's scale, and the sum of each block.
inline void round_to_codes(const LinearTask& task, std::int64_t row, std::int16_t* codes,
                           const float* x, std::int64_t inputs) {
  std::memset(codes, 0, static_cast<std::size_t>(task.depth) * sizeof *codes);
  Vec largest = zero();
  for_each_vec(inputs, [&](std::int64_t i, auto load_at, auto) {
    const Vec value = load_at(x + i, 0.0f);
    largest = max(largest, max(value, sub(zero(), value)));
  });
  const float most = max_lanes(largest);
  const float limit = task.activation_bits == 8 ? 127.0f : 127.0f * 256.0f + 127.0f;
  constexpr float kLeast = 7.8886090522101181e-31f;  // 2^-100: below, a row counts as zeros
  if (!all_finite(x, inputs)) {
    task.x_scales[row] = std::numeric_limits<float>::quiet_NaN();  // of the whole result
  } else if (most < kLeast) {
    task.x_scales[row] = 0.0f;
  } else {
    task.x_scales[row] = most / limit;
    const Vec steps = splat(limit / most), top = splat(limit);
    for_each_vec(inputs, [&](std::int64_t i, auto load_at, auto) {
      const Vec value = max(sub(zero(), top), min(top, mul(load_at(x + i, 0.0f), steps)));
      store_rounded(codes + i, value);  // writes 16: depth is a multiple of them
    });
  }
  std::int64_t block = 0;
  for (std::int64_t k = 0; k < task.depth; ++block) {
    const std::int64_t end = block_end(task, k);
    std::int32_t sum = 0;
    for (std::int64_t i = k; i < end; ++i) sum += codes[i];
    task.x_sums[row * task.num_blocks + block] = sum;
    k = end;
  }
}

// Writes the codes of a row of x in the form that `load_codes` reads.
//
// to: depth / 2 words, then scratch memory for as many again.
inline void prepare_integers(const LinearTask& task, std::int64_t row, void* to, const float* x,
                             std::int64_t inputs) {
  auto* words = static_cast<std::uint32_t*>(to);
  auto* codes = reinterpret_cast<std::int16_t*>(words + task.depth / 2);
  round_to_codes(task, row, codes, x, inputs);
  if (task.activation_bits == 8) {
    store_codes<1>(words, codes, task.depth);
  } else {
    store_codes<2>(words, codes, task.depth);
  }
}

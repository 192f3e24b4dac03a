// Products with quantized weights, in whole numbers.
//
// A row of x becomes 16-bit codes a and a scale: x = a * scale, |a| <= 127 * 256 + 127. A block of
// at most 512 inputs, all of one group, is then summed exactly, S = sum of a * level in 32 bits
// (128 * 32639 * 512 < 2^31), and only S enters floating point. So it does not matter in what order
// or by which instructions S came about, nor that sums wrap around on the way: every tile and every
// instruction set gives the same bits.
//
// Levels lie in memory as unsigned bytes, level + offset; what that adds, offset * (sum of the
// block's codes), is taken off again. A block's S becomes a float; int4 multiplies it by the
// group's scale (after taking off zero point * sum of codes), int8 has one scale for the whole row.
//
// `Sums`, `Codes`, `dot` and their kin are the instruction set's own (dot_*.h).

template <int kPasses>
struct FormatInt8 {
  static constexpr int kParts = 1, kActivationPasses = kPasses;
  static constexpr bool kGrouped = false;
  explicit FormatInt8(const LinearTask&) {}
  static constexpr std::uint32_t offset() { return 128; }
  template <int Part>
  Words bytes(Words raw) const {
    return raw;
  }
};

// Levels -8 to 7: a code is its level + 8.
struct FormatInt4 {
  static constexpr int kParts = 2, kActivationPasses = 2;
  static constexpr bool kGrouped = true;
  explicit FormatInt4(const LinearTask&) {}
  static constexpr std::uint32_t offset() { return 8; }
  template <int Part>
  Words bytes(Words raw) const {
    return low_nibbles(Part == 0 ? raw : shift_right<4>(raw));
  }
};

// Levels from a table.
struct FormatInt4Levels : FormatInt4 {
  ByteTable table;
  explicit FormatInt4Levels(const LinearTask& task)
      : FormatInt4(task), table(load_byte_table(task.levels)) {}
  static constexpr std::uint32_t offset() { return 128; }
  template <int Part>
  Words bytes(Words raw) const {
    return look_up_bytes(table, FormatInt4::bytes<Part>(raw));
  }
};

template <class Format>
struct IntegerFormat {
  static constexpr int kPasses = Format::kActivationPasses;
  static constexpr int kTileRows = kPasses == 1 ? kDotRowsOnePass : kDotRows,
                       kTilePanels = kDotPanels, kTilePanelsOneRow = kPanelsOneRow;

  Format format;
  explicit IntegerFormat(const LinearTask& task) : format(task) {}

  // Whole groups, or blocks of one: a block is never cut.
  static std::int64_t next_chunk(const LinearTask& task, std::int64_t first) {
    const std::int64_t group = group_inputs(task);
    if (group < kDepthChunk) return first + kDepthChunk / group * group;
    return block_end(task, first);
  }

  // Adds inputs [first, last) to acc, [MR][NR][16].
  template <int MR, int NR>
  void accumulate(const LinearTask& task, std::int64_t row, std::int64_t panel, std::int64_t first,
                  std::int64_t last, float* acc) const {
    constexpr int kInputsPerWord = 4 * Format::kParts;
    const auto* x = static_cast<const std::uint32_t*>(task.x) + row * task.x_stride;
    const std::int64_t panel_words = task.depth / kInputsPerWord * kLanes;
    const std::uint32_t* weight = task.weight + panel * panel_words;
    std::int64_t group = first / group_inputs(task), block = block_index(task, first);
    for (std::int64_t k = first; k < last; ++block) {
      const std::int64_t end = block_end(task, k, group);
      Sums<kPasses> sums[MR][NR];
      for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NR; ++n) sums[m][n] = no_sums<kPasses>();
      }
      for (std::int64_t i = k; i < end; i += kInputsPerWord) {
        const auto add_part = [&](auto part) {
          Bytes bytes[NR];
          for (int n = 0; n < NR; ++n) {
            const Words raw = load_words(weight + n * panel_words + i / kInputsPerWord * kLanes);
            bytes[n] = split_bytes(format.template bytes<part>(raw));
          }
          for (int m = 0; m < MR; ++m) {
            const Codes<kPasses> codes =
                load_codes<kPasses>(x + m * task.x_stride + i / 2 + 2 * part);
            for (int n = 0; n < NR; ++n) dot(sums[m][n], bytes[n], codes);
          }
        };
        unroll(add_part, std::make_integer_sequence<int, Format::kParts>{});
      }
      for (int m = 0; m < MR; ++m) {
        const auto code_sum = task.x_sums[(row + m) * task.num_blocks + block];
        const Words added = splat_word(Format::offset() * static_cast<std::uint32_t>(code_sum));
        for (int n = 0; n < NR; ++n) {
          float* sum = acc + (m * NR + n) * kLanes;
          const Vec part = to_floats(sub_words(total(sums[m][n]), added));
          store(sum, add_block(task, load(sum), part, static_cast<float>(code_sum),
                               (panel + n) * task.num_groups + group));
        }
      }
      k = end;
      if (k == (group + 1) * group_inputs(task)) ++group;
    }
  }

  static Vec add_block(const LinearTask& task, Vec sum, Vec part, float code_sum,
                       std::int64_t group) {
    if constexpr (!Format::kGrouped) return add(sum, part);
    if (task.zeros)
      part = fma(sub(zero(), load(task.zeros + group * kLanes)), splat(code_sum), part);
    const Vec scale = task.scale_type == DType::bf16
                          ? load(static_cast<const std::uint16_t*>(task.scales) + group * kLanes)
                          : load(static_cast<const float*>(task.scales) + group * kLanes);
    return fma(part, scale, sum);
  }

  static Vec finish(const LinearTask& task, Vec sum, std::int64_t row, std::int64_t panel) {
    const Vec y = mul(sum, splat(task.x_scales[row]));
    if constexpr (Format::kGrouped) return y;
    return mul(y, load(static_cast<const float*>(task.scales) + panel * kLanes));
  }
};

// The codes of a row of x, as `load_codes` wants them, with their sums block by block.
//
// to: depth / 2 words, then room for as many again.
inline void prepare_integers(const LinearTask& task, std::int64_t row, void* to, const float* x,
                             std::int64_t inputs) {
  auto* words = static_cast<std::uint32_t*>(to);
  auto* codes = reinterpret_cast<std::int16_t*>(words + task.depth / 2);
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
  if (task.activation_bits == 8) {
    store_codes<1>(words, codes, task.depth);
  } else {
    store_codes<2>(words, codes, task.depth);
  }
}

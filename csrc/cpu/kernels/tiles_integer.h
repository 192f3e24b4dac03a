// Products of whole numbers on tile registers: linear_tiles.h has the formula and the layout,
// linear_integer.h what the numbers are.

// Steps of whole numbers: blocks begin with a new one.
struct IntegerSteps {
  std::int64_t inputs, per_group, group;

  explicit IntegerSteps(const LinearTask& task)
      : inputs(kTileRowBytes),
        per_group((group_inputs(task) + inputs - 1) / inputs),
        group(group_inputs(task)) {}

  // The step that begins at input k, where a block or an earlier step begins.
  std::int64_t at(std::int64_t k) const { return k / group * per_group + k % group / inputs; }
  std::int64_t count(std::int64_t length) const { return (length + inputs - 1) / inputs; }
};

template <class Format>
struct TilesInteger {
  using Integers = IntegerFormat<Format>;
  static constexpr int kPasses = Format::kActivationPasses;
  static constexpr int kRowTiles = kPasses == 1 ? 2 : 1;
  static constexpr bool kStreams = false;
  static constexpr std::int64_t kWorthAsking = 4;
  const Format format;
  const IntegerSteps place;
  const std::int64_t step_bytes, steps;

  explicit TilesInteger(const LinearTask& task)
      : format(task), place(task), step_bytes(place.inputs), steps(place.at(task.depth - 1) + 1) {}

  // One block's worth: with what is added to each group to fill steps, no more than kMaxStretch.
  static std::int64_t next_stretch(const LinearTask& task, std::int64_t first, std::int64_t) {
    return stretch_end(task, first, 1);
  }

  AskAhead ask_ahead(const LinearTask& task, const PanelPair& pair, std::int64_t first,
                     std::int64_t length, std::int64_t row_tiles) const {
    const std::int64_t calls = (row_tiles + kRowTiles - 1) / kRowTiles;
    if (calls < kWorthAsking) return {};
    constexpr std::int64_t kInputsPerWord = 4 * Format::kParts;
    const auto at = [&](int n) {
      const std::int64_t input = pair.panel[n] * task.depth + first;
      return reinterpret_cast<const unsigned char*>(task.weight + input / kInputsPerWord * kLanes);
    };
    const std::int64_t steps = place.at(length - 1) + 1;
    return {at(0), at(1), length * kLanes / Format::kParts, steps * calls};
  }

  const unsigned char* weights(const LinearTask& task, std::int64_t panel, std::int64_t first,
                               std::int64_t last, unsigned char* room) const {
    constexpr std::int64_t kInputsPerWord = 4 * Format::kParts;
    const std::uint32_t* words = task.weight + panel * task.depth / kInputsPerWord * kLanes;
    if (Format::kParts == 1 && (last - first) % step_bytes == 0)
      return reinterpret_cast<const unsigned char*>(words + first / kInputsPerWord * kLanes);
    auto* to = reinterpret_cast<std::uint32_t*>(room);
    for (std::int64_t k = first; k < last;) {
      const std::int64_t end = block_end(task, k);
      for (std::int64_t i = k; i < end; i += kInputsPerWord) {
        const Words raw = load_words(words + i / kInputsPerWord * kLanes);
        const auto store_part = [&](auto part) {
          store_words(to, format.template bytes<part>(raw));
          to += kLanes;
        };
        unroll(store_part, std::make_integer_sequence<int, Format::kParts>{});
      }
      for (std::int64_t i = end - k; i < place.count(end - k) * place.inputs; i += 4) {
        store_words(to, splat_word(0));
        to += kLanes;
      }
      k = end;
    }
    return room;
  }

  template <int MT, int NR, class Beside>
  void accumulate(const LinearTask& task, const RowTiles& rows, const PanelPair& pair,
                  std::int64_t first, std::int64_t last, const unsigned char* const* w, float* sums,
                  std::int64_t sum_stride, Beside&& beside) const {
    constexpr int kX = MT * kPasses;
    const std::int64_t tile_bytes = kRowTile * step_bytes;
    std::int64_t group = first / place.group, block = block_index(task, first);
    for (std::int64_t k = first; k < last; ++block) {
      const std::int64_t end = block_end(task, k, group);
      const unsigned char *x[kX], *w_at[NR];
      for (int m = 0; m < kX; ++m)
        x[m] = TilesBf16::x_tiles(task, rows.tile + m / kPasses) +
               (m % kPasses * steps + place.at(k)) * tile_bytes;
      for (int n = 0; n < NR; ++n) w_at[n] = w[n] + (place.at(k) - place.at(first)) * tile_bytes;
      alignas(64) std::uint32_t block_sums[2][2][kTileSums];
      each_sum<kX, NR>([](auto t, int, int) { tile_zero<t>(); });
      multiply_tiles<DotBytes, kX, NR>(x, w_at, place.count(end - k), step_bytes, beside);
      each_sum<kX, NR>(
          [&](auto t, int m, int n) { tile_store<t>(block_sums[m][n], kTileRowBytes); });
      for (int n = 0; n < NR; ++n) {
        const Group numbers = load_group(task, pair.panel[n] * task.num_groups + group);
        for (int m = 0; m < MT; ++m)
          fold(task, numbers, block_sums[m * kPasses][n], block_sums[kX - 1][n],
               {(rows.tile + m) * kRowTile, std::min(kRowTile, rows.count - m * kRowTile), block,
                k == 0},
               sums + m * sum_stride + n * kTileSums);
      }
      k = end;
      if (k == (group + 1) * place.group) ++group;
    }
  }

  // What 16 outputs multiply a block's sums by, and by what number they take off its codes' sum.
  struct Group {
    Vec scale, minus_zero_point;
  };
  static Group load_group(const LinearTask& task, std::int64_t group) {
    Group numbers{zero(), zero()};
    if constexpr (!Format::kGrouped) return numbers;
    if (task.zeros) numbers.minus_zero_point = sub(zero(), load(task.zeros + group * kLanes));
    numbers.scale = task.scale_type == DType::bf16
                        ? load(static_cast<const std::uint16_t*>(task.scales) + group * kLanes)
                        : load(static_cast<const float*>(task.scales) + group * kLanes);
    return numbers;
  }

  struct Rows {
    std::int64_t first, count, block;
    bool is_first_block;
  };
  // Adds a block's sums to those of a tile of rows.
  static void fold(const LinearTask& task, const Group& numbers, const std::uint32_t* high,
                   const std::uint32_t* low, const Rows& rows, float* sums) {
    const std::int64_t num_blocks = task.num_blocks;
    const std::int32_t* code_sums = task.x_sums + rows.first * num_blocks + rows.block;
    const bool has_zeros = task.zeros != nullptr;
    for (std::int64_t r = 0; r < rows.count; ++r, code_sums += num_blocks) {
      Words whole = load_words(high + r * kLanes);
      if constexpr (kPasses == 2)
        whole = add_words(shift_left<8>(whole), load_words(low + r * kLanes));
      const auto offset = Format::offset() * static_cast<std::uint32_t>(*code_sums);
      Vec part = to_floats(add_words(whole, splat_word(0u - offset)));
      float* at = sums + r * kLanes;
      const Vec sum = rows.is_first_block ? zero() : load(at);
      if constexpr (Format::kGrouped) {
        const auto code_sum = static_cast<float>(*code_sums);
        if (has_zeros) part = fma(numbers.minus_zero_point, splat(code_sum), part);
        store(at, fma(part, numbers.scale, sum));
      } else {
        store(at, add(sum, part));
      }
    }
  }

  static void flush() {}
  static Vec finish(const LinearTask& task, Vec sum, std::int64_t row, std::int64_t panel) {
    return Integers::finish(task, sum, row, panel);
  }
};

// A row of x, as its tiles hold it.
inline void prepare_integer_tile(const LinearTask& task, std::int64_t row, unsigned char* to,
                                 const float* x, std::int64_t inputs) {
  static thread_local std::vector<std::int16_t> memory;
  memory.resize(static_cast<std::size_t>(task.depth));
  const std::int16_t* codes = memory.data();
  round_to_codes(task, row, memory.data(), x, inputs);
  const IntegerSteps place(task);
  const std::int64_t steps = place.at(task.depth - 1) + 1;
  const bool has_low = task.activation_bits == 16;
  for (std::int64_t k = 0; k < task.depth;) {
    const std::int64_t end = block_end(task, k);
    for (; k < end; k += std::min(place.inputs, end - k)) {
      std::uint8_t high[kTileRowBytes] = {}, low[kTileRowBytes] = {};
      const std::int64_t count = std::min(place.inputs, end - k);
      for (std::int64_t i = 0; i < count; ++i) {
        low[i] = static_cast<std::uint8_t>(codes[k + i]);
        high[i] = has_low ? static_cast<std::uint8_t>((codes[k + i] + 128) >> 8) : low[i];
      }
      unsigned char* at = to + place.at(k) * kRowTile * place.inputs;
      std::memcpy(at, high, static_cast<std::size_t>(place.inputs));
      if (has_low)
        std::memcpy(at + steps * kRowTile * place.inputs, low,
                    static_cast<std::size_t>(place.inputs));
    }
  }
}

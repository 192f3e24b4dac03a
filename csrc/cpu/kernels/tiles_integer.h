// Products of int8 weights on tile registers: linear_tiles.h has the layout, linear_integer.h the
// definition, and why a block is 512 inputs.

// Steps of whole numbers: a row's last one may be half empty.
struct IntegerSteps {
  static constexpr std::int64_t kInputs = kTileRowBytes;

  static std::int64_t count(std::int64_t inputs) { return (inputs + kInputs - 1) / kInputs; }
  static std::int64_t bytes(std::int64_t inputs) { return count(inputs) * kInputs; }
};

template <int kPasses>
struct TilesInt8 {
  using Integers = IntegerFormat<FormatInt8<kPasses>>;
  using Steps = IntegerSteps;
  static constexpr int kRowTiles = kPasses == 1 ? 2 : 1;
  static constexpr bool kStreams = false;
  static constexpr std::int64_t kInputs = Steps::kInputs;  // of a step
  static constexpr std::int64_t kPart = kIntegerBlock;
  const std::int64_t step_bytes = kInputs;

  explicit TilesInt8(const LinearTask&) {}

  static std::int64_t next_stretch(const LinearTask&, std::int64_t first, std::int64_t) {
    return first + kIntegerBlock;
  }

  static std::int64_t input_stride(const LinearTask& task) {
    const bool is_whole = task.depth <= kIntegerBlock;
    return (Steps::bytes(task.depth) * kPasses + (is_whole ? 0 : kIntegerBlock)) / 4;
  }

  static AheadOf weights_ahead(const LinearTask& task, const PanelPair& pair, std::int64_t first,
                               std::int64_t length) {
    const auto at = [&](int n) {
      return reinterpret_cast<const unsigned char*>(words_of(task, pair.panel[n], first));
    };
    return {at(0), at(1), length * kLanes};
  }

  static AheadOf x_ahead(const LinearTask& task, std::int64_t row_tile, std::int64_t first,
                         std::int64_t length) {
    return {x_tiles(task, row_tile, 0, first), x_tiles(task, row_tile, 1, first),
            Steps::count(length) * kTileBytes};
  }

  // The stored weights, or a copy with zeros that fill the last step.
  static const unsigned char* weights(const LinearTask& task, std::int64_t panel,
                                      std::int64_t first, std::int64_t last, unsigned char* room) {
    const auto* from = reinterpret_cast<const unsigned char*>(words_of(task, panel, first));
    const std::int64_t length = last - first;
    if (length % Steps::kInputs == 0) return from;
    std::memcpy(room, from, static_cast<std::size_t>(length * kLanes));
    std::memset(room + length * kLanes, 0,
                static_cast<std::size_t>((Steps::bytes(length) - length) * kLanes));
    return room;
  }

  // One block.
  template <int MT, int NR, class Beside>
  static void accumulate(const LinearTask& task, const RowTiles& rows, const PanelPair&,
                         std::int64_t first, std::int64_t last, const unsigned char* const* w,
                         float* sums, std::int64_t sum_stride, Beside&& beside) {
    constexpr int kX = MT * kPasses;
    const unsigned char* x[kX];
    for (int m = 0; m < kX; ++m) x[m] = x_tiles(task, rows.tile, m, first);
    alignas(64) std::uint32_t block_sums[2][2][kTileSums];
    each_sum<kX, NR>([](auto t, int, int) { tile_zero<t>(); });
    multiply_tiles<DotBytes, kX, NR>(x, w, Steps::count(last - first), kTileRowBytes, beside);
    each_sum<kX, NR>([&](auto t, int m, int n) { tile_store<t>(block_sums[m][n], kTileRowBytes); });
    for (int m = 0; m < MT; ++m) {
      const std::int64_t row = (rows.tile + m) * kRowTile;
      const std::int32_t* code_sums = task.x_sums + row * task.num_blocks + first / kIntegerBlock;
      const std::int64_t count = std::min(kRowTile, rows.count - m * kRowTile);
      for (int n = 0; n < NR; ++n)
        fold(block_sums[m * kPasses][n], block_sums[kX - 1][n], code_sums, task.num_blocks, count,
             first == 0, sums + m * sum_stride + n * kTileSums);
    }
  }

  static void flush() {}

  static Vec finish(const LinearTask& task, Vec sum, std::int64_t row, std::int64_t panel) {
    return Integers::finish(task, sum, row, panel);
  }

 private:
  // Of `index` 0 or 1: high and low bytes, or those of two row tiles.
  static const unsigned char* x_tiles(const LinearTask& task, std::int64_t row_tile, int index,
                                      std::int64_t first) {
    const std::int64_t steps = index % kPasses * Steps::count(task.depth) + first / kInputs;
    return TilesBf16::x_tiles(task, row_tile + index / kPasses) + steps * kTileBytes;
  }

  static const std::uint32_t* words_of(const LinearTask& task, std::int64_t panel,
                                       std::int64_t first) {
    return task.weight + (panel * task.depth + first) / 4 * kLanes;
  }

  // Adds a block's sums to those of a tile of rows. code_sums: of each row, `num_blocks` apart.
  static void fold(const std::uint32_t* high, const std::uint32_t* low,
                   const std::int32_t* code_sums, std::int64_t num_blocks, std::int64_t rows,
                   bool is_first, float* sums) {
    for (std::int64_t at = 0; at < rows * kLanes; at += kLanes, code_sums += num_blocks) {
      Words whole = load_words(high + at);
      if constexpr (kPasses == 2) whole = add_words(shift_left<8>(whole), load_words(low + at));
      const auto offset = Integers::offset() * static_cast<std::uint32_t>(*code_sums);
      const Vec part = to_floats(add_words(whole, splat_word(0u - offset)));
      store(sums + at, add(is_first ? zero() : load(sums + at), part));
    }
  }
};

// Writes a row of x in the layout of its tiles: high bytes, and low ones of 16-bit codes.
inline void prepare_integer_tile(const LinearTask& task, std::int64_t row, unsigned char* to,
                                 const float* x, std::int64_t inputs) {
  constexpr std::int64_t kInputs = IntegerSteps::kInputs;
  static thread_local std::vector<std::int16_t> memory;
  memory.assign(static_cast<std::size_t>(IntegerSteps::bytes(task.depth)), 0);
  std::int16_t* codes = memory.data();
  round_to_codes(task, row, codes, x, inputs);
  const bool has_low = task.activation_bits == 16;
  unsigned char* low_to = to + IntegerSteps::count(task.depth) * kTileBytes;
  for (std::int64_t k = 0; k < task.depth; k += kInputs) {
    std::uint8_t high[kInputs], low[kInputs];
    for (std::int64_t i = 0; i < kInputs; ++i) {
      low[i] = static_cast<std::uint8_t>(codes[k + i]);
      high[i] = static_cast<std::uint8_t>((codes[k + i] + 128) >> 8);
    }
    const std::int64_t at = k / kInputs * kTileBytes;
    std::memcpy(to + at, has_low ? high : low, sizeof high);
    if (has_low) std::memcpy(low_to + at, low, sizeof low);
  }
}

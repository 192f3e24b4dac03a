// Products of bf16 on tile registers: linear_tiles.h has the formula and the layout.

struct TilesBf16 {
  static constexpr int kRowTiles = 2;
  static constexpr bool kStreams = false;
  static constexpr std::int64_t kInputs = kTileRowBytes / 2;  // of a step
  static constexpr std::int64_t kPart = 512;                  // two panels' are 32 KiB
  const std::int64_t step_bytes = kTileRowBytes;

  explicit TilesBf16(const LinearTask&) {}

  // All inputs, if 256 rows of them leave room for weights in L2, or if weights are read only once.
  static std::int64_t next_stretch(const LinearTask& task, std::int64_t first,
                                   std::int64_t row_tiles) {
    if (task.depth <= kShallow || row_tiles <= kRowTiles) return task.depth;
    return std::min(task.depth, first + kPart);
  }

  static std::int64_t input_stride(const LinearTask& task) {
    const bool is_whole = task.depth <= kShallow;
    return (task.depth + (is_whole ? 0 : kShallow)) / 2;
  }

  static AheadOf weights_ahead(const LinearTask& task, const PanelPair& pair, std::int64_t first,
                               std::int64_t length) {
    return {weights(task, pair.panel[0], first, 0, nullptr),
            weights(task, pair.panel[1], first, 0, nullptr), length * kLanes * 2};
  }

  static AheadOf x_ahead(const LinearTask& task, std::int64_t row_tile, std::int64_t first,
                         std::int64_t length) {
    const auto at = [&](std::int64_t tile) {
      return x_tiles(task, tile) + first / kInputs * kTileBytes;
    };
    return {at(row_tile), at(row_tile + 1), length / kInputs * kTileBytes};
  }

  static const unsigned char* weights(const LinearTask& task, std::int64_t panel,
                                      std::int64_t first, std::int64_t, unsigned char*) {
    return reinterpret_cast<const unsigned char*>(task.weight + panel * task.depth / 2 * kLanes +
                                                  first / 2 * kLanes);
  }

  template <int MT, int NR, class Beside>
  void accumulate(const LinearTask& task, const RowTiles& rows, const PanelPair&,
                  std::int64_t first, std::int64_t last, const unsigned char* const* w, float* sums,
                  std::int64_t sum_stride, Beside&& beside) const {
    const unsigned char* x[MT];
    for (int m = 0; m < MT; ++m) x[m] = x_tiles(task, rows.tile + m) + first / kInputs * kTileBytes;
    each_sum<MT, NR>([&](auto t, int m, int n) {
      if (first == 0) {
        tile_zero<t>();
      } else {
        tile_load<t>(sums + m * sum_stride + n * kTileSums, kTileRowBytes);
      }
    });
    multiply_tiles<DotBf16, MT, NR>(x, w, (last - first) / kInputs, step_bytes, beside);
    each_sum<MT, NR>([&](auto t, int m, int n) {
      tile_store<t>(sums + m * sum_stride + n * kTileSums, kTileRowBytes);
    });
  }

  static const unsigned char* x_tiles(const LinearTask& task, std::int64_t row_tile) {
    return static_cast<const unsigned char*>(task.x) + row_tile * kRowTile * task.x_stride * 4;
  }
  static void flush() {}
  static Vec finish(const LinearTask&, Vec sum, std::int64_t, std::int64_t) { return sum; }
};

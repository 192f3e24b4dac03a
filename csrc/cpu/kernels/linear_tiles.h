// Matrix products on tile registers: 16 rows of x by 16 outputs at a time.
//
//   sums (rows x outputs) += X (rows x a step of inputs) * W (a step of inputs x outputs)
//
// with 4 bytes of inputs, times 16, in each of W's 64-byte rows: that is a packed panel as it lies.
// A step is 64 bytes of a row of x, 32 inputs in bf16, 64 in int8.
//
// x, as prepare_input leaves it when there are more than kFewRows rows:
//   [tile of 16 rows][high bytes, low bytes (16-bit codes only)][step][16][bytes of a step]
// in whole tiles, one after another, so that loads meet 16 different cache lines' places. Integer
// blocks begin with a new step, and a step's unused end is zero.
//
// bf16: TDPBF16PS sums up 32 inputs in just the order of linear_float.h and adds them to the sums,
// so chaining steps gives the bits of the other instruction sets (while all numbers are normal: the
// processor takes denormal ones as zeros).
// Integers: TDPBSUD, signed codes by unsigned levels. High and low bytes are two tiles of the same
// product, and from 256 * high + low on, all is as in linear_integer.h. Four bits are widened to
// bytes in scratch memory, once for a stretch of two panels and all rows.
//
// Cost, in cycles of one core, from published figures (a product starts every 16 cycles; a tile is
// loaded in 8, stored in 16), not measured: two tiles of X by two of W are 4 products in 64 cycles
// for 4 loads in 32, and 4 KiB, which is more than the second cache delivers in that time; so a
// stretch of W (24 KiB of two panels) stays in the first cache while the rows pass by. Sums go to
// memory and come back between stretches, 96 cycles beside 768: 85 to 95 % of the peak.
// Integers with 16-bit codes take two products for one of bf16, but twice the inputs a step: the
// same time per input at best. A block's sums are stored (64 cycles) and folded into float32 (about
// 130): beside 512 cycles in int8, 70 to 85 %; beside 128 in int4 with groups of 128, 40 %; 64 with
// groups of 64, 25 %. Groups of 32 fill only half a step, and the processor takes as long: 12 %.

constexpr std::int64_t kRowTile = kTileRows;
constexpr std::int64_t kFewRows = 4;  // up to here vectors are as fast: weights come from memory
// What one call sums up at a time: so much memory for sums.
constexpr std::int64_t kMaxRowTiles = 16, kMaxPanels = 16;
constexpr std::int64_t kTileSums = kRowTile * kLanes;
constexpr std::int64_t kMaxStretch = 1024;  // inputs, with what is added to fill the steps

struct TileScratch {
  alignas(64) float sums[kMaxRowTiles * kMaxPanels * kTileSums];
  alignas(64) unsigned char weights[2][kMaxStretch * kLanes];
};

inline TileScratch& tile_scratch() {
  static thread_local const std::unique_ptr<TileScratch> scratch(new TileScratch);
  return *scratch;
}

// Tiles 0 to 3 are sums, 4 and 5 of X, 6 and 7 of W. Configured anew in each call, which costs some
// hundred cycles: another library may have used the registers of this thread in between. Released
// after it, since the system saves what is in use whenever it switches threads.
class TileSession {
 public:
  explicit TileSession(std::int64_t step_bytes) {
    TileConfig config;
    const int bytes = static_cast<int>(step_bytes);
    for (int t = 0; t < 4; ++t) config.set(t, kTileRows, kTileRowBytes);
    for (int t = 4; t < 6; ++t) config.set(t, kTileRows, bytes);
    for (int t = 6; t < 8; ++t) config.set(t, bytes / 4, kTileRowBytes);
    tile_configure(config);
  }
  ~TileSession() { tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

struct DotBf16 {
  template <int Sum, int X, int W>
  static void add() {
    tile_dot_bf16<Sum, X, W>();
  }
};
struct DotBytes {
  template <int Sum, int X, int W>
  static void add() {
    tile_dot_bytes<Sum, X, W>();
  }
};

// Adds `steps` steps to the sums of MX tiles of x and NW panels. A tile of either is 16 *
// step_bytes long, and the next step's lies behind it.
template <class Dot, int MX, int NW>
inline void multiply_tiles(const unsigned char* const* x, const unsigned char* const* w,
                           std::int64_t steps, std::int64_t step_bytes) {
  for (std::int64_t at = 0; at < steps * kRowTile * step_bytes; at += kRowTile * step_bytes) {
    tile_load<4>(x[0] + at, step_bytes);
    tile_load<6>(w[0] + at, kTileRowBytes);
    Dot::template add<0, 4, 6>();
    if constexpr (NW == 2) {
      tile_load<7>(w[1] + at, kTileRowBytes);
      Dot::template add<1, 4, 7>();
    }
    if constexpr (MX == 2) {
      tile_load<5>(x[1] + at, step_bytes);
      Dot::template add<2, 5, 6>();
      if constexpr (NW == 2) Dot::template add<3, 5, 7>();
    }
  }
}

// Calls f(tile number, m, n), as constants, for each tile of sums.
template <int MX, int NW, class F>
inline void each_sum(F&& f) {
  const auto one = [&](auto i) {
    if constexpr (i / 2 < MX && i % 2 < NW) f(i, int{i} / 2, int{i} % 2);
  };
  unroll(one, std::make_integer_sequence<int, 4>{});
}

// A format says how rows of x and weights become tiles, and adds a stretch of inputs to the sums:
//   kRowTiles                row tiles that are taken at a time
//   step_bytes, steps        of a row of x, for all inputs
//   next_stretch(task, first, row_tiles)
//   weights(task, panel, first, last, room)    -> the panel's tiles
//   accumulate<MT, NR>(task, row_tile, rows, panel, first, last, weights, sums)
// with sums [row tile][panel][16][16], those of a row tile sum_stride apart.
#include "cpu/kernels/tiles_bf16.h"
//
#include "cpu/kernels/tiles_integer.h"

// ---- all tiles of a piece ----

// Rows and panels of one call that fit the scratch memory.
struct TilePiece {
  std::int64_t first_row, last_row, first_panel, last_panel;

  std::int64_t row_tiles() const { return (last_row - first_row + kRowTile - 1) / kRowTile; }
  std::int64_t panels() const { return last_panel - first_panel; }
};

// Takes the sums of a piece to where they belong.
template <class Tiles>
inline void finish_tiles(const LinearTask& task, const TilePiece& piece, const float* sums) {
  for (std::int64_t row = piece.first_row; row < piece.last_row; ++row) {
    const std::int64_t r = row - piece.first_row;
    for (std::int64_t panel = piece.first_panel; panel < piece.last_panel; ++panel) {
      const std::int64_t tile = r / kRowTile * piece.panels() + panel - piece.first_panel;
      Vec sum = load(sums + tile * kTileSums + r % kRowTile * kLanes);
      sum = Tiles::finish(task, sum, row, panel);
      float* out = task.out + row * task.out_stride + panel * kLanes;
      const float* bias = task.bias + panel * kLanes;
      const std::int64_t width = task.outputs - panel * kLanes;
      if (width >= kLanes) {
        if (task.bias) sum = add(sum, load(bias));
        store(out, sum);
      } else {
        if (task.bias) sum = add(sum, load_tail(bias, width, 0.0f));
        store_tail(out, sum, width);
      }
    }
  }
}

// Inputs [first, last) of NR panels, for all rows of a piece.
template <int NR, class Tiles>
inline void add_stretch(const LinearTask& task, const Tiles& tiles, const TilePiece& piece,
                        std::int64_t panel, std::int64_t first, std::int64_t last,
                        TileScratch& scratch) {
  const unsigned char* w[NR];
  for (int n = 0; n < NR; ++n)
    w[n] = tiles.weights(task, panel + n, first, last, scratch.weights[n]);
  const std::int64_t stride = piece.panels() * kTileSums;
  const auto add = [&](auto num_tiles, std::int64_t row_tile) {
    const std::int64_t row = piece.first_row + row_tile * kRowTile;
    tiles.template accumulate<num_tiles, NR>(
        task, row / kRowTile, piece.last_row - row, panel, first, last, w,
        scratch.sums + row_tile * stride + (panel - piece.first_panel) * kTileSums, stride);
  };
  std::int64_t row_tile = 0;
  for (; row_tile + Tiles::kRowTiles <= piece.row_tiles(); row_tile += Tiles::kRowTiles)
    add(std::integral_constant<int, Tiles::kRowTiles>{}, row_tile);
  if (row_tile < piece.row_tiles()) add(std::integral_constant<int, 1>{}, row_tile);
}

template <class Tiles>
inline void linear_tiles(const LinearTask& task, const TilePiece& whole) {
  const Tiles tiles(task);
  const TileSession session(tiles.step_bytes);
  TileScratch& scratch = tile_scratch();
  constexpr std::int64_t kMaxRows = kMaxRowTiles * kRowTile;
  for (std::int64_t panel = whole.first_panel; panel < whole.last_panel; panel += kMaxPanels) {
    for (std::int64_t row = whole.first_row; row < whole.last_row; row += kMaxRows) {
      const TilePiece piece{row, std::min(whole.last_row, row + kMaxRows), panel,
                            std::min(whole.last_panel, panel + kMaxPanels)};
      for (std::int64_t first = 0, last; first < task.depth; first = last) {
        last = std::min(task.depth, tiles.next_stretch(task, first, piece.row_tiles()));
        std::int64_t at = piece.first_panel;
        for (; at + 2 <= piece.last_panel; at += 2)
          add_stretch<2>(task, tiles, piece, at, first, last, scratch);
        if (at < piece.last_panel) add_stretch<1>(task, tiles, piece, at, first, last, scratch);
      }
      finish_tiles<Tiles>(task, piece, scratch.sums);
    }
  }
}

inline bool takes_tiles(const LinearTask& task) {
  return task.format != DType::f32 && task.rows > kFewRows;
}

void linear_on_tiles(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
                     std::int64_t first_panel, std::int64_t last_panel) {
  const TilePiece piece{first_row, last_row, first_panel, last_panel};
  if (!takes_tiles(task)) return linear(task, first_row, last_row, first_panel, last_panel);
  switch (task.format) {
    case DType::bf16:
      return linear_tiles<TilesBf16>(task, piece);
    case DType::int8:
      return task.activation_bits == 8 ? linear_tiles<TilesInteger<FormatInt8<1>>>(task, piece)
                                       : linear_tiles<TilesInteger<FormatInt8<2>>>(task, piece);
    case DType::int4:
      return task.levels ? linear_tiles<TilesInteger<FormatInt4Levels>>(task, piece)
                         : linear_tiles<TilesInteger<FormatInt4>>(task, piece);
    case DType::f32:
    case DType::f16:
      break;  // f32 was taken above, f16 has no packed format
  }
}

void prepare_tile_input(const LinearTask& task, std::int64_t row, void* to, const float* x,
                        std::int64_t inputs) {
  if (!takes_tiles(task)) return prepare_input(task, row, to, x, inputs);
  const std::int64_t within = row % kRowTile;
  unsigned char* tile = static_cast<unsigned char*>(to) - within * task.depth * 4;
  if (task.format == DType::bf16)
    return prepare_bf16_tile(task, tile + within * kTileRowBytes, x, inputs);
  prepare_integer_tile(task, row, tile + within * IntegerSteps(task).inputs, x, inputs);
}

#include "cpu/kernels/attention_tiles.h"

// Pieces of many rows, since weights come from memory once for each: 256 rows and 16 panels are
// sums of 256 KiB, and 768 KiB of x and weights a stretch of 1024 bytes, in the second cache.
inline Kernels with_tiles(Kernels kernels) {
  kernels.prepare_input = prepare_tile_input;
  kernels.linear = linear_on_tiles;
  kernels.attend = attend_on_tiles;
  kernels.pieces = {2 * kRowTile, kMaxRowTiles * kRowTile, kMaxPanels};
  return kernels;
}

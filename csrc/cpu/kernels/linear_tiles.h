// Matrix products on tile registers: 16 rows of x by 16 outputs at a time.
//
//   sums (rows x outputs) += X (rows x a step of inputs) * W (a step of inputs x outputs)
//
// where each of W's 64-byte rows holds 4 bytes of inputs of 16 outputs: the layout of a packed
// panel. A step is 64 bytes of a row of x, 32 inputs in bf16, 64 in int8.
//
// The layout of x, written by prepare_input when there are more than kFewRows rows:
//   [tile of 16 rows][high bytes, low bytes (16-bit codes only)][step][16][bytes of a step]
// in whole tiles, one after another, so that a load's 16 cache lines are in different sets. Integer
// blocks begin with a new step, and a step's unused end is zero.
//
// bf16: TDPBF16PS sums up 32 inputs in just the order of linear_float.h and adds them to the sums,
// so chaining steps gives the bits of the other instruction sets (while all numbers are normal: the
// processor takes denormal ones as zeros).
// int8: TDPBSUD, signed codes by unsigned levels. High and low bytes are two tiles of the same
// product; 256 * high + low is then used as in linear_integer.h.
// int8 and int4 in groups: tiles_codes.h.
//
// Cost of one product, in ticks of 2.6 GHz, measured on one core of a Sapphire Rapids-like Xeon: 11
// without loads, 14 with x and W in L1, 22 with x in L2, 24 where W comes from beyond L2 as
// described here, 36 where nothing is prefetched. Two tiles of X by two of W are four products for
// four loads. So
//   - 512 inputs of two panels, 32 KiB of bf16, stay in L1 for all rows; rows are loaded from L2
//     without going into L1 (tileloaddt1);
//   - 256 rows of x, 1 MiB, stay in L2 for all panels. Longer rows are taken 512 inputs at a time
//     for many panels, and the next 512 are prefetched meanwhile;
//   - rows' shares of a stretch do not lie a power of two apart: they would push each other out;
//   - the next two panels are prefetched, a few lines a step;
//   - results bypass the caches: they would push x out, and be fetched first. They are finished a
//     little in each step, which still costs a tenth of the time.
// Three panels at a time, or one row tile by four panels, need fewer of x's loads and are a fifth
// slower.

#include "cpu/kernels/tiles.h"

constexpr std::int64_t kFewRows = 4;     // up to here vectors are as fast: weights come from memory
constexpr std::int64_t kShallow = 2048;  // inputs; 256 rows of so many stay in L2
constexpr std::int64_t kWorthKeeping = 3;  // calls that use the weights of kPart inputs

// A format says how rows of x and weights become tiles, and adds a stretch of inputs to the sums:
//   kRowTiles                row tiles that are taken at a time
//   step_bytes               of a row of x
//   kInputs                  of a step
//   next_stretch(task, first, row_tiles)             all of the block's rows take so many inputs
//   kPart                    inputs of a stretch whose weights stay in L1 meanwhile
//   weights_ahead(task, panels, first, length), x_ahead(task, row_tile, first, length)
//   weights(task, panel, first, last, room)          -> the panel's tiles
//   accumulate<MT, NR>(task, rows, panels, first, last, weights, sums, stride, beside)
//   kStreams                 whether a single tile of rows has a separate function
//   flush(): adds the sums that accumulate left to be added during the next tiles
// with sums [row tile][panel][16][16], those of a row tile `stride` apart.
#include "cpu/kernels/tiles_bf16.h"
//
#include "cpu/kernels/tiles_codes.h"
//
#include "cpu/kernels/tiles_integer.h"

// ---- all tiles of a piece ----

inline bool takes_tiles(const LinearTask& task) {
  return task.format != DType::f32 && task.rows > (is_grouped(task) ? 1 : kFewRows);
}

template <class Tiles>
inline Vec finish_sum(const LinearTask& task, Vec sum, std::int64_t row, std::int64_t panel) {
  sum = Tiles::finish(task, sum, row, panel);
  return task.bias ? add(sum, load_outputs(task, task.bias, panel)) : sum;
}

// Results of many rows do not fit L2 beside the operands: they bypass it, where they are whole
// cache lines.
constexpr std::int64_t kStreamedRows = 128;

inline bool is_streamed(const LinearTask& task, const void* to, std::int64_t stride) {
  return task.rows >= kStreamedRows && reinterpret_cast<std::uintptr_t>(to) % 64 == 0 &&
         stride % kLanes == 0;
}

inline void store_line(float* to, Vec y, bool is_streamed) {
  is_streamed ? stream(to, y) : store(to, y);
}

// 32 inputs of a row as bf16, in the order of the format's tiles.
inline Vec input_line(const LinearTask& task, Vec x0, Vec x1) {
  const Vec line = two_as_bf16(x0, x1);
  if (!is_grouped(task)) return line;
  static constexpr std::uint16_t kPlaces[32] = {0,  2,  1,  3,  4,  6,  5,  7,  8,  10, 9,
                                                11, 12, 14, 13, 15, 16, 18, 17, 19, 20, 22,
                                                21, 23, 24, 26, 25, 27, 28, 30, 29, 31};
  return permute_halves(line, kPlaces);
}

// A row of x, as its tile holds it.
inline void prepare_bf16_tile(const LinearTask& task, unsigned char* to, const float* x,
                              std::int64_t inputs) {
  const auto load_some = [&](std::int64_t k) {
    const std::int64_t left = inputs - k;
    return left >= kLanes ? load(x + k) : left > 0 ? load_tail(x + k, left, 0.0f) : zero();
  };
  for (std::int64_t k = 0; k < task.depth; k += TilesBf16::kInputs, to += kTileBytes)
    store(reinterpret_cast<float*>(to), input_line(task, load_some(k), load_some(k + kLanes)));
}

// y = activation(gate) * up of two panels' outputs, as input of the product that reads it.
inline void store_input_tile(const LinearTask& next, std::int64_t row, std::int64_t output, Vec y0,
                             Vec y1, bool is_streamed) {
  unsigned char* tile = static_cast<unsigned char*>(next.input) +
                        row / kRowTile * kRowTile * next.x_stride * 4 +
                        output / TilesBf16::kInputs * kTileBytes + row % kRowTile * kTileRowBytes;
  store_line(reinterpret_cast<float*>(tile), input_line(next, y0, y1), is_streamed);
}

// Some rows and panels whose sums fit the scratch memory. Panels are taken in pairs; of a gated
// pair only the gates are counted.
struct TileBlock {
  std::int64_t first_row, last_row, first_panel, last_panel;
  std::int64_t up_panels;

  std::int64_t row_tiles() const { return (last_row - first_row + kRowTile - 1) / kRowTile; }
  std::int64_t panels_of_pair() const { return up_panels ? 1 : 2; }
  std::int64_t pairs() const {
    return (last_panel - first_panel + panels_of_pair() - 1) / panels_of_pair();
  }
  PanelPair pair(std::int64_t index) const {
    const std::int64_t panel = first_panel + index * panels_of_pair();
    return {{panel, panel + (up_panels ? up_panels : 1)}};
  }
  // Whether the second panel exists.
  bool is_whole(const PanelPair& pair) const { return up_panels || pair.panel[1] < last_panel; }
  // Sums: [pair][row tile][2][16 rows][16].
  static std::int64_t sums_at(std::int64_t pair, std::int64_t row_tile) {
    return (pair * kMaxRowTiles + row_tile) * 2 * kTileSums;
  }
};

// Stores the complete sums of a block, a row at a time: rows of the result are often a power of two
// apart, and short pieces of many of them would push each other out of caches. A little is done in
// each step of the next block. The kind of store is chosen once for a block, since every
// instruction counts there: one lambda for all kinds makes an MLP 3 % slower.
template <class Tiles>
class Finish {
 public:
  Finish() = default;
  Finish(const LinearTask& task, const TileBlock& block, const float* sums)
      : block_(block), row_(block.first_row), sums_(sums) {
    const bool to_tiles = task.next && takes_tiles(*task.next);
    const void* to = to_tiles ? task.next->input : task.out;
    is_streamed_ = is_streamed(task, to, to_tiles ? kLanes : task.out_stride);
    const bool are_whole =
        block.is_whole(block.pair(block.pairs() - 1)) && block.last_panel * kLanes <= task.outputs;
    if (block.up_panels)
      way_ = to_tiles ? Way::to_tiles : Way::gated;
    else
      way_ = are_whole ? Way::whole : Way::any;
    pairs_at_once_ = to_tiles ? 2 : 1;
  }

  // Calls of `step` until all is done, or nearly.
  void spread(std::int64_t steps) {
    const std::int64_t due = (block_.last_row - row_) * block_.pairs() / pairs_at_once_;
    wait_ = every_ = due > 0 ? std::max(steps / due, std::int64_t{1}) : steps;
  }

  void step(const LinearTask& task) {
    if (--wait_ > 0) return;
    wait_ = every_;
    finish_some(task);
  }

  void finish_all(const LinearTask& task) {
    while (row_ < block_.last_row) finish_some(task);
  }

 private:
  enum class Way { any, whole, gated, to_tiles };

  // A pair of panels of a row, or two where they fill a cache line of the next product's input.
  void finish_some(const LinearTask& task) {
    if (row_ >= block_.last_row) return;
    const std::int64_t r = row_ - block_.first_row;
    const PanelPair pair = block_.pair(pair_);
    const float* at = sums_ + block_.sums_at(pair_, r / kRowTile) + r % kRowTile * kLanes;
    const auto sum = [&](int n) {
      return finish_sum<Tiles>(task, load(at + n * kTileSums), row_, pair.panel[n]);
    };
    float* out = task.out + row_ * task.out_stride;
    const std::int64_t output = pair.panel[0] * kLanes;
    switch (way_) {
      case Way::whole:
        store_line(out + output, sum(0), is_streamed_);
        store_line(out + output + kLanes, sum(1), is_streamed_);
        break;
      case Way::to_tiles: {
        const auto gated = [&](int index) {
          const float* sums = at + block_.sums_at(index, 0);
          const auto of = [&](int n) {
            return finish_sum<Tiles>(task, load(sums + n * kTileSums), row_, pair.panel[n] + index);
          };
          const Vec gate = of(0);
          return activate_pair(task, gate, of(1));
        };
        const Vec y = gated(0);
        store_input_tile(*task.next, row_, output, y, gated(1), is_streamed_);
        break;
      }
      case Way::gated:
        if (task.next)
          store_activated(task, row_, output, sum(0), sum(1));
        else
          store_line(out + output, activate_pair(task, sum(0), sum(1)), is_streamed_);
        break;
      case Way::any:
        store_outputs(task, out, pair.panel[0], sum(0));
        if (block_.is_whole(pair)) store_outputs(task, out, pair.panel[1], sum(1));
        break;
    }
    pair_ += pairs_at_once_;
    if (pair_ < block_.pairs()) return;
    pair_ = 0;
    ++row_;
  }

  TileBlock block_{};
  std::int64_t row_ = 0, pair_ = 0, pairs_at_once_ = 1;
  std::int64_t every_ = 1, wait_ = 1;  // steps
  const float* sums_ = nullptr;
  bool is_streamed_ = false;
  Way way_ = Way::any;
};

template <class Tiles>
class TileProduct {
 public:
  explicit TileProduct(const LinearTask& task)
      : task_(task), tiles_(task), scratch_(tile_scratch()) {}

  void multiply(std::int64_t first_row, std::int64_t last_row, std::int64_t first_panel,
                std::int64_t last_panel) {
    const TileSession session(tiles_.step_bytes, task_.rows,
                              Tiles::kStreams && task_.rows <= kRowTile);
    constexpr std::int64_t kMaxRows = kMaxRowTiles * kRowTile;
    // Few panels at a time where sums are complete after one stretch, so that they are in L2 only
    // for a short time; many where rows are taken a stretch at a time; and four where all rows fit
    // one call: then their weights are read from one end to the other.
    const std::int64_t row_tiles =
        std::min(kMaxRows, last_row - first_row + kRowTile - 1) / kRowTile;
    const bool is_whole = tiles_.next_stretch(task_, 0, row_tiles) >= task_.depth;
    std::int64_t panels = is_whole || row_tiles <= Tiles::kRowTiles ? 4
                          : task_.depth <= kShallow                 ? kMaxPanels / 2
                                                                    : kMaxPanels;
    if (task_.up_panels) panels /= 2;
    for (std::int64_t row = first_row; row < last_row; row += kMaxRows) {
      for (std::int64_t panel = first_panel; panel < last_panel; panel += panels)
        multiply_block({row, std::min(last_row, row + kMaxRows), panel,
                        std::min(last_panel, panel + panels), task_.up_panels});
    }
    finish_.finish_all(task_);
    stream_fence();
  }

 private:
  void multiply_block(const TileBlock& block) {
    float* sums = scratch_.sums[turn_];
    if constexpr (Tiles::kStreams) {
      if (task_.rows <= kRowTile) {
        stream_block(block);
        return;
      }
    }
    const std::int64_t pairs = block.pairs();
    const std::int64_t calls = (block.row_tiles() + Tiles::kRowTiles - 1) / Tiles::kRowTiles;
    finish_.spread(pairs * calls * (task_.depth / Tiles::kInputs));
    for (std::int64_t first = 0, last; first < task_.depth; first = last) {
      last = std::min(task_.depth, tiles_.next_stretch(task_, first, block.row_tiles()));
      const std::int64_t next_first = last < task_.depth ? last : 0, length = last - first;
      const std::int64_t steps = (length + Tiles::kInputs - 1) / Tiles::kInputs;
      for (std::int64_t index = 0; index < pairs; ++index) {
        // Prefetch the first pair's next stretch, or the next block's first pair, unless it does
        // not fit beside this one.
        const bool is_last = index + 1 == pairs;
        const PanelPair next = block.pair(is_last && next_first ? 0 : index + 1);
        if (length <= kShallow)
          ahead_ = {tiles_.weights_ahead(task_, next, is_last ? next_first : first, length),
                    steps * calls};
        const auto next_x = [&](std::int64_t row_tile) {
          if (task_.depth <= kShallow || length == task_.depth) return AskAhead();
          return AskAhead(tiles_.x_ahead(task_, row_tile, next_first, length), steps, index, pairs);
        };
        const std::int64_t part = calls >= kWorthKeeping ? Tiles::kPart : length;
        for (std::int64_t begin = first; begin < last; begin += part) {
          const std::int64_t end = std::min(last, begin + part);
          const PanelPair pair = block.pair(index);
          float* at = sums + block.sums_at(index, 0);
          if (block.is_whole(pair))
            add_part<2>(block, pair, begin, end, at, next_x);
          else
            add_part<1>(block, pair, begin, end, at, next_x);
        }
      }
    }
    tiles_.flush();
    finish_.finish_all(task_);
    finish_ = Finish<Tiles>(task_, block, sums);
    turn_ = 1 - turn_;
  }

  void stream_block(const TileBlock& block) {
    StreamedPanel panels[4];
    int count = 0;
    for (std::int64_t index = 0; index < block.pairs(); ++index) {
      const PanelPair pair = block.pair(index);
      for (int n = 0; n < (block.is_whole(pair) ? 2 : 1); ++n)
        panels[count++] = {pair.panel[n],
                           scratch_.sums[0] + block.sums_at(index, 0) + n * kTileSums};
    }
    tiles_.stream(task_, block.first_row / kRowTile, block.last_row - block.first_row, panels,
                  count, scratch_.weights[0]);
    finish_ = Finish<Tiles>(task_, block, scratch_.sums[0]);
    finish_.finish_all(task_);
  }

  // Inputs [first, last) of NR panels, for the rows of a block. next_x(row tile): x to prefetch.
  template <int NR, class NextX>
  void add_part(const TileBlock& block, const PanelPair& pair, std::int64_t first,
                std::int64_t last, float* sums, NextX&& next_x) {
    const unsigned char* w[NR];
    for (int n = 0; n < NR; ++n)
      w[n] = tiles_.weights(task_, pair.panel[n], first, last, scratch_.weights[n]);
    const std::int64_t row_tiles = block.row_tiles();
    const auto add = [&](auto num_tiles, std::int64_t row_tile) {
      const std::int64_t tile = block.first_row / kRowTile + row_tile;
      AskAhead x_ahead = next_x(tile);
      const auto beside = [&](std::int64_t) {
        ahead_();
        x_ahead();
        finish_.step(task_);
      };
      tiles_.template accumulate<num_tiles, NR>(
          task_, {tile, block.last_row - tile * kRowTile, row_tile == 0}, pair, first, last, w,
          sums + block.sums_at(0, row_tile), 2 * kTileSums, beside);
    };
    std::int64_t row_tile = 0;
    for (; row_tile + Tiles::kRowTiles <= row_tiles; row_tile += Tiles::kRowTiles)
      add(std::integral_constant<int, Tiles::kRowTiles>{}, row_tile);
    if (row_tile < row_tiles) add(std::integral_constant<int, 1>{}, row_tile);
  }

  const LinearTask& task_;
  Tiles tiles_;
  TileScratch& scratch_;
  int turn_ = 0;
  Finish<Tiles> finish_;
  AskAhead ahead_;
};

void linear_on_tiles(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
                     std::int64_t first_panel, std::int64_t last_panel) {
  const auto run = [&](auto&& product) {
    product.multiply(first_row, last_row, first_panel, last_panel);
  };
  if (!takes_tiles(task)) {
    if (!is_grouped(task)) return linear(task, first_row, last_row, first_panel, last_panel);
    const auto multiply = task.format == DType::int4 ? linear_format<FormatCodes<Codes4>>
                                                     : linear_format<FormatCodes<Codes8>>;
    return task.up_panels
               ? linear_gated(task, first_row, last_row, first_panel, last_panel, multiply)
               : multiply(task, first_row, last_row, first_panel, last_panel);
  }
  switch (task.format) {
    case DType::bf16:
      return run(TileProduct<TilesBf16>(task));
    case DType::int8:
      if (is_grouped(task)) return run(TileProduct<TilesCodes<Codes8>>(task));
      return task.activation_bits == 8 ? run(TileProduct<TilesInt8<1>>(task))
                                       : run(TileProduct<TilesInt8<2>>(task));
    case DType::int4:
      return run(TileProduct<TilesCodes<Codes4>>(task));
    case DType::f32:
    case DType::f16:
      break;  // f32 is handled above, f16 has no packed format
  }
}

// A stretch of all rows must stay in L2, so the rows' shares of it must not lie a power of two
// apart.
std::int64_t tile_input_stride(const LinearTask& task) {
  if (!takes_tiles(task)) return input_stride(task);
  if (task.format == DType::bf16) return TilesBf16::input_stride(task);
  if (is_grouped(task)) return TilesCodes<Codes8>::input_stride(task);  // as of Codes4
  return task.activation_bits == 16 ? TilesInt8<2>::input_stride(task)
                                    : TilesInt8<1>::input_stride(task);
}

void prepare_tile_input(const LinearTask& task, std::int64_t row, void* to, const float* x,
                        std::int64_t inputs) {
  if (!takes_tiles(task)) {
    if (!is_grouped(task)) return prepare_input(task, row, to, x, inputs);
    return prepare_bf16(to, x, inputs, task.depth);
  }
  const std::int64_t within = row % kRowTile;
  unsigned char* tile = static_cast<unsigned char*>(to) - within * task.x_stride * 4;
  if (task.format == DType::bf16 || is_grouped(task))
    return prepare_bf16_tile(task, tile + within * kTileRowBytes, x, inputs);
  prepare_integer_tile(task, row, tile + within * kTileRowBytes, x, inputs);
}

#include "cpu/kernels/attention_tiles.h"

// Pieces of many rows, since weights come from beyond L2 once for each piece.
inline Kernels with_tiles(Kernels kernels) {
  kernels.input_stride = tile_input_stride;
  kernels.prepare_input = prepare_tile_input;
  kernels.linear = linear_on_tiles;
  kernels.attend = attend_on_tiles;
  kernels.pieces = {2 * kRowTile, kMaxRowTiles * kRowTile, kMaxPanels, true};
  kernels.groups_take_bf16 = true;
  return kernels;
}

// Matrix products: x (rows, depth) times packed weights.
//
// A format (linear_float.h, linear_integer.h) says how a tile of a few rows and panels adds up a
// stretch of inputs; this file takes tiles, stretches and rows in an order that suits the caches.
// The bits of an output depend neither on the tile that computes it nor on where stretches end.
// Bias comes last.

// At most so many inputs at a time, so that a few panels' weights stay in the second cache while
// rows pass by.
constexpr std::int64_t kDepthChunk = 1024;

// Where to ask for what is needed soon, in arrays of so many items a panel, of which a tile goes
// through several at once: the processor's own prefetching begins anew with each panel.
class Ahead {
 public:
  Ahead(std::int64_t distance, std::int64_t panel_items, int num_panels)
      : distance_(distance), end_(panel_items - distance), skip_((num_panels - 1) * panel_items) {}

  // How many items from item `at` of a panel; behind its end come the panels of the next tile.
  std::int64_t from(std::int64_t at) const { return at < end_ ? distance_ : distance_ + skip_; }

 private:
  std::int64_t distance_, end_, skip_;
};

constexpr std::int64_t kWordsAhead = 512;           // 2 KiB of each panel
constexpr std::int64_t kScalesAhead = 16 * kLanes;  // what 16 groups need

#include "cpu/kernels/linear_float.h"
//
#include "cpu/kernels/linear_integer.h"

// Inputs [first, last) of MR rows and NR panels; partial sums wait in `out` between calls.
template <int MR, int NR, class Format>
inline void linear_tile(const LinearTask& task, const Format& format, std::int64_t row,
                        std::int64_t panel, std::int64_t first, std::int64_t last) {
  alignas(64) float acc[MR * NR * kLanes];
  const auto width = [&](int n) {
    const std::int64_t left = task.outputs - (panel + n) * kLanes;
    return left < kLanes ? left : kLanes;
  };
  const auto load_some = [&](const float* p, int n) {
    return width(n) == kLanes ? load(p) : load_tail(p, width(n), 0.0f);
  };
  const auto out = [&](int m, int n) {
    return task.out + (row + m) * task.out_stride + (panel + n) * kLanes;
  };
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n)
      store(acc + (m * NR + n) * kLanes, first == 0 ? zero() : load_some(out(m, n), n));
  }
  format.template accumulate<MR, NR>(task, row, panel, first, last, acc);
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) {
      Vec sum = load(acc + (m * NR + n) * kLanes);
      if (last == task.depth) {
        sum = format.finish(task, sum, row + m, panel + n);
        if (task.bias) sum = add(sum, load_some(task.bias + (panel + n) * kLanes, n));
      }
      if (width(n) == kLanes) {
        store(out(m, n), sum);
      } else {
        store_tail(out(m, n), sum, width(n));
      }
    }
  }
}

// All panels of MR rows, NR at a time, then one at a time.
template <int MR, int NR, class Format>
inline void linear_rows(const LinearTask& task, const Format& format, std::int64_t row,
                        std::int64_t first_panel, std::int64_t last_panel, std::int64_t first,
                        std::int64_t last) {
  std::int64_t panel = first_panel;
  for (; panel + NR <= last_panel; panel += NR)
    linear_tile<MR, NR>(task, format, row, panel, first, last);
  for (; panel < last_panel; ++panel) linear_tile<MR, 1>(task, format, row, panel, first, last);
}

template <class Format>
inline void linear_format(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
                          std::int64_t first_panel, std::int64_t last_panel) {
  constexpr int kTileRows = Format::kTileRows;
  const Format format(task);
  const bool streams = last_row - first_row <= kStreamRows;
  for (std::int64_t first = 0; first < task.depth;) {
    const std::int64_t chunk_end = streams ? task.depth : format.next_chunk(task, first);
    const std::int64_t last = chunk_end < task.depth ? chunk_end : task.depth;
    for (std::int64_t panel = first_panel; panel < last_panel; panel += kPanelGroup) {
      const std::int64_t end = panel + kPanelGroup < last_panel ? panel + kPanelGroup : last_panel;
      const auto rows = [&](auto num_rows, std::int64_t row) {
        constexpr int kAtOnce = num_rows == 1 ? Format::kTilePanelsOneRow : Format::kTilePanels;
        linear_rows<num_rows, kAtOnce>(task, format, row, panel, end, first, last);
      };
      std::int64_t row = first_row;
      for (; row + kTileRows <= last_row; row += kTileRows)
        rows(std::integral_constant<int, kTileRows>{}, row);
      // What is left is fewer than kTileRows: the one tile of just that height.
      const auto rest = [&](auto num_rows) {
        if (last_row - row == num_rows + 1) rows(std::integral_constant<int, num_rows + 1>{}, row);
      };
      unroll(rest, std::make_integer_sequence<int, kTileRows - 1>{});
    }
    first = last;
  }
}

void linear(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
            std::int64_t first_panel, std::int64_t last_panel) {
  const auto run = [&](auto kernel) { kernel(task, first_row, last_row, first_panel, last_panel); };
  switch (task.format) {
    case DType::f32:
      return run(linear_format<FloatFormat<PairsF32>>);
    case DType::bf16:
      return run(linear_format<FormatBf16>);
    case DType::int8:
      return task.activation_bits == 8 ? run(linear_format<IntegerFormat<FormatInt8<1>>>)
                                       : run(linear_format<IntegerFormat<FormatInt8<2>>>);
    case DType::int4:
      return task.levels ? run(linear_format<IntegerFormat<FormatInt4Levels>>)
                         : run(linear_format<IntegerFormat<FormatInt4>>);
    case DType::f16:
      break;  // no packed format
  }
}

void prepare_input(const LinearTask& task, std::int64_t row, void* to, const float* x,
                   std::int64_t inputs) {
  switch (task.format) {
    case DType::f32:
      return prepare_f32(static_cast<float*>(to), x, inputs, task.depth);
    case DType::bf16:
      return prepare_bf16(to, x, inputs, task.depth);
    default:
      return prepare_integers(task, row, to, x, inputs);
  }
}

// Matrix products: x (rows, depth) times packed weights.
//
// A format (linear_float.h, linear_integer.h) says how a tile of a few rows and panels adds up a
// stretch of inputs; this file takes tiles, stretches and rows in an order that suits the caches.
// The bits of an output depend neither on the tile that computes it nor on where stretches end.
// Bias is added last.

// For memory that is needed later: into L2.
inline void prefetch_second(const void* p) { __builtin_prefetch(p, 0, 1); }

// At most so many inputs at a time, so that a few panels' weights stay in L2 for all rows.
constexpr std::int64_t kDepthChunk = 1024;

// The places to prefetch in arrays of so many items a panel; a tile goes through several panels at
// once. The processor's own prefetching starts again with each panel.
class Ahead {
 public:
  Ahead(std::int64_t distance, std::int64_t panel_items, int num_panels)
      : distance_(distance), end_(panel_items - distance), skip_((num_panels - 1) * panel_items) {}

  // The distance in items from item `at` of a panel; after its end come the next tile's panels.
  std::int64_t from(std::int64_t at) const { return at < end_ ? distance_ : distance_ + skip_; }

 private:
  std::int64_t distance_, end_, skip_;
};

constexpr std::int64_t kWordsAhead = 512;           // 2 KiB of each panel
constexpr std::int64_t kScalesAhead = 16 * kLanes;  // the scales of 16 groups

#include "cpu/kernels/linear_float.h"
//
#include "cpu/kernels/linear_integer.h"

// The outputs of a panel, 16 or fewer in the last one: their number, loading, storing.
inline std::int64_t panel_width(const LinearTask& task, std::int64_t panel) {
  const std::int64_t left = task.outputs - panel * kLanes;
  return left < kLanes ? left : kLanes;
}
inline Vec load_outputs(const LinearTask& task, const float* row, std::int64_t panel) {
  const std::int64_t width = panel_width(task, panel);
  const float* p = row + panel * kLanes;
  return width == kLanes ? load(p) : load_tail(p, width, 0.0f);
}
inline void store_outputs(const LinearTask& task, float* row, std::int64_t panel, Vec sum) {
  const std::int64_t width = panel_width(task, panel);
  float* p = row + panel * kLanes;
  if (width == kLanes) {
    store(p, sum);
  } else {
    store_tail(p, sum, width);
  }
}

// Inputs [first, last) of MR rows and NR panels; partial sums are stored in `out` between calls.
template <int MR, int NR, class Format>
inline void linear_tile(const LinearTask& task, const Format& format, std::int64_t row,
                        std::int64_t panel, std::int64_t first, std::int64_t last) {
  alignas(64) float acc[MR * NR * kLanes];
  const auto out = [&](int m) { return task.out + (row + m) * task.out_stride; };
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n)
      store(acc + (m * NR + n) * kLanes,
            first == 0 ? zero() : load_outputs(task, out(m), panel + n));
  }
  format.template accumulate<MR, NR>(task, row, panel, first, last, acc);
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) {
      Vec sum = load(acc + (m * NR + n) * kLanes);
      if (last == task.depth) {
        sum = format.finish(task, sum, row + m, panel + n);
        if (task.bias) sum = add(sum, load_outputs(task, task.bias, panel + n));
      }
      store_outputs(task, out(m), panel + n, sum);
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
      // Fewer than kTileRows rows are left: one tile of exactly that height.
      const auto rest = [&](auto num_rows) {
        if (last_row - row == num_rows + 1) rows(std::integral_constant<int, num_rows + 1>{}, row);
      };
      unroll(rest, std::make_integer_sequence<int, kTileRows - 1>{});
    }
    first = last;
  }
}

inline void linear_plain(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
                         std::int64_t first_panel, std::int64_t last_panel) {
  const auto run = [&](auto kernel) { kernel(task, first_row, last_row, first_panel, last_panel); };
  switch (task.format) {
    case DType::f32:
      return run(linear_format<FloatFormat<PairsF32>>);
    case DType::bf16:
      return run(linear_format<FormatBf16>);
    case DType::int8:
      if (is_grouped(task)) return run(linear_format<IntegerFormat<FormatInt8<2, true>>>);
      return task.activation_bits == 8 ? run(linear_format<IntegerFormat<FormatInt8<1>>>)
                                       : run(linear_format<IntegerFormat<FormatInt8<2>>>);
    case DType::int4:
      return task.levels ? run(linear_format<IntegerFormat<FormatInt4Levels>>)
                         : run(linear_format<IntegerFormat<FormatInt4>>);
    case DType::f16:
      break;  // not a packed format
  }
}

inline Vec activate_pair(const LinearTask& task, Vec gate, Vec up) {
  return mul(activated(task.activation, gate), up);
}

// activation(gate) * up of 16 outputs of a row: to `out`, or as an input of the next product.
inline void store_activated(const LinearTask& task, std::int64_t row, std::int64_t output, Vec gate,
                            Vec up) {
  const Vec y = activate_pair(task, gate, up);
  if (!task.next) return store(task.out + row * task.out_stride + output, y);
  auto* to = static_cast<float*>(task.next->input) + row * task.next->x_stride;
  if (task.next->format == DType::f32) return store(to + output, y);
  store_bf16_input(to, output, y);
}

// Gates and ups are computed together, and multiplied before they leave the cache.
template <class Multiply>
inline void linear_gated(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
                         std::int64_t first_panel, std::int64_t last_panel, Multiply&& multiply) {
  const std::int64_t rows = last_row - first_row, width = (last_panel - first_panel) * kLanes;
  static thread_local std::vector<float> memory;
  memory.resize(std::max(memory.size(), static_cast<std::size_t>(2 * rows * width)));
  LinearTask part = task;
  part.out_stride = width;
  for (int half = 0; half < 2; ++half) {
    const std::int64_t panels = half * task.up_panels;
    part.out =
        memory.data() + half * rows * width - first_row * width - (first_panel + panels) * kLanes;
    multiply(part, first_row, last_row, first_panel + panels, last_panel + panels);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* gate = memory.data() + r * width;
    for (std::int64_t i = 0; i < width; i += kLanes)
      store_activated(task, first_row + r, first_panel * kLanes + i, load(gate + i),
                      load(gate + rows * width + i));
  }
}

void linear(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
            std::int64_t first_panel, std::int64_t last_panel) {
  if (task.up_panels)
    linear_gated(task, first_row, last_row, first_panel, last_panel, linear_plain);
  else
    linear_plain(task, first_row, last_row, first_panel, last_panel);
}

std::int64_t input_stride(const LinearTask& task) { return task.depth; }

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

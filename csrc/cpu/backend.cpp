// Memory, packing, and the ops that touch each number once.

#include "cpu/backend.h"

#include <algorithm>
#include <cstring>

#include "cpu/platform.h"

namespace octavo::cpu {

namespace {

// Element (row, input) of packed weights; kernels.h has the layout.
std::int64_t packed_item(const Linear& linear, std::int64_t depth, std::int64_t row,
                         std::int64_t input) {
  const std::int64_t panel = row / kLanes * depth * kLanes, lane = row % kLanes;
  if (linear.format == DType::bf16) return panel + (input / 2 * kLanes + lane) * 2 + input % 2;
  return panel + input * kLanes + lane;
}

std::int64_t padded_depth(std::int64_t inputs) {
  return (inputs + kDepthBlock - 1) / kDepthBlock * kDepthBlock;
}

void unpack_row(float* out, const Linear& table, std::int64_t row, bool add) {
  const std::int64_t depth = padded_depth(table.inputs);
  for (std::int64_t i = 0; i < table.inputs; ++i) {
    const float value =
        load_float(table.weight.data(), table.format, packed_item(table, depth, row, i));
    out[i] = add ? out[i] + value : value;
  }
}

}  // namespace

CpuBackend::CpuBackend(int num_threads, const std::string& isa)
    : pool_(num_threads > 0 ? num_threads : physical_cores()), kernels_(kernels_for(isa)) {}

void* CpuBackend::allocate(std::size_t bytes) { return cpu::allocate(bytes); }

void CpuBackend::release(void* data, std::size_t bytes) noexcept { cpu::release(data, bytes); }

void CpuBackend::upload(void* device, const void* host, std::size_t bytes) {
  std::memcpy(device, host, bytes);
}

void CpuBackend::download(void* host, const void* device, std::size_t bytes) {
  std::memcpy(host, device, bytes);
}

std::size_t CpuBackend::available_memory() const { return cpu::available_memory(); }

Linear CpuBackend::make_linear(std::int64_t outputs, std::int64_t inputs, DType format,
                               bool with_bias) {
  require(format != DType::f16, "the CPU computes with f32 or bf16 weights, not f16");
  Linear linear;
  linear.outputs = outputs;
  linear.inputs = inputs;
  linear.format = format;
  const std::int64_t panels = (outputs + kLanes - 1) / kLanes;
  linear.weight = Buffer(
      this, static_cast<std::size_t>(panels * kLanes * padded_depth(inputs) * item_size(format)));
  if (with_bias) linear.bias = Buffer(this, static_cast<std::size_t>(outputs) * 4);
  return linear;
}

namespace {

// Packs the rows of one panel: lanes [first_lane, last_lane) from consecutive rows of `rows`.
// Inputs outside, lanes inside: what is written lies in one piece.
template <class Item, class Convert>
void pack_panel(Item* panel, const HostMatrix& rows, std::int64_t first_row,
                std::int64_t first_lane, std::int64_t last_lane, Convert&& convert) {
  constexpr std::int64_t kPair = sizeof(Item) == 2 ? 2 : 1;  // bf16 inputs lie in pairs
  for (std::int64_t i = 0; i < rows.cols; ++i) {
    Item* lanes = panel + i / kPair * kPair * kLanes + i % kPair;
    for (std::int64_t lane = first_lane; lane < last_lane; ++lane)
      lanes[lane * kPair] = convert((first_row + lane - first_lane) * rows.cols + i);
  }
}

}  // namespace

void CpuBackend::pack_rows(Linear& linear, std::int64_t first_row, const HostMatrix& rows) {
  const std::int64_t panel_items = padded_depth(linear.inputs) * kLanes;
  const std::int64_t last_row = first_row + rows.rows;
  const std::int64_t first_panel = first_row / kLanes;
  const std::int64_t num_panels = (last_row - 1) / kLanes - first_panel + 1;
  pool_.each(num_panels, [&](std::int64_t index, int) {
    const std::int64_t begin = (first_panel + index) * kLanes;
    const std::int64_t first_lane = std::max<std::int64_t>(0, first_row - begin);
    const std::int64_t last_lane = std::min(kLanes, last_row - begin);
    const std::int64_t source = begin + first_lane - first_row;
    const auto pack = [&](auto* items, auto&& convert) {
      pack_panel(items + (first_panel + index) * panel_items, rows, source, first_lane, last_lane,
                 convert);
    };
    if (linear.format == DType::f32 && rows.dtype == DType::bf16) {
      const auto* from = static_cast<const std::uint16_t*>(rows.data);
      pack(linear.weight.as<float>(), [=](std::int64_t i) { return bf16_to_float(from[i]); });
    } else if (linear.format == DType::f32) {
      pack(linear.weight.as<float>(),
           [&](std::int64_t i) { return load_float(rows.data, rows.dtype, i); });
    } else if (rows.dtype == DType::bf16) {
      const auto* from = static_cast<const std::uint16_t*>(rows.data);
      pack(linear.weight.as<std::uint16_t>(), [=](std::int64_t i) { return from[i]; });
    } else {
      pack(linear.weight.as<std::uint16_t>(),
           [&](std::int64_t i) { return float_to_bf16(load_float(rows.data, rows.dtype, i)); });
    }
  });
}

std::vector<std::string> CpuBackend::unsupported(const ModelSpec&) const { return {}; }

void CpuBackend::embed(View out, const Linear& table, const Linear* positions, const Step& step) {
  each_row(out, [&](std::int64_t t) {
    const std::int32_t id = step.token_ids[t];
    unpack_row(out.row(t), table, id >= 0 ? id : step.sampled[-1 - id], false);
    if (positions) unpack_row(out.row(t), *positions, step.positions[t], true);
  });
}

void CpuBackend::norm(View out, View x, const Norm& norm) {
  each_row(out, [&](std::int64_t row) {
    kernels_.norm(out.row(row), x.row(row), norm.weight, norm.bias, norm.spec.eps, norm.spec.kind,
                  out.cols);
  });
}

void CpuBackend::add_norm(View out, View residual, View x, const Norm& norm) {
  each_row(out, [&](std::int64_t row) {
    kernels_.add(residual.row(row), x.row(row), residual.cols);
    kernels_.norm(out.row(row), residual.row(row), norm.weight, norm.bias, norm.spec.eps,
                  norm.spec.kind, out.cols);
  });
}

void CpuBackend::linear(View out, View x, const Linear& weight) {
  LinearTask task;
  task.weight = weight.weight.data();
  task.format = weight.format;
  task.depth = padded_depth(weight.inputs);
  task.outputs = weight.outputs;
  task.bias = weight.bias.as<float>();
  task.out = out.data;
  task.out_stride = out.stride;
  if (weight.format == DType::f32 && task.depth == weight.inputs) {
    task.x = x.data;
    task.x_stride = x.stride;
  } else {
    float* rounded = scratch(linear_scratch_, x.rows * task.depth);
    each_row(x, [&](std::int64_t row) {
      float* to = rounded + row * task.depth;
      if (weight.format == DType::bf16) {
        kernels_.round_bf16(to, x.row(row), x.cols);
      } else {
        std::copy_n(x.row(row), x.cols, to);
      }
      std::fill(to + x.cols, to + task.depth, 0.0f);
    });
    task.x = rounded;
    task.x_stride = task.depth;
  }

  const std::int64_t panels = (weight.outputs + kLanes - 1) / kLanes;
  constexpr std::int64_t kFewRows = 8;  // as many rows as stay in the first cache beside weights
  if (x.rows <= kFewRows) {
    // Weights are read once: every thread streams a piece of its own, the same in every step.
    pool_.run([&](int thread) {
      const std::int64_t first = panels * thread / pool_.size();
      const std::int64_t last = panels * (thread + 1) / pool_.size();
      kernels_.linear(task, 0, x.rows, first, last);
    });
    return;
  }
  // Pieces of rows x panels that fit the second cache, taken by whichever thread is free.
  constexpr std::int64_t kRowPiece = 96, kPanelPiece = 8;
  const std::int64_t row_pieces = (x.rows + kRowPiece - 1) / kRowPiece;
  const std::int64_t panel_pieces = (panels + kPanelPiece - 1) / kPanelPiece;
  pool_.each(row_pieces * panel_pieces, [&](std::int64_t index, int) {
    const std::int64_t row = index % row_pieces * kRowPiece;
    const std::int64_t panel = index / row_pieces * kPanelPiece;
    kernels_.linear(task, row, std::min(x.rows, row + kRowPiece), panel,
                    std::min(panels, panel + kPanelPiece));
  });
}

void CpuBackend::gated_activation(View out, View x, Activation activation, bool gated) {
  each_row(out, [&](std::int64_t row) {
    const float* first = x.row(row);
    kernels_.activate(out.row(row), gated ? first : nullptr, gated ? first + out.cols : first,
                      activation, out.cols);
  });
}

void CpuBackend::take_rows(View out, View x, const std::int32_t* rows) {
  for (std::int64_t i = 0; i < out.rows; ++i) std::copy_n(x.row(rows[i]), out.cols, out.row(i));
}

}  // namespace octavo::cpu

namespace octavo {

std::unique_ptr<Backend> make_cpu_backend(int num_threads, const std::string& isa) {
  return std::make_unique<cpu::CpuBackend>(num_threads, isa);
}

}  // namespace octavo

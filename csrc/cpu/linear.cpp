// Products with matrices: preparing their input, and dividing the work.

#include <algorithm>

#include "cpu/backend.h"
#include "cpu/matrix_task.h"

namespace octavo::cpu {

void CpuBackend::embed(View out, const Linear& table, const Linear* positions, const Step& step) {
  each_row(out, [&](std::int64_t t) {
    const std::int32_t id = step.token_ids[t];
    unpack_row(out.row(t), table, id >= 0 ? id : step.sampled[-1 - id], false);
    if (positions) unpack_row(out.row(t), *positions, step.positions[t], true);
  });
}

// row_of(row): its numbers, valid until the same thread's next call.
template <class RowOf>
void CpuBackend::prepare_rows(LinearTask& task, View shape, RowOf&& row_of) {
  task.x_stride = kernels_.input_stride(task);
  const std::int64_t words = input_words(task);
  float* memory = scratch(linear_scratch_, words + shape.rows * (1 + task.num_blocks));
  task.x = memory;
  task.x_scales = memory + words;
  task.x_sums = reinterpret_cast<std::int32_t*>(task.x_scales + shape.rows);
  each_row(shape, [&](std::int64_t row) {
    kernels_.prepare_input(task, row, memory + row * task.x_stride, row_of(row), shape.cols);
  });
}

void CpuBackend::prepare_input(LinearTask& task, View x) {
  if (task.format == DType::f32 && task.depth == x.cols) {
    task.x = x.row(0);
    task.x_stride = x.stride;
    return;
  }
  prepare_rows(task, x, [&](std::int64_t row) { return x.row(row); });
}

void CpuBackend::prepare_input(LinearTask& task, const NormedInput& x) {
  prepare_rows(task, x.residual, [&](std::int64_t row) {
    static thread_local std::vector<float> normed;
    normed.resize(static_cast<std::size_t>(x.residual.cols));
    add_and_norm(normed.data(), x, row);
    return normed.data();
  });
}

void CpuBackend::linear(View out, View x, const Linear& weight) {
  MatrixTask task(weight, x.rows);
  task.write_to(out);
  prepare_input(task, x);
  multiply(task);
}

bool CpuBackend::normed_linear(View out, const NormedInput& x, const Linear& weight) {
  MatrixTask task(weight, out.rows);
  task.write_to(out);
  prepare_input(task, x);
  multiply(task);
  return true;
}

bool CpuBackend::normed_mlp(View out, const NormedInput& x, const std::vector<Linear>& up,
                            const Linear& down, Activation activation) {
  // The panels of gate and up have to be of one matrix.
  const std::int64_t width = down.inputs;
  if (up.size() != 1 || up[0].outputs != 2 * width || width % kDepthBlock != 0) return false;
  const std::int64_t rows = out.rows;
  MatrixTask first(up[0], rows), second(down, rows);
  prepare_input(first, x);
  first.up_panels = width / kLanes;
  first.activation = activation;
  second.x_stride = kernels_.input_stride(second);
  const std::int64_t words = std::max(input_words(second), rows * width);
  float* memory = scratch(mlp_scratch_, words);
  const bool is_written = writes_input(first, second, kernels_.groups_take_bf16);
  if (is_written) {
    first.next = &second;
    second.x = second.input = memory;
  } else {
    first.out = memory;
    first.out_stride = width;
  }
  multiply(first);
  if (!is_written) prepare_input(second, {memory, rows, width, width});
  second.write_to(out);
  multiply(second);
  return true;
}

void CpuBackend::multiply(const LinearTask& task) {
  const std::int64_t panels = task.up_panels ? task.up_panels : num_panels(task.outputs);
  const Pieces& pieces = kernels_.pieces;
  if (task.rows <= pieces.stream_rows) {
    // Weights are read once: every thread reads the share that it packed, in pieces, so that other
    // threads can take pieces of a thread that is delayed. Panels of gates are taken in pairs,
    // since tiles write 32 inputs of the next product at a time.
    constexpr std::int64_t kPanels = 8;
    const std::int64_t unit = task.up_panels ? 2 : 1;
    pool_.shares(panels / unit, kPanels / unit, [&](ThreadPool::Range piece) {
      kernels_.linear(task, 0, task.rows, piece.begin * unit, piece.end * unit);
    });
    return;
  }
  const std::int64_t row_pieces = (task.rows + pieces.rows - 1) / pieces.rows;
  std::int64_t rows = pieces.rows;
  if (pieces.keeps_rows) {  // pieces of equal size, at least two tiles of rows
    constexpr std::int64_t kTwoTiles = 2 * kLanes;
    rows = ((task.rows + row_pieces - 1) / row_pieces + kTwoTiles - 1) / kTwoTiles * kTwoTiles;
  }
  const auto panel_pieces = [&](std::int64_t size) { return (panels + size - 1) / size; };
  std::int64_t size = pieces.panels;
  while (size > 4 && row_pieces * panel_pieces(size) < 4 * pool_.size()) size /= 2;
  const auto multiply_piece = [&](std::int64_t row_piece, std::int64_t panel_piece) {
    const std::int64_t row = row_piece * rows, panel = panel_piece * size;
    kernels_.linear(task, row, std::min(task.rows, row + rows), panel,
                    std::min(panels, panel + size));
  };
  if (pieces.keeps_rows) {
    const std::int64_t count = panel_pieces(size);
    pool_.shares(row_pieces * count, 1, [&](ThreadPool::Range piece) {
      multiply_piece(piece.begin / count, piece.begin % count);
    });
    return;
  }
  // A free thread takes the next piece; there are a few for each.
  pool_.each(row_pieces * panel_pieces(size), [&](std::int64_t index, int) {
    multiply_piece(index % row_pieces, index / row_pieces);
  });
}

}  // namespace octavo::cpu

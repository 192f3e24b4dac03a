// LoRA adapters: the small products of many of them in one step, as S-LoRA (Sheng et al. 2023) and
// Punica (Chen et al. 2023) have it. Rows are sorted by adapter. All products with A are one job
// for the threads, then all with B are another, done by the kernels of all other products: so a
// row's bits depend on the row and its adapter alone.

#include <algorithm>

#include "cpu/backend.h"
#include "cpu/matrix_task.h"

namespace octavo::cpu {

namespace {

constexpr std::int64_t kRowsAtOnce = 512;        // of a step: their shrunk rows lie in memory
constexpr std::int64_t kRowsOfPiece = 32;        // as few as share a read of the weights well
constexpr std::int64_t kPieceNumbers = 1 << 12;  // results of a piece: they stay in L1
constexpr std::int64_t kFewestPanels = 4;

LinearTask task_of(const Kernels& kernels, const Linear& matrix, std::int64_t rows) {
  LinearTask task = MatrixTask(matrix, rows);
  task.x_stride = kernels.input_stride(task);
  return task;
}

}  // namespace

template <class Body>
void CpuBackend::each_adapter(std::int64_t num_rows, const LowRankStack& stack,
                              const std::int32_t* adapters, Body&& body) {
  SortedRows& sorted = adapter_rows_;
  const auto flush = [&] {
    if (!sorted.rows.empty()) body(sorted);
    sorted.rows.clear();
    sorted.groups.clear();
  };
  for (std::size_t slot = 0; slot < stack.size(); ++slot) {
    bool is_open = false;
    for (std::int64_t row = 0; stack[slot] && row < num_rows; ++row) {
      if (adapters[row] != static_cast<std::int32_t>(slot)) continue;
      if (!is_open) sorted.groups.push_back({stack[slot], std::int64_t(sorted.rows.size()), 0});
      is_open = true;
      sorted.rows.push_back(row);
      ++sorted.groups.back().count;
      if (sorted.groups.back().count == kRowsOfPiece) is_open = false;
      if (static_cast<std::int64_t>(sorted.rows.size()) < kRowsAtOnce) continue;
      is_open = false;
      flush();
    }
  }
  flush();
}

// Memory for what A makes of the rows: enough columns for every adapter.
View CpuBackend::shrunk_rows(const SortedRows& sorted) {
  std::int64_t cols = 0;
  for (const AdapterRows& group : sorted.groups) {
    for (const LowRank::Part& part : group.added->parts)
      cols = std::max(cols, part.shrunk + part.b.inputs);
  }
  const auto rows = static_cast<std::int64_t>(sorted.rows.size());
  return {scratch(experts_scratch_, rows * cols), rows, cols, cols};
}

template <class Body>
void CpuBackend::each_piece(std::int64_t numbers, Body&& body) {
  float* memory = scratch(mlp_scratch_, pool_.size() * numbers);
  pool_.each(static_cast<std::int64_t>(low_rank_pieces_.size()), [&](std::int64_t i, int thread) {
    body(low_rank_pieces_[static_cast<std::size_t>(i)], Arena(memory + thread * numbers));
  });
}

void CpuBackend::shrink_rows(View shrunk, View x, const SortedRows& sorted) {
  low_rank_pieces_.clear();
  std::int64_t numbers = 0;
  const bool are_enough = static_cast<int>(sorted.groups.size()) >= pool_.size();
  for (const AdapterRows& group : sorted.groups) {
    const std::int64_t panels = num_panels(group.added->a.outputs);
    const std::int64_t size = are_enough ? panels : 1;
    for (std::int64_t panel = 0; panel < panels; panel += size)
      low_rank_pieces_.push_back({&group, nullptr, panel, panel + size});
    numbers = std::max(numbers, input_numbers(task_of(kernels_, group.added->a, group.count)));
  }
  each_piece(numbers, [&](const LowRankPiece& piece, Arena arena) {
    const AdapterRows& group = *piece.group;
    LinearTask task = task_of(kernels_, group.added->a, group.count);
    place_input(task, arena);
    for (std::int64_t i = 0; i < group.count; ++i)
      prepare_row(kernels_, task, i, x.row(sorted.row(group, i)), x.cols);
    task.out = shrunk.row(group.first);
    task.out_stride = shrunk.stride;
    kernels_.linear(task, 0, group.count, piece.first_panel, piece.last_panel);
  });
}

void CpuBackend::expand_rows(View out, View shrunk, const SortedRows& sorted) {
  low_rank_pieces_.clear();
  const auto each_part = [&](auto&& body) {
    for (const AdapterRows& group : sorted.groups) {
      for (const LowRank::Part& part : group.added->parts) body(group, part);
    }
  };
  std::int64_t panels = 0, numbers = 0;
  each_part(
      [&](const AdapterRows&, const LowRank::Part& part) { panels += num_panels(part.b.outputs); });
  const std::int64_t fair = std::max(kFewestPanels, panels / (4 * pool_.size()));
  each_part([&](const AdapterRows& group, const LowRank::Part& part) {
    const std::int64_t size = std::min(fair, kPieceNumbers / (group.count * kLanes));
    const std::int64_t end = num_panels(part.b.outputs);
    for (std::int64_t panel = 0; panel < end; panel += size)
      low_rank_pieces_.push_back({&group, &part, panel, std::min(end, panel + size)});
    numbers = std::max(numbers, input_numbers(task_of(kernels_, part.b, group.count)));
  });
  each_piece(numbers + kPieceNumbers, [&](const LowRankPiece& piece, Arena arena) {
    const AdapterRows& group = *piece.group;
    const LowRank::Part& part = *piece.part;
    const std::int64_t column = piece.first_panel * kLanes;
    const std::int64_t width = (piece.last_panel - piece.first_panel) * kLanes;
    LinearTask task = task_of(kernels_, part.b, group.count);
    place_input(task, arena);
    for (std::int64_t i = 0; i < group.count; ++i)
      prepare_row(kernels_, task, i, shrunk.row(group.first + i) + part.shrunk, part.b.inputs);
    float* found = arena.take(group.count * width);
    task.out = found - column;
    task.out_stride = width;
    kernels_.linear(task, 0, group.count, piece.first_panel, piece.last_panel);
    const std::int64_t count = std::min(width, part.b.outputs - column);
    for (std::int64_t i = 0; i < group.count; ++i)
      kernels_.add(out.row(sorted.row(group, i)) + part.first + column, found + i * width, count);
  });
}

void CpuBackend::add_low_rank(View out, View x, const LowRankStack& stack,
                              const std::int32_t* adapters) {
  each_adapter(x.rows, stack, adapters, [&](const SortedRows& sorted) {
    const View shrunk = shrunk_rows(sorted);
    shrink_rows(shrunk, x, sorted);
    expand_rows(out, shrunk, sorted);
  });
}

void CpuBackend::add_low_rank_rows(View out, const LowRankStack& stack, const Step& step) {
  each_adapter(out.rows, stack, step.adapters, [&](const SortedRows& sorted) {
    const View shrunk = shrunk_rows(sorted);
    for (const AdapterRows& group : sorted.groups) {
      for (std::int64_t i = 0; i < group.count; ++i) {
        const std::int32_t id = step.token_ids[sorted.row(group, i)];
        unpack_row(shrunk.row(group.first + i), group.added->a,
                   id >= 0 ? id : step.sampled[-1 - id], false);
      }
    }
    expand_rows(out, shrunk, sorted);
  });
}

}  // namespace octavo::cpu

// LoRA adapters: the small products of many of them in one step, as S-LoRA (Sheng et al. 2023) and
// Punica (Chen et al. 2023) have it. Rows are sorted by adapter, and the products of all adapters
// are one job, done by the kernels of all other products: so a row's bits depend on the row and its
// adapter alone.

#include <algorithm>

#include "cpu/backend.h"
#include "cpu/matrix_task.h"

namespace octavo::cpu {

namespace {

constexpr std::int64_t kRowsAtOnce = 128;

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
      sorted.rows.push_back(row);
      ++sorted.groups.back().count;
      is_open = static_cast<std::int64_t>(sorted.rows.size()) < kRowsAtOnce;
      if (!is_open) flush();
    }
  }
  flush();
}

// The second products, and their addition to `out`. shrink(group, part, task): writes the input of
// `task`, a row for each row of the group, which is what the first product gives.
template <class Shrink>
void CpuBackend::expand_rows(View out, const SortedRows& sorted, Shrink&& shrink) {
  std::int64_t numbers = 0;
  down_tasks_.clear();
  for (const AdapterRows& group : sorted.groups) {
    for (const LowRankPart& part : *group.parts) {
      down_tasks_.push_back(task_of(kernels_, part.b, group.count));
      numbers += input_numbers(down_tasks_.back()) + Arena::size(group.count * part.b.outputs);
    }
  }
  Arena arena(scratch(mlp_scratch_, numbers));
  for (LinearTask& task : down_tasks_) {
    place_input(task, arena);
    task.out = arena.take(task.rows * task.outputs);
    task.out_stride = task.outputs;
  }
  std::size_t index = 0;
  for (const AdapterRows& group : sorted.groups) {
    for (const LowRankPart& part : *group.parts)
      shrink(group, part, index, down_tasks_[index]), ++index;
  }
  multiply_all(down_tasks_);
  index = 0;
  for (const AdapterRows& group : sorted.groups) {
    for (const LowRankPart& part : *group.parts) {
      const LinearTask& task = down_tasks_[index++];
      each_row({nullptr, group.count, task.outputs, task.outputs}, [&](std::int64_t i) {
        const std::int64_t row = sorted.rows[static_cast<std::size_t>(group.first + i)];
        kernels_.add(out.row(row) + part.first, task.out + i * task.out_stride, task.outputs);
      });
    }
  }
}

void CpuBackend::add_low_rank(View out, View x, const LowRankStack& stack,
                              const std::int32_t* adapters) {
  each_adapter(x.rows, stack, adapters, [&](const SortedRows& sorted) {
    // The parts of a stack read the same rows: they are prepared once for each adapter.
    std::int64_t numbers = 0;
    up_tasks_.clear();
    for (const AdapterRows& group : sorted.groups) {
      for (const LowRankPart& part : *group.parts) {
        up_tasks_.push_back(task_of(kernels_, part.a, group.count));
        numbers += Arena::size(group.count * part.a.outputs);
      }
      numbers += input_numbers(up_tasks_.back());
    }
    Arena arena(scratch(experts_scratch_, numbers));
    std::size_t index = 0;
    for (const AdapterRows& group : sorted.groups) {
      LinearTask& first = up_tasks_[index];
      place_input(first, arena);
      each_row({nullptr, group.count, x.cols, x.cols}, [&](std::int64_t i) {
        const std::int64_t row = sorted.rows[static_cast<std::size_t>(group.first + i)];
        prepare_row(kernels_, first, i, x.row(row), x.cols);
      });
      for (std::size_t part = 0; part < group.parts->size(); ++part) {
        LinearTask& task = up_tasks_[index++];
        task.x = first.x;
        task.out = arena.take(task.rows * task.outputs);
        task.out_stride = task.outputs;
      }
    }
    multiply_all(up_tasks_);
    expand_rows(
        out, sorted,
        [&](const AdapterRows& group, const LowRankPart&, std::size_t index, LinearTask& task) {
          const LinearTask& shrunk = up_tasks_[index];
          for (std::int64_t i = 0; i < group.count; ++i)
            prepare_row(kernels_, task, i, shrunk.out + i * shrunk.out_stride, shrunk.outputs);
        });
  });
}

void CpuBackend::add_low_rank_rows(View out, const LowRankStack& stack, const Step& step) {
  each_adapter(out.rows, stack, step.adapters, [&](const SortedRows& sorted) {
    expand_rows(
        out, sorted,
        [&](const AdapterRows& group, const LowRankPart& part, std::size_t, LinearTask& task) {
          std::vector<float> numbers(static_cast<std::size_t>(part.a.inputs));
          for (std::int64_t i = 0; i < group.count; ++i) {
            const std::int64_t row = sorted.rows[static_cast<std::size_t>(group.first + i)];
            const std::int32_t id = step.token_ids[row];
            unpack_row(numbers.data(), part.a, id >= 0 ? id : step.sampled[-1 - id], false);
            prepare_row(kernels_, task, i, numbers.data(), part.a.inputs);
          }
        });
  });
}

}  // namespace octavo::cpu

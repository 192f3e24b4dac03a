// Sparse experts: each multiplies all of its rows at once, by the kernels of `linear`.
//
// Pairs of a row and one of its experts are sorted by expert. Experts are taken in groups of some
// hundred pairs, so that their results stay in cache; all products of a group are one job for the
// threads, the gates and ups, and then the downs. A weight is read once a step, and only if some
// row has chosen its expert. A row's bits do not depend on the others: those of a product do not,
// and its experts' outputs are added in the order of their numbers.

#include <algorithm>
#include <cmath>

#include "cpu/backend.h"
#include "cpu/matrix_task.h"

namespace octavo::cpu {

namespace {

constexpr std::int64_t kGroupPairs = 256;

// Experts of the largest logits, in ascending order, with their weights (reference/ops.py, route).
// Exponentials are taken in double and rounded, so that they do not depend on the C library.
void route_row(const float* logits, const MoeSpec& moe, std::int32_t* experts, float* weights) {
  const auto k = static_cast<std::int32_t>(moe.experts_per_token);
  const auto count = static_cast<std::int32_t>(moe.num_experts);
  for (std::int32_t expert = 0, kept = 0; expert < count; ++expert) {
    std::int32_t at = kept;
    while (at > 0 && logits[expert] > logits[experts[at - 1]]) --at;
    if (at == k) continue;
    kept = std::min(kept + 1, k);
    std::copy_backward(experts + at, experts + kept - 1, experts + kept);
    experts[at] = expert;
  }
  const float largest = logits[experts[0]];
  const auto power = [&](std::int32_t expert) {
    return std::exp(static_cast<double>(logits[expert] - largest));
  };
  std::sort(experts, experts + k);
  double total = 0.0;
  for (std::int32_t i = 0; i < (moe.normalize ? k : count); ++i)
    total += power(moe.normalize ? experts[i] : i);
  for (std::int32_t i = 0; i < k; ++i) weights[i] = static_cast<float>(power(experts[i]) / total);
}

// The task of one of the matrices; `all` is that of the first.
LinearTask task_of(const MatrixTask& all, const Linear& matrix, std::int64_t expert,
                   std::int64_t rows) {
  LinearTask task = all;
  const std::int64_t numbers = expert * matrix.pitch * all.num_groups;  // scales before its own
  task.rows = rows;
  task.weight += expert * matrix.pitch * all.depth * bits_of(all.format) / 32;
  task.scales = static_cast<const unsigned char*>(all.scales) +
                (all.scales ? numbers * bits_of(all.scale_type) / 8 : 0);
  if (all.zeros) task.zeros += numbers;
  return task;
}

}  // namespace

void CpuBackend::moe(View out, View x, View router, const ExpertWork& work) {
  route(router, work.moe);
  const std::int64_t most = std::max(kGroupPairs, x.rows);  // an expert's rows are never divided
  float* memory = scratch(mlp_scratch_, out.rows * out.cols);
  const View sums{memory, out.rows, out.cols, out.cols};
  std::fill(memory, memory + out.rows * out.cols, 0.0f);
  const std::vector<std::int32_t>& starts = routing_.first;
  for (std::int64_t first = 0, last; first < work.moe.num_experts; first = last) {
    const auto start = [&](std::int64_t expert) {
      return starts[static_cast<std::size_t>(expert)];
    };
    last = first + 1;
    while (last < work.moe.num_experts && start(last + 1) - start(first) <= most) ++last;
    if (start(last) > start(first)) add_experts(sums, x, work, {first, last});
  }
  each_row(out, [&](std::int64_t row) { std::copy_n(sums.row(row), out.cols, out.row(row)); });
}

void CpuBackend::route(View router, const MoeSpec& moe) {
  const std::int64_t rows = router.rows, k = moe.experts_per_token;
  const auto pairs = static_cast<std::size_t>(rows * k);
  Routing& r = routing_;
  for (std::vector<std::int32_t>* each : {&r.experts, &r.places, &r.rows, &r.owners})
    each->resize(pairs);
  r.weights.resize(pairs);
  each_row(router, [&](std::int64_t row) {
    route_row(router.row(row), moe, &r.experts[static_cast<std::size_t>(row * k)],
              &r.weights[static_cast<std::size_t>(row * k)]);
  });
  // A counting sort: first[e + 1] counts the pairs of e, then says where they begin and end.
  r.first.assign(static_cast<std::size_t>(moe.num_experts) + 2, 0);
  for (const std::int32_t expert : r.experts) ++r.first[static_cast<std::size_t>(expert) + 2];
  for (std::size_t i = 2; i < r.first.size(); ++i) r.first[i] += r.first[i - 1];
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    const std::int32_t place = r.first[static_cast<std::size_t>(r.experts[pair]) + 1]++;
    r.places[pair] = place;
    r.owners[static_cast<std::size_t>(place)] = r.experts[pair];
    r.rows[static_cast<std::size_t>(place)] =
        static_cast<std::int32_t>(pair) / static_cast<std::int32_t>(k);
  }
}

void CpuBackend::add_experts(View sums, View x, const ExpertWork& work, ThreadPool::Range experts) {
  const std::int64_t width = work.down.inputs, outputs = work.down.outputs;
  const std::size_t halves = work.up.size();  // of one format: both in one matrix
  const bool is_gated = halves == 1 && width % kDepthBlock == 0;  // gates meet ups in the product
  const MatrixTask ups(work.up[0], 0), others(work.up[halves - 1], 0), downs(work.down, 0);
  const bool is_written = is_gated && writes_input(ups, downs, kernels_.groups_take_bf16);
  const auto start = [&](std::int64_t expert) {
    return static_cast<std::int64_t>(routing_.first[static_cast<std::size_t>(expert)]);
  };
  const std::int64_t begin = start(experts.begin), pairs = start(experts.end) - begin;

  up_tasks_.clear();
  down_tasks_.clear();
  std::int64_t numbers = Arena::size(pairs * 3 * width) + Arena::size(pairs * outputs);
  const auto add = [&](std::vector<LinearTask>& tasks, const LinearTask& task) {
    tasks.push_back(task);
    tasks.back().x_stride = kernels_.input_stride(task);
    numbers += input_numbers(tasks.back());
  };
  for (std::int64_t expert = experts.begin; expert < experts.end; ++expert) {
    const std::int64_t rows = start(expert + 1) - start(expert);
    add(up_tasks_, task_of(ups, work.up[0], expert, rows));
    if (halves == 2) add(up_tasks_, task_of(others, work.up[1], expert, rows));
    add(down_tasks_, task_of(downs, work.down, expert, rows));
  }

  Arena arena(scratch(experts_scratch_, numbers));
  float* opened = arena.take(pairs * 3 * width);  // activated; gates and ups if apart before that
  float* both = opened + pairs * width;
  float* given = arena.take(pairs * outputs);
  for (std::size_t i = 0; i < down_tasks_.size(); ++i) {
    const std::int64_t before = start(experts.begin + static_cast<std::int64_t>(i)) - begin;
    LinearTask& down = down_tasks_[i];
    place_input(down, arena);
    down.out = given + before * outputs;
    down.out_stride = outputs;
    for (std::size_t half = 0; half < halves; ++half) {
      LinearTask& up = up_tasks_[i * halves + half];
      place_input(up, arena);
      up.out = is_gated ? opened + before * width
                        : both + before * 2 * width + static_cast<std::int64_t>(half) * width;
      up.out_stride = is_gated ? width : 2 * width;
      if (!is_gated) continue;
      up.up_panels = width / kLanes;
      up.activation = work.activation;
      if (!is_written) continue;
      up.next = &down;
      down.input = const_cast<void*>(down.x);
    }
  }

  // Calls body(pair, its expert among these, its row among the expert's).
  const auto each_pair = [&](std::int64_t cols, auto&& body) {
    each_row({nullptr, pairs, cols, cols}, [&](std::int64_t pair) {
      const std::int64_t owner = routing_.owners[static_cast<std::size_t>(begin + pair)];
      body(pair, static_cast<std::size_t>(owner - experts.begin), begin + pair - start(owner));
    });
  };
  each_pair(x.cols, [&](std::int64_t pair, std::size_t i, std::int64_t row) {
    const float* from = x.row(routing_.rows[static_cast<std::size_t>(begin + pair)]);
    for (std::size_t half = 0; half < halves; ++half)
      prepare_row(kernels_, up_tasks_[i * halves + half], row, from, x.cols);
  });
  multiply_all(up_tasks_);
  if (!is_written) {
    each_pair(width, [&](std::int64_t pair, std::size_t i, std::int64_t row) {
      float* to = opened + pair * width;
      const float* gate = both + pair * 2 * width;
      if (!is_gated) kernels_.activate(to, gate, gate + width, work.activation, width);
      prepare_row(kernels_, down_tasks_[i], row, to, width);
    });
  }
  multiply_all(down_tasks_);
  const std::int64_t k = work.moe.experts_per_token;
  each_row(sums, [&](std::int64_t row) {
    for (std::int64_t i = row * k; i < (row + 1) * k; ++i) {
      const std::int64_t pair = routing_.places[static_cast<std::size_t>(i)] - begin;
      if (pair < 0 || pair >= pairs) continue;
      kernels_.add_scaled(sums.row(row), given + pair * outputs,
                          routing_.weights[static_cast<std::size_t>(i)], outputs);
    }
  });
}

// All products as one job. As in `multiply`, few rows are multiplied by the panels that a thread
// has packed, and many rows a piece at a time.
void CpuBackend::multiply_all(const std::vector<LinearTask>& tasks) {
  constexpr std::int64_t kPanels = 8;
  pieces_.clear();
  const auto add = [&](const LinearTask& task, std::int64_t rows, ThreadPool::Range panels) {
    for (std::int64_t row = 0; row < task.rows; row += rows) {
      for (std::int64_t panel = panels.begin; panel < panels.end; panel += kPanels)
        pieces_.push_back({&task, row, std::min(task.rows, row + rows), panel,
                           std::min(panels.end, panel + kPanels)});
    }
  };
  for (int thread = 0; thread < pool_.size(); ++thread) {
    for (const LinearTask& task : tasks) {
      const std::int64_t pairs_of = task.up_panels ? 2 : 1;
      const std::int64_t panels = task.up_panels ? task.up_panels : num_panels(task.outputs);
      const ThreadPool::Range mine = pool_.share(panels / pairs_of, thread);
      const bool streams = task.rows <= kernels_.pieces.stream_rows;
      add(task, streams ? task.rows : kernels_.pieces.rows,
          {mine.begin * pairs_of, mine.end * pairs_of});
    }
  }
  pool_.shares(static_cast<std::int64_t>(pieces_.size()), 1, [&](ThreadPool::Range range) {
    const ProductPiece& piece = pieces_[static_cast<std::size_t>(range.begin)];
    kernels_.linear(*piece.task, piece.first_row, piece.last_row, piece.first_panel,
                    piece.last_panel);
  });
}

}  // namespace octavo::cpu

// LoRA adapters: octavo.reference.ops.low_rank, for rows of different adapters in one launch, as
// Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023) have it.
//
// A kernel shrinks each row to the rank of its adapter, another expands it and adds it. Which
// adapter a row has, and where its matrices lie, is read on the device: so a recorded step serves
// any adapters. Both products are sums in one order, by the row and its adapter alone. They move
// the matrices of the adapters in a step once for each of their rows.

#include <algorithm>

#include "cuda/backend.h"
#include "cuda/elementwise/elementwise.cuh"
#include "cuda/layout/weights.cuh"

namespace octavo::cuda {

// What an adapter adds to a stack of at most three matrices: see LowRank.
struct LowRankEntry {
  Matrix a, b[kLowRankParts];
  int first[kLowRankParts], shrunk[kLowRankParts];
  int count;
};

namespace {

constexpr unsigned kThreads = 128, kWarps = kThreads / 32;

struct LowRankArguments {
  const LowRankEntry* entries;   // by the place of an adapter
  const std::int32_t* adapters;  // [rows]; -1: none
  void* shrunk;                  // (rows, max_shrunk) numbers of `dtype`
  int max_shrunk;
  DType dtype;  // of the adapters' matrices
  Numbers x, out;
  const std::int32_t *ids, *sampled;  // of rows of a table
};

// blockIdx.x: row; each warp of all blocks of a row takes a number of A x, and then others.
__global__ void __launch_bounds__(kThreads) shrink_rows(LowRankArguments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const long long row = blockIdx.x;
  const int slot = a.adapters[row];
  if (slot < 0 || a.entries[slot].count == 0) return;
  const Matrix& m = a.entries[slot].a;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto first = static_cast<int>(blockIdx.y * kWarps + threadIdx.x / 32);
  for (int r = first; r < m.outputs; r += static_cast<int>(gridDim.y * kWarps)) {
    float sum = 0.0f;
    for (int i = lane; i < m.inputs; i += 32)
      sum = fma_rn(read_number(m.row(r), a.dtype, i),
                   read_number(a.x.data, a.x.dtype, row * a.x.stride + i), sum);
    sum = warp_sum(sum);
    if (lane == 0) write_number(a.shrunk, a.dtype, row * a.max_shrunk + r, sum);
  }
}

// blockIdx.x: row. Of the embedding: the row of A that belongs to the token.
__global__ void __launch_bounds__(kThreads) take_shrunk_rows(LowRankArguments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const long long row = blockIdx.x;
  const int slot = a.adapters[row];
  if (slot < 0 || a.entries[slot].count == 0) return;
  const Matrix& m = a.entries[slot].a;
  int id = a.ids[row];
  if (id < 0) id = a.sampled[-1 - id];
  if (id < 0 || id >= m.outputs) id = 0;  // of a padded token
  for (int r = static_cast<int>(threadIdx.x); r < m.inputs; r += static_cast<int>(kThreads))
    write_number(a.shrunk, a.dtype, row * a.max_shrunk + r, read_number(m.row(id), a.dtype, r));
}

// blockIdx.x: row; blockIdx.y, threads: a number of `out` each.
__global__ void __launch_bounds__(kThreads) expand_rows(LowRankArguments a, int cols) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const long long row = blockIdx.x;
  const int slot = a.adapters[row], col = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  if (slot < 0 || col >= cols) return;
  const LowRankEntry& entry = a.entries[slot];
  for (int part = 0; part < entry.count; ++part) {
    const Matrix& m = entry.b[part];
    const int output = col - entry.first[part];
    if (output < 0 || output >= m.outputs) continue;
    const long long shrunk = row * a.max_shrunk + entry.shrunk[part];
    float sum = 0.0f;
    for (int r = 0; r < m.inputs; ++r)
      sum = fma_rn(read_number(m.row(output), a.dtype, r),
                   read_number(a.shrunk, a.dtype, shrunk + r), sum);
    const long long at = row * a.out.stride + col;
    write_number(a.out.data, a.out.dtype, at,
                 add_rn(read_number(a.out.data, a.out.dtype, at), sum));
  }
}

}  // namespace

void CudaBackend::adapters_changed(const std::vector<LowRankStack>& stacks) {
  const std::size_t num_slots = stacks.front().size();
  std::vector<LowRankEntry> entries(stacks.size() * num_slots);
  std::int64_t max_shrunk = max_shrunk_;
  for (std::size_t stack = 0; stack < stacks.size(); ++stack) {
    for (std::size_t slot = 0; slot < num_slots; ++slot) {
      if (!stacks[stack][slot]) continue;
      LowRankEntry& entry = entries[stack * num_slots + slot];
      entry.a = matrix_of(stacks[stack][slot]->a);
      for (const LowRank::Part& part : stacks[stack][slot]->parts) {
        entry.b[entry.count] = matrix_of(part.b);
        entry.first[entry.count] = static_cast<int>(part.first);
        entry.shrunk[entry.count++] = static_cast<int>(part.shrunk);
        max_shrunk = std::max(max_shrunk, part.shrunk + part.b.inputs);
      }
    }
  }
  const std::size_t bytes = entries.size() * sizeof(LowRankEntry);
  if (low_rank_table_.bytes() < bytes || max_shrunk > max_shrunk_) forget_recorded();
  if (low_rank_table_.bytes() < bytes) low_rank_table_ = Buffer(this, bytes);
  if (bytes) upload(low_rank_table_.data(), entries.data(), bytes);
  low_rank_stacks_ = stacks.data();
  low_rank_slots_ = num_slots;
  max_shrunk_ = max_shrunk;
  low_rank_workspace_.get(static_cast<std::size_t>(max_tokens_ * max_shrunk_) * 4);
}

void CudaBackend::add_low_rank(View out, View x, const LowRankStack& stack,
                               const std::int32_t* adapters) {
  add_low_rank(out, x, stack, adapters, nullptr);
}

void CudaBackend::add_low_rank_rows(View out, const LowRankStack& stack, const Step& step) {
  add_low_rank(out, {}, stack, step.adapters, &step);
}

void CudaBackend::add_low_rank(View out, View x, const LowRankStack& stack,
                               const std::int32_t* adapters, const Step* step) {
  if (out.rows == 0 || stack.empty()) return;
  LowRankArguments a{};
  a.entries = low_rank_table_.as<LowRankEntry>() +
              static_cast<std::size_t>(&stack - low_rank_stacks_) * low_rank_slots_;
  a.adapters = adapters;
  a.shrunk = low_rank_workspace_.get(
      static_cast<std::size_t>(std::max(out.rows, max_tokens_) * max_shrunk_) * 4);
  a.max_shrunk = static_cast<int>(max_shrunk_);
  a.dtype = options_.dtype;
  a.x = numbers_of(x);
  a.out = numbers_of(out);
  if (step) {
    a.ids = step->token_ids;
    a.sampled = step->sampled;
    launch(stream_, "take_shrunk_rows", {dims(out.rows, 1), kThreads, 0, true}, take_shrunk_rows,
           a);
  } else {
    launch(stream_, "shrink_rows", {dims(out.rows, kLowRankParts), kThreads, 0, true}, shrink_rows,
           a);
  }
  launch(stream_, "expand_rows", {dims(out.rows, ceil_div(out.cols, kThreads)), kThreads, 0, true},
         expand_rows, a, static_cast<int>(out.cols));
}

}  // namespace octavo::cuda

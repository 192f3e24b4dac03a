// Small kernels for the emulator's own tests, each right or, where `planted` says so, wrong in the
// way its name tells.
#pragma once

#include "cuda/device/tensor_cores.cuh"

namespace octavo::cuda::programs {

// out[row] = x[row] / rms(x[row]); a block a row, any number of threads that is a multiple of 32.
template <bool planted_missing_barrier = false>
__global__ void rms_norm(float* out, const float* x, int width) {
  auto* partial = reinterpret_cast<float*>(shared_memory());  // one number a warp
  const float* row = x + static_cast<std::size_t>(blockIdx.x) * width;
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
    sum += row[i] * row[i];
  sum = warp_sum(sum);
  if (lane_index() == 0) partial[warp_index()] = sum;
  if (!planted_missing_barrier) __syncthreads();
  float total = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += partial[warp];
  const float scale = reciprocal_sqrt(total / static_cast<float>(width));
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
    out[static_cast<std::size_t>(blockIdx.x) * width + i] = row[i] * scale;
}

// out (16, 8) = a (16, 16) times b (16, 8), row-major, by one warp through ldmatrix and mma.
enum class ProductFault {
  none,
  wrong_fragment,
  transposed_load,
  no_wait,      // reads shared memory before the copies to it are done
  never_waits,  // ends with copies under way
  misaligned_copy,
  copies_past_shared_memory,
};
template <class T, ProductFault planted = ProductFault::none>
__global__ void product(float* out, const T* a, const T* b) {
  T* shared_a = reinterpret_cast<T*>(shared_memory());
  T* shared_b = shared_a + 16 * 16;
  const unsigned lane = lane_index();
  const unsigned shift = planted == ProductFault::misaligned_copy ? 1 : 0;
  const unsigned far = planted == ProductFault::copies_past_shared_memory ? 8 : 0;
  async_copy_16(shared_a + 8 * lane, a + 8 * lane + shift);
  if (lane < 16) async_copy_16(shared_b + 8 * lane + far, b + 8 * lane);
  async_commit();
  if (planted != ProductFault::no_wait && planted != ProductFault::never_waits) async_wait<0>();
  sync_warp();
  std::uint32_t left[4], right[4];
  cuda_emulator::load_matrices(left, shared_a + lane % 16 * 16 + lane / 16 * 8);
  cuda_emulator::load_matrices(right, shared_b + lane % 16 * 8,
                               planted != ProductFault::transposed_load);
  if (planted == ProductFault::no_wait) async_wait<0>();
  if (planted == ProductFault::wrong_fragment) {
    const std::uint32_t swapped = left[1];
    left[1] = left[2];
    left[2] = swapped;
  }
  float d[4] = {};
  const std::uint32_t columns[2] = {right[0], right[1]};
  multiply_accumulate<T>(d, left, columns);
  for (unsigned r = 0; r < 4; ++r)
    out[(lane / 4 + 8 * (r / 2)) * 8 + 2 * (lane % 4) + r % 2] = d[r];
}

// out[i] = the sum of x[0 .. i], by one block of as many threads as there are numbers.
enum class ScanFault {
  none,
  reads_past_the_end,
  writes_past_the_end,
  writes_before_the_start,
  writes_past_shared_memory,
  part_of_the_block,  // returns before a barrier
  two_barriers,       // half of the block waits at another one
  unwritten,          // one number of shared memory is never written
  no_second_barrier,  // the next step overwrites what others still read
};
template <ScanFault planted = ScanFault::none>
__global__ void scan(int* out, const int* x, int count) {
  auto* sums = reinterpret_cast<int*>(shared_memory());  // 2 * count
  const int i = static_cast<int>(threadIdx.x);
  int* from = sums;
  int* to = sums + count;
  if (planted != ScanFault::unwritten || i > 0) from[i] = x[i];
  if (planted == ScanFault::two_barriers && i < count / 2)
    __syncthreads();
  else
    __syncthreads();
  for (int step = 1; step < count; step *= 2) {
    if (planted == ScanFault::part_of_the_block && i < step) return;
    to[i] = from[i] + (i >= step ? from[i - step] : 0);
    if (planted != ScanFault::no_second_barrier || step == 1) __syncthreads();
    int* const swapped = from;
    from = to;
    to = swapped;
  }
  if (planted == ScanFault::reads_past_the_end && i == count - 1 && x[i + 1] == 123) from[i] = 0;
  if (planted == ScanFault::writes_past_shared_memory && i == 3) sums[2 * count] = 1;
  out[i] = from[i];
  if (planted == ScanFault::writes_past_the_end && i == count - 1) out[i + 1] = 0;
  if (planted == ScanFault::writes_before_the_start && i == 5) out[-1] = 0;
}

// out[i] = x[n - 1 - i] for n = blockDim.x, four numbers at a time through 16-byte accesses.
template <bool planted_misaligned = false>
__global__ void reverse_fours(float* out, const float* x) {
  const unsigned i = threadIdx.x;
  const uint4 four = load_16(x + 4 * (blockDim.x - 1 - i) + (planted_misaligned && i == 6 ? 1 : 0));
  store_16(out + 4 * i, {four.w, four.z, four.y, four.x});
}

// out[i] = the sum of x over the warp of thread i.
enum class WarpFault { none, part_of_the_warp, two_collectives };
template <WarpFault planted = WarpFault::none>
__global__ void sum_warps(float* out, const float* x) {
  const unsigned i = threadIdx.x;
  if (planted == WarpFault::part_of_the_warp && i == 40) return;
  if (planted == WarpFault::two_collectives && i % kWarp < 3)
    out[i] = static_cast<float>(ballot(x[i] > 0.0f));
  else
    out[i] = warp_sum(x[i]);
}

// sum[0] += all of x, a number a thread; the last block to arrive writes it to out and sets the
// counter back.
template <bool planted_no_atomic = false>
__global__ void sum_all(float* out, int* sum, int* arrived, const int* x) {
  auto* is_last = reinterpret_cast<int*>(shared_memory());
  const int value = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (planted_no_atomic) {
    const int before = sum[0];
    sync_warp();  // where a GPU might let others go first
    sum[0] = before + value;
  } else {
    atomic_add(sum, value);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomic_add(arrived, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (is_last[0] && threadIdx.x == 0) {
    out[0] = static_cast<float>(sum[0]);
    arrived[0] = 0;
  }
}

}  // namespace octavo::cuda::programs

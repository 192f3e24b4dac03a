// Small kernels for the emulator's own tests, each right or, where `planted` says so, wrong in the
// way its name tells.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/products.cuh"

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
template <class T, bool planted_wrong_fragment = false>
__global__ void product(float* out, const T* a, const T* b) {
  T* shared_a = reinterpret_cast<T*>(shared_memory());
  T* shared_b = shared_a + 16 * 16;
  const unsigned lane = lane_index();
  async_copy_16(shared_a + 8 * lane, a + 8 * lane);
  if (lane < 16) async_copy_16(shared_b + 8 * lane, b + 8 * lane);
  async_commit();
  async_wait<0>();
  sync_warp();
  std::uint32_t left[4], right[4];
  load_matrices(left, shared_a + lane % 16 * 16 + lane / 16 * 8);
  load_matrices(right, shared_b + lane % 16 * 8, true);
  if (planted_wrong_fragment) {
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
  part_of_the_block,
  unwritten
};
template <ScanFault planted = ScanFault::none>
__global__ void scan(int* out, const int* x, int count) {
  auto* sums = reinterpret_cast<int*>(shared_memory());  // 2 * count
  const int i = static_cast<int>(threadIdx.x);
  int* from = sums;
  int* to = sums + count;
  if (planted != ScanFault::unwritten || i > 0) from[i] = x[i];
  __syncthreads();
  for (int step = 1; step < count; step *= 2) {
    if (planted == ScanFault::part_of_the_block && i < step) return;
    to[i] = from[i] + (i >= step ? from[i - step] : 0);
    __syncthreads();
    int* const swapped = from;
    from = to;
    to = swapped;
  }
  if (planted == ScanFault::reads_past_the_end && i == count - 1) from[i] += x[i + 1] * 0;
  out[i] = from[i];
  if (planted == ScanFault::writes_past_the_end && i == count - 1) out[i + 1] = 0;
}

}  // namespace octavo::cuda::programs

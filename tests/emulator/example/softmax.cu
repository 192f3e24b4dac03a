// A whole program that nvcc compiles for a GPU and any C++ compiler for the emulator: softmax of
// every row of a matrix, checked against the definition. docs/emulator.md walks through it.
//
//   nvcc -std=c++17 -I.. softmax.cu -o softmax && ./softmax            (on a GPU)
//   cmake -S . -B build && cmake --build build && build/softmax        (without one)

#include <cmath>
#include <cstdio>
#include <exception>
#include <vector>

#include "portable.h"

// out = softmax(x), a block a row. Shared memory: a float a warp. -DPLANTED leaves a barrier out.
__global__ void softmax_rows(float* out, const float* x, int width) {
  float* partial = shared_memory_as<float>();
  const float* row = x + blockIdx.x * width;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);

  float most = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
    most = fmaxf(most, row[i]);
  for (int mask = 16; mask > 0; mask /= 2)
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
  if (lane == 0) partial[warp] = most;
  __syncthreads();
  for (int i = 0; i < warps; ++i) most = fmaxf(most, partial[i]);
#ifndef PLANTED
  __syncthreads();  // everyone has read the maxima: their place may be used again
#endif

  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
    sum += expf(row[i] - most);
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < warps; ++i) total += partial[i];
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
    out[blockIdx.x * width + i] = expf(row[i] - most) / total;
}

static void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

static int run() {
  constexpr int kRows = 7, kWidth = 1000;
  constexpr unsigned kThreads = 128;
  std::vector<float> x(kRows * kWidth);
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<float>(i * 7919 % 1009) / 100.0f - 5.0f;
  const std::size_t bytes = x.size() * sizeof(float);

  void *device_x = nullptr, *device_out = nullptr;
  check(cudaMalloc(&device_x, bytes));
  check(cudaMalloc(&device_out, bytes));
  check(cudaMemcpy(device_x, x.data(), bytes, cudaMemcpyHostToDevice));
  LAUNCH(softmax_rows, kRows, kThreads, kThreads / 32 * sizeof(float), nullptr)
  (static_cast<float*>(device_out), static_cast<const float*>(device_x), kWidth);
  check(cudaGetLastError());
  std::vector<float> out(x.size());
  check(cudaMemcpy(out.data(), device_out, bytes, cudaMemcpyDeviceToHost));
  check(cudaFree(device_x));
  check(cudaFree(device_out));

  double worst = 0.0;
  for (int row = 0; row < kRows; ++row) {
    double total = 0.0;
    for (int i = 0; i < kWidth; ++i) total += std::exp(double{x[row * kWidth + i]});
    for (int i = 0; i < kWidth; ++i) {
      const double expected = std::exp(double{x[row * kWidth + i]}) / total;
      const double error = std::abs(out[row * kWidth + i] - expected) / expected;
      if (!(error <= worst)) worst = error;  // a NaN counts
    }
  }
  const bool right = worst < 1e-5;
  std::printf("softmax of %d rows: %s, largest relative error %.1e\n", kRows,
              right ? "right" : "WRONG", worst);
  return right ? 0 : 1;
}

int main() {
  try {
    return run();
  } catch (const std::exception& error) {  // the emulator's settings, if they make no sense
    std::printf("%s\n", error.what());
    return 1;
  }
}

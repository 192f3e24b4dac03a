#include "cuda/measure.h"

#include <algorithm>
#include <chrono>
#include <functional>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/products.cuh"

namespace octavo::cuda {

namespace {

constexpr unsigned kThreads = 256;
constexpr int kLoads = 8;  // in flight at a time for each thread

// Reads `count` pieces of 16 bytes once. found: written only if their bits fold to a number that
// the measured zeros do not, so that the compiler must read them.
__global__ void read_all(const uint4* data, std::size_t count, std::uint32_t* found) {
  const std::size_t threads = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  std::uint32_t folded = 0;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += kLoads * threads) {
    uint4 pieces[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      pieces[j] = i + j * threads < count ? load_16_once(data + i + j * threads) : uint4{};
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      folded |= pieces[j].x | pieces[j].y | pieces[j].z | pieces[j].w;
  }
  if (folded) *found = folded;
}

constexpr int kChains = 8;  // independent sums a warp, to fill the tensor core's pipeline

__global__ void multiply_all(float* out, int rounds) {
  const std::uint32_t a[4] = {threadIdx.x, 1u, 2u, 3u}, b[2] = {4u, 5u};
  float sums[kChains][4] = {};
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (auto& sum : sums) multiply_accumulate<Bf16>(sum, a, b);
  }
  float total = 0.0f;
  for (const auto& sum : sums) total += sum[0] + sum[1] + sum[2] + sum[3];
  out[static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x] = total;
}

// Calls work() again and again for about `seconds`; the least time of one call.
double best_seconds(Stream& stream, double seconds, const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  work();
  stream.sync();
  double best = 1e30;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    work();
    stream.sync();
    best = std::min(best, since(start));
  } while (since(begin) < seconds);
  return best;
}

}  // namespace

std::string device_name() { return Stream(0).device_name(); }

double measure_bandwidth(double seconds, double num_bytes) {
  Stream stream(0);
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the free memory");
  const std::size_t most = std::min<std::size_t>(free / 4, std::size_t{4} << 30);
  const std::size_t pieces = (num_bytes > 0 ? static_cast<std::size_t>(num_bytes) : most) / 16;
  Workspace memory(stream);
  auto* data = static_cast<unsigned char*>(memory.get(16 * pieces + 256));  // zeros
  auto* found = reinterpret_cast<std::uint32_t*>(data + 16 * pieces);
  const auto blocks = static_cast<unsigned>(stream.num_processors() * 8);
  const double best = best_seconds(stream, seconds, [&] {
    launch(stream, "read_all", {dim3(blocks), dim3(kThreads)}, read_all,
           reinterpret_cast<const uint4*>(data), pieces, found);
  });
  return 16.0 * static_cast<double>(pieces) / best;
}

double measure_flops(double seconds) {
  Stream stream(0);
#ifdef OCTAVO_EMULATED
  constexpr int kRounds = 2;
#else
  constexpr int kRounds = 20000;
#endif
  const auto blocks = static_cast<unsigned>(stream.num_processors() * 2);
  Workspace memory(stream);
  auto* out = static_cast<float*>(memory.get(std::size_t{blocks} * kThreads * 4));
  const double best = best_seconds(stream, seconds, [&] {
    launch(stream, "multiply_all", {dim3(blocks), dim3(kThreads)}, multiply_all, out, kRounds);
  });
  const double products = static_cast<double>(blocks) * (kThreads / kWarp) * kRounds * kChains;
  return products * 2.0 * 16 * 8 * 16 / best;
}

}  // namespace octavo::cuda

// What a CUDA device can do at most, measured: the limits that benchmarks are held against.

#include <algorithm>
#include <chrono>

#include "cuda/backend.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/tensor_cores.cuh"

namespace octavo::cuda {

namespace {

constexpr unsigned kThreads = 256;
constexpr int kLoads = 8;  // in flight at a time for each thread

// Random bits (the finalizer of MurmurHash3): memory and multipliers are faster on constants.
OCTAVO_DEVICE std::uint32_t random_bits(std::uint32_t seed) {
  std::uint32_t x = seed * 0x9e3779b9u + 1;
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}
// Two bf16 numbers of random sign, magnitudes from 1 to 2.
OCTAVO_DEVICE std::uint32_t random_pair(std::uint32_t seed) {
  return (random_bits(seed) & 0x807f807fu) | 0x3f803f80u;
}

__global__ void fill_all(uint4* data, std::size_t count) {
  const std::size_t threads = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += threads) {
    const auto seed = static_cast<std::uint32_t>(4 * i);
    data[i] = {random_bits(seed), random_bits(seed + 1), random_bits(seed + 2),
               random_bits(seed + 3)};
  }
}

// Reads `count` pieces of 16 bytes once. found: written only if they fold to a number that they
// almost surely do not, so that the compiler must read them.
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
      folded ^= pieces[j].x ^ pieces[j].y ^ pieces[j].z ^ pieces[j].w;
  }
  if (folded == 0x12345678u) *found = folded;
}

constexpr int kChains = 8;  // independent sums a warp, to fill the tensor core's pipeline

__global__ void multiply_all(float* out, int rounds) {
  const std::uint32_t seed = (blockIdx.x * kThreads + threadIdx.x) * 6;
  const std::uint32_t a[4] = {random_pair(seed), random_pair(seed + 1), random_pair(seed + 2),
                              random_pair(seed + 3)};
  const std::uint32_t b[2] = {random_pair(seed + 4), random_pair(seed + 5)};
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
double best_seconds(Backend& backend, double seconds, const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  backend.seconds_of(work);
  double best = 1e30;
  const auto begin = Clock::now();
  do best = std::min(best, backend.seconds_of(work));
  while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds);
  return best;
}

}  // namespace

// Between two events around what `work` queues.
double CudaBackend::seconds_of(const std::function<void()>& work) {
  struct Event {
    cudaEvent_t handle = nullptr;
    Event() { check(cudaEventCreateWithFlags(&handle, cudaEventDefault), "creating an event"); }
    ~Event() { cudaEventDestroy(handle); }
  } start, end;
  check(cudaEventRecord(start.handle, stream_.handle()), "recording an event");
  work();
  check(cudaEventRecord(end.handle, stream_.handle()), "recording an event");
  stream_.sync();
  float milliseconds = 0.0f;
  check(cudaEventElapsedTime(&milliseconds, start.handle, end.handle), "reading two events");
  return milliseconds / 1e3;
}

// Bytes a second read from device memory by a kernel that does nothing else; the best of several
// passes over num_bytes of random data (0: a quarter of the free memory, at most 4 GiB).
double CudaBackend::measure_bandwidth(double seconds, double num_bytes) {
  stream_.attach_thread();
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the free memory");
  const std::size_t most = std::min<std::size_t>(free / 4, std::size_t{4} << 30);
  const std::size_t pieces = (num_bytes > 0 ? static_cast<std::size_t>(num_bytes) : most) / 16;
  Workspace memory(stream_);
  auto* data = static_cast<unsigned char*>(memory.get(16 * pieces + 256));
  auto* found = reinterpret_cast<std::uint32_t*>(data + 16 * pieces);
  const LaunchShape shape{dims(stream_.num_processors() * 8), kThreads};
  launch(stream_, "fill_all", shape, fill_all, reinterpret_cast<uint4*>(data), pieces);
  const double best = best_seconds(*this, seconds, [&] {
    launch(stream_, "read_all", shape, read_all, reinterpret_cast<const uint4*>(data), pieces,
           found);
  });
  return 16.0 * static_cast<double>(pieces) / best;
}

// Operations a second of mma.sync with bf16 inputs and float32 sums, multiply-adds counted as two,
// all operands in registers, and random. From sm_90 on, wgmma (which cuBLASLt uses) can do more.
double CudaBackend::measure_flops(double seconds) {
  stream_.attach_thread();
#ifdef OCTAVO_EMULATED
  constexpr int kRounds = 2;
#else
  constexpr int kRounds = 20000;
#endif
  const auto blocks = static_cast<unsigned>(stream_.num_processors() * 2);
  Workspace memory(stream_);
  auto* out = static_cast<float*>(memory.get(std::size_t{blocks} * kThreads * 4));
  const double best = best_seconds(*this, seconds, [&] {
    launch(stream_, "multiply_all", {dim3(blocks), dim3(kThreads)}, multiply_all, out, kRounds);
  });
  const double products = static_cast<double>(blocks) * (kThreads / kWarp) * kRounds * kChains;
  return products * 2.0 * 16 * 8 * 16 / best;
}

}  // namespace octavo::cuda

// portable.h: CUDA's own names, for kernels that know nothing of octavo.

#include "emulated.h"
#include "portable.h"

namespace octavo::tests {

namespace {

constexpr unsigned kAll = 0xffffffffu;

void exchanges_between_lanes() {
  const Array<int> out(64 * 5);
  run("exchanges", 1, 64, 0, [&] {
    const int lane = static_cast<int>(threadIdx.x % 32), value = static_cast<int>(threadIdx.x);
    int* to = out.data() + 5 * threadIdx.x;
    to[0] = __shfl_sync(kAll, value, 3 * lane % 32);
    to[1] = __shfl_up_sync(kAll, value, 5u);
    to[2] = __shfl_down_sync(kAll, value, 7u);
    to[3] = __shfl_xor_sync(kAll, value, 19);
    to[4] = static_cast<int>(__shfl_xor_sync(kAll, static_cast<double>(value), 1));
  });
  const std::vector<int> got = out.get();
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, base = i - lane;
    const std::vector<int> expected = {base + 3 * lane % 32, lane < 5 ? i : i - 5,
                                       lane + 7 > 31 ? i : i + 7, base + (lane ^ 19), i ^ 1};
    for (int k = 0; k < 5; ++k)
      CHECK(got[static_cast<std::size_t>(5 * i + k)] == expected[static_cast<std::size_t>(k)]);
  }
}

void votes() {
  const Array<unsigned> out(32 * 4);
  run("votes", 1, 32, 0, [&] {
    const unsigned lane = threadIdx.x;
    unsigned* to = out.data() + 4 * lane;
    to[0] = __ballot_sync(kAll, lane % 3 == 0);
    to[1] = static_cast<unsigned>(__any_sync(kAll, lane == 31));
    to[2] = static_cast<unsigned>(__all_sync(kAll, lane != 31));
    // Halves of a warp vote by themselves.
    to[3] = lane < 16 ? __ballot_sync(0x0000ffffu, lane > 10) : __ballot_sync(0xffff0000u, 1);
    __syncwarp();
  });
  const std::vector<unsigned> got = out.get();
  for (unsigned lane = 0; lane < 32; ++lane) {
    CHECK(got[4 * lane] == 0x49249249u);
    CHECK(got[4 * lane + 1] == 1 && got[4 * lane + 2] == 0);
    CHECK(got[4 * lane + 3] == (lane < 16 ? 0x0000f800u : 0xffff0000u));
  }
}

void atomics() {
  const Array<int> x(std::vector<int>{0, -5, 5, 0, 9});
  run("atomics", 4, 32, 0, [&] {
    const int value = static_cast<int>(blockIdx.x * 32 + threadIdx.x) - 60;
    atomicAdd(x.data(), 1);
    atomicMax(x.data() + 1, value);
    atomicMin(x.data() + 2, value);
    if (value == 7) atomicExch(x.data() + 3, 77);
    if (atomicCAS(x.data() + 4, 9, value) == 9) __threadfence();
  });
  const std::vector<int> got = x.get();
  CHECK(got[0] == 128 && got[1] == 67 && got[2] == -60 && got[3] == 77 && got[4] != 9);
}

__global__ void fill(int* out, int value) {
  int* shared = shared_memory_as<int>();
  shared[threadIdx.x] = value;
  __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x] + static_cast<int>(threadIdx.x);
}

void launches() {
  const Array<int> out(40);
  succeed(LAUNCH(fill, 1, 40, 160, nullptr)(out.data(), 3));
  const std::vector<int> got = out.get();
  for (int i = 0; i < 40; ++i) CHECK(got[static_cast<std::size_t>(i)] == 3 + i);
  const cudaError_t error = LAUNCH(fill, 1, 2000, 0, nullptr)(out.data(), 3);
  CHECK(error == cudaErrorInvalidConfiguration);
  check_message(cudaGetErrorString(cudaGetLastError()), {"kernel fill cannot be launched: 2000"});
}

}  // namespace

std::vector<Test> intrinsic_tests() {
  return {
      {"exchanges between lanes", exchanges_between_lanes},
      {"votes", votes},
      {"atomics", atomics},
      {"launches", launches},
  };
}

}  // namespace octavo::tests

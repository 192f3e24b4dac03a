// What a kernel's source includes to be compiled by nvcc and for the emulator alike, without
// octavo. octavo's own kernels go through csrc/cuda/device/primitives.cuh instead.
//
// Under nvcc it adds two things to CUDA: shared_memory_as<T>() for the block's dynamic shared
// memory, and LAUNCH(kernel, grid, block, shared_bytes, stream)(arguments...). For the emulator
// (CUDA_EMULATOR defined) it adds what CUDA has and C++ has not: threadIdx and its like,
// __syncthreads, the functions of warps and the atomics below.
#pragma once

#include <cuda_runtime.h>

#ifndef CUDA_EMULATOR

template <class T>
__device__ T* shared_memory_as() {
  extern __shared__ __align__(16) unsigned char emulator_portable_bytes[];
  return reinterpret_cast<T*>(emulator_portable_bytes);
}

#define LAUNCH(kernel, grid, block, shared_bytes, stream) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>

#else

#include <cmath>

#include "kernel.h"
#include "launch.h"

template <class T>
T* shared_memory_as() {
  return static_cast<T*>(cuda_emulator::shared_memory());
}

namespace cuda_emulator {

template <class... Parameters>
auto launcher(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              std::size_t shared_bytes, cudaStream_t stream) {
  return [=](auto... arguments) {
    return enqueue({name, grid, block, shared_bytes}, stream,
                   [=] { kernel(static_cast<Parameters>(arguments)...); });
  };
}

// What every lane of a warp hands in, and what it gets: choose(lane, its argument) is the lane
// whose value it gets.
template <class T, class Choose>
T exchange(unsigned mask, const char* what, T value, unsigned argument, Choose) {
  struct Lane {
    T value, result;
    unsigned argument;
  } mine{value, value, argument};
  warp_collective(mask, what, &mine, [](void* const* lanes) {
    for (unsigned i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      auto& lane = *static_cast<Lane*>(lanes[i]);
      const unsigned source = Choose{}(i, lane.argument);
      // From a lane outside of the mask a GPU gives anything.
      if (source < 32 && lanes[source]) lane.result = static_cast<Lane*>(lanes[source])->value;
    }
  });
  return mine.result;
}

struct FromLane {
  unsigned operator()(unsigned, unsigned source) const { return source % 32; }
};
struct FromAbove {
  unsigned operator()(unsigned lane, unsigned delta) const { return lane + delta; }
};
struct FromBelow {
  unsigned operator()(unsigned lane, unsigned delta) const { return lane - delta; }
};
struct FromXor {
  unsigned operator()(unsigned lane, unsigned mask) const { return lane ^ mask; }
};

template <class T, class Change>
T change(T* address, Change&& body) {
  const T before = *address;
  *address = body(before);
  return before;
}

}  // namespace cuda_emulator

#define LAUNCH(kernel, grid, block, shared_bytes, stream) \
  cuda_emulator::launcher(#kernel, kernel, (grid), (block), (shared_bytes), (stream))

// ---- warps (whole ones: width 32) ----

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_emulator::exchange(mask, "__shfl_sync", value, static_cast<unsigned>(lane),
                                 cuda_emulator::FromLane{});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return cuda_emulator::exchange(mask, "__shfl_down_sync", value, delta,
                                 cuda_emulator::FromAbove{});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return cuda_emulator::exchange(mask, "__shfl_up_sync", value, delta, cuda_emulator::FromBelow{});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_emulator::exchange(mask, "__shfl_xor_sync", value, static_cast<unsigned>(lane_mask),
                                 cuda_emulator::FromXor{});
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Lane {
    int predicate;
    unsigned result;
  } mine{predicate, 0};
  cuda_emulator::warp_collective(mask, "__ballot_sync", &mine, [](void* const* lanes) {
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; ++i) {
      if (lanes[i] && static_cast<Lane*>(lanes[i])->predicate) bits |= 1u << i;
    }
    for (unsigned i = 0; i < 32; ++i) {
      if (lanes[i]) static_cast<Lane*>(lanes[i])->result = bits;
    }
  });
  return mine.result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulator::warp_collective(mask, "__syncwarp", nullptr, [](void* const*) {});
}

// ---- atomics: threads take turns, so a plain read and write is one ----

template <class T>
T atomicAdd(T* address, T value) {
  return cuda_emulator::change(address, [&](T before) { return before + value; });
}
template <class T>
T atomicMax(T* address, T value) {
  return cuda_emulator::change(address, [&](T before) { return before < value ? value : before; });
}
template <class T>
T atomicMin(T* address, T value) {
  return cuda_emulator::change(address, [&](T before) { return value < before ? value : before; });
}
template <class T>
T atomicExch(T* address, T value) {
  return cuda_emulator::change(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T compare, T value) {
  return cuda_emulator::change(address,
                               [&](T before) { return before == compare ? value : before; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

#endif

// What CUDA C++ has and C++ has not, for kernels that the host's compiler translates.
//
// threadIdx and its like, __syncthreads, and the functions that CUDA calls intrinsics. Shared
// memory is dynamic only: a `__shared__` variable would be one for all blocks and never poisoned.
#pragma once

#include <cmath>
#include <type_traits>

#include "grid.h"

#undef __shared__
#define __shared__ static_assert(false, "emulated kernels take their shared memory at the launch")
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __restrict__
#define __restrict__ __restrict

#define threadIdx (::cuda_emulator::current.thread)
#define blockIdx (::cuda_emulator::current.block)
#define blockDim (::cuda_emulator::current.block_size)
#define gridDim (::cuda_emulator::current.grid_size)
#define __syncthreads() ::cuda_emulator::sync_block(__FILE__, __LINE__)

namespace cuda_emulator {

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

// ---- arithmetic (compile with -ffp-contract=off: fused where the source says so) ----

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frsqrt_rn(float x) {  // rounds once: a double has digits enough
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(both >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  return result;
}

// Everything that is not plain CUDA C++: PTX instructions and intrinsics, each under a name.
//
// Every primitive has two bodies: the GPU's, and one that does the same on the host, for the
// emulator in tests/emulator (docs/emulator.md). So kernels are one source for both. Rules:
//
// - no asm, no intrinsic (`__shfl_sync`, `__expf`, ...) outside of this file and the part of it
// that
//   has the matrix products, products.cuh;
// - shared memory is dynamic (`shared_memory`), its size given at the launch;
// - every launch goes through launch.cuh.
//
// PTX: "Parallel Thread Execution ISA", sections 9.7.8 (loads), 9.7.9 (cp.async), 9.7.14 (mma).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef OCTAVO_EMULATED
#include "kernel.h"
#define OCTAVO_DEVICE inline
#define OCTAVO_HOST_DEVICE inline
#else
#define OCTAVO_DEVICE __device__ __forceinline__
#define OCTAVO_HOST_DEVICE __host__ __device__ __forceinline__
#endif

namespace octavo::cuda {

using Bf16 = __nv_bfloat16;
using F16 = __half;

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- numbers ----

OCTAVO_HOST_DEVICE float to_float(float x) { return x; }
OCTAVO_HOST_DEVICE float to_float(Bf16 x) { return __bfloat162float(x); }
OCTAVO_HOST_DEVICE float to_float(F16 x) { return __half2float(x); }

// To the nearest number of type T, ties to even.
template <class T>
OCTAVO_HOST_DEVICE T from_float(float x);
template <>
OCTAVO_HOST_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
OCTAVO_HOST_DEVICE Bf16 from_float<Bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
OCTAVO_HOST_DEVICE F16 from_float<F16>(float x) {
  return __float2half_rn(x);
}

// The same bits as another type of the same size.
template <class To, class From>
OCTAVO_HOST_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "types of one size");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

// Two 16-bit numbers in a register, the first in the low half.
template <class T>
OCTAVO_HOST_DEVICE float2 unpack2(std::uint32_t pair);
template <>
OCTAVO_HOST_DEVICE float2 unpack2<Bf16>(std::uint32_t pair) {
  return {bits_as<float>(pair << 16), bits_as<float>(pair & 0xffff0000u)};
}
template <>
OCTAVO_HOST_DEVICE float2 unpack2<F16>(std::uint32_t pair) {
  return __half22float2(bits_as<__half2>(pair));
}

template <class T>
OCTAVO_HOST_DEVICE std::uint32_t pack2(float low, float high);
template <>
OCTAVO_HOST_DEVICE std::uint32_t pack2<Bf16>(float low, float high) {
  return bits_as<std::uint32_t>(__floats2bfloat162_rn(low, high));
}
template <>
OCTAVO_HOST_DEVICE std::uint32_t pack2<F16>(float low, float high) {
  return bits_as<std::uint32_t>(__floats2half2_rn(low, high));
}

// Sums and products that no compiler fuses: the same bits on every device and on the host.
OCTAVO_DEVICE float add_rn(float a, float b) {
#ifdef OCTAVO_EMULATED
  return a + b;  // compiled with -ffp-contract=off
#else
  return __fadd_rn(a, b);
#endif
}
OCTAVO_DEVICE float multiply_rn(float a, float b) {
#ifdef OCTAVO_EMULATED
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}
OCTAVO_DEVICE float divide_rn(float a, float b) {
#ifdef OCTAVO_EMULATED
  return a / b;
#else
  return __fdiv_rn(a, b);
#endif
}
OCTAVO_DEVICE float fma_rn(float a, float b, float c) {
#ifdef OCTAVO_EMULATED
  return std::fma(a, b, c);
#else
  return __fmaf_rn(a, b, c);
#endif
}

// 2^x and e^x, fast: within 2 units in the last place of float32 where the result is normal.
OCTAVO_DEVICE float fast_exp2(float x) {
#ifdef OCTAVO_EMULATED
  return std::exp2(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
OCTAVO_DEVICE float fast_exp(float x) { return fast_exp2(x * 1.44269504088896340736f); }

OCTAVO_DEVICE float reciprocal_sqrt(float x) {
#ifdef OCTAVO_EMULATED
  return 1.0f / std::sqrt(x);
#else
  return __frsqrt_rn(x);
#endif
}

// a * b + c of two pairs of 16-bit numbers, each rounded once.
template <class T>
OCTAVO_DEVICE std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#ifdef OCTAVO_EMULATED
  const float2 x = unpack2<T>(a), y = unpack2<T>(b), z = unpack2<T>(c);
  // A product of 16-bit numbers is exact in double, and so is the sum but in the rarest cases.
  const auto fused = [](float p, float q, float r) {
    return static_cast<float>(static_cast<double>(p) * q + r);
  };
  return pack2<T>(fused(x.x, y.x, z.x), fused(x.y, y.y, z.y));
#else
  std::uint32_t d;
  if constexpr (std::is_same_v<T, Bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

// (a & mask) | bits in one instruction, of which ptxas makes two where both are constants.
OCTAVO_DEVICE std::uint32_t and_or(std::uint32_t a, std::uint32_t mask, std::uint32_t bits) {
#ifdef OCTAVO_EMULATED
  return (a & mask) | bits;
#else
  std::uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
  return result;
#endif
}

// Byte i of the result is byte (selector >> 4 i & 7) of the eight of b:a, a's first.
OCTAVO_DEVICE std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b,
                                          std::uint32_t selector) {
#ifdef OCTAVO_EMULATED
  const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
  std::uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i)
    result |= static_cast<std::uint32_t>(both >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  return result;
#else
  return __byte_perm(a, b, selector);
#endif
}

// c + the sum of the products of four pairs of signed bytes.
OCTAVO_DEVICE std::int32_t dot4(std::uint32_t a, std::uint32_t b, std::int32_t c) {
#ifdef OCTAVO_EMULATED
  for (unsigned i = 0; i < 4; ++i)
    c += static_cast<std::int8_t>(a >> 8 * i) * static_cast<std::int8_t>(b >> 8 * i);
  return c;
#else
  return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
#endif
}

// ---- warps: all 32 lanes must call these together ----

OCTAVO_DEVICE unsigned thread_in_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
OCTAVO_DEVICE unsigned lane_index() { return thread_in_block() % kWarp; }
OCTAVO_DEVICE unsigned warp_index() { return thread_in_block() / kWarp; }

OCTAVO_DEVICE void sync_warp() {
#ifdef OCTAVO_EMULATED
  cuda_emulator::warp_collective(kAllLanes, "__syncwarp", nullptr, [](void* const*) {});
#else
  __syncwarp();
#endif
}

// The value that lane `source` (0 to 31) holds. T: 4 or 8 bytes.
template <class T>
OCTAVO_DEVICE T shuffle(T value, unsigned source) {
#ifdef OCTAVO_EMULATED
  struct Lane {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  cuda_emulator::warp_collective(kAllLanes, "__shfl_sync", &mine, [](void* const* lanes) {
    for (unsigned i = 0; i < kWarp; ++i) {
      auto& lane = *static_cast<Lane*>(lanes[i]);
      lane.result = static_cast<Lane*>(lanes[lane.source % kWarp])->value;
    }
  });
  return mine.result;
#else
  return __shfl_sync(kAllLanes, value, static_cast<int>(source));
#endif
}

template <class T>
OCTAVO_DEVICE T shuffle_xor(T value, unsigned mask) {
#ifdef OCTAVO_EMULATED
  return shuffle(value, lane_index() ^ mask);
#else
  return __shfl_xor_sync(kAllLanes, value, static_cast<int>(mask));
#endif
}

// From the lane `delta` below; the lowest lanes keep their own.
template <class T>
OCTAVO_DEVICE T shuffle_up(T value, unsigned delta) {
#ifdef OCTAVO_EMULATED
  return shuffle(value, lane_index() >= delta ? lane_index() - delta : lane_index());
#else
  return __shfl_up_sync(kAllLanes, value, delta);
#endif
}

// Bit i: whether lane i's predicate holds.
OCTAVO_DEVICE unsigned ballot(bool predicate) {
#ifdef OCTAVO_EMULATED
  struct Lane {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  cuda_emulator::warp_collective(kAllLanes, "__ballot_sync", &mine, [](void* const* lanes) {
    unsigned bits = 0;
    for (unsigned i = 0; i < kWarp; ++i)
      bits |= static_cast<unsigned>(static_cast<Lane*>(lanes[i])->predicate) << i;
    for (unsigned i = 0; i < kWarp; ++i) static_cast<Lane*>(lanes[i])->result = bits;
  });
  return mine.result;
#else
  return __ballot_sync(kAllLanes, predicate);
#endif
}

// In every lane the same bits: the butterfly adds the same pairs on both sides.
OCTAVO_DEVICE float warp_sum(float value) {
  for (unsigned mask = kWarp / 2; mask; mask /= 2) value = add_rn(value, shuffle_xor(value, mask));
  return value;
}
OCTAVO_DEVICE float warp_max(float value) {
  for (unsigned mask = kWarp / 2; mask; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// ---- memory ----

// The block's shared memory, aligned to 128 bytes.
OCTAVO_DEVICE unsigned char* shared_memory() {
#ifdef OCTAVO_EMULATED
  return static_cast<unsigned char*>(cuda_emulator::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
#endif
}

// 16 bytes from an address that is a multiple of 16.
OCTAVO_DEVICE uint4 load_16(const void* address) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_aligned(address, 16, "a load of 16 bytes");
#endif
  return *static_cast<const uint4*>(address);
}

// 8 bytes from or to an address that is a multiple of 8.
OCTAVO_DEVICE uint2 load_8(const void* address) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_aligned(address, 8, "a load of 8 bytes");
#endif
  return *static_cast<const uint2*>(address);
}

OCTAVO_DEVICE void store_8(void* address, uint2 value) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_aligned(address, 8, "a store of 8 bytes");
#endif
  *static_cast<uint2*>(address) = value;
}

// The same for what is read once and by nobody else, as weights in decoding: past the first cache,
// first to be evicted from the second. Never for what the kernel before may still be writing.
// Not ld.global.nc: ptxas puts such loads off until after griddepcontrol.wait, and with it the
// whole gain of starting early (seen in the machine code that CUDA 13.0 makes for sm_90).
OCTAVO_DEVICE uint4 load_16_once(const void* address) {
#ifdef OCTAVO_EMULATED
  return load_16(address);
#else
  uint4 v;
  asm("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
#endif
}

// What was loaded into it is loaded before whatever follows: the compiler may not put it off.
OCTAVO_DEVICE void keep_in_registers(uint4& value) {
#ifdef OCTAVO_EMULATED
  static_cast<void>(value);
#else
  asm volatile("" : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w));
#endif
}

OCTAVO_DEVICE void store_16(void* address, uint4 value) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_aligned(address, 16, "a store of 16 bytes");
#endif
  *static_cast<uint4*>(address) = value;
}

// cp.async: copies 16 bytes to shared memory in the background, or, where not `valid`, writes 16
// zeros (and reads nothing). Both addresses are multiples of 16.
OCTAVO_DEVICE void async_copy_16(void* shared, const void* global, bool valid = true) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::async_copy(shared, global, valid ? 16 : 0, valid ? 0 : 16);
#else
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}
// Ends a group of copies.
OCTAVO_DEVICE void async_commit() {
#ifdef OCTAVO_EMULATED
  cuda_emulator::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `groups_left` of this thread's groups are under way. Other threads' copies
// are seen after a __syncthreads() that follows.
template <unsigned groups_left>
OCTAVO_DEVICE void async_wait() {
#ifdef OCTAVO_EMULATED
  cuda_emulator::async_wait(groups_left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#endif
}

// Returns the value before.
template <class T>
OCTAVO_DEVICE T atomic_add(T* address, T value) {
#ifdef OCTAVO_EMULATED
  const T before = *address;
  *address = before + value;
  return before;
#else
  return atomicAdd(address, value);
#endif
}
template <class T>
OCTAVO_DEVICE T atomic_max(T* address, T value) {
#ifdef OCTAVO_EMULATED
  const T before = *address;
  if (value > before) *address = value;
  return before;
#else
  return atomicMax(address, value);
#endif
}
// What this thread wrote before is seen by whoever sees what it writes afterwards.
OCTAVO_DEVICE void fence() {
#ifndef OCTAVO_EMULATED
  __threadfence();
#endif
}

// ---- kernels that overlap with the one before (programmatic dependent launch, sm_90) ----

// Until here the kernel may run before its predecessor has ended: only weights may be read before.
OCTAVO_DEVICE void wait_for_previous_kernel() {
#ifdef OCTAVO_EMULATED
  cuda_emulator::wait_for_previous_kernel();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the next kernel may be started.
OCTAVO_DEVICE void let_next_kernel_start() {
#if !defined(OCTAVO_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}

}  // namespace octavo::cuda

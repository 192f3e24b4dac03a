// Numbers of 8, 16 and 32 bits: instructions and intrinsics, as in primitives.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"

#ifdef OCTAVO_EMULATED
#include "kernel.h"
#define OCTAVO_DEVICE inline
#define OCTAVO_HOST_DEVICE inline
#define OCTAVO_DEVICE_CALL inline
#else
#define OCTAVO_DEVICE __device__ __forceinline__
#define OCTAVO_DEVICE_CALL __device__ __noinline__  // keeps its registers out of its callers' loops
#define OCTAVO_HOST_DEVICE __host__ __device__ __forceinline__
#endif

namespace octavo::cuda {

using Bf16 = __nv_bfloat16;
using F16 = __half;

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

template <class T>
OCTAVO_HOST_DEVICE T ceil_div(T a, std::common_type_t<T> b) {
  return (a + b - 1) / b;
}
OCTAVO_HOST_DEVICE int round_up(int a, int b) { return ceil_div(a, b) * b; }
OCTAVO_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
OCTAVO_HOST_DEVICE int larger(int a, int b) { return a < b ? b : a; }

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

// Number `index` of f32, bf16 or f16 ones.
OCTAVO_HOST_DEVICE float read_number(const void* data, DType dtype, long long index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  const std::uint32_t bits = static_cast<const std::uint16_t*>(data)[index];
  return dtype == DType::bf16 ? unpack2<Bf16>(bits).x : unpack2<F16>(bits).x;
}
OCTAVO_DEVICE void write_number(void* data, DType dtype, long long index, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[index] = value;
  else if (dtype == DType::bf16)
    static_cast<Bf16*>(data)[index] = from_float<Bf16>(value);
  else
    static_cast<F16*>(data)[index] = from_float<F16>(value);
}

// Sums and products that no compiler fuses: the same bits on every device and on the host.
OCTAVO_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
OCTAVO_DEVICE float multiply_rn(float a, float b) { return __fmul_rn(a, b); }
OCTAVO_DEVICE double multiply_rn(double a, double b) { return __dmul_rn(a, b); }
OCTAVO_DEVICE float divide_rn(float a, float b) { return __fdiv_rn(a, b); }
OCTAVO_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }

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

// The logarithm to base 2 of x >= 0 (of 0: -inf), fast: within 2^-22 for x in [0.5, 2], elsewhere
// within 2 units in the last place.
OCTAVO_DEVICE float fast_log2(float x) {
#ifdef OCTAVO_EMULATED
  return std::log2(x);
#else
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

OCTAVO_DEVICE float reciprocal_sqrt(float x) { return __frsqrt_rn(x); }

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
  return __byte_perm(a, b, selector);
}

OCTAVO_DEVICE unsigned count_bits(unsigned x) { return static_cast<unsigned>(__popc(x)); }

// All 64 bits of a product, in one instruction.
OCTAVO_DEVICE unsigned long long multiply_wide(std::uint32_t a, std::uint32_t b) {
#ifdef OCTAVO_EMULATED
  return static_cast<unsigned long long>(a) * b;
#else
  unsigned long long product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#endif
}

}  // namespace octavo::cuda

// What the threads of a block find out together, and groups of four numbers in memory.
//
// A block has up to 1024 threads, a multiple of 32. Sums run over a warp's lanes in a butterfly and
// then over the warps in ascending order: the same bits in every thread and in every run.
#pragma once

#include "cuda/device/primitives.cuh"

namespace octavo::cuda {

constexpr unsigned kMostWarps = 32;

// `partial`: shared memory for a value a warp, which nobody else touches before the next barrier
// but one: two reductions in a row take two of them. known_warps: of a block whose size is
// constant.
template <unsigned known_warps = 0, class T, class Combine>
OCTAVO_DEVICE T block_reduce(T value, T* partial, Combine&& combine) {
  const unsigned warps = known_warps ? known_warps : blockDim.x / kWarp;
  value = warp_reduce(value, combine);
  if (lane_index() == 0) partial[warp_index()] = value;
  __syncthreads();
  T result = partial[0];
  for (unsigned warp = 1; warp < warps; ++warp) result = combine(result, partial[warp]);
  return result;
}

OCTAVO_DEVICE float block_sum(float value, float* partial) {
  return block_reduce(value, partial, add_rn);
}

OCTAVO_DEVICE float block_max(float value, float* partial) {
  return block_reduce(value, partial, [](float a, float b) { return fmaxf(a, b); });
}

// ---- four numbers of type T at p, of which `count` (any number; 4 or more: all) are there ----
// aligned: p is a multiple of four numbers' size.

OCTAVO_DEVICE float4 load_four(const float* p, int count, bool aligned, float missing = 0.0f) {
  if (aligned && count >= 4) return bits_as<float4>(load_16(p));
  return {count > 0 ? p[0] : missing, count > 1 ? p[1] : missing, count > 2 ? p[2] : missing,
          count > 3 ? p[3] : missing};
}

template <class T>
OCTAVO_DEVICE float4 load_four(const T* p, int count, bool aligned) {
  if (aligned && count >= 4) {
    const uint2 pairs = load_8(p);
    const float2 low = unpack2<T>(pairs.x), high = unpack2<T>(pairs.y);
    return {low.x, low.y, high.x, high.y};
  }
  return {count > 0 ? to_float(p[0]) : 0.0f, count > 1 ? to_float(p[1]) : 0.0f,
          count > 2 ? to_float(p[2]) : 0.0f, count > 3 ? to_float(p[3]) : 0.0f};
}

template <class T>
OCTAVO_DEVICE void store_four(T* p, float4 v, int count, bool aligned) {
  if (aligned && count >= 4) {
    if constexpr (sizeof(T) == 4)
      store_16(p, bits_as<uint4>(v));
    else
      store_8(p, {pack2<T>(v.x, v.y), pack2<T>(v.z, v.w)});
    return;
  }
  if (count > 0) p[0] = from_float<T>(v.x);
  if (count > 1) p[1] = from_float<T>(v.y);
  if (count > 2) p[2] = from_float<T>(v.z);
  if (count > 3) p[3] = from_float<T>(v.w);
}

// ---- eight numbers: 16 bytes of 16-bit ones, twice as many of float32 ----

template <class T>
OCTAVO_DEVICE void unpack_eight(float (&to)[8], uint4 from) {
  const std::uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack2<T>(words[i]);
    to[2 * i] = two.x;
    to[2 * i + 1] = two.y;
  }
}
template <class T>
OCTAVO_DEVICE uint4 pack_eight(const float (&x)[8]) {
  return {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])};
}
OCTAVO_DEVICE void load_eight(float (&to)[8], const float* from) {
  for (int i = 0; i < 2; ++i) {
    const float4 four = bits_as<float4>(load_16(from + 4 * i));
    to[4 * i] = four.x;
    to[4 * i + 1] = four.y;
    to[4 * i + 2] = four.z;
    to[4 * i + 3] = four.w;
  }
}

}  // namespace octavo::cuda

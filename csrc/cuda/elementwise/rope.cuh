// Rotating a pair of numbers and storing one in the cache: of the op (rope.cu), and of the product
// that does so with what it makes (multiply_few.cuh).
#pragma once

#include "core/backend.h"
#include "cuda/layout/kv_layout.cuh"

namespace octavo::cuda {

struct RopeArguments {
  void* qkv;
  std::int64_t stride;
  const float *cosines, *sines;  // null: no rotation
  const std::int32_t *positions, *slots;
  int num_heads, num_kv_heads, head_dim;
  KvLayout cache;
  unsigned char* cache_data;
};

inline RopeArguments rope_arguments(View qkv, const Rope* rope, const LayerSpec& layer,
                                    const KvLayer& kv, const Step& step) {
  RopeArguments a{};
  a.qkv = qkv.data;
  a.stride = qkv.stride;
  a.cosines = rope ? rope->cosines : nullptr;
  a.sines = rope ? rope->sines : nullptr;
  a.positions = step.positions;
  a.slots = step.slots_of(layer.kv_group);
  a.num_heads = static_cast<int>(layer.num_heads);
  a.num_kv_heads = static_cast<int>(layer.num_kv_heads);
  a.head_dim = static_cast<int>(layer.head_dim);
  a.cache = layout_of(kv);
  a.cache_data = static_cast<unsigned char*>(kv.data);
  return a;
}

// Numbers i and i + head_dim / 2 of a head, rotated and rounded.
template <class T>
OCTAVO_DEVICE T turned_first(float first, float second, float cosine, float sine) {
  return from_float<T>(add_rn(multiply_rn(first, cosine), -multiply_rn(second, sine)));
}
template <class T>
OCTAVO_DEVICE T turned_second(float first, float second, float cosine, float sine) {
  return from_float<T>(add_rn(multiply_rn(second, cosine), multiply_rn(first, sine)));
}

// scale: of int8.
OCTAVO_DEVICE void store_item(unsigned char* items, DType dtype, int index, float value,
                              float scale) {
  switch (dtype) {
    case DType::f32:
      reinterpret_cast<float*>(items)[index] = value;
      break;
    case DType::bf16:
      reinterpret_cast<Bf16*>(items)[index] = from_float<Bf16>(value);
      break;
    case DType::f16:
      reinterpret_cast<F16*>(items)[index] = from_float<F16>(value);
      break;
    default: {
      const float steps = rintf(divide_rn(value, scale));  // ties to even
      reinterpret_cast<std::int8_t*>(items)[index] =
          static_cast<std::int8_t>(fminf(127.0f, fmaxf(-127.0f, steps)));
    }
  }
}

}  // namespace octavo::cuda

// Rotating a pair of numbers and storing one in the cache: of the op (rope.cu), and of the product
// that does so with what it makes (multiply_few.cuh).
#pragma once

#include "core/backend.h"
#include "cuda/layout/kv_layout.cuh"

namespace octavo::cuda {

struct RopeArguments {
  void* qkv;
  std::int64_t stride;
  const float *cosines, *sines;      // null: no rotation
  const std::int32_t *rows, *slots;  // of cosines and sines; of the cache
  int num_heads, num_kv_heads, head_dim;
  int pairs;  // of a head, that rotate; without rotation half of the head
  KvLayout cache;

  // The elements of pair i, of the (head_dim + 1) / 2 that a head is cut into: the first `pairs`
  // rotate; the rest is cut into halves as well.
  OCTAVO_DEVICE int lower(int i) const { return i < pairs ? i : i + pairs; }
  OCTAVO_DEVICE int upper(int i) const { return i < pairs ? i + pairs : i + (head_dim + 1) / 2; }
};

inline RopeArguments rope_arguments(View qkv, const Rope* rope, const LayerSpec& layer,
                                    const KvLayer& kv, const Step& step) {
  RopeArguments a{};
  a.qkv = qkv.data;
  a.stride = qkv.stride;
  a.cosines = rope ? rope->cosines : nullptr;
  a.sines = rope ? rope->sines : nullptr;
  a.rows = step.rope_rows;
  a.slots = step.slots_of(layer.kv_group);
  a.num_heads = static_cast<int>(layer.num_heads);
  a.num_kv_heads = static_cast<int>(layer.num_kv_heads);
  a.head_dim = static_cast<int>(layer.head_dim);
  a.pairs = rope ? static_cast<int>(rope->pairs) : (a.head_dim + 1) / 2;
  a.cache = layout_of(kv);
  return a;
}

// The numbers of a pair, rotated and rounded.
template <class T>
OCTAVO_DEVICE T turned_first(float first, float second, float cosine, float sine) {
  return from_float<T>(add_rn(multiply_rn(first, cosine), -multiply_rn(second, sine)));
}
template <class T>
OCTAVO_DEVICE T turned_second(float first, float second, float cosine, float sine) {
  return from_float<T>(add_rn(multiply_rn(second, cosine), multiply_rn(first, sine)));
}

// Where a token's key or value goes.
struct Place {
  const KvLayout& cache;
  unsigned char* items;  // of the block and KV head
  int within;            // the block, of the token
  bool is_value;

  // head: among those of q, k and v.
  OCTAVO_DEVICE Place(const RopeArguments& a, int slot, int head)
      : cache(a.cache),
        items(cache.data +
              cache.head_at(slot / cache.block_size, (head - a.num_heads) % a.num_kv_heads)),
        within(slot % cache.block_size),
        is_value(head >= a.num_heads + a.num_kv_heads) {}

  OCTAVO_DEVICE void set_scale(float scale) const {
    auto* scales = reinterpret_cast<float*>(items + cache.scales_at());
    scales[is_value ? cache.block_size + within : within] = scale;
  }
  // Element d; scale: of int8, 127 steps of the vector's largest magnitude.
  OCTAVO_DEVICE void store(int d, float value, float scale) const {
    const int at = is_value ? cache.value_item(within, d) : cache.key_item(within, d);
    if (cache.dtype != DType::int8) return write_number(items, cache.dtype, at, value);
    const float steps = rintf(divide_rn(value, scale));  // ties to even
    reinterpret_cast<std::int8_t*>(items)[at] =
        static_cast<std::int8_t>(fminf(127.0f, fmaxf(-127.0f, steps)));
  }
};

}  // namespace octavo::cuda

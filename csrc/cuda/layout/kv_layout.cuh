// Where the keys and values of a layer lie in the paged cache.
//
// A block of block_size tokens (a multiple of 16) holds, one KV head after the other:
//
//   keys    [block_size][head_dim]               a token's key is contiguous
//   values  [block_size / 16][head_dim][16]      16 tokens' values of a dimension are contiguous
//   scales  float32 [2][block_size]              of int8 only: of the keys, then of the values
//
// The matrix products of attention (mma.m16n8k16) want a lane to hold neighbours along the
// dimension that is summed over: of a key along head_dim, of values along the tokens. Stored like
// this, the 16 bytes that a lane loads are a piece of such a fragment, whether they come from the
// cache straight into registers (decode) or through shared memory (prefill). Hence values are kept
// transposed, 16 tokens (a "page") at a time; the price is that a new value is stored two bytes
// here, two there.
#pragma once

#include "core/backend.h"
#include "core/text.h"
#include "cuda/device/primitives.cuh"

namespace octavo::cuda {

constexpr int kPageTokens = 16;

// By value to kernels. Counts of numbers ("items"), not of bytes, unless the name says so.
struct KvLayout {
  unsigned char* data = nullptr;
  DType dtype = DType::f32;
  int block_size = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  std::int64_t block_bytes = 0;

  OCTAVO_HOST_DEVICE int item_bytes() const {
    return dtype == DType::f32 ? 4 : dtype == DType::int8 ? 1 : 2;
  }
  OCTAVO_HOST_DEVICE int scales_at() const { return 2 * block_size * head_dim * item_bytes(); }
  OCTAVO_HOST_DEVICE int head_bytes() const {
    return scales_at() + (dtype == DType::int8 ? 2 * block_size * 4 : 0);
  }
  // Of element d of the token `within` its block.
  OCTAVO_HOST_DEVICE int key_item(int within, int d) const { return within * head_dim + d; }
  OCTAVO_HOST_DEVICE int value_item(int within, int d) const {
    return (block_size + within / kPageTokens * kPageTokens) * head_dim + d * kPageTokens +
           within % kPageTokens;
  }
  OCTAVO_HOST_DEVICE std::int64_t head_at(int block, int head) const {
    return block * block_bytes + static_cast<std::int64_t>(head) * head_bytes();
  }
};

inline KvLayout make_layout(DType dtype, std::int64_t block_size, std::int64_t num_kv_heads,
                            std::int64_t head_dim) {
  require(dtype != DType::int4, "the KV cache's dtype is int4; expected f32, bf16, f16 or int8");
  require(block_size >= kPageTokens && block_size % kPageTokens == 0, "block_size is ", block_size,
          "; expected a multiple of ", kPageTokens);
  require(head_dim >= 1 && head_dim <= 256, "head_dim is ", head_dim, "; expected 1 to 256");
  KvLayout layout;
  layout.dtype = dtype;
  layout.block_size = static_cast<int>(block_size);
  layout.num_kv_heads = static_cast<int>(num_kv_heads);
  layout.head_dim = static_cast<int>(head_dim);
  layout.block_bytes = num_kv_heads * layout.head_bytes();
  return layout;
}

inline KvLayout layout_of(const KvLayer& kv) {
  KvLayout layout = make_layout(kv.dtype, kv.block_size, kv.num_kv_heads, kv.head_dim);
  layout.data = static_cast<unsigned char*>(kv.data);
  return layout;
}

// One stored number; int8 without its scale.
OCTAVO_HOST_DEVICE float load_item(const unsigned char* items, DType dtype, int index) {
  if (dtype == DType::int8)
    return static_cast<float>(reinterpret_cast<const std::int8_t*>(items)[index]);
  return read_number(items, dtype, index);
}

}  // namespace octavo::cuda

// What the attention kernels share: their arguments, and where a sequence's rows and keys are.
#pragma once

#include "cuda/backend.h"
#include "cuda/device/launch.cuh"
#include "cuda/layout/kv_layout.cuh"

namespace octavo::cuda {

// By value to kernels.
struct AttentionArguments {
  void* out;
  const void* q;
  std::int64_t out_stride, q_stride;  // in numbers
  const std::int32_t *row_starts, *context_lens;
  const std::int32_t* block_tables;  // [num_seqs, max_blocks], of the layer's KV group
  int num_tokens, num_seqs, max_blocks;
  int num_heads, group, head_dim;  // group: query heads of a KV head
  int window;                      // 0: no limit
  float scale;                     // of scores, times log2(e): weights are powers of two
  KvLayout cache;
};

OCTAVO_DEVICE int least(int a, int b) { return a < b ? a : b; }
OCTAVO_DEVICE int most(int a, int b) { return a < b ? b : a; }

// Of one query row.
struct Visible {
  int begin, end;  // keys begin .. end - 1; none for padding
};
OCTAVO_DEVICE Visible visible_keys(int position, int window) {
  const int begin = window > 0 ? position - window + 1 : 0;
  return {most(begin, 0), position + 1};
}

constexpr float kLog2E = 1.44269504088896340736f;
OCTAVO_DEVICE float minus_infinity() { return bits_as<float>(0xff800000u); }

// 2^(a - b) where b is a maximum that a cannot exceed: 0 while there has been nothing to see.
OCTAVO_DEVICE float shrink(float a, float b) {
  return b == minus_infinity() ? 0.0f : fast_exp2(add_rn(a, -b));
}

// Any format, head_dim and shape (attention_simple.cu).
void attend_simply(Stream& stream, DType dtype, const AttentionArguments& arguments);

}  // namespace octavo::cuda

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
  float cap;  // 0: none; else a score is cap * tanh(scale * q.k), and cap is times log2(e)
  KvLayout cache;

  OCTAVO_DEVICE const std::int32_t* table_of(int seq) const {
    return block_tables + static_cast<std::int64_t>(seq) * max_blocks;
  }
};

// Keys begin .. end - 1: of one query row those that it sees; none for padding.
struct Visible {
  int begin, end;
  OCTAVO_DEVICE bool holds(int key) const { return begin <= key && key < end; }
};
OCTAVO_DEVICE Visible visible_keys(int position, int window) {
  const int begin = window > 0 ? position - window + 1 : 0;
  return {larger(begin, 0), position + 1};
}

constexpr float kLog2E = 1.44269504088896340736f;
OCTAVO_DEVICE float minus_infinity() { return bits_as<float>(0xff800000u); }

// 2^(a - b) where b is a maximum that a cannot exceed: 0 while there has been nothing to see.
OCTAVO_DEVICE float shrink(float a, float b) {
  return b == minus_infinity() ? 0.0f : fast_exp2(add_rn(a, -b));
}

// Query rows that are worked on together, of a sequence and KV head. A sequence's rows are its
// tokens times the head's query heads, token by token.
struct Rows {
  int seq, kv_head;
  int first_token;       // of the sequence, in the step
  int first_row, count;  // of the sequence's rows
  int first_position;    // of the sequence's first new token
  int context;

  // Returns how many tokens the sequence brings.
  OCTAVO_DEVICE int take_sequence(const AttentionArguments& a, int its_seq) {
    seq = its_seq;
    first_token = a.row_starts[seq];
    const int num_tokens = a.row_starts[seq + 1] - first_token;
    context = a.context_lens[seq];
    first_position = context - num_tokens;
    return num_tokens;
  }
  // Keys that may be read: none before the first row's window, where blocks may hold anything by
  // now, and none that was not written yet.
  OCTAVO_DEVICE Visible readable(const AttentionArguments& a) const {
    return {visible_keys(position(a, 0), a.window).begin, context};
  }
  // Of row `row` of these, counted from 0.
  OCTAVO_DEVICE int position(const AttentionArguments& a, int row) const {
    return first_position + (first_row + row) / a.group;
  }
  template <class T>
  OCTAVO_DEVICE T* numbers_of(const AttentionArguments& a, T* data, std::int64_t stride,
                              int row) const {
    const int index = first_row + row;
    return data + (first_token + index / a.group) * stride +
           (kv_head * a.group + index % a.group) * a.head_dim;
  }
  // Padding has no context: its rows become 0.
  template <class T>
  OCTAVO_DEVICE void clear(const AttentionArguments& a) const {
    for (int row = static_cast<int>(warp_index()); row < count;
         row += static_cast<int>(blockDim.x / kWarp)) {
      T* out = numbers_of(a, static_cast<T*>(a.out), a.out_stride, row);
      for (int d = static_cast<int>(lane_index()); d < a.head_dim; d += 32)
        out[d] = from_float<T>(0.0f);
    }
  }
};

// The last of `count` sequences for which holds(sequence), as it does for all before it.
template <class Holds>
OCTAVO_DEVICE int last_sequence(int count, Holds&& holds) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (holds(middle))
      low = middle;
    else
      high = middle;
  }
  return low;
}

// ---- the kernels ----

// How the decode kernel is asked. Where a sequence may bring more rows than max_rows (a ragged
// batch), the others are not shared out: one block takes them through all splits. The results are
// the same, only later.
struct DecodeWork {
  int max_tokens;  // sequences that bring more are left alone; 0: none is
  int max_rows;    // query rows of a sequence and KV head that have room in the workspace
  int sets;        // of 16 such rows
  int workers;     // blocks that share the splits of such a set
  int max_splits;
  float* partials;         // [num_seqs, max_rows, num_kv_heads, max_splits, head_dim + 4]
  std::int32_t* counters;  // [num_seqs, sets, num_kv_heads], zero
};

// T and cache formats: as can_use_tensor_cores (attention.cu) says.
void attend_few(Stream& stream, DType dtype, const AttentionArguments& arguments,
                const DecodeWork& work);

// Sequences that bring more than min_tokens tokens (attention_prefill.cu).
void attend_many(Stream& stream, DType dtype, const AttentionArguments& arguments, int min_tokens);

// Any format, head_dim and shape (attention_simple.cu).
void attend_simply(Stream& stream, DType dtype, const AttentionArguments& arguments);

}  // namespace octavo::cuda

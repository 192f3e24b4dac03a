// How the attention kernels on tensor cores are called.
#pragma once

#include "cuda/attention/attention.cuh"

namespace octavo::cuda {

// Where a sequence may bring more rows than max_rows (a ragged batch), the others are not shared
// out: one block takes them through all splits. The results are the same, only later.
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

}  // namespace octavo::cuda

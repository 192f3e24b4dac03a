// The data that change from step to step. They lie in device memory and come in one upload.
#pragma once

#include <cstdint>

#include "core/sampling_row.h"

namespace octavo {

// A ragged batch, as the ops see it. Every pointer is device memory; sizes are in brackets.
// Class Batch of `python/octavo/_native.pyi` documents the fields.
struct Step {
  std::int64_t num_tokens = 0;
  std::int64_t num_seqs = 0;
  std::int64_t num_rows = 0;    // rows whose logits are wanted
  std::int64_t max_blocks = 0;  // width of a block table

  const std::int32_t* token_ids = nullptr;     // [num_tokens]; -1 - r: sampled[r]
  const std::int32_t* positions = nullptr;     // [num_tokens]
  const std::int32_t* rope_rows = nullptr;     // [num_tokens], of cosines and sines
  const std::int32_t* slots = nullptr;         // [num_kv_groups, num_tokens]; -1: store nothing
  const std::int32_t* row_starts = nullptr;    // [num_seqs + 1]
  const std::int32_t* context_lens = nullptr;  // [num_seqs], new tokens included
  const std::int32_t* block_tables = nullptr;  // [num_kv_groups, num_seqs, max_blocks]
  const std::int32_t* logit_rows = nullptr;    // [num_rows]
  const SamplingRow* sampling = nullptr;       // [num_rows]
  // The places of adapters, -1 for none; null where no sequence has one.
  const std::int32_t* adapters = nullptr;      // [num_tokens]
  const std::int32_t* row_adapters = nullptr;  // [num_rows]

  std::int32_t* sampled =
      nullptr;  // [max_num_seqs], kept between steps: each state row's last token

  // Whether every token's logits are wanted, as in decoding: then row r is token r, since
  // logit_rows ascend.
  bool rows_are_tokens() const { return num_rows == num_tokens; }
  const std::int32_t* slots_of(std::int64_t group) const { return slots + group * num_tokens; }
  const std::int32_t* block_table(std::int64_t group, std::int64_t seq) const {
    return block_tables + (group * num_seqs + seq) * max_blocks;
  }
};

// The first block of its table that a token sees, and so do those after it. window: 0 for no limit.
inline std::int64_t first_seen_block(std::int64_t position, std::int64_t window,
                                     std::int64_t block_size) {
  return window > 0 && position >= window ? (position - window + 1) / block_size : 0;
}

}  // namespace octavo

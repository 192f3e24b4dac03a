// One step's work as Python passes it, and its upload to the device.
#pragma once

#include <cstdint>
#include <vector>

#include "core/backend.h"
#include "core/step.h"

namespace octavo {

// A ragged batch in host memory. Class Batch of `python/octavo/_native.pyi` documents the fields.
struct Batch {
  std::vector<std::int32_t> token_ids, row_starts, context_lens, block_tables, logit_rows;
  std::int64_t num_kv_groups = 1;
  std::int64_t max_blocks = 0;
  std::vector<SamplingRow> sampling;  // one a logit row; their positions are set by `upload`

  std::vector<std::int32_t> adapter_ids;  // empty: no sequence has one
  std::vector<std::int32_t> rope_sets;    // empty: 0, the set of short sequences
  // Of each sequence, how many of its first tokens are padding (see `even`); empty: none.
  std::vector<std::int32_t> front_padding;

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(token_ids.size()); }
  std::int64_t num_seqs() const { return static_cast<std::int64_t>(context_lens.size()); }
  std::int64_t num_rows() const { return static_cast<std::int64_t>(logit_rows.size()); }
  std::int64_t num_logprobs() const;  // the most that any row asks for; -1: none asks for any
  // tokens_per_seq and rows_per_seq are 0 when the sequences bring, or want, different numbers.
  StepKey key() const;
  // Adds sequences without context until the batch has this shape (`Backend::padded`).
  void pad(const StepKey& shape);
  std::int64_t most_tokens() const;  // of a sequence
  // Gives every sequence this many tokens, each with a logit row, so that a step of sequences with
  // different numbers of drafts can be recorded. The padding comes first: it stands for tokens
  // that are in the KV cache, attends to what they saw, and stores nothing. Returns the places of
  // the rows that were asked for; none, and no change, where a sequence lacks logit rows at its
  // end, or tokens or blocks (windows: of each KV group) before its own.
  std::vector<std::int32_t> even(std::int64_t tokens, const std::vector<std::int64_t>& windows,
                                 std::int64_t block_size);
};

// What a batch is checked against.
struct BatchLimits {
  std::int64_t vocab_size, max_num_batched_tokens, max_num_seqs, max_model_len;
  std::vector<std::int64_t> kv_windows;  // of each KV group; 0: no limit
  std::int64_t num_blocks, block_size;
  std::int64_t num_adapters;  // places
  std::int64_t rope_switch;   // of the model

  std::int64_t num_kv_groups() const { return static_cast<std::int64_t>(kv_windows.size()); }
};

// Throws std::invalid_argument naming the first field that is wrong, its value and its range.
void check(const Batch& batch, const BatchLimits& limits);

// Holds the device's copy of a batch. One upload a step; the buffers are reused, so that batches of
// one shape (StepKey) lie at the same addresses.
class StepUpload {
 public:
  // Allocates memory for every batch within these limits; a larger one makes the buffers grow.
  void reserve(Backend& backend, const BatchLimits& limits, std::int64_t max_blocks);
  // `sampled` is the device's [max_num_seqs] memory of sampled tokens.
  // rope_switch: of the model.
  Step upload(Backend& backend, const Batch& batch, std::int64_t block_size,
              std::int64_t rope_switch, std::int32_t* sampled);
  std::int64_t growths() const { return growths_; }
  std::size_t bytes() const { return device_.bytes(); }

 private:
  void grow(Backend& backend, std::size_t bytes);

  HostBuffer staging_;
  Buffer device_;
  std::int64_t growths_ = 0;
};

}  // namespace octavo

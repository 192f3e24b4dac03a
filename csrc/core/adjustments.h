// Changes to single logits before a token is sampled: biases and penalties. Most tokens have none.
#pragma once

#include <cstdint>
#include <vector>

#include "core/backend.h"

namespace octavo {

// In host memory, as Python passes them; empty when no row has any. LogitAdjustments
// (core/backend.h) documents the fields.
struct Adjustments {
  std::vector<std::int32_t> row_starts, token_ids;
  std::vector<float> repetition, bias;

  bool empty() const { return token_ids.empty(); }
};

// Throws std::invalid_argument naming the first entry that is wrong, its value and its range.
void check(const Adjustments& adjustments, std::int64_t num_rows, std::int64_t vocab_size);

// Bytes of all arrays one after the other, as `write` stores them.
std::size_t bytes_of(const Adjustments& adjustments);
void write(const Adjustments& adjustments, unsigned char* host);

// The place of each array in a copy of the bytes that `write` wrote.
LogitAdjustments find(const Adjustments& adjustments, const unsigned char* copy);

// Log-probabilities of one row: of the sampled token, with its rank, and of the `num_top` most
// probable ones, the lower id first of equals. logprobs: log(softmax(logits)), [vocab_size]; they
// are rounded, so the order is that of the logits.
struct RowLogprobs {
  float logprob = 0.0f;
  std::int32_t rank = 0;
  std::vector<std::int32_t> top_token_ids;
  std::vector<float> top_logprobs;
};
RowLogprobs list_logprobs(const std::vector<float>& logits, const std::vector<float>& logprobs,
                          std::int32_t token_id, std::int64_t num_top);

// The place of a token in that order, counted from 1.
std::int32_t rank_of(const float* values, std::int64_t count, std::int32_t token_id);

}  // namespace octavo

// Filters of sampling: which tokens of a row may be sampled. reference/sampling.py defines them.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/sampling_row.h"
#include "cpu/kernels.h"

namespace octavo::cpu {

// Orders tokens by score, the best first; the lower id first among equals.
struct Better {
  const float* scores;
  bool operator()(std::int32_t a, std::int32_t b) const {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  }
};

// What a thread needs to sample a row, kept for the next one: memory that is new is slow.
struct SamplingScratch {
  std::vector<float> scores, gathered;
  std::vector<std::int32_t> tokens;
  std::vector<std::uint64_t> weights;
  std::vector<std::pair<std::int32_t, std::uint64_t>> edge;  // tokens and weights
};

// The row as it is sampled this time: XTC is on or off, as its random number says.
SamplingRow decide_xtc(SamplingRow row, const Kernels& kernels);

// The smallest logit within num_sigmas standard deviations of the largest one, `max`. Logits of
// -inf do not count.
float lowest_by_sigma(const float* logits, float max, std::int64_t vocab, float num_sigmas);

// Top-p where no other filter comes before it: scores of tokens that are filtered out become -inf.
// A list of most tokens of a row would cost more than the filter itself. max: the largest score.
void keep_top_p_of_row(SamplingScratch& scratch, float max, float top_p, const Kernels& kernels);

// Removes those of scratch.tokens that are filtered out after the two lower bounds, min_p and
// top_n_sigma. max: the largest of scratch.scores. What is left is in any order.
void keep_by_rank(SamplingScratch& scratch, float max, const SamplingRow& row,
                  const Kernels& kernels);

}  // namespace octavo::cpu

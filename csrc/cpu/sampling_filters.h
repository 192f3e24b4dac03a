// Filters of sampling: which tokens of a row may be sampled. reference/sampling.py defines them.
#pragma once

#include <cstdint>
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

// The row as it is sampled this time: XTC is on or off, as its random number says.
SamplingRow decide_xtc(SamplingRow row, const Kernels& kernels);

// The smallest logit within num_sigmas standard deviations of the largest one, `max`. Logits of
// -inf do not count.
float lowest_by_sigma(const float* logits, float max, std::int64_t vocab, float num_sigmas);

// Removes those of `tokens` that are filtered out after the two lower bounds, min_p and
// top_n_sigma. max: the largest score of all. What is left is in any order.
void keep_by_rank(std::vector<std::int32_t>& tokens, const float* scores, float max,
                  const SamplingRow& row, const Kernels& kernels);

}  // namespace octavo::cpu

// Sampling a token from each row of logits. reference/sampling.py defines every step, to the bit.

#include "core/adjustments.h"
#include "cpu/backend.h"
#include "cpu/sampling_filters.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace octavo::cpu {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
// A probability relative to the largest one's, e^-28, is less than the unit of its fixed point; so
// a token as far below the largest score is of no account to top-p. With some room for roundings.
constexpr float kWeightless = 30.0f;

std::int64_t first_largest(const float* values, std::int64_t count, const Kernels& kernels) {
  const float* found = std::find(values, values + count, kernels.max_value(values, count));
  return found == values + count ? 0 : found - values;  // all NaN: any token, the row is flagged
}

// The scores of tokens that the mask does not allow become -inf.
void apply_mask(std::vector<float>& scores, const std::int32_t* mask) {
  for (std::size_t begin = 0; begin < scores.size(); begin += 32) {
    const auto word = static_cast<std::uint32_t>(mask[begin / 32]);
    if (word == ~0u) continue;
    const std::size_t end = std::min(scores.size(), begin + 32);
    for (std::size_t i = begin; i < end; ++i) {
      if (!((word >> (i - begin)) & 1u)) scores[i] = kNever;
    }
  }
}

// The largest score that `count` tokens or more reach, or a smaller one: the count-th largest of
// the largest scores of groups of tokens. largest: scratch.
float reached_by(const float* scores, std::int64_t vocab, std::int64_t count,
                 std::vector<float>& largest, const Kernels& kernels) {
  constexpr std::int64_t kGroup = 64;
  largest.clear();
  for (std::int64_t i = 0; i < vocab; i += kGroup)
    largest.push_back(kernels.max_value(scores + i, std::min(kGroup, vocab - i)));
  if (count > static_cast<std::int64_t>(largest.size())) return kNever;
  const auto place = largest.begin() + static_cast<std::ptrdiff_t>(count - 1);
  std::nth_element(largest.begin(), place, largest.end(), std::greater<float>());
  return *place;
}

// The tokens whose score is `lowest` or more, and not -inf, in ascending order.
void take_from(std::vector<std::int32_t>& tokens, const float* scores, std::int64_t vocab,
               float lowest) {
  tokens.resize(static_cast<std::size_t>(vocab));
  std::size_t count = 0;
  for (std::int64_t i = 0; i < vocab; ++i) {
    tokens[count] = static_cast<std::int32_t>(i);
    count += scores[i] >= lowest && scores[i] != kNever;
  }
  tokens.resize(count);
}

std::int64_t draw_token(const float* logits, std::int64_t vocab, const std::int32_t* mask,
                        const SamplingRow& options, SamplingScratch& scratch,
                        const Kernels& kernels) {
  if (options.target >= 0) return options.target;
  if (options.is_greedy() && !mask) return first_largest(logits, vocab, kernels);
  SamplingRow row = decide_xtc(options, kernels);
  std::vector<float>& scores = scratch.scores;
  scores.assign(logits, logits + vocab);
  if (mask) apply_mask(scores, mask);
  if (row.is_greedy()) return first_largest(scores.data(), vocab, kernels);
  float lowest = kNever;
  if (row.top_n_sigma > 0.0f) {
    const float largest = kernels.max_value(scores.data(), vocab);
    lowest = lowest_by_sigma(scores.data(), largest, vocab, row.top_n_sigma) / row.temperature;
  }
  for (float& score : scores) score = score / row.temperature;
  const auto draw = [&] {
    return kernels.noisy_best(scores.data(), row.seed, static_cast<std::uint32_t>(row.sample_index),
                              static_cast<std::uint32_t>(row.position), vocab);
  };
  if (row.keeps_all()) return draw();

  const float max = kernels.max_value(scores.data(), vocab);
  if (row.min_p > 0.0f) lowest = std::max(lowest, max + kernels.log_positive(row.min_p));
  // The filters after these bounds look at single tokens: they get no more than they may keep.
  if (row.top_k > 0) {
    const float least = reached_by(scores.data(), vocab, row.top_k, scratch.gathered, kernels);
    lowest = std::max(lowest, least);
  }
  if (row.top_p < 1.0f && row.typical_p >= 1.0f) {
    if (row.top_k == 0 && lowest == kNever && max > kNever) {
      keep_top_p_of_row(scratch, max, row.top_p, kernels);
      row.top_p = 1.0f;
      if (row.keeps_all()) return draw();
    } else {
      lowest = std::max(lowest, max - kWeightless);
    }
  }
  std::vector<std::int32_t>& tokens = scratch.tokens;
  take_from(tokens, scores.data(), vocab, lowest);
  if (tokens.empty()) return 0;  // every logit is a NaN, or none is allowed
  keep_by_rank(scratch, max, row, kernels);
  std::vector<float>& kept = scratch.gathered;
  kept.resize(tokens.size());
  for (std::size_t i = 0; i < kept.size(); ++i)
    kept[i] = scores[static_cast<std::size_t>(tokens[i])];
  std::fill(scores.begin(), scores.end(), kNever);
  for (std::size_t i = 0; i < kept.size(); ++i)
    scores[static_cast<std::size_t>(tokens[i])] = kept[i];
  return draw();
}

// log(sum of e^(logit - max)), the sum in fixed point.
float log_sum(const float* logits, float max, std::int64_t vocab, const Kernels& kernels) {
  const double sum = static_cast<double>(kernels.exp_sum(logits, max, vocab));
  return static_cast<float>(std::log(sum * 0x1p-40));
}

// The most probable `count` tokens of a row and their log-probabilities.
void list_top(const float* logits, std::int64_t vocab, float max, float log_total,
              std::int64_t count, std::int32_t* token_ids, float* logprobs,
              SamplingScratch& scratch, const Kernels& kernels) {
  if (count == 0) return;
  std::vector<std::int32_t>& tokens = scratch.tokens;
  take_from(tokens, logits, vocab, reached_by(logits, vocab, count, scratch.gathered, kernels));
  const auto end = tokens.begin() + static_cast<std::ptrdiff_t>(count);
  std::partial_sort(tokens.begin(), end, tokens.end(), Better{logits});
  for (std::int64_t i = 0; i < count; ++i) {
    token_ids[i] = tokens[static_cast<std::size_t>(i)];
    logprobs[i] = (logits[token_ids[i]] - max) - log_total;
  }
}

}  // namespace

void CpuBackend::adjust_logits(View out, View logits, const LogitAdjustments& adjustments) {
  each_row(out, [&](std::int64_t row) {
    float* values = out.row(row);
    if (values != logits.row(row)) std::copy_n(logits.row(row), logits.cols, values);
    for (std::int32_t i = adjustments.row_starts[row]; i < adjustments.row_starts[row + 1]; ++i) {
      float& x = values[adjustments.token_ids[i]];
      const float repetition = adjustments.repetition[i];
      x = x > 0.0f ? x / repetition : x * repetition;
      x = x + adjustments.bias[i];
    }
  });
}

void CpuBackend::sample(const Samples& out, View logits, const std::int32_t* masks,
                        const Step& step) {
  const std::int64_t vocab = logits.cols;
  const std::int64_t words = (vocab + 31) / 32;
  pool_.each(logits.rows, [&](std::int64_t row, int thread) {
    SamplingScratch& scratch = sampling_scratch_[static_cast<std::size_t>(thread)];
    const float* values = logits.row(row);
    const bool finite = kernels_.all_finite(values, vocab);
    const SamplingRow& sampling = step.sampling[row];
    // A row that is not finite is not sampled: a NaN cannot be ordered.
    const auto token = finite ? static_cast<std::int32_t>(
                                    draw_token(values, vocab, masks ? masks + row * words : nullptr,
                                               sampling, scratch, kernels_))
                              : 0;
    out.finite[row] = finite;
    out.token_ids[row] = token;
    if (sampling.state_row >= 0) step.sampled[sampling.state_row] = token;

    constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
    const std::int64_t num_top = sampling.num_logprobs;
    out.logprobs[row] = kNone;
    if (out.ranks) out.ranks[row] = 0;
    std::fill_n(out.top_token_ids + row * out.num_top, out.num_top, -1);
    std::fill_n(out.top_logprobs + row * out.num_top, out.num_top, kNone);
    if (num_top < 0 || !finite) return;
    const float max = kernels_.max_value(values, vocab);
    const float log_total = log_sum(values, max, vocab, kernels_);
    out.logprobs[row] = (values[token] - max) - log_total;
    if (out.ranks) out.ranks[row] = rank_of(values, vocab, token);
    list_top(values, vocab, max, log_total, num_top, out.top_token_ids + row * out.num_top,
             out.top_logprobs + row * out.num_top, scratch, kernels_);
  });
}

void CpuBackend::log_softmax(View out, View logits) {
  each_row(out, [&](std::int64_t row) {
    const float* values = logits.row(row);
    const float max = kernels_.max_value(values, logits.cols);
    const float log_total = log_sum(values, max, logits.cols, kernels_);
    for (std::int64_t i = 0; i < logits.cols; ++i) out.row(row)[i] = (values[i] - max) - log_total;
  });
}

}  // namespace octavo::cpu

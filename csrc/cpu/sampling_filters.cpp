#include "cpu/sampling_filters.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace octavo::cpu {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
using Tokens = std::vector<std::int32_t>;
using Weights = std::vector<std::uint64_t>;

// The tokens' scores.
void gather(SamplingScratch& s) {
  s.gathered.resize(s.tokens.size());
  const float* scores = s.scores.data();
  for (std::size_t i = 0; i < s.gathered.size(); ++i) s.gathered[i] = scores[s.tokens[i]];
}

// The probabilities of the tokens, relative to that of one with score `max`, in fixed point.
const Weights& weigh(SamplingScratch& s, float max, const Kernels& kernels) {
  gather(s);
  s.weights.resize(s.tokens.size());
  kernels.exp_weights(s.weights.data(), s.gathered.data(), max,
                      static_cast<std::int64_t>(s.weights.size()));
  return s.weights;
}

template <class Values>
std::uint64_t sum_of(const Values& weights) {
  return std::accumulate(weights.begin(), weights.end(), std::uint64_t{0});
}

std::uint64_t part_of(float fraction, std::uint64_t total) {
  return static_cast<std::uint64_t>(
      std::ceil(static_cast<double>(fraction) * static_cast<double>(total)));
}

template <class Before>
void sort_edge(SamplingScratch& s, Before before) {
  std::sort(s.edge.begin(), s.edge.end(),
            [&](const auto& a, const auto& b) { return before(a.first, b.first); });
}

// Weights by bins of a distance, which order tokens: whole bins are kept, or not, by their weight
// alone, and only the tokens of one of them are sorted.
struct Bins {
  std::array<std::uint64_t, kWeightBins> sums{};

  static int of(float distance) {
    // Also of a NaN, by the order of the two.
    return static_cast<int>(std::min(kWeightBins - 1.0f, distance * kWeightBinsOfOne));
  }
  // The bin in which the sum of all so far reaches `needed`; `reached`: the sum before it.
  int last(std::uint64_t needed, std::uint64_t& reached) const {
    int bin = 0;
    for (reached = 0; bin + 1 < kWeightBins; ++bin) {
      const std::uint64_t with = reached + sums[static_cast<std::size_t>(bin)];
      if (with >= needed) break;
      reached = with;
    }
    return bin;
  }
};

// Keeps the shortest prefix, in the order that `before` gives, whose weight reaches `needed`.
// distance: of a token, 0 or more, in the same order.
template <class Distance, class Before>
void keep_prefix(SamplingScratch& s, std::uint64_t needed, Distance distance, Before before) {
  Bins bins;
  Tokens& tokens = s.tokens;
  for (std::size_t i = 0; i < tokens.size(); ++i)
    bins.sums[static_cast<std::size_t>(Bins::of(distance(tokens[i])))] += s.weights[i];
  std::uint64_t reached = 0;
  const int last = bins.last(needed, reached);

  s.edge.clear();
  std::size_t kept = 0;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const int bin = Bins::of(distance(tokens[i]));
    if (bin == last) s.edge.emplace_back(tokens[i], s.weights[i]);
    tokens[kept] = tokens[i];
    kept += bin < last;
  }
  sort_edge(s, before);
  for (std::size_t i = 0; i < s.edge.size() && reached < needed; ++i) {
    tokens[kept++] = s.edge[i].first;
    reached += s.edge[i].second;
  }
  tokens.resize(kept);
}

// Tokens by how far their distance from the largest score is from the mean one.
struct MoreTypical {
  const float* scores;
  float max, mean;

  float away(std::int32_t token) const { return std::fabs((max - scores[token]) - mean); }
  bool operator()(std::int32_t a, std::int32_t b) const {
    const float away_a = away(a), away_b = away(b);
    return away_a != away_b ? away_a < away_b : a < b;
  }
};

void keep_typical(SamplingScratch& s, float max, float mass, const Kernels& kernels) {
  const Weights& weights = weigh(s, max, kernels);
  std::int64_t products = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    // No distance above 28 has a weight; an infinite one must not be multiplied.
    const float distance = std::min(max - s.gathered[i], 1000.0f);
    products +=  // below 2^50, and signed numbers are converted faster
        static_cast<std::int64_t>(static_cast<double>(weights[i]) * static_cast<double>(distance));
  }
  const std::uint64_t total = sum_of(weights);
  const auto mean = static_cast<float>(static_cast<double>(products) / static_cast<double>(total));
  const MoreTypical more{s.scores.data(), max, mean};
  keep_prefix(s, part_of(mass, total), [&](std::int32_t token) { return more.away(token); }, more);
}

void keep_top_p(SamplingScratch& s, float max, float top_p, const Kernels& kernels) {
  const std::uint64_t needed = part_of(top_p, sum_of(weigh(s, max, kernels)));
  const float* scores = s.scores.data();
  keep_prefix(s, needed, [&](std::int32_t token) { return max - scores[token]; }, Better{scores});
}

// Removes the tokens that have `threshold` of the probability, but for the last of them.
void exclude_top(SamplingScratch& s, float max, float threshold, const Kernels& kernels) {
  const Weights& weights = weigh(s, max, kernels);
  const std::uint64_t needed = part_of(threshold, sum_of(weights));
  constexpr std::int32_t kNone = -1;
  const Better better{s.scores.data()};
  Tokens& tokens = s.tokens;
  std::int32_t last = kNone;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (weights[i] >= needed && (last == kNone || better(last, tokens[i]))) last = tokens[i];
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (weights[i] < needed || tokens[i] == last) tokens[kept++] = tokens[i];
  }
  tokens.resize(kept);
}

}  // namespace

SamplingRow decide_xtc(SamplingRow row, const Kernels& kernels) {
  if (row.xtc_probability > 0.0f) {
    const std::uint32_t word =
        kernels.xtc_word(row.seed, static_cast<std::uint32_t>(row.sample_index),
                         static_cast<std::uint32_t>(row.position));
    const auto bound =
        static_cast<std::uint64_t>(static_cast<double>(row.xtc_probability) * 0x1p32);
    if (word >= bound) row.xtc_probability = 0.0f;
  }
  return row;
}

float lowest_by_sigma(const float* logits, float max, std::int64_t vocab, float num_sigmas) {
  std::uint64_t count = 0, sum = 0, squares = 0;
  for (std::int64_t i = 0; i < vocab; ++i) {
    const float distance = std::min(max - logits[i], 128.0f);
    const bool counts = logits[i] != kNever;
    const auto steps =
        counts ? static_cast<std::uint32_t>(static_cast<std::int32_t>(distance * 0x1p15f)) : 0u;
    count += counts;
    sum += steps;
    squares += std::uint64_t{steps} * steps;
  }
  const double mean = static_cast<double>(sum) / static_cast<double>(count);
  const double variance = static_cast<double>(squares) / static_cast<double>(count) - mean * mean;
  const double sigma = std::sqrt(std::max(variance, 0.0)) * 0x1p-15;
  return max - static_cast<float>(static_cast<double>(num_sigmas) * sigma);
}

void keep_top_p_of_row(SamplingScratch& scratch, float max, float top_p, const Kernels& kernels) {
  std::vector<float>& scores = scratch.scores;
  const auto vocab = static_cast<std::int64_t>(scores.size());
  Bins bins;
  kernels.bin_weights(bins.sums.data(), scores.data(), max, vocab);
  const std::uint64_t needed = part_of(top_p, sum_of(bins.sums));
  std::uint64_t reached = 0;
  const int last = bins.last(needed, reached);

  Tokens& tokens = scratch.tokens;
  tokens.resize(scores.size());
  tokens.resize(
      static_cast<std::size_t>(kernels.take_bin(tokens.data(), scores.data(), max, last, vocab)));
  weigh(scratch, max, kernels);
  std::vector<std::pair<std::int32_t, std::uint64_t>>& edge = scratch.edge;
  edge.clear();
  for (std::size_t i = 0; i < tokens.size(); ++i) edge.emplace_back(tokens[i], scratch.weights[i]);
  sort_edge(scratch, Better{scores.data()});
  float lowest = kNever;
  std::size_t kept = 0;
  for (; kept < edge.size() && reached < needed; ++kept) {
    lowest = scores[static_cast<std::size_t>(edge[kept].first)];
    reached += edge[kept].second;
  }
  for (float& score : scores) score = score >= lowest ? score : kNever;
  for (; kept < edge.size(); ++kept) scores[static_cast<std::size_t>(edge[kept].first)] = kNever;
}

void keep_by_rank(SamplingScratch& scratch, float max, const SamplingRow& row,
                  const Kernels& kernels) {
  Tokens& tokens = scratch.tokens;
  const auto top_k = static_cast<std::size_t>(row.top_k);
  if (top_k > 0 && top_k < tokens.size()) {
    std::nth_element(tokens.begin(), tokens.begin() + row.top_k, tokens.end(),
                     Better{scratch.scores.data()});
    tokens.resize(top_k);
  }
  if (row.typical_p < 1.0f) keep_typical(scratch, max, row.typical_p, kernels);
  if (row.top_p < 1.0f) keep_top_p(scratch, max, row.top_p, kernels);
  if (row.xtc_probability > 0.0f) exclude_top(scratch, max, row.xtc_threshold, kernels);
}

}  // namespace octavo::cpu

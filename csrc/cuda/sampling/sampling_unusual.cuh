// Sampling with the filters that few requests use: top-n-sigma, typical and XTC, and the others
// beside them. reference/sampling.py defines each.
//
// One block does a row by itself, in about ten passes over it; rows without these filters never
// come here. A filter's limit is a place among the tokens, which makes "is kept" a comparison.
#pragma once

#include "cuda/sampling/sampling_filters.cuh"

namespace octavo::cuda {

// Which tokens the filters have left so far.
struct Kept {
  Wide lowest = 0, highest = ~Wide{0};  // places by score
  Wide least_typical = 0;               // place by typicality; 0: any
  float mean = 0.0f;                    // distance from the best score

  // Larger for a token whose distance is closer to the mean; among equals for a lower token id.
  OCTAVO_DEVICE Wide typical_place(const Search& search, int token, float score) const {
    return place_of(-fabsf(add_rn(add_rn(search.max, -score), -mean)), token);
  }
  OCTAVO_DEVICE bool has(const Search& search, int token, float score) const {
    const Wide place = place_of(score, token);
    if (!(score >= search.lowest) || place < lowest || place > highest) return false;
    return least_typical == 0 || typical_place(search, token, score) >= least_typical;
  }
};

// The first of the kept tokens, in the order of `place`, whose number or weight reaches `needed`:
// those of at least the limit's place. needed: 1 or more, and not more than there is.
template <class Place>
OCTAVO_DEVICE Limit limit_of_kept(const Search& search, const Kept& kept, bool by_weight,
                                  Wide needed, Place&& place) {
  Wide prefix = 0, weight_before = 0;
  for (int shift = 64;;) {  // of a place's bits, those from here on are known
    const int next = shift > kDigitBits ? shift - kDigitBits : 0;
    const int digits = 1 << (shift - next);
    search.count_in_bins(true, [&](int token, float score) {
      if (!kept.has(search, token, score)) return -1;
      const Wide its_place = place(token, score);
      if (shift < 64 && its_place >> shift != prefix) return -1;
      return digits - 1 - static_cast<int>(its_place >> next & (digits - 1));
    });
    const Found found = search.find(by_weight, needed);
    needed -= by_weight ? found.weight_before : found.count_before;
    weight_before += found.weight_before;
    prefix =
        (shift == 64 ? 0 : prefix << (shift - next)) | static_cast<Wide>(digits - 1 - found.bin);
    shift = next;
    if (found.count_in <= 1 || shift == 0)
      return {prefix << shift, weight_before + select_memory().weights[found.bin].value()};
  }
}

// The smallest score within `num_sigmas` standard deviations of the largest logit.
OCTAVO_DEVICE float lowest_by_sigma(const Search& search, float max_logit, float num_sigmas) {
  SelectMemory& memory = select_memory();
  Scores logits = search.scores;
  logits.divisor = 1.0f;
  Wide count = 0, sum = 0, squares = 0;
  logits.each([&](int, float logit) {
    const float distance = fminf(add_rn(max_logit, -logit), 128.0f);
    const auto steps = static_cast<unsigned>(multiply_rn(distance, 0x1p15f));
    ++count;
    sum += steps;
    squares += Wide{steps} * steps;
  });
  count = block_total(count, memory.sums);
  sum = block_total(sum, memory.more_sums);
  __syncthreads();
  squares = block_total(squares, memory.sums);
  const double mean = static_cast<double>(sum) / static_cast<double>(count);
  const double square = multiply_rn(mean, mean);
  const double variance = static_cast<double>(squares) / static_cast<double>(count) - square;
  const double sigma = sqrt(variance > 0.0 ? variance : 0.0) * 0x1p-15;
  const auto reach = static_cast<float>(static_cast<double>(num_sigmas) * sigma);
  return divide_rn(add_rn(max_logit, -reach), search.scores.divisor);
}

OCTAVO_DEVICE Total total_of_kept(const Search& search, const Kept& kept) {
  SelectMemory& memory = select_memory();
  Wide count = 0, weight = 0;
  search.scores.each([&](int token, float score) {
    if (!kept.has(search, token, score)) return;
    ++count;
    weight += search.weight_of(score);
  });
  __syncthreads();
  count = block_total(count, memory.sums);
  return {static_cast<unsigned>(count), block_total(weight, memory.more_sums)};
}

// Keeps the most typical tokens that hold `mass` of the weight `total`; returns theirs.
OCTAVO_DEVICE Wide keep_typical(const Search& search, Kept& kept, float mass, Wide total) {
  Wide sum = 0;
  search.scores.each([&](int token, float score) {
    if (!kept.has(search, token, score)) return;
    const double distance = add_rn(search.max, -score), weight = search.weight_of(score);
    if (weight > 0.0) sum += static_cast<Wide>(weight * distance);
  });
  __syncthreads();
  sum = block_total(sum, select_memory().sums);
  kept.mean = static_cast<float>(static_cast<double>(sum) / static_cast<double>(total));
  const Limit limit = limit_of_kept(
      search, kept, true, enough_of(mass, total),
      [&](int token, float score) { return kept.typical_place(search, token, score); });
  kept.least_typical = limit.place;
  return limit.weight;
}

// Leaves out the tokens that have `threshold` of the weight `total`, but for the last of them.
OCTAVO_DEVICE void exclude_top(const Search& search, Kept& kept, float threshold, Wide total) {
  const Wide needed = enough_of(threshold, total);
  Wide last = ~Wide{0};
  search.scores.each([&](int token, float score) {
    const Wide place = place_of(score, token);
    if (place < last && kept.has(search, token, score) && search.weight_of(score) >= needed)
      last = place;
  });
  __syncthreads();
  kept.highest = block_reduce<kSamplingWarps>(last, select_memory().sums,
                                              [](Wide a, Wide b) { return a < b ? a : b; });
}

// The place of the token that is sampled, noise included. max_logit: of the tokens allowed.
OCTAVO_DEVICE Wide sample_unusual(Search search, const RowOptions& options, float max_logit) {
  if (search.max == INFINITY) return sample_down_to(search, options, 0);
  if (options.top_n_sigma > 0.0f)
    search.lowest = fmaxf(search.lowest, lowest_by_sigma(search, max_logit, options.top_n_sigma));
  Kept kept;
  const auto by_score = [](int token, float score) { return place_of(score, token); };
  const Total all = total_of_kept(search, kept);
  if (all.count == 0) return place_of(-INFINITY, 0);
  Wide weight = all.weight;
  const auto keep_best = [&](bool by_weight, Wide needed) {
    const Limit limit = limit_of_kept(search, kept, by_weight, needed, by_score);
    // The place may be below that of any kept token, so of a filter before this one.
    if (limit.place > kept.lowest) kept.lowest = limit.place;
    weight = limit.weight;
  };
  if (options.top_k > 0 && static_cast<unsigned>(options.top_k) < all.count)
    keep_best(false, static_cast<Wide>(options.top_k));
  if (options.typical_p < 1.0f) weight = keep_typical(search, kept, options.typical_p, weight);
  if (options.top_p < 1.0f) keep_best(true, enough_of(options.top_p, weight));
  if (options.xtc_probability > 0.0f) exclude_top(search, kept, options.xtc_threshold, weight);

  Best best;
  search.scores.each([&](int token, float score) {
    if (kept.has(search, token, score))
      best.see(add_rn(score, gumbel_of(options.stamp(), token)), token);
  });
  return best_of_block(best.place());
}

}  // namespace octavo::cuda

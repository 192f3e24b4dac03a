// What the last block of a phase concludes: which tokens filters leave, by counts and then by the
// few that were collected; and the same for log-probabilities.
#pragma once

#include "cuda/sampling/sampling_row.cuh"

namespace octavo::cuda {

// Adds this block's counts to the row's.
OCTAVO_DEVICE void add_counts(RowState& state) {
  const SelectMemory& memory = select_memory();
  for (unsigned i = threadIdx.x; i < kBins; i += kSamplingThreads) {
    if (memory.counts[i]) atomic_add(&state.counts[i], memory.counts[i]);
    const Wide weight = memory.weights[i].value();
    if (weight) atomic_add(&state.weights[i], weight);
  }
}

OCTAVO_DEVICE float gumbel_of(const Stamp& stamp, int token) {
  const uint4 four = random_of_four(stamp, static_cast<unsigned>(token) / 4);
  const int i = token % 4;
  return gumbel_variate(i < 2 ? (i == 0 ? four.x : four.y) : (i == 2 ? four.z : four.w));
}

OCTAVO_DEVICE Wide best_of_block(Wide place) {
  __syncthreads();
  return block_reduce<kSamplingWarps>(place, select_memory().sums,
                                      [](Wide a, Wide b) { return a > b ? a : b; });
}

// The prefix that holds top_p of the weight is the shortest that reaches this.
OCTAVO_DEVICE Wide enough_of(float top_p, Wide total) {
  return static_cast<Wide>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
}

// Samples from the tokens whose place is at least `lowest`; as the next two, the place that is
// best, noise included.
OCTAVO_DEVICE Wide sample_down_to(const Search& search, const RowOptions& options, Wide lowest) {
  Best best;
  search.scores.each([&](int token, float score) {
    if (score >= search.lowest && place_of(score, token) >= lowest)
      best.see(add_rn(score, gumbel_of(options.stamp(), token)), token);
  });
  return best_of_block(best.place());
}

// Samples from the tokens that `wanted` names, few enough to be listed, but of those the best
// options.top_k (0: all), and of those the best that hold options.top_p.
template <class Wanted>
OCTAVO_DEVICE Wide sample_listed(const Search& search, const RowOptions& options, Wide total,
                                 Wanted&& wanted) {
  SelectMemory& memory = select_memory();
  const unsigned listed = search.list(wanted);
  const Rank mine = rank_listed(listed);
  bool kept = threadIdx.x < listed;
  if (options.top_k > 0) {
    kept = kept && mine.count_before < static_cast<unsigned>(options.top_k);
    total = block_total(kept ? mine.weight : 0, memory.more_sums);
  }
  if (options.top_p < 1.0f) kept = kept && mine.weight_before < enough_of(options.top_p, total);
  Wide place = 0;
  if (kept) {
    const int token = token_of(mine.place);
    place = place_of(add_rn(score_of(mine.place), gumbel_of(options.stamp(), token)), token);
  }
  return best_of_block(place);
}

// Goes on where the plan ends, over the row or what was collected of it.
OCTAVO_DEVICE Wide sample_as_planned(const Search& search, const Plan& plan, RowOptions options) {
  bool by_weight = plan.by_weight;
  Wide needed = plan.needed;
  Found found = plan.found;
  if (!plan.by_limit) {
    const Total total = search.count_by_distance(options.top_p < 1.0f);
    if (options.top_k > 0 && static_cast<unsigned>(options.top_k) >= total.count) options.top_k = 0;
    by_weight = options.top_k == 0;
    if (!options.counts()) return sample_down_to(search, options, 0);
    needed = by_weight ? enough_of(options.top_p, total.weight) : static_cast<Wide>(options.top_k);
    found = search.find(by_weight, needed);
    if (found.count_before + found.count_in <= kMostListed) {
      return sample_listed(search, options, total.weight,
                           [&](int, float score) { return search.bin_of(score) <= found.bin; });
    }
  }
  for (;;) {
    const Limit limit = search.limit(by_weight, needed, found);
    if (by_weight || options.top_p >= 1.0f) return sample_down_to(search, options, limit.place);
    by_weight = true;  // top-p, of what top-k keeps
    needed = enough_of(options.top_p, limit.weight);
    search.count_by_distance(true);
    found = search.find(true, needed);
  }
}

// ---- counts ----

// Takes the row's counts into shared memory, and leaves zeros.
OCTAVO_DEVICE Total take_counts(RowState& state) {
  SelectMemory& memory = select_memory();
  unsigned count = 0;
  Wide weight = 0;
  __syncthreads();
  for (unsigned i = threadIdx.x; i < kBins; i += kSamplingThreads) {
    const Wide its_weight = state.weights[i];
    memory.counts[i] = state.counts[i];
    memory.weights[i] = {static_cast<unsigned>(its_weight),
                         static_cast<unsigned>(its_weight >> 32)};
    count += memory.counts[i];
    weight += its_weight;
    state.counts[i] = 0;
    state.weights[i] = 0;
  }
  const auto counted = static_cast<unsigned>(block_total(count, memory.sums));
  return {counted, block_total(weight, memory.more_sums)};
}

OCTAVO_DEVICE Plan plan_sampling(const Search& search, RowOptions options, RowState& state) {
  Plan plan;
  const Total total = take_counts(state);
  if (total.count == 0 || search.max == INFINITY) return plan;  // what overflowed is of one score
  if (options.top_k > 0 && static_cast<unsigned>(options.top_k) >= total.count) options.top_k = 0;
  if (!options.counts()) return plan;
  plan.by_weight = options.top_k == 0;
  plan.needed =
      plan.by_weight ? enough_of(options.top_p, total.weight) : static_cast<Wide>(options.top_k);
  plan.found = search.find(plan.by_weight, plan.needed);
  // Of one filter only the bin that its limit lies in is to be looked at. Where top-p follows upon
  // top-k, the weight of what top-k keeps has to be known first.
  plan.by_limit = plan.by_weight || options.top_p >= 1.0f;
  plan.kept = plan.by_limit ? plan.found.bin : 0;
  plan.collected = plan.found.bin;
  const unsigned count = (plan.by_limit ? 0 : plan.found.count_before) + plan.found.count_in;
  if (count > kMostCollected) {
    plan.alone = 1;
    plan.by_limit = 0;
    plan.kept = 0;
    plan.collected = -1;
  }
  return plan;
}

OCTAVO_DEVICE void forget_collected(RowState& state) {
  __syncthreads();
  const unsigned count = state.num_collected;
  for (unsigned i = threadIdx.x; i < count; i += kSamplingThreads) state.collected[i] = 0;
  __syncthreads();
  if (threadIdx.x == 0) state.num_collected = 0;
}

OCTAVO_DEVICE void note_token(const SampleArguments& a, int token, unsigned finite) {
  const std::int64_t row = a.row();
  if (threadIdx.x == 0) {
    const RowOptions& options = sample_memory().options;
    if (finite && options.target >= 0) token = static_cast<int>(options.target);
    a.out.token_ids[row] = token;
    a.out.finite[row] = static_cast<std::uint8_t>(finite);
    a.out.logprobs[row] = NAN;
    if (options.state_row >= 0) a.sampled[options.state_row] = token;
  }
  for (int i = static_cast<int>(threadIdx.x); i < a.num_top;
       i += static_cast<int>(kSamplingThreads)) {
    a.out.top_token_ids[row * a.num_top + i] = -1;
    a.out.top_logprobs[row * a.num_top + i] = NAN;
  }
}

OCTAVO_DEVICE float logprob_of(const Search& search, const Plan& plan, float logit) {
  return add_rn(add_rn(logit, -search.max), -log_of_total(plan.total));
}

// Notes the log-probability of the sampled token, and plans how to find the best tokens.
OCTAVO_DEVICE Plan plan_logprobs(const SampleArguments& a, const Search& search, RowState& state) {
  const std::int64_t row = a.row();
  Plan plan;
  plan.kept = 0;
  const Total total = take_counts(state);
  plan.total = total.weight;
  if (threadIdx.x == 0) {
    const float logit = search.scores.logits[a.out.token_ids[row]];
    a.out.logprobs[row] = logprob_of(search, plan, logit);
  }
  const int asked = sample_memory().options.num_logprobs;
  const int wanted = asked < a.num_top ? asked : a.num_top;
  plan.needed =
      static_cast<unsigned>(wanted) < total.count ? static_cast<unsigned>(wanted) : total.count;
  if (plan.needed == 0) return plan;
  plan.found = search.find(false, plan.needed);
  plan.alone = plan.found.count_before + plan.found.count_in > kMostCollected;
  if (!plan.alone) plan.collected = plan.found.bin;
  return plan;
}

// Notes the best tokens and their log-probabilities.
OCTAVO_DEVICE void note_top(const SampleArguments& a, const Search& search, const Plan& plan) {
  if (plan.needed == 0) return;
  const Found& found = plan.found;
  const bool listable = found.count_before + found.count_in <= kMostListed;
  const Wide lowest = listable ? 0 : search.limit(false, plan.needed, found).place;
  const unsigned listed = search.list([&](int token, float score) {
    return listable ? search.bin_of(score) <= found.bin : place_of(score, token) >= lowest;
  });
  const Rank mine = rank_listed(listed);
  if (threadIdx.x < listed && mine.count_before < plan.needed) {
    const std::int64_t at = a.row() * a.num_top + mine.count_before;
    const int token = token_of(mine.place);
    a.out.top_token_ids[at] = token;
    a.out.top_logprobs[at] = logprob_of(search, plan, search.scores.logits[token]);
  }
}

}  // namespace octavo::cuda

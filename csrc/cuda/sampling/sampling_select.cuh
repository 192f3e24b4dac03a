// Which of a row's tokens are the best, without sorting the row: top-k by number, top-p by
// probability.
//
// Every result is exact: counts and fixed-point sums do not depend on the order in which threads
// add, and a place decides between equal scores. First the tokens are counted in bins of their
// distance from the best one, by all blocks that share the row (sampling.cu). What follows is one
// block's, and mostly about the few tokens of the bin that the limit lies in. If they fit in shared
// memory each finds its rank by looking at all others. Else they are counted again, by 11 more bits
// of the place at a time, until few enough are left.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/sampling/exact_math.cuh"

namespace octavo::cuda {

constexpr unsigned kSamplingThreads = 512, kSamplingWarps = kSamplingThreads / kWarp;
constexpr int kBins = 2048, kDigitBits = 11;
constexpr float kBinsOfOne = 64.0f;                 // of a distance of 1
constexpr unsigned kMostListed = kSamplingThreads;  // one a thread

// A token's place among all: larger for a larger score, among equal scores for a lower token id.
OCTAVO_DEVICE Wide place_of(float score, int token) {
  return Wide{ordered(score)} << 32 | ~static_cast<std::uint32_t>(token);
}
OCTAVO_DEVICE int token_of(Wide place) { return static_cast<int>(~static_cast<unsigned>(place)); }
OCTAVO_DEVICE float score_of(Wide place) {
  const auto key = static_cast<std::uint32_t>(place >> 32);
  return bits_as<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The best token: the first of equals, if they come in ascending order.
struct Best {
  float score = -INFINITY;
  int token = 0;

  OCTAVO_DEVICE void see(float other, int other_token) {
    if (other > score) {
      score = other;
      token = other_token;
    }
  }
  OCTAVO_DEVICE void see(int first, const float (&logits)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) see(logits[i], first + i);
  }
  OCTAVO_DEVICE Wide place() const { return place_of(score, token); }
};

// A row of logits as it is sampled: (masked ones -inf) / temperature.
struct Scores {
  const float* logits;
  const std::int32_t* mask;  // bit b of word w allows token 32 w + b; null allows all
  float divisor;
  int vocab;
  bool aligned;
  const int* listed = nullptr;  // some tokens: `each` sees these instead of the whole row
  unsigned num_listed = 0;

  // Of tokens first .. first + 3, first being a multiple of 4.
  OCTAVO_DEVICE float4 allowed(float4 x, int first) const {
    if (!mask) return x;
    const unsigned bits = first < vocab ? static_cast<unsigned>(mask[first / 32]) >> first % 32 : 0;
    return {bits & 1u ? x.x : -INFINITY, bits & 2u ? x.y : -INFINITY, bits & 4u ? x.z : -INFINITY,
            bits & 8u ? x.w : -INFINITY};
  }
  OCTAVO_DEVICE float4 from_allowed(float4 x) const {
    if (divisor == 1.0f) return x;
    return {divide_rn(x.x, divisor), divide_rn(x.y, divisor), divide_rn(x.z, divisor),
            divide_rn(x.w, divisor)};
  }
  // Calls body(first, logits) for the fours of tokens begin .. end - 1, in all lanes of a warp
  // together (with logits of -inf behind the end). begin: a multiple of 4, end as well, or vocab.
  template <class Body>
  OCTAVO_DEVICE void each_four(int begin, int end, Body&& body) const {
    constexpr int kStep = static_cast<int>(4 * kSamplingThreads);
    int first = begin + static_cast<int>(4 * threadIdx.x);
    const float* from = logits + first;
    float4 next = load_four(from, end - first, aligned, -INFINITY);
    for (int warp_first = begin + static_cast<int>(4 * kWarp * warp_index()); warp_first < end;
         warp_first += kStep, first += kStep) {
      const float4 four = next;
      from += kStep;
      next = load_four(from, end - first - kStep, aligned, -INFINITY);  // while the body works
      body(first, four);
    }
  }
  OCTAVO_DEVICE float of_token(int token) const {
    if (mask && !(static_cast<unsigned>(mask[token / 32]) >> token % 32 & 1u)) return -INFINITY;
    return divide_rn(logits[token], divisor);
  }
  // Calls body(token, score) for every token of the row, or listed, that may be sampled.
  template <class Body>
  OCTAVO_DEVICE void each(Body&& body) const {
    const unsigned count = listed ? num_listed : static_cast<unsigned>(vocab);
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < count; i += kSamplingThreads) {
      const int token = listed ? listed[i] : static_cast<int>(i);
      const float score = of_token(token);
      if (score > -INFINITY) body(token, score);
    }
  }
};

// A sum of 64 bits in two halves. Shared memory adds 32 bits in one instruction and 64 in a loop of
// compare and swap.
struct HalvedSum {
  unsigned low, high;

  OCTAVO_DEVICE Wide value() const { return Wide{high} << 32 | low; }
  OCTAVO_DEVICE void add(Wide value) {
    const auto its_low = static_cast<unsigned>(value);
    const unsigned carry = atomic_add(&low, its_low) + its_low < its_low;
    const unsigned its_high = static_cast<unsigned>(value >> 32) + carry;
    if (its_high) atomic_add(&high, its_high);
  }
};

// Where a limit lies.
struct Found {
  int bin;
  unsigned count_before, count_in;  // tokens in better bins, and in this one
  unsigned unused;
  Wide weight_before;
};

// A limit, exactly: the best tokens down to it are those of at least this place.
struct Limit {
  Wide place;
  Wide weight;  // theirs, all together
};

struct SelectMemory {
  HalvedSum weights[kBins];
  Wide places[kMostListed], listed_weights[kMostListed];
  Wide sums[kSamplingWarps], more_sums[kSamplingWarps];
  unsigned counts[kBins];
  unsigned count_sums[kSamplingWarps];
  unsigned num_listed;
  Found found;
  Limit limit;
};

// At the start of the block's shared memory. (Not passed on: that it is shared memory must be
// plain.)
OCTAVO_DEVICE SelectMemory& select_memory() {
  return *reinterpret_cast<SelectMemory*>(shared_memory());
}
OCTAVO_DEVICE Wide block_total(Wide value, Wide* partial) {
  return block_reduce<kSamplingWarps>(value, partial, [](Wide a, Wide b) { return a + b; });
}

// How many tokens, and how heavy they are.
struct Total {
  unsigned count;
  Wide weight;
};

// What is looked for in a row.
struct Search {
  Scores scores;
  float max;     // of the scores
  float lowest;  // tokens below it are left out

  OCTAVO_DEVICE int bin_of(float score) const {
    const float distance = add_rn(max, -score);
    return distance < kBins / kBinsOfOne ? static_cast<int>(distance * kBinsOfOne) : kBins - 1;
  }
  OCTAVO_DEVICE Wide weight_of(float score) const { return exp_fixed(add_rn(score, -max)); }

  OCTAVO_DEVICE bool can_be_sampled(float score) const {
    return score > -INFINITY && score >= lowest;
  }

  OCTAVO_DEVICE void clear_bins() const {
    SelectMemory& memory = select_memory();
    __syncthreads();
    for (unsigned i = threadIdx.x; i < kBins; i += kSamplingThreads) {
      memory.counts[i] = 0;
      memory.weights[i] = {0, 0};
    }
    __syncthreads();
  }
  // Counts tokens begin .. end - 1 of the row, and where asked for weighs them, by their distance.
  OCTAVO_DEVICE void count_part(bool weighed, int begin, int end) const;
  // Counts, and where asked for weighs, the tokens for which bin(token, score) is not negative, in
  // the bins that it says. Returns how many and how heavy they are.
  template <class Bin>
  OCTAVO_DEVICE Total count_in_bins(bool weighed, Bin&& bin) const {
    SelectMemory& memory = select_memory();
    clear_bins();
    unsigned count = 0;
    Wide total = 0;
    scores.each([&](int token, float score) {
      if (!(score >= lowest)) return;
      const int in = bin(token, score);
      if (in < 0) return;
      atomic_add(&memory.counts[in], 1u);
      ++count;
      if (weighed) {
        const Wide weight = weight_of(score);
        if (weight) memory.weights[in].add(weight);
        total += weight;
      }
    });
    const auto counted = static_cast<unsigned>(block_total(count, memory.sums));
    return {counted, block_total(total, memory.more_sums)};
  }
  OCTAVO_DEVICE Total count_by_distance(bool weighed) const {
    return count_in_bins(weighed, [&](int, float score) { return bin_of(score); });
  }

  // The bin in which the number of tokens, or their weight, reaches `needed`, from bin 0 on.
  OCTAVO_DEVICE Found find(bool by_weight, Wide needed) const;
  // Lists the tokens that `wanted` names. At most kMostListed; returns how many.
  template <class Wanted>
  OCTAVO_DEVICE unsigned list(Wanted&& wanted) const;
  // The best tokens whose number, or weight, reaches `needed`. `found`: the bin of distances.
  OCTAVO_DEVICE Limit limit(bool by_weight, Wide needed, Found found) const;
};

OCTAVO_DEVICE void Search::count_part(bool weighed, int begin, int end) const {
  SelectMemory& memory = select_memory();
  clear_bins();
  // Most tokens lie far from the best: thousands in one bin, which threads would queue up for. They
  // weigh nothing: e^-31.98 is less than 2^-40.
  unsigned far = 0;
  scores.each_four(begin, end, [&](int first, float4 logits) {
    const float4 four = scores.from_allowed(scores.allowed(logits, first));
    const float score[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!can_be_sampled(score[i])) continue;
      const int bin = bin_of(score[i]);
      if (bin == kBins - 1) {
        ++far;
        continue;
      }
      atomic_add(&memory.counts[bin], 1u);
      const Wide weight = weighed ? weight_of(score[i]) : 0;
      if (weight) memory.weights[bin].add(weight);
    }
  });
  for (unsigned mask = kWarp / 2; mask; mask /= 2) far += shuffle_xor(far, mask);
  if (lane_index() == 0 && far) atomic_add(&memory.counts[kBins - 1], far);
  __syncthreads();
}

// Each thread scans four bins, then the sums of the threads are scanned.
OCTAVO_DEVICE Found Search::find(bool by_weight, Wide needed) const {
  SelectMemory& memory = select_memory();
  constexpr int kEach = kBins / static_cast<int>(kSamplingThreads);
  const int first = static_cast<int>(threadIdx.x) * kEach;
  __syncthreads();
  unsigned count = 0;
  Wide weight = 0;
  for (int i = 0; i < kEach; ++i) {
    count += memory.counts[first + i];
    weight += memory.weights[first + i].value();
  }
  const unsigned own_count = count, own_lane = lane_index();
  const Wide own_weight = weight;
  for (unsigned delta = 1; delta < kWarp; delta *= 2) {
    const unsigned lower_count = shuffle_up(count, delta);
    const Wide lower_weight = shuffle_up(weight, delta);
    if (own_lane >= delta) {
      count += lower_count;
      weight += lower_weight;
    }
  }
  if (own_lane == kWarp - 1) {
    memory.count_sums[warp_index()] = count;
    memory.sums[warp_index()] = weight;
  }
  __syncthreads();
  for (unsigned lower = 0; lower < warp_index(); ++lower) {
    count += memory.count_sums[lower];
    weight += memory.sums[lower];
  }
  Found here{first, count - own_count, 0, 0, weight - own_weight};
  for (int i = 0; i < kEach; ++i) {
    here.bin = first + i;
    here.count_in = memory.counts[here.bin];
    const Wide weight_in = memory.weights[here.bin].value();
    const Wide before = by_weight ? here.weight_before : here.count_before;
    const Wide in = by_weight ? weight_in : here.count_in;
    if (before < needed && needed <= before + in) memory.found = here;
    here.count_before += here.count_in;
    here.weight_before += weight_in;
  }
  __syncthreads();
  return memory.found;
}

template <class Wanted>
OCTAVO_DEVICE unsigned Search::list(Wanted&& wanted) const {
  SelectMemory& memory = select_memory();
  __syncthreads();
  if (threadIdx.x == 0) memory.num_listed = 0;
  __syncthreads();
  scores.each([&](int token, float score) {
    if (!(score >= lowest) || !wanted(token, score)) return;
    const unsigned at = atomic_add(&memory.num_listed, 1u);
    if (at >= kMostListed) return;  // not if counts are right
    memory.places[at] = place_of(score, token);
    memory.listed_weights[at] = weight_of(score);
  });
  __syncthreads();
  return memory.num_listed < kMostListed ? memory.num_listed : kMostListed;
}

// Of the listed token of this thread: how many are better, and their weight. Call it in every
// thread; those without a token get the place 0.
struct Rank {
  Wide place, weight;
  unsigned count_before;
  Wide weight_before;
};
OCTAVO_DEVICE Rank rank_listed(unsigned num_listed) {
  const SelectMemory& memory = select_memory();
  Rank mine{0, 0, 0, 0};
  if (threadIdx.x >= num_listed) return mine;
  mine.place = memory.places[threadIdx.x];
  mine.weight = memory.listed_weights[threadIdx.x];
#pragma unroll 4
  for (unsigned i = 0; i < num_listed; ++i) {
    if (memory.places[i] > mine.place) {
      ++mine.count_before;
      mine.weight_before += memory.listed_weights[i];
    }
  }
  return mine;
}

OCTAVO_DEVICE Limit Search::limit(bool by_weight, Wide needed, Found found) const {
  SelectMemory& memory = select_memory();
  const int bin = found.bin;
  Wide prefix = 0, weight_before = found.weight_before;
  int shift = 64;  // of a place's bits, those from here on are known
  const auto undecided = [&](int token, float score) {
    return bin_of(score) == bin && (shift == 64 || place_of(score, token) >> shift == prefix);
  };
  needed -= by_weight ? found.weight_before : found.count_before;
  while (found.count_in > kMostListed && shift > 0) {
    const int next = shift > kDigitBits ? shift - kDigitBits : 0;
    const int digits = 1 << (shift - next);
    count_in_bins(true, [&](int token, float score) {
      if (!undecided(token, score)) return -1;
      return digits - 1 - static_cast<int>(place_of(score, token) >> next & (digits - 1));
    });
    found = find(by_weight, needed);
    needed -= by_weight ? found.weight_before : found.count_before;
    weight_before += found.weight_before;
    prefix =
        (shift == 64 ? 0 : prefix << (shift - next)) | static_cast<Wide>(digits - 1 - found.bin);
    shift = next;
  }
  const unsigned listed = list(undecided);
  const Rank mine = rank_listed(listed);
  const Wide before = by_weight ? mine.weight_before : mine.count_before;
  const Wide own = by_weight ? mine.weight : 1;
  if (threadIdx.x < listed && before < needed && needed <= before + own)
    memory.limit = {mine.place, weight_before + mine.weight_before + mine.weight};
  __syncthreads();
  return memory.limit;
}

}  // namespace octavo::cuda

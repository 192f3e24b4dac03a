// Which of a row's tokens are the best, without sorting the row: top-k by number, top-p by
// probability.
//
// All of it is done by one block, and every result is exact: counts and fixed-point sums do not
// depend on the order in which threads add, and a place decides between equal scores. First the
// tokens are counted in bins of their distance from the best one. Then, mostly, those of the best
// bins are few enough to be listed in shared memory, where each finds its rank by looking at all
// others. Else the one bin that the limit lies in is counted again, by 11 more bits of the place at
// a time, until few enough are left.
#pragma once

#include "cuda/exact_math.cuh"
#include "cuda/reduce.cuh"

namespace octavo::cuda {

constexpr unsigned kSamplingThreads = 512;
constexpr int kBins = 2048, kDigitBits = 11;
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

// A row of logits as it is drawn from: (masked ones -inf) / temperature.
struct Scores {
  const float* logits;
  const std::int32_t* mask;  // bit b of word w allows token 32 w + b; null allows all
  float divisor;
  int vocab;
  bool aligned;

  // Of tokens first .. first + 3, first being a multiple of 4; behind the row's end -inf.
  OCTAVO_DEVICE float4 logits_of_four(int first) const {
    return load_four(logits + first, vocab - first, aligned, -INFINITY);
  }
  OCTAVO_DEVICE float4 from_logits(float4 x, int first) const {
    if (mask) {
      const unsigned bits =
          first < vocab ? static_cast<unsigned>(mask[first / 32]) >> first % 32 : 0;
      x = {bits & 1u ? x.x : -INFINITY, bits & 2u ? x.y : -INFINITY, bits & 4u ? x.z : -INFINITY,
           bits & 8u ? x.w : -INFINITY};
    }
    if (divisor != 1.0f) {
      x = {divide_rn(x.x, divisor), divide_rn(x.y, divisor), divide_rn(x.z, divisor),
           divide_rn(x.w, divisor)};
    }
    return x;
  }
  // Calls body(token, score) for every token of the row that may be drawn.
  template <class Body>
  OCTAVO_DEVICE void each(Body&& body) const {
    for (int first = static_cast<int>(4 * threadIdx.x); first < vocab;
         first += static_cast<int>(4 * kSamplingThreads)) {
      const float4 four = from_logits(logits_of_four(first), first);
      const float score[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (score[i] > -INFINITY) body(first + i, score[i]);
      }
    }
  }
};

// Where a limit lies.
struct Found {
  int bin;
  unsigned count_before, count_in;  // tokens in better bins, and in this one
  Wide weight_before;
};

// A limit, exactly: the best tokens down to it are those of at least this place.
struct Limit {
  Wide place;
  Wide weight;  // theirs, all together
};

struct SelectMemory {
  Wide weights[kBins];
  Wide places[kMostListed], listed_weights[kMostListed];
  Wide sums[kMostWarps], more_sums[kMostWarps];
  unsigned counts[kBins];
  unsigned count_sums[kMostWarps];
  unsigned num_listed;
  Found found;
  Limit limit;
};

OCTAVO_DEVICE Wide block_total(Wide value, Wide* partial) {
  return block_reduce(value, partial, [](Wide a, Wide b) { return a + b; });
}

// What is looked for in a row.
struct Search {
  const Scores& scores;
  float max;     // of the scores
  float lowest;  // tokens below it are left out
  SelectMemory& memory;

  OCTAVO_DEVICE int bin_of(float score) const {
    const float distance = add_rn(max, -score);
    return distance < 32.0f ? static_cast<int>(distance * 64.0f) : kBins - 1;
  }
  OCTAVO_DEVICE Wide weight_of(float score) const { return exp_fixed(add_rn(score, -max)); }

  // Counts, and where asked for weighs, the tokens for which bin(token, score) is not negative, in
  // the bins that it says. Returns how many and how heavy they are.
  struct Total {
    unsigned count;
    Wide weight;
  };
  template <class Bin>
  OCTAVO_DEVICE Total count_in_bins(bool weighed, Bin&& bin) const {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < kBins; i += kSamplingThreads) {
      memory.counts[i] = 0;
      memory.weights[i] = 0;
    }
    __syncthreads();
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
        if (weight) atomic_add(&memory.weights[in], weight);
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

// Each thread scans four bins, then the sums of the threads are scanned.
OCTAVO_DEVICE Found Search::find(bool by_weight, Wide needed) const {
  constexpr int kEach = kBins / static_cast<int>(kSamplingThreads);
  const int first = static_cast<int>(threadIdx.x) * kEach;
  __syncthreads();
  unsigned count = 0;
  Wide weight = 0;
  for (int i = 0; i < kEach; ++i) {
    count += memory.counts[first + i];
    weight += memory.weights[first + i];
  }
  const unsigned own_count = count, lane = lane_index();
  const Wide own_weight = weight;
  for (unsigned delta = 1; delta < kWarp; delta *= 2) {
    const unsigned lower_count = shuffle_up(count, delta);
    const Wide lower_weight = shuffle_up(weight, delta);
    if (lane >= delta) {
      count += lower_count;
      weight += lower_weight;
    }
  }
  if (lane == kWarp - 1) {
    memory.count_sums[warp_index()] = count;
    memory.sums[warp_index()] = weight;
  }
  __syncthreads();
  for (unsigned warp = 0; warp < warp_index(); ++warp) {
    count += memory.count_sums[warp];
    weight += memory.sums[warp];
  }
  Found here{first, count - own_count, 0, weight - own_weight};
  for (int i = 0; i < kEach; ++i) {
    here.bin = first + i;
    here.count_in = memory.counts[here.bin];
    const Wide weight_in = memory.weights[here.bin];
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
OCTAVO_DEVICE Rank rank_listed(const SelectMemory& memory, unsigned num_listed) {
  Rank mine{0, 0, 0, 0};
  if (threadIdx.x >= num_listed) return mine;
  mine.place = memory.places[threadIdx.x];
  mine.weight = memory.listed_weights[threadIdx.x];
  for (unsigned i = 0; i < num_listed; ++i) {
    if (memory.places[i] > mine.place) {
      ++mine.count_before;
      mine.weight_before += memory.listed_weights[i];
    }
  }
  return mine;
}

OCTAVO_DEVICE Limit Search::limit(bool by_weight, Wide needed, Found found) const {
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
  const Rank mine = rank_listed(memory, listed);
  const Wide before = by_weight ? mine.weight_before : mine.count_before;
  const Wide own = by_weight ? mine.weight : 1;
  if (threadIdx.x < listed && before < needed && needed <= before + own)
    memory.limit = {mine.place, weight_before + mine.weight_before + mine.weight};
  __syncthreads();
  return memory.limit;
}

}  // namespace octavo::cuda

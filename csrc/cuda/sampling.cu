// Drawing a token from each row of logits: one kernel, which reads a row once where nothing but
// its largest (noisy) logit is asked for. reference/sampling.py defines every step, to the bit.
#include <algorithm>

#include "cuda/elementwise.cuh"
#include "cuda/kernels.h"
#include "cuda/sampling_select.cuh"

namespace octavo::cuda {

namespace {

constexpr int kMostBlocks = 64;        // that share a row
constexpr int kLogitsPerBlock = 4096;  // a block takes that many or more
constexpr std::int64_t kMostTop = kMostListed;

// What a part of a row comes to.
struct Part {
  Wide best;        // place of the largest score, noise included; 0: none is looked for
  float max_logit;  // of all
  float max_score;  // of those allowed, without noise
  unsigned finite;  // 1: all logits are
};

// The blocks of a row meet here. The counter is 0 before and after.
struct RowState {
  unsigned arrived;
  unsigned unused[3];
  Part parts[kMostBlocks];
};

struct SampleArguments {
  const float* logits;
  std::int64_t stride;
  const std::int32_t* masks;
  int vocab, num_blocks, num_top;
  bool aligned;
  RowState* states;
  const float *temperature, *top_p, *min_p;
  const std::int32_t *top_k, *sample_index, *position, *num_logprobs, *state_rows;
  const std::uint64_t* seed;
  std::int32_t* sampled;
  Samples out;
};

// How one row is to be drawn from.
struct Draw {
  float temperature, top_p, min_p;
  int top_k;
  Stamp stamp;

  OCTAVO_DEVICE bool is_greedy() const { return temperature == 0.0f; }
  OCTAVO_DEVICE bool keeps_all() const { return min_p == 0.0f && top_k == 0 && top_p >= 1.0f; }
};

struct SampleMemory {
  Part parts[kMostWarps];
  Part whole;
  unsigned is_last;
  SelectMemory select;
};

OCTAVO_DEVICE Part combine(Part a, Part b) {
  return {a.best > b.best ? a.best : b.best, fmaxf(a.max_logit, b.max_logit),
          fmaxf(a.max_score, b.max_score), a.finite & b.finite};
}

OCTAVO_DEVICE Part combine_warp(Part part) {
  for (unsigned mask = kWarp / 2; mask; mask /= 2) {
    part = combine(part, {shuffle_xor(part.best, mask), shuffle_xor(part.max_logit, mask),
                          shuffle_xor(part.max_score, mask), shuffle_xor(part.finite, mask)});
  }
  return part;
}

// Keeps the best token seen: the first of equals, if tokens come in ascending order.
struct Best {
  float score = -INFINITY;
  int token = 0;

  OCTAVO_DEVICE void see(float other, int other_token) {
    if (other > score) {
      score = other;
      token = other_token;
    }
  }
  OCTAVO_DEVICE Wide place() const { return place_of(score, token); }
};

// This block's part of a row: tokens begin .. end - 1, both multiples of 4 (but the row's end).
OCTAVO_DEVICE Part scan_part(const Scores& scores, const Draw& draw, int begin, int end) {
  const bool noisy = !draw.is_greedy() && draw.keeps_all();
  Part part{0, -INFINITY, -INFINITY, 1};
  Best best;
  constexpr int kStep = static_cast<int>(4 * kSamplingThreads);
  for (int first = begin + static_cast<int>(4 * threadIdx.x); first < end; first += kStep) {
    const float4 logits = scores.logits_of_four(first);
    const float4 score = scores.from_logits(logits, first);
    const float x[4] = {logits.x, logits.y, logits.z, logits.w};
    float y[4] = {score.x, score.y, score.z, score.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      part.max_logit = fmaxf(part.max_logit, x[i]);
      part.max_score = fmaxf(part.max_score, y[i]);
      // x - x is 0 for a finite number and NaN for every other.
      if (first + i < end && !(x[i] - x[i] == 0.0f)) part.finite = 0;
    }
    if (noisy) {
      const float4 noise = gumbel_of_four(draw.stamp, static_cast<unsigned>(first) / 4);
      y[0] = add_rn(y[0], noise.x);
      y[1] = add_rn(y[1], noise.y);
      y[2] = add_rn(y[2], noise.z);
      y[3] = add_rn(y[3], noise.w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) best.see(y[i], first + i);
  }
  part.best = best.place();
  return part;
}

// Combines the parts of a row's blocks. In the block that comes last: the whole row's, in all
// threads; in the others 0 is returned, and they are done.
OCTAVO_DEVICE bool arrive_last(Part part, RowState& state, unsigned num_blocks, unsigned block,
                               SampleMemory& memory) {
  part = combine_warp(part);
  if (lane_index() == 0) memory.parts[warp_index()] = part;
  __syncthreads();
  constexpr unsigned kWarps = kSamplingThreads / kWarp;
  if (warp_index() == 0) {
    part = combine_warp(memory.parts[lane_index() % kWarps]);
    if (lane_index() == 0) {
      memory.whole = part;
      memory.is_last = 1;
      if (num_blocks > 1) {
        state.parts[block] = part;
        fence();
        memory.is_last = atomic_add(&state.arrived, 1u) == num_blocks - 1;
      }
    }
  }
  __syncthreads();
  if (!memory.is_last) return false;
  if (num_blocks > 1 && warp_index() == 0) {
    fence();
    part = state.parts[lane_index() % num_blocks];
    if (lane_index() + kWarp < num_blocks) part = combine(part, state.parts[lane_index() + kWarp]);
    part = combine_warp(part);
    if (lane_index() == 0) {
      memory.whole = part;
      state.arrived = 0;
    }
  }
  __syncthreads();
  return true;
}

OCTAVO_DEVICE float gumbel_of(const Stamp& stamp, int token) {
  const float4 four = gumbel_of_four(stamp, static_cast<unsigned>(token) / 4);
  const int i = token % 4;
  return i < 2 ? (i == 0 ? four.x : four.y) : (i == 2 ? four.z : four.w);
}

OCTAVO_DEVICE int best_of_block(Wide place, SelectMemory& memory) {
  __syncthreads();
  return token_of(block_reduce(place, memory.sums, [](Wide a, Wide b) { return a > b ? a : b; }));
}

// The prefix that holds top_p of the weight is the shortest that reaches this.
OCTAVO_DEVICE Wide enough_of(float top_p, Wide total) {
  return static_cast<Wide>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
}

// Draws from the tokens whose place is at least `lowest`.
OCTAVO_DEVICE int draw_down_to(const Search& search, const Draw& draw, Wide lowest) {
  Best best;
  search.scores.each([&](int token, float score) {
    if (score >= search.lowest && place_of(score, token) >= lowest)
      best.see(add_rn(score, gumbel_of(draw.stamp, token)), token);
  });
  return best_of_block(best.place(), search.memory);
}

// Draws from the tokens that `wanted` names, few enough to be listed, but of those the best
// draw.top_k (0: all), and of those the best that hold draw.top_p.
template <class Wanted>
OCTAVO_DEVICE int draw_listed(const Search& search, const Draw& draw, Wide total, Wanted&& wanted) {
  SelectMemory& memory = search.memory;
  const unsigned listed = search.list(wanted);
  const Rank mine = rank_listed(memory, listed);
  bool kept = threadIdx.x < listed;
  if (draw.top_k > 0) {
    kept = kept && mine.count_before < static_cast<unsigned>(draw.top_k);
    total = block_total(kept ? mine.weight : 0, memory.more_sums);
  }
  if (draw.top_p < 1.0f) kept = kept && mine.weight_before < enough_of(draw.top_p, total);
  Wide place = 0;
  if (kept) {
    const int token = token_of(mine.place);
    place = place_of(add_rn(score_of(mine.place), gumbel_of(draw.stamp, token)), token);
  }
  return best_of_block(place, memory);
}

// Of a row some of whose tokens are not to be drawn at all.
OCTAVO_DEVICE int draw_filtered(const Scores& scores, Draw draw, float max, SelectMemory& memory) {
  if (!(max > -INFINITY)) return 0;  // nothing is allowed
  const float lowest = draw.min_p > 0.0f ? add_rn(max, log_positive(draw.min_p)) : -INFINITY;
  const Search search{scores, max, lowest, memory};
  if (max == INFINITY) return draw_down_to(search, draw, 0);  // what overflowed, all of one score
  if (draw.top_k == 0 && draw.top_p >= 1.0f) return draw_down_to(search, draw, 0);

  const auto total = search.count_by_distance(draw.top_p < 1.0f);
  if (draw.top_k > 0 && static_cast<unsigned>(draw.top_k) >= total.count) draw.top_k = 0;
  if (draw.top_k == 0 && draw.top_p >= 1.0f) return draw_down_to(search, draw, 0);
  const bool by_weight = draw.top_k == 0;
  const Wide needed =
      by_weight ? enough_of(draw.top_p, total.weight) : static_cast<Wide>(draw.top_k);
  const Found found = search.find(by_weight, needed);
  if (found.count_before + found.count_in <= kMostListed) {
    return draw_listed(search, draw, total.weight,
                       [&](int, float score) { return search.bin_of(score) <= found.bin; });
  }
  Limit limit = search.limit(by_weight, needed, found);
  if (!by_weight && draw.top_p < 1.0f) {
    const Wide enough = enough_of(draw.top_p, limit.weight);
    search.count_by_distance(true);
    limit = search.limit(true, enough, search.find(true, enough));
  }
  return draw_down_to(search, draw, limit.place);
}

// Log-probabilities of the drawn token and of the best `num_top` tokens.
OCTAVO_DEVICE void note_logprobs(const SampleArguments& a, const Scores& scores, float max,
                                 int token, unsigned num_top, SelectMemory& memory) {
  const std::int64_t row = blockIdx.y;
  const Search search{scores, max, -INFINITY, memory};
  const auto total = search.count_by_distance(true);
  const float log_total = log_of_total(total.weight);
  const auto logprob_of = [&](float logit) { return add_rn(add_rn(logit, -max), -log_total); };
  if (threadIdx.x == 0) a.out.logprobs[row] = logprob_of(scores.logits[token]);
  if (num_top > total.count) num_top = total.count;
  if (num_top == 0) return;

  const Found found = search.find(false, num_top);
  const bool listable = found.count_before + found.count_in <= kMostListed;
  const Wide lowest = listable ? 0 : search.limit(false, num_top, found).place;
  const unsigned listed = search.list([&](int other, float score) {
    return listable ? search.bin_of(score) <= found.bin : place_of(score, other) >= lowest;
  });
  const Rank mine = rank_listed(memory, listed);
  if (threadIdx.x < listed && mine.count_before < num_top) {
    const std::int64_t at = row * a.num_top + mine.count_before;
    a.out.top_token_ids[at] = token_of(mine.place);
    a.out.top_logprobs[at] = logprob_of(scores.logits[token_of(mine.place)]);
  }
}

// blockIdx.y: row; blockIdx.x: one of the num_blocks that share it. Each reads its part of the row
// once, 4 bytes a token; the one that comes last goes on with what needs the whole row: filters and
// log-probabilities, two or three readings more (from the second cache).
__global__ void __launch_bounds__(kSamplingThreads, 2) sample_rows(SampleArguments a) {
  auto& memory = *reinterpret_cast<SampleMemory*>(shared_memory());
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t row = blockIdx.y;
  const Draw draw{a.temperature[row],
                  a.top_p[row],
                  a.min_p[row],
                  a.top_k[row],
                  {a.seed[row], static_cast<unsigned>(a.sample_index[row]),
                   static_cast<unsigned>(a.position[row])}};
  const int words = (a.vocab + 31) / 32;
  const Scores plain{a.logits + row * a.stride, nullptr, 1.0f, a.vocab, a.aligned};
  Scores scores = plain;
  scores.mask = a.masks ? a.masks + row * words : nullptr;
  scores.divisor = draw.is_greedy() ? 1.0f : draw.temperature;

  const int fours = (a.vocab + 3) / 4;
  const int each = 4 * ((fours + a.num_blocks - 1) / a.num_blocks);
  const int begin = static_cast<int>(blockIdx.x) * each;
  const int end = begin + each < a.vocab ? begin + each : a.vocab;
  const Part part = scan_part(scores, draw, begin, end);
  if (!arrive_last(part, a.states[row], static_cast<unsigned>(a.num_blocks), blockIdx.x, memory))
    return;

  // Of a row that is not finite nothing is drawn: comparing a NaN orders nothing.
  const Part whole = memory.whole;
  int token = 0;
  if (whole.finite) {
    token = draw.is_greedy() || draw.keeps_all()
                ? token_of(whole.best)
                : draw_filtered(scores, draw, whole.max_score, memory.select);
  }
  if (threadIdx.x == 0) {
    a.out.token_ids[row] = token;
    a.out.finite[row] = static_cast<std::uint8_t>(whole.finite);
    a.out.logprobs[row] = NAN;
    if (a.state_rows[row] >= 0) a.sampled[a.state_rows[row]] = token;
  }
  for (int i = static_cast<int>(threadIdx.x); i < a.num_top;
       i += static_cast<int>(kSamplingThreads)) {
    a.out.top_token_ids[row * a.num_top + i] = -1;
    a.out.top_logprobs[row * a.num_top + i] = NAN;
  }
  const int num_top = a.num_logprobs[row];
  if (num_top < 0 || !whole.finite) return;
  note_logprobs(a, plain, whole.max_logit, token,
                static_cast<unsigned>(num_top < a.num_top ? num_top : a.num_top), memory.select);
}

}  // namespace

std::size_t sampling_workspace_bytes(std::int64_t, std::int64_t max_num_rows) {
  return static_cast<std::size_t>(max_num_rows) * sizeof(RowState);
}

void sample(Stream& stream, const Samples& out, View logits, const std::int32_t* masks,
            const Step& step, Workspace& workspace) {
  require_f32("sample", logits);
  require(logits.rows <= 65535, "sample of ", logits.rows, " rows; the kernel takes up to 65535");
  require(out.num_top <= kMostTop, "sample with log-probabilities of ", out.num_top,
          " tokens; the kernel lists up to ", kMostTop);
  if (logits.rows == 0 || logits.cols == 0) return;
  // As many blocks as fill the device; how a row is shared does not change what is drawn.
  const std::int64_t fill =
      std::max<std::int64_t>(2 * stream.num_processors(), kMostBlocks) / logits.rows;
  const std::int64_t parts = (logits.cols + kLogitsPerBlock - 1) / kLogitsPerBlock;
  const std::int64_t blocks =
      std::min<std::int64_t>({std::max<std::int64_t>(fill, 1), parts, kMostBlocks});
  SampleArguments a{};
  a.logits = static_cast<const float*>(logits.data);
  a.stride = logits.stride;
  a.masks = masks;
  a.vocab = static_cast<int>(logits.cols);
  a.num_blocks = static_cast<int>(blocks);
  a.num_top = static_cast<int>(out.num_top);
  a.aligned = fours_aligned(logits);
  a.states =
      static_cast<RowState*>(workspace.get(sampling_workspace_bytes(logits.cols, logits.rows)));
  a.temperature = step.temperature;
  a.top_p = step.top_p;
  a.min_p = step.min_p;
  a.top_k = step.top_k;
  a.sample_index = step.sample_index;
  a.position = step.sample_positions;
  a.num_logprobs = step.num_logprobs;
  a.state_rows = step.state_rows;
  a.seed = step.seed;
  a.sampled = step.sampled;
  a.out = out;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(logits.rows));
  launch(stream, "sample_rows", {grid, {kSamplingThreads}, sizeof(SampleMemory), true}, sample_rows,
         a);
}

}  // namespace octavo::cuda

// Samples a token from each row of logits: one kernel, which reads a row once where only its
// largest (noisy) logit is asked for, and once more for each phase that filters and
// log-probabilities need (sampling_row.cuh). reference/sampling.py defines every step, to the bit.
#include <algorithm>

#include "cuda/backend.h"
#include "cuda/elementwise/elementwise.cuh"
#include "cuda/sampling/sampling_unusual.cuh"

namespace octavo::cuda {

namespace {

constexpr std::int64_t kLogitsPerBlock = 1024;  // a block takes that many or more
// Blocks a row, however many rows: rows come in turns then, few enough for the second cache to hold
// what the next phases read again.
constexpr std::int64_t kFewestBlocks = 4;

// Looks for no token. As Best and NoisyBest: `see` gets four logits, -inf for those that must not
// be sampled.
struct Nothing {
  OCTAVO_DEVICE void see(int, const float (&)[4]) {}
  OCTAVO_DEVICE Wide place() const { return 0; }
};

// Tokens begin .. end - 1.
template <class Sight>
OCTAVO_DEVICE Part scan_part(const Scores& scores, int begin, int end, Sight sight) {
  Part part{0, -INFINITY, -INFINITY, 1};
  float sum = 0.0f;  // of 0 * x: 0 if every x is finite, else NaN
  scores.each_four(begin, end, [&](int first, float4 logits) {
    const float4 allowed = scores.allowed(logits, first);
    const float x[4] = {logits.x, logits.y, logits.z, logits.w};
    const float y[4] = {allowed.x, allowed.y, allowed.z, allowed.w};
    const bool whole = first + 4 <= end;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      part.max_logit = fmaxf(part.max_logit, x[i]);
      part.max_allowed = fmaxf(part.max_allowed, y[i]);
      if (whole || first + i < end) sum = fma_rn(0.0f, x[i], sum);
    }
    sight.see(first, y);
  });
  part.finite = sum == 0.0f;
  part.best = sight.place();
  return part;
}

// Notes the token of each lane that wants it; all lanes of a warp together.
OCTAVO_DEVICE void collect(RowState& state, bool wanted, int token) {
  const unsigned lanes = ballot(wanted);
  if (!lanes) return;
  unsigned at = 0;
  if (lane_index() == 0) at = atomic_add(&state.num_collected, count_bits(lanes));
  at = shuffle(at, 0) + count_bits(lanes & ((1u << lane_index()) - 1));
  if (wanted && at < kMostCollected) state.collected[at] = token;  // there is room, by the count
}

// No token with a smaller logit is kept or collected, which spares most of a row its divisions. The
// parts of 2^-20 are for roundings, of scores and distances and here, each 2^-24 of what it rounds.
OCTAVO_DEVICE float nearest_logit(const Search& search, const Plan& plan) {
  const float temperature = search.scores.divisor;
  if (!(temperature >= 1e-30f && temperature <= 1e30f)) return -INFINITY;
  const int last = plan.kept > plan.collected ? plan.kept - 1 : plan.collected;
  float low = search.lowest;
  if (last < kBins - 1)
    low = fmaxf(low, search.max - (static_cast<float>(last) + 2.0f) / kBinsOfOne);
  low -= (fabsf(low) + fabsf(search.max) + 32.0f) * 0x1p-20f;
  const float logit = temperature * low;
  return logit - fabsf(logit) * 0x1p-20f - 1e-37f;
}

// Tokens begin .. end - 1: the best of those that are kept, noise included; others are collected.
OCTAVO_DEVICE Part collect_part(const Search& search, const Plan& plan, const RowOptions& options,
                                RowState& state, int begin, int end) {
  const Scores& scores = search.scores;
  NoisyBest best(options.stamp(), options.temperature);
  if (plan.kept > 0 || plan.collected >= 0) {
    const float nearest = nearest_logit(search, plan);
    scores.each_four(begin, end, [&](int first, float4 logits) {
      const float4 allowed = scores.allowed(logits, first);
      const float most = fmaxf(fmaxf(allowed.x, allowed.y), fmaxf(allowed.z, allowed.w));
      if (!ballot(most > -INFINITY && !(most < nearest))) return;
      const float4 four = scores.from_allowed(allowed);
      const float score[4] = {four.x, four.y, four.z, four.w};
      float kept[4] = {allowed.x, allowed.y, allowed.z, allowed.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool possible = search.can_be_sampled(score[i]);
        const int bin = search.bin_of(score[i]);
        const bool wanted = possible && bin >= plan.kept && bin <= plan.collected;
        if (plan.collected >= 0) collect(state, wanted, first + i);
        if (!possible || bin >= plan.kept) kept[i] = -INFINITY;
      }
      if (plan.kept > 0) best.see(first, kept);
    });
  }
  return {best.place(), -INFINITY, -INFINITY, 1};
}

// The phase of an index among those that a row takes.
OCTAVO_DEVICE unsigned phase_of(unsigned phases, unsigned index) {
  for (; index > 0; --index) phases &= phases - 1;
  return count_bits((phases & ~(phases - 1)) - 1);
}

// sampling: the row with its mask and temperature; else the plain row.
OCTAVO_DEVICE Scores scores_of(const SampleArguments& a, bool sampling) {
  const SampleMemory& memory = sample_memory();
  const bool scaled = sampling && !memory.options.is_greedy();
  return {in_global_memory(memory.logits), sampling ? in_global_memory(memory.mask) : nullptr,
          scaled ? memory.options.temperature : 1.0f, a.vocab, a.aligned};
}

// What is looked for in it once its maxima are known.
OCTAVO_DEVICE Search search_of(const SampleArguments& a, bool sampling, const Part& whole) {
  const RowOptions& options = sample_memory().options;
  const Scores scores = scores_of(a, sampling);
  // Division keeps the order: the largest score is that of the largest logit.
  const float max = divide_rn(sampling ? whole.max_allowed : whole.max_logit, scores.divisor);
  const bool limited = sampling && options.min_p > 0.0f;
  return {scores, max, limited ? add_rn(max, log_positive(options.min_p)) : -INFINITY};
}

// From here on calls keep the registers of phases apart; their arguments lie in shared memory.
OCTAVO_DEVICE_CALL void conclude_count(bool sampling) {
  const SampleMemory& memory = sample_memory();
  const SampleArguments& a = memory.arguments;
  RowState& state = a.states[blockIdx.y];
  const Search search = search_of(a, sampling, state.whole);
  const Plan plan =
      sampling ? plan_sampling(search, memory.options, state) : plan_logprobs(a, search, state);
  if (threadIdx.x == 0) state.plan = plan;
}

OCTAVO_DEVICE Search search_collected(const SampleArguments& a, bool sampling, const Plan& plan) {
  const RowState& state = a.states[blockIdx.y];
  Search search = search_of(a, sampling, state.whole);
  search.scores.listed = plan.alone ? nullptr : state.collected;
  search.scores.num_listed = state.num_collected;
  return search;
}

OCTAVO_DEVICE_CALL Wide conclude_unusual() {
  const SampleMemory& memory = sample_memory();
  const Part& whole = memory.arguments.states[blockIdx.y].whole;
  return sample_unusual(search_of(memory.arguments, true, whole), memory.options,
                        whole.max_allowed);
}

OCTAVO_DEVICE_CALL void conclude_sampling() {
  const SampleMemory& memory = sample_memory();
  const SampleArguments& a = memory.arguments;
  const Plan& plan = memory.plan;
  const unsigned finite = a.states[blockIdx.y].whole.finite;
  Wide best = memory.whole.best;
  if (finite && memory.options.is_unusual()) {
    best = conclude_unusual();
  } else if (finite && (plan.alone || plan.collected >= 0)) {
    const Wide other = sample_as_planned(search_collected(a, true, plan), plan, memory.options);
    if (other > best) best = other;
  }
  note_token(a, finite ? token_of(best) : 0, finite);
}

OCTAVO_DEVICE_CALL void conclude_logprobs() {
  const SampleMemory& memory = sample_memory();
  const SampleArguments& a = memory.arguments;
  if (a.states[blockIdx.y].whole.finite)
    note_top(a, search_collected(a, false, memory.plan), memory.plan);
}

// What a block does in a phase: tokens begin .. end - 1 of its row.
struct Turn {
  unsigned index, phase, part;
  int begin, end;

  OCTAVO_DEVICE bool sampling() const { return phase < kCountLogprobs; }
};

OCTAVO_DEVICE_CALL void run_scan(Turn turn) {
  const SampleMemory& memory = sample_memory();
  const SampleArguments& a = memory.arguments;
  RowState& state = *in_global_memory(a.states + blockIdx.y);
  const RowOptions& options = memory.options;
  const Scores scores = scores_of(a, true);
  Part found;
  if (options.is_greedy())
    found = scan_part(scores, turn.begin, turn.end, Best{});
  else if (options.keeps_all())
    found =
        scan_part(scores, turn.begin, turn.end, NoisyBest(options.stamp(), options.temperature));
  else
    found = scan_part(scores, turn.begin, turn.end, Nothing{});
  if (!arrive_last(found, state, gridDim.x, turn.part)) return;
  const Part whole = memory.whole;
  if (threadIdx.x == 0) {
    state.whole = whole;
    state.plan = {};
    if (options.is_unusual()) {
      state.plan.alone = 1;
      state.plan.kept = 0;
    }
  }
  if (!(memory.phases >> kCollect & 1u))
    note_token(a, whole.finite ? token_of(whole.best) : 0, whole.finite);
  if (memory.num_phases > 1) conclude(state, 1, false);
}

OCTAVO_DEVICE_CALL void run_count(Turn turn) {
  const SampleMemory& memory = sample_memory();
  const SampleArguments& a = memory.arguments;
  RowState& state = *in_global_memory(a.states + blockIdx.y);
  if (state.whole.finite) {
    const bool weighed = !turn.sampling() || memory.options.top_p < 1.0f;
    search_of(a, turn.sampling(), state.whole).count_part(weighed, turn.begin, turn.end);
    add_counts(state);
  }
  if (!arrive_last({}, state, gridDim.x, turn.part)) return;
  if (state.whole.finite) conclude_count(turn.sampling());
  conclude(state, turn.index + 1, false);
}

OCTAVO_DEVICE_CALL void run_collect(Turn turn) {
  SampleMemory& memory = sample_memory();
  const SampleArguments& a = memory.arguments;
  RowState& state = *in_global_memory(a.states + blockIdx.y);
  if (threadIdx.x == 0) memory.plan = state.plan;
  __syncthreads();
  Part found{};
  if (state.whole.finite) {
    found = collect_part(search_of(a, turn.sampling(), state.whole), memory.plan, memory.options,
                         state, turn.begin, turn.end);
  }
  if (!arrive_last(found, state, gridDim.x, turn.part)) return;
  if (turn.sampling())
    conclude_sampling();
  else
    conclude_logprobs();
  forget_collected(state);
  conclude(state, turn.index + 1, turn.index + 1 == memory.num_phases);
}

// blockIdx.y: row; gridDim.x blocks share it. 4 bytes a token are read in a phase, by and large
// from the second cache after the first.
__global__ void __launch_bounds__(kSamplingThreads, 2) sample_rows(SampleArguments a) {
  SampleMemory& memory = sample_memory();
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t row = a.row();
  if (threadIdx.x == 0) {
    memory.options = {a.sampling[row]};
    memory.options.decide_xtc();
    memory.logits = a.logits + row * a.stride;
    memory.mask = a.masks ? a.masks + row * ((a.vocab + 31) / 32) : nullptr;
    memory.phases = memory.options.phases();
    memory.num_phases = memory.turns_left = count_bits(memory.phases);
    memory.arguments = a;
  }
  __syncthreads();
  while (memory.turns_left > 0) {
    Turn turn{0, 0, take_ticket(a.states[blockIdx.y], gridDim.x), 0, 0};
    for (; turn.part >= gridDim.x; turn.part -= gridDim.x) ++turn.index;
    turn.phase = phase_of(memory.phases, turn.index);
    turn.begin = static_cast<int>(turn.part) * a.each;
    turn.end = turn.begin + a.each < a.vocab ? turn.begin + a.each : a.vocab;
    // A row that is not finite is not sampled: comparing a NaN orders nothing.
    if (turn.phase == kScan)
      run_scan(turn);
    else if (turn.phase == kCount || turn.phase == kCountLogprobs)
      run_count(turn);
    else
      run_collect(turn);
  }
}

// Samples::ranks. A block a row; 4 bytes a token are read.
__global__ void __launch_bounds__(kSamplingThreads)
    rank_rows(const float* logits, std::int64_t stride, int vocab, const SamplingRow* sampling,
              Samples out) {
  auto* partial = reinterpret_cast<unsigned*>(shared_memory());  // kMostWarps
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t row = blockIdx.x;
  logits += row * stride;
  unsigned rank = 0;
  if (sampling[row].num_logprobs >= 0 && out.finite[row]) {
    const int token = out.token_ids[row];
    const float own = logits[token];
    for (int i = static_cast<int>(threadIdx.x); i < vocab; i += static_cast<int>(blockDim.x))
      rank += logits[i] > own || (logits[i] == own && i <= token);
  }
  rank = block_reduce(rank, partial, [](unsigned a, unsigned b) { return a + b; });
  if (threadIdx.x == 0) out.ranks[row] = static_cast<std::int32_t>(rank);
}

}  // namespace

std::size_t CudaBackend::sampling_workspace_bytes(std::int64_t max_num_rows) {
  return static_cast<std::size_t>(std::min(max_num_rows, kMostRows)) * sizeof(RowState);
}

void CudaBackend::sample(const Samples& out, View logits, const std::int32_t* masks,
                         const Step& step) {
  require_f32("sample", logits);
  require(out.num_top <= kMostListed, "sample with log-probabilities of ", out.num_top,
          " tokens; the kernel lists up to ", kMostListed);
  if (logits.rows == 0 || logits.cols == 0) return;
  // As many blocks as fill the device; how a row is shared does not change the sampled token.
  const std::int64_t most_rows = std::min(logits.rows, kMostRows);
  const std::int64_t fill = std::max(2 * stream_.num_processors() / most_rows, kFewestBlocks);
  const std::int64_t parts = ceil_div(logits.cols, kLogitsPerBlock);
  const std::int64_t blocks = std::min<std::int64_t>({fill, parts, kMostBlocks});
  SampleArguments a{};
  a.logits = static_cast<const float*>(logits.data);
  a.stride = logits.stride;
  a.masks = masks;
  a.vocab = static_cast<int>(logits.cols);
  a.num_top = static_cast<int>(out.num_top);
  a.each = static_cast<int>(4 * ceil_div(logits.cols, 4 * blocks));
  a.aligned = fours_aligned(logits);
  a.states = static_cast<RowState*>(sampling_workspace_.get(sampling_workspace_bytes(logits.rows)));
  a.sampling = step.sampling;
  a.sampled = step.sampled;
  a.out = out;
  for (a.first_row = 0; a.first_row < logits.rows; a.first_row += most_rows) {
    const std::int64_t rows = std::min(logits.rows - a.first_row, most_rows);
    launch(stream_, "sample_rows",
           {dims(blocks, rows), kSamplingThreads, sizeof(SampleMemory), true}, sample_rows, a);
  }
  if (out.ranks) {
    launch(stream_, "rank_rows",
           {dims(logits.rows), kSamplingThreads, kMostWarps * sizeof(unsigned), true}, rank_rows,
           a.logits, logits.stride, logits.cols, step.sampling, out);
  }
}

}  // namespace octavo::cuda

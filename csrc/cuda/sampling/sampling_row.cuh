// How the blocks that share a row work together: what each passes on, and who comes when.
//
// A row takes one phase or several: every block reads its part of the row once a phase, and the
// last one to be done in a phase concludes it. A next phase needs that conclusion, so blocks have
// to wait; and they may, without all of a grid being on the device at once, because work is handed
// out by tickets: phase by phase, part by part, each block taking as many as there are phases. Who
// holds a ticket has started, waits for lower tickets alone, and those are held by blocks that have
// started too (as in Merrill and Garland 2016, "Single-pass parallel prefix scan with decoupled
// look-back"). In the emulator a block that waits for higher tickets is an error.
#pragma once

#include "core/backend.h"
#include "cuda/sampling/sampling_screen.cuh"

namespace octavo::cuda {

constexpr int kMostBlocks = 128;           // that share a row
constexpr std::int64_t kMostRows = 256;    // of a launch
constexpr unsigned kMostCollected = 4096;  // tokens of a row that one block looks at more closely

// What is done in a phase, in this order; a row skips what it has no need of.
enum Phase : unsigned {
  kScan,           // maxima; the best, noise included, where no filter is set
  kCount,          // tokens by their distance from the best
  kCollect,        // the best of the tokens that are kept; those of a limit's bin are collected
  kCountLogprobs,  // the same two for log-probabilities
  kCollectLogprobs,
  kNumPhases
};

struct RowState;
struct SampleArguments {
  const float* logits;
  std::int64_t stride;
  const std::int32_t* masks;
  std::int64_t first_row;    // of this launch
  int vocab, num_top, each;  // each: tokens of a block
  bool aligned;
  RowState* states;
  const SamplingRow* sampling;
  std::int32_t* sampled;
  Samples out;

  OCTAVO_DEVICE std::int64_t row() const { return first_row + blockIdx.y; }
};

// How one row is sampled.
struct RowOptions : SamplingRow {
  OCTAVO_DEVICE bool counts() const { return top_k > 0 || top_p < 1.0f; }
  OCTAVO_DEVICE Stamp stamp() const {
    return {seed, static_cast<unsigned>(sample_index), static_cast<unsigned>(position)};
  }
  // XTC is on or off for this token, as its random number says.
  OCTAVO_DEVICE void decide_xtc() {
    if (xtc_probability == 0.0f) return;
    const uint4 random =
        philox({0, static_cast<unsigned>(position), static_cast<unsigned>(sample_index), 1},
               {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)});
    const auto bound = static_cast<Wide>(static_cast<double>(xtc_probability) * 0x1p32);
    if (random.x >= bound) xtc_probability = 0.0f;
  }
  // Bit p: whether phase p is needed.
  OCTAVO_DEVICE unsigned phases() const {
    unsigned bits = 1u << kScan;
    if (!is_greedy() && counts() && !is_unusual()) bits |= 1u << kCount;
    if (!is_greedy() && !keeps_all()) bits |= 1u << kCollect;
    if (num_logprobs >= 0) bits |= 1u << kCountLogprobs | 1u << kCollectLogprobs;
    return bits;
  }
};

// What a part of a row comes to.
struct Part {
  Wide best;          // place of the best token, noise included
  float max_logit;    // of all
  float max_allowed;  // logit, of those that the mask allows
  unsigned finite;    // 1: all logits are
  unsigned unused = 0;
};

// What to do with the tokens of each bin. As it stands here: all are kept.
struct Plan {
  int kept = kBins;    // those of bins below it are kept
  int collected = -1;  // those of bins from there up to this one are collected
  // Whether collected tokens are those that the limit of the only filter lies among. Else filters
  // go on with what was collected, or, alone, one block does with the whole row.
  unsigned by_limit = 0, alone = 0;
  unsigned by_weight = 0;  // the limit: of weight or of number
  unsigned unused = 0;     // no padding: every byte that is stored is defined
  Wide needed = 0;
  Found found{};
  Wide total = 0;  // weight of all
};

// In device memory.
struct RowState {
  // Zero before and after a step.
  unsigned tickets, arrived, phases_done, num_collected;
  unsigned counts[kBins];
  Wide weights[kBins];
  int collected[kMostCollected];
  // Written before they are read.
  Part whole;
  Plan plan;
  Part parts[kMostBlocks];
};

// In shared memory, so that loops have their registers to themselves.
struct SampleMemory {
  SelectMemory select;
  SampleArguments arguments;
  RowOptions options;
  const float* logits;       // of the row
  const std::int32_t* mask;  // of the row, or null
  unsigned phases, num_phases, turns_left;
  Part parts[kSamplingWarps];
  Part whole;
  Plan plan;
  unsigned is_last, ticket;
};

OCTAVO_DEVICE SampleMemory& sample_memory() {
  return *reinterpret_cast<SampleMemory*>(shared_memory());
}

OCTAVO_DEVICE Part combine(Part a, Part b) {
  return {a.best > b.best ? a.best : b.best, fmaxf(a.max_logit, b.max_logit),
          fmaxf(a.max_allowed, b.max_allowed), a.finite & b.finite};
}

OCTAVO_DEVICE Part combine_warp(Part part) {
  for (unsigned mask = kWarp / 2; mask; mask /= 2) {
    part = combine(part, {shuffle_xor(part.best, mask), shuffle_xor(part.max_logit, mask),
                          shuffle_xor(part.max_allowed, mask), shuffle_xor(part.finite, mask)});
  }
  return part;
}

// The next ticket of the row: number of the phase * num_blocks + part. Returns when the phase may
// begin. In the only phase there is nobody to wait for.
OCTAVO_DEVICE unsigned take_ticket(RowState& state, unsigned num_blocks) {
  SampleMemory& memory = sample_memory();
  __syncthreads();
  if (threadIdx.x == 0) {
    --memory.turns_left;
    memory.ticket = blockIdx.x;
    if (memory.num_phases > 1) {
      memory.ticket = atomic_add(&state.tickets, 1u);
      wait_for_count(&state.phases_done, memory.ticket / num_blocks);
    }
  }
  __syncthreads();
  return memory.ticket;
}

// Combines the parts of a phase, and what the blocks wrote into the state before. Returns true in
// the block that comes last, with the whole in memory.whole.
OCTAVO_DEVICE bool arrive_last(Part part, RowState& state, unsigned num_blocks, unsigned block) {
  SampleMemory& memory = sample_memory();
  part = combine_warp(part);
  if (lane_index() == 0) memory.parts[warp_index()] = part;
  __syncthreads();
  if (warp_index() == 0) {
    part = combine_warp(memory.parts[lane_index() % kSamplingWarps]);
    if (lane_index() == 0) {
      memory.whole = part;
      memory.is_last = 1;
      if (num_blocks > 1) {
        state.parts[block] = part;
        memory.is_last = atomic_add_acquire_release(&state.arrived, 1u) == num_blocks - 1;
      }
    }
  }
  __syncthreads();
  if (!memory.is_last) return false;
  if (num_blocks > 1) {
    if (warp_index() == 0) {
      part = state.parts[lane_index() % num_blocks];
      for (unsigned i = lane_index() + kWarp; i < num_blocks; i += kWarp)
        part = combine(part, state.parts[i]);
      part = combine_warp(part);
      if (lane_index() == 0) {
        memory.whole = part;
        state.arrived = 0;
      }
    }
    __syncthreads();
  }
  return true;
}

// The last block of a phase: lets the next begin, or leaves the row as it was found.
OCTAVO_DEVICE void conclude(RowState& state, unsigned phases_done, bool is_final) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (is_final) state.tickets = 0;
  publish_count(&state.phases_done, is_final ? 0 : phases_done);
}

}  // namespace octavo::cuda

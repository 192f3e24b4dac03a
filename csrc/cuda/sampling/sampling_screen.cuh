// The best of a row's tokens, noise included, without making every token's noise exactly: two exact
// logarithms cost three times what all the rest of a token does.
//
// A bound that is never below the noise takes one fast logarithm. Only a token that could reach the
// best seen so far, were its noise as large as the bound, gets its exact score; a block of 32
// thousand tokens has a dozen such. The others could not have won: the sampled token is the same.
//
// The bound. Noise is g = -log(E), E = -log(1 - w), where w in (0, 1) is the distance of the random
// word from its upper end, plus 1/2, in units of 2^-32. E = w + w^2/2 + w^3/3 + ... is more than
// w + w^2/2, so g < -log(w + w^2/2), closely where w is small, as winners' is. Roundings, here and
// in the g that reference/sampling.py defines, and the error of the fast logarithm are less than
// kNoiseSlack all together. tests/emulator/test_sampling_math.cpp tries every random word.
//
// The test. A token's exact score is y = round(q + g), q = round(x / T), x being its logit. Let
// y >= best. Then q + g >= best - 2^-24 |best|, hence x / T >= best - g - 2^-22 (|best| + 24),
// since |g| < 23.5 and q is off by 2^-24 of itself. So, h being the bound with its slack,
//   x + T (h - slack) >= T (best - (|best| + 32) 2^-20 - slack)
// where 2^-20 covers the roundings of the right side too. The left side is one fused operation,
// whose rounding keeps the order. T beyond 1e-30 .. 1e30 could overflow: then nothing is left out.
#pragma once

#include "cuda/sampling/sampling_select.cuh"

namespace octavo::cuda {

constexpr float kNoiseSlack = 0x1p-10f;
constexpr float kMostNoise = 23.5f;  // of any token: -log(2^-33) is 22.9

// log2(w + w^2/2): times -log(2), and with kNoiseSlack, at least gumbel_variate(random).
OCTAVO_DEVICE float log2_of_least(std::uint32_t random) {
  const float w = multiply_rn(static_cast<float>(~random), 0x1p-32f);
  return fast_log2(fma_rn(multiply_rn(0.5f, w), w, w));
}

// What a token has to reach to be looked at exactly.
struct Screen {
  float scale = 0.0f;         // of log2_of_least; with the token's logit, the left side above
  float bound = -INFINITY;    // the right side
  float nearest = -INFINITY;  // no token with a smaller logit reaches it, whatever its noise

  OCTAVO_DEVICE float reach(float logit, std::uint32_t random) const {
    return fma_rn(scale, log2_of_least(random), logit);
  }
  OCTAVO_DEVICE void raise(float best, float temperature) {
    if (!(temperature >= 1e-30f && temperature <= 1e30f)) return;
    const float low = best - (fabsf(best) + 32.0f) * 0x1p-20f - kNoiseSlack;
    scale = -0.693147180559945309f * temperature;
    bound = temperature * low;
    nearest = temperature * (low - kMostNoise);
  }
};

// Sees tokens four by four, all lanes of a warp together, and keeps the best, noise included.
struct NoisyBest {
  Stamp stamp;
  float temperature;
  Wide best_place;         // of the tokens that this lane has looked at
  float best = -INFINITY;  // score of the best that the warp has
  Screen screen;

  OCTAVO_DEVICE NoisyBest(const Stamp& its_stamp, float its_temperature)
      : stamp(its_stamp), temperature(its_temperature), best_place(place_of(-INFINITY, 0)) {
    screen.raise(best, temperature);
  }

  OCTAVO_DEVICE Wide place() const { return best_place; }
  // logits: of tokens first .. first + 3, -inf for those that must not be sampled.
  OCTAVO_DEVICE void see(int first, const float (&logits)[4]) {
    const float most = fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3]));
    if (!ballot(most > -INFINITY && !(most < screen.nearest))) return;
    const uint4 random = random_of_four(stamp, static_cast<unsigned>(first) / 4);
    const std::uint32_t words[4] = {random.x, random.y, random.z, random.w};
    float reach[4];
    unsigned open = 0;  // bit i: token first + i may be the best
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reach[i] = screen.reach(logits[i], words[i]);
      if (logits[i] > -INFINITY && !(reach[i] < screen.bound)) open |= 1u << i;
    }
    while (ballot(open != 0)) {
      float score = -INFINITY;
      if (open) {
        // The most promising first: mostly the others are then out of the question.
        int at = -1;
        float logit = 0.0f, its_reach = 0.0f;
        std::uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if ((open >> i & 1u) && (at < 0 || reach[i] > its_reach)) {
            at = i;
            its_reach = reach[i];
            logit = logits[i];
            word = words[i];
          }
        }
        open &= ~(1u << at);
        score = add_rn(divide_rn(logit, temperature), gumbel_variate(word));
        const Wide its_place = place_of(score, first + at);
        if (score > -INFINITY && its_place > best_place) best_place = its_place;
      }
      best = fmaxf(best, warp_max(score));
      screen.raise(best, temperature);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (reach[i] < screen.bound) open &= ~(1u << i);
      }
    }
  }
};

}  // namespace octavo::cuda

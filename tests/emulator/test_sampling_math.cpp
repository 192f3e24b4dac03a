// The arithmetic of the CUDA sampler against that of the CPU's (which the Python tests compare with
// the reference): the same bits for every input.

#include <cstdlib>
#include <limits>

#include "cpu/kernels.h"
#include "cuda/sampling/sampling_screen.cuh"
#include "emulated.h"

namespace octavo::tests {

namespace {

using namespace cuda;

void exponentials() {
  const cpu::Kernels& kernels = cpu::kernels_for("scalar");
  std::vector<float> x = {0.0f, -0.0f, -87.0f, -87.00001f, -1e30f, -1e-30f, -0.34657359f};
  Numbers numbers(1);
  for (int i = 0; i < 200'000; ++i) x.push_back((numbers.next() - 1.0f) * (i % 3 ? 0.5f : 45.0f));
  std::vector<std::uint64_t> expected(x.size());
  kernels.exp_weights(expected.data(), x.data(), 0.0f, static_cast<std::int64_t>(x.size()));
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (exp_fixed(x[i]) != expected[i])
      fail("e^", x[i], " is ", exp_fixed(x[i]), " / 2^40; expected ", expected[i]);
  }
  CHECK(exp_fixed(0.0f) == Wide{1} << 40);
  exp_fixed(std::numeric_limits<float>::quiet_NaN());  // anything, but no fault
}

void logarithms() {
  const cpu::Kernels& kernels = cpu::kernels_for("scalar");
  Numbers numbers(2);
  for (int i = 0; i < 100'000; ++i) {
    const float x = std::ldexp(numbers.next() + 1.0001f, numbers.below(60) - 40);
    CHECK(log_positive(x) == kernels.log_positive(x));
  }
}

void noise() {
  const cpu::Kernels& kernels = cpu::kernels_for("scalar");
  constexpr unsigned kTokens = 40'000;
  for (const std::uint64_t seed :
       {std::uint64_t{0}, std::uint64_t{1} << 63 | 12345, ~std::uint64_t{0}}) {
    std::vector<float> expected(kTokens);
    kernels.gumbel(expected.data(), seed, 3, 77, 0, kTokens);
    for (unsigned group = 0; group < kTokens / 4; ++group) {
      const uint4 random = random_of_four({seed, 3, 77}, group);
      const std::uint32_t words[4] = {random.x, random.y, random.z, random.w};
      for (unsigned i = 0; i < 4; ++i) CHECK(gumbel_variate(words[i]) == expected[4 * group + i]);
    }
  }
}

void places_of_floats() {
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> ascending = {-infinity, -3e38f, -1.0f,      -1e-40f, 0.0f,    1e-40f,
                                  1e-3f,     1.0f,   1.0000001f, 3e38f,   infinity};
  for (std::size_t i = 1; i < ascending.size(); ++i)
    CHECK(ordered(ascending[i - 1]) < ordered(ascending[i]));
  CHECK(ordered(-0.0f) == ordered(0.0f));
}

// How far the noise bound is above the noise, with half of its slack: the other half is for what
// the GPU's logarithm does worse than the host's, 8e-6 at most.
float room(std::uint32_t random) {
  return -0.693147180559945309f * log2_of_least(random) + kNoiseSlack / 2 - gumbel_variate(random);
}

// Every random word with OCTAVO_TEST_EXPLORE set (a minute); else one of 251, and all that are near
// an end, or near a power of two, where rounding changes.
//
// Words that round to one float and lie on one side of 2^31 have one noise and, but for those of
// the lower side, one bound. There the bound falls as the noise rises, so a range's end is its
// worst.
void noise_is_never_above_its_bound() {
  const std::uint32_t step = std::getenv("OCTAVO_TEST_EXPLORE") ? 1 : 251;
  float least = INFINITY, closest = INFINITY;
  const auto look = [&](std::uint32_t random) {
    const float its_room = room(random);
    if (!(its_room >= 0)) fail("noise of ", random, " is above its bound, by ", -its_room);
    least = std::fmin(least, its_room);
    // Where the largest noise is, the bound is close: a lower one would be found.
    if (random > 0xff000000u) closest = std::fmin(closest, its_room);
  };
  for (std::uint64_t random = 0; random < std::uint64_t{1} << 32; random += step)
    look(static_cast<std::uint32_t>(random));
  for (std::uint32_t i = 0; i < 1u << 16; ++i) {
    look(i);
    look(~i);
    for (int bit = 17; bit < 32; ++bit) {
      look((1u << bit) + i - (1u << 15));
      look(~((1u << bit) + i - (1u << 15)));
    }
  }
  CHECK(gumbel_variate(0xffffffffu) < kMostNoise - 0.5f);
  CHECK(closest < kNoiseSlack);
  CHECK(least >= 0 && least <= closest);
}

// Whoever reaches the best, or draws with it, is looked at; with the bound moved, not all are.
unsigned left_out(float shift) {
  Numbers numbers(3);
  const auto any = [&] { return static_cast<std::uint32_t>(numbers.below(1 << 30)) * 2654435761u; };
  const float none = -INFINITY;
  unsigned result = 0;
  for (int i = 0; i < 1'000'000; ++i) {
    const int magnitude = i % 4 ? numbers.below(12) - 6 : numbers.below(240) - 120;
    const float temperature =
        i % 3 ? numbers.next() + 1.0001f : std::ldexp(numbers.next() + 1.5f, magnitude / 2);
    const float logit = std::ldexp(numbers.next() * 8.0f, i % 5 ? 1 : magnitude);
    // Large noise as often as any.
    const std::uint32_t random = i % 2 ? any() : ~(any() >> numbers.below(32));
    const float score = add_rn(divide_rn(logit, temperature), gumbel_variate(random));
    if (score == none) continue;
    Screen screen;
    screen.raise(none, temperature);
    result += screen.reach(logit, random) < screen.bound || logit < screen.nearest;
    screen.raise(score, temperature);
    screen.bound += shift * temperature;
    result += screen.reach(logit, random) < screen.bound || logit < screen.nearest;
  }
  return result;
}

void screens_let_every_winner_pass() {
  CHECK(left_out(0.0f) == 0);
  CHECK(left_out(2 * kNoiseSlack) > 1000);
}

}  // namespace

std::vector<Test> sampling_math_tests() {
  return {
      {"sampling: exponentials", exponentials},
      {"sampling: logarithms", logarithms},
      {"sampling: noise", noise},
      {"sampling: places of floats", places_of_floats},
      {"sampling: noise is never above its bound", noise_is_never_above_its_bound},
      {"sampling: screens let every winner pass", screens_let_every_winner_pass},
  };
}

}  // namespace octavo::tests

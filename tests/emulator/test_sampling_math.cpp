// The arithmetic of the CUDA sampler against that of the CPU's (which the Python tests compare with
// the reference): the same bits for every input.

#include <limits>

#include "cpu/kernels.h"
#include "cuda/exact_math.cuh"
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
      const float4 four = gumbel_of_four({seed, 3, 77}, group);
      const float* right = &expected[4 * group];
      CHECK(four.x == right[0] && four.y == right[1] && four.z == right[2] && four.w == right[3]);
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

}  // namespace

std::vector<Test> sampling_math_tests() {
  return {
      {"sampling: exponentials", exponentials},
      {"sampling: logarithms", logarithms},
      {"sampling: noise", noise},
      {"sampling: places of floats", places_of_floats},
  };
}

}  // namespace octavo::tests

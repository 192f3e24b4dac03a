// The arithmetic of sampling, the same bits as reference/sampling.py, which explains each function,
// and as csrc/cpu/kernels/sampling.h: every product and sum is rounded by itself, and sums of
// probabilities are of integers, so that their order does not matter.
#pragma once

#include "cuda/device/primitives.cuh"

namespace octavo::cuda {

using Wide = unsigned long long;  // what atomics on 64 bits take

// a * b + c, rounded twice.
OCTAVO_DEVICE float twice_rounded(float a, float b, float c) {
  return add_rn(multiply_rn(a, b), c);
}

// floor(e^x * 2^40) for x <= 0: the fixed point in which probabilities are summed. A NaN gives any
// number. e^x is y * 2^n, and of y's 24 bits a shift keeps those that count: none below -27.73.
OCTAVO_DEVICE Wide exp_fixed(float x) {
  if (!(x >= -28.0f)) return 0;
  const float n = floorf(twice_rounded(x, 1.44269504088896341f, 0.5f));
  float r = add_rn(x, -multiply_rn(n, 0.693359375f));
  r = add_rn(r, -multiply_rn(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = twice_rounded(p, r, 1.3981999507e-3f);
  p = twice_rounded(p, r, 8.3334519073e-3f);
  p = twice_rounded(p, r, 4.1665795894e-2f);
  p = twice_rounded(p, r, 1.6666665459e-1f);
  p = twice_rounded(p, r, 5.0000001201e-1f);
  const float y = add_rn(add_rn(multiply_rn(p, multiply_rn(r, r)), r), 1.0f);
  const auto bits = bits_as<std::uint32_t>(y);
  constexpr int kBias = 127, kFraction = 23, kUnits = 40;
  const int shift =
      static_cast<int>(bits >> kFraction) - kBias - kFraction + kUnits + static_cast<int>(n);
  const Wide fraction = (bits & 0x7fffffu) | 0x800000u;
  return shift >= 0 ? fraction << shift : (shift > -24 ? fraction >> -shift : 0);
}

// log(1 + f) + e log(2) for f in [-0.293, 0.415].
OCTAVO_DEVICE float log_pieces(float f, float e) {
  const float z = multiply_rn(f, f);
  float p = 7.0376836292e-2f;
  p = twice_rounded(p, f, -1.1514610310e-1f);
  p = twice_rounded(p, f, 1.1676998740e-1f);
  p = twice_rounded(p, f, -1.2420140846e-1f);
  p = twice_rounded(p, f, 1.4249322787e-1f);
  p = twice_rounded(p, f, -1.6668057665e-1f);
  p = twice_rounded(p, f, 2.0000714765e-1f);
  p = twice_rounded(p, f, -2.4999993993e-1f);
  p = twice_rounded(p, f, 3.3333331174e-1f);
  float y = multiply_rn(multiply_rn(p, f), z);
  y = add_rn(y, multiply_rn(e, -2.12194440e-4f));
  y = add_rn(y, -multiply_rn(0.5f, z));
  return add_rn(add_rn(f, y), multiply_rn(e, 0.693359375f));
}

// The natural logarithm of x > 0, not denormal.
OCTAVO_DEVICE float log_positive(float x) {
  const auto bits = bits_as<std::uint32_t>(x);
  const float mantissa = bits_as<float>((bits & 0x007fffffu) | 0x3f000000u);  // in [0.5, 1)
  const float exponent = static_cast<float>(static_cast<int>(bits >> 23) - 126);
  const bool low = mantissa < 0.707106781186547524f;
  const float f = add_rn(low ? add_rn(mantissa, mantissa) : mantissa, -1.0f);
  return log_pieces(f, low ? exponent - 1.0f : exponent);
}

// A number from the standard Gumbel distribution out of 32 random bits: -log(-log(u)), where u
// close to 1 is kept as its distance from 1.
OCTAVO_DEVICE float gumbel_variate(std::uint32_t random) {
  constexpr float kUnit = 2.3283064365386963e-10f;  // 2^-32
  const bool upper = random >= 0x80000000u;
  const std::uint32_t distance = upper ? ~random : random;  // from the nearer end
  const float w = multiply_rn(add_rn(static_cast<float>(distance), 0.5f), kUnit);
  const bool near_one = upper && w <= 0.2929f;
  const float log_u = near_one ? log_pieces(-w, 0.0f) : log_positive(upper ? add_rn(1.0f, -w) : w);
  return -log_positive(-log_u);
}

// Philox4x32-10 (Salmon et al. 2011): four random words out of a counter and a key.
OCTAVO_DEVICE uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const Wide p0 = multiply_wide(0xD2511F53u, counter.x);
    const Wide p1 = multiply_wide(0xCD9E8D57u, counter.z);
    counter = {
        static_cast<std::uint32_t>(p1 >> 32) ^ counter.y ^ key.x, static_cast<std::uint32_t>(p1),
        static_cast<std::uint32_t>(p0 >> 32) ^ counter.w ^ key.y, static_cast<std::uint32_t>(p0)};
    key = {key.x + 0x9E3779B9u, key.y + 0xBB67AE85u};
  }
  return counter;
}

// What the random numbers of a row depend on.
struct Stamp {
  Wide seed;
  std::uint32_t sample_index, position;
};

// The random bits of tokens 4 group .. 4 group + 3.
OCTAVO_DEVICE uint4 random_of_four(const Stamp& stamp, std::uint32_t group) {
  const auto key = [](Wide word) { return computed_anew(static_cast<int>(word)); };
  return philox({group, stamp.position, stamp.sample_index, 0},
                {static_cast<std::uint32_t>(key(stamp.seed)),
                 static_cast<std::uint32_t>(key(stamp.seed >> 32))});
}
// log(sum of e^(x - max)) from that sum in fixed point.
OCTAVO_DEVICE float log_of_total(Wide total) {
  return static_cast<float>(log(static_cast<double>(total) * 0x1p-40));
}

// A float's place among all floats, as an unsigned number: larger for a larger one, the same for
// the two zeros. No NaN.
OCTAVO_DEVICE std::uint32_t ordered(float x) {
  const auto bits = bits_as<std::uint32_t>(add_rn(x, 0.0f));  // -0 becomes +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace octavo::cuda

#include "core/spec.h"

#include <cmath>

namespace octavo {

namespace {

constexpr float kTwoPi = 6.283185307179586f;

float scale_llama3(float frequency, const RopeSpec& rope) {
  const float original = static_cast<float>(rope.original_max_position_embeddings);
  const float wavelength = kTwoPi / frequency;
  const float low = static_cast<float>(rope.low_freq_factor);
  const float high = static_cast<float>(rope.high_freq_factor);
  const float factor = static_cast<float>(rope.factor);
  if (wavelength < original / high) return frequency;
  if (wavelength > original / low) return frequency / factor;
  const float smooth = (original / wavelength - low) / (high - low);
  return (1.0f - smooth) * frequency / factor + smooth * frequency;
}

}  // namespace

std::vector<float> rope_frequencies(const RopeSpec& rope, std::int64_t head_dim) {
  std::vector<float> frequencies(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const float power = static_cast<float>(std::pow(rope.theta, static_cast<double>(exponent)));
    const float frequency = 1.0f / power;
    switch (rope.scaling) {
      case RopeScaling::none:
        frequencies[i] = frequency;
        break;
      case RopeScaling::linear:
        frequencies[i] = frequency / static_cast<float>(rope.factor);
        break;
      case RopeScaling::llama3:
        frequencies[i] = scale_llama3(frequency, rope);
        break;
    }
  }
  return frequencies;
}

}  // namespace octavo

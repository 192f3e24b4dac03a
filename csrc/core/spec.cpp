#include "core/spec.h"

#include <cmath>

#include "core/text.h"

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

std::vector<std::string> uncomputed_fields(const ModelSpec& spec) {
  bool has_softcap = false, has_output_norm = false, has_qk_norm = false, has_multiplier = false;
  bool has_no_norm = spec.final_norm.kind == NormKind::none;
  for (const LayerSpec& layer : spec.layers) {
    has_softcap |= layer.attention_softcap != 0.0f;
    has_output_norm |= layer.output_norm.has_value();
    has_qk_norm |= layer.qk_norm != QkNorm::none;
    has_multiplier |= layer.residual_multiplier != 1.0f;
    has_no_norm |= layer.norm.kind == NormKind::none;
  }
  std::vector<std::string> fields;
  const auto refuse = [&](bool is_used, const char* field) {
    if (is_used) fields.push_back(text(field, " is not computed here yet: use the reference"));
  };
  refuse(has_softcap, "attention_softcap");
  refuse(has_output_norm, "output_norm");
  refuse(has_qk_norm, "qk_norm");
  refuse(has_multiplier, "residual_multiplier");
  refuse(has_no_norm, "norm kind \"none\"");
  refuse(spec.embed_multiplier != 1.0f, "embed_multiplier");
  refuse(spec.logits_multiplier != 1.0f, "logits_multiplier");
  refuse(spec.logits_softcap != 0.0f, "logits_softcap");
  return fields;
}

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

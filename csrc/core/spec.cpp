#include "core/spec.h"

#include <cmath>

#include "core/text.h"

namespace octavo {

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

RopeTables rope_tables(const RopeSpec& rope, std::int64_t positions) {
  RopeTables tables;
  const std::size_t count = static_cast<std::size_t>(positions) * rope.frequencies.size();
  tables.cosines.reserve(count);
  tables.sines.reserve(count);
  for (std::int64_t position = 0; position < positions; ++position) {
    for (const float frequency : rope.frequencies) {
      // The angle is a float32 product, as in Hugging Face; its cosine is rounded once.
      const double angle = static_cast<float>(position) * frequency;
      tables.cosines.push_back(static_cast<float>(std::cos(angle)) * rope.attention_factor);
      tables.sines.push_back(static_cast<float>(std::sin(angle)) * rope.attention_factor);
    }
  }
  return tables;
}

}  // namespace octavo

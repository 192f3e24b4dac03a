#include "core/spec.h"

#include <cmath>

namespace octavo {

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

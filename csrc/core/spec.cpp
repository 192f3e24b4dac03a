#include "core/spec.h"

#include <cmath>

namespace octavo {

RopeTables rope_tables(const RopeSpec& rope, std::int64_t positions, std::int64_t rope_switch) {
  RopeTables tables;
  const std::size_t count =
      static_cast<std::size_t>(rope_switch + positions) * rope.frequencies.size();
  tables.cosines.reserve(count);
  tables.sines.reserve(count);
  const auto add = [&](const std::vector<float>& frequencies, std::int64_t rows) {
    for (std::int64_t position = 0; position < rows; ++position) {
      for (const float frequency : frequencies) {
        // The angle is a float32 product, as in Hugging Face; its cosine is rounded once.
        const double angle = static_cast<float>(position) * frequency;
        tables.cosines.push_back(static_cast<float>(std::cos(angle)) * rope.attention_factor);
        tables.sines.push_back(static_cast<float>(std::sin(angle)) * rope.attention_factor);
      }
    }
  };
  add(rope.frequencies, rope_switch);
  const bool is_split = rope_switch && !rope.long_frequencies.empty();
  add(is_split ? rope.long_frequencies : rope.frequencies, positions);
  return tables;
}

}  // namespace octavo

// A matrix somebody else owns: what the ops of a backend read and write.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace octavo {

// `rows` rows of `cols` float32 numbers in the device's memory, `stride` numbers apart.
struct View {
  float* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;

  float* row(std::int64_t index) const { return data + index * stride; }

  // Columns first .. first + count - 1 of every row.
  View columns(std::int64_t first, std::int64_t count) const {
    return {data + first, rows, count, stride};
  }
};

}  // namespace octavo

// A matrix in memory owned elsewhere, which the ops of a backend read and write.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace octavo {

// `rows` rows of `cols` numbers in the device's memory, `stride` numbers apart: float32, or for
// activations Backend::activation_dtype.
struct View {
  void* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;
  DType dtype = DType::f32;

  // Of a float32 matrix.
  float* row(std::int64_t index) const { return static_cast<float*>(data) + index * stride; }

  void* row_bytes(std::int64_t index) const { return offset(index * stride); }

  // Columns first .. first + count - 1 of every row.
  View columns(std::int64_t first, std::int64_t count) const {
    return {offset(first), rows, count, stride, dtype};
  }

  std::size_t row_size() const { return static_cast<std::size_t>(cols * bits_of(dtype) / 8); }

 private:
  void* offset(std::int64_t numbers) const {
    return static_cast<unsigned char*>(data) + numbers * bits_of(dtype) / 8;
  }
};

}  // namespace octavo

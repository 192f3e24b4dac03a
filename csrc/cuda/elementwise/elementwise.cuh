// The host side that elementwise kernels share: checks of shapes.
#pragma once

#include <cstdint>

#include "core/text.h"
#include "core/view.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"

namespace octavo::cuda {

inline void require_shape(const char* op, View given, std::int64_t rows, std::int64_t cols) {
  require(given.rows == rows && given.cols == cols, op, " got a matrix of ", given.rows, " x ",
          given.cols, " numbers; expected ", rows, " x ", cols);
}

inline void require_same_dtype(const char* op, View out, View x) {
  require(out.dtype == x.dtype, op, " reads ", name(x.dtype), " and writes ", name(out.dtype),
          "; expected one format");
}

inline void require_f32(const char* op, View given) {
  require(given.dtype == DType::f32, op, " takes f32 numbers; got ", name(given.dtype));
}

// Whether four numbers at every fourth column of every row can be read at once.
inline bool fours_aligned(View view) {
  const auto bytes = static_cast<std::size_t>(bits_of(view.dtype) / 2);
  return view.stride % 4 == 0 && is_aligned(view.data, bytes);
}

}  // namespace octavo::cuda

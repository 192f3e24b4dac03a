// The host side that elementwise kernels share: checks of shapes, and the choice of a type.
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

// Calls body(a number of the type that dtype stands for).
template <class Body>
void for_type(const char* op, DType dtype, Body&& body) {
  if (dtype == DType::f32)
    body(float{});
  else if (dtype == DType::bf16)
    body(Bf16{});
  else if (dtype == DType::f16)
    body(F16{});
  else
    require(false, op, " takes f32, bf16 or f16 numbers; got ", name(dtype));
}

// Whether four numbers at every fourth column of every row can be read at once.
inline bool fours_aligned(View view) {
  const auto bytes = static_cast<std::uintptr_t>(bits_of(view.dtype) / 2);
  return view.stride % 4 == 0 && reinterpret_cast<std::uintptr_t>(view.data) % bytes == 0;
}

inline unsigned blocks_of(std::int64_t count, std::int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

}  // namespace octavo::cuda

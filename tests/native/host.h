// Matrices, weights and caches on a backend, for tests. Only the CPU's memory is host memory too.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/backend.h"
#include "cpu/kernels.h"

namespace octavo::tests {

using Ids = std::vector<std::int32_t>;

inline BackendOptions cpu_options(int num_threads, const std::string& isa = "auto") {
  BackendOptions options;
  options.num_threads = num_threads;
  options.isa = isa;
  return options;
}

// Whether an instruction set has to round what meets int4 weights to bf16; written down here so
// that the tests do not take the kernels' word for it.
inline bool groups_take_bf16(const std::string& isa) { return isa.rfind("amx", 0) == 0; }

// One backend of every instruction set of this machine, with one thread and with three.
struct Variant {
  std::string name, isa;
  std::unique_ptr<Backend> backend;
};

inline std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const std::string& isa : cpu::available_isas()) {
    for (const int threads : {1, 3})
      all.push_back({text(isa, " with ", threads, " threads"), isa,
                     make_backend("cpu", cpu_options(threads, isa))});
  }
  return all;
}

// A test that runs once a variant.
inline Test on_each_variant(const std::string& name, void (*body)(Backend&)) {
  return {name, [body] {
            for (const Variant& variant : variants()) {
              try {
                body(*variant.backend);
              } catch (const Failure& failure) {
                fail(variant.name, ": ", failure.what());
              }
            }
          }};
}

// A matrix with `gap` numbers behind every row that no op may touch.
class Matrix {
 public:
  static constexpr float kGuard = 12345.0f;

  Matrix(std::int64_t rows, std::int64_t cols, std::int64_t gap = 0)
      : rows_(rows),
        cols_(cols),
        stride_(cols + gap),
        values_(static_cast<std::size_t>(rows * stride_), kGuard) {}
  Matrix(std::int64_t rows, std::int64_t cols, const std::vector<float>& values,
         std::int64_t gap = 0)
      : Matrix(rows, cols, gap) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < cols; ++c)
        at(r, c) = values[static_cast<std::size_t>(r * cols + c)];
    }
  }

  View view() { return {values_.data(), rows_, cols_, stride_}; }
  float& at(std::int64_t row, std::int64_t col) {
    return values_[static_cast<std::size_t>(row * stride_ + col)];
  }
  void check_gaps() {
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = cols_; c < stride_; ++c) CHECK(at(r, c) == kGuard);
    }
  }

 private:
  std::int64_t rows_, cols_, stride_;
  std::vector<float> values_;
};

inline float as_stored(float value, DType dtype) {
  return dtype == DType::bf16  ? bf16_to_float(float_to_bf16(value))
         : dtype == DType::f16 ? f16_to_float(float_to_f16(value))
                               : value;
}

// What a cache of `dtype` keeps of vectors of head_dim numbers each; int8: 127 steps of a vector's
// largest magnitude.
inline std::vector<float> as_cached(const std::vector<float>& given, std::int64_t head_dim,
                                    DType dtype) {
  std::vector<float> kept = given;
  for (float& value : kept) value = as_stored(value, dtype);
  if (dtype != DType::int8) return kept;
  const auto width = static_cast<std::size_t>(head_dim);
  for (std::size_t begin = 0; begin < kept.size(); begin += width) {
    float largest = 0.0f;
    for (std::size_t d = 0; d < width; ++d) largest = std::max(largest, std::abs(kept[begin + d]));
    const float scale = largest > 0.0f ? largest / 127.0f : 1.0f;
    for (std::size_t d = 0; d < width; ++d)
      kept[begin + d] = std::nearbyint(kept[begin + d] / scale) * scale;
  }
  return kept;
}

inline KvLayer make_kv(Backend& backend, Buffer& memory, const LayerSpec& layer, DType dtype,
                       std::int64_t num_blocks, std::int64_t block_size) {
  KvLayer kv;
  kv.dtype = dtype;
  kv.num_blocks = num_blocks;
  kv.block_size = block_size;
  kv.num_kv_heads = layer.num_kv_heads;
  kv.head_dim = layer.head_dim;
  kv.block_bytes = backend.kv_block_bytes(layer, dtype, block_size);
  memory = Buffer(&backend, static_cast<std::size_t>(num_blocks * kv.block_bytes));
  kv.data = memory.data();
  return kv;
}

}  // namespace octavo::tests

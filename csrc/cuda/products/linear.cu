// out = x weight^T + bias: which kernel does it.
//
//   rows   plain weights                     quantized weights
//   1-8    multiply_few                      multiply_few
//   9-16   of few outputs: multiply_few_twice; else as below
//   9-128  cuBLASLt, or else multiply_tiles  multiply_tiles
//   129-   cuBLASLt, or else multiply_tiles  dequantize and cuBLASLt, or else multiply_tiles
//
// Where the library begins was measured on an H100 (docs/cuda_products.md). Without it, and that is
// how `deterministic` runs, a row's bits are the same however many rows there are (fragments.cuh);
// with it they are so up to 8 rows, of quantized weights up to 128 (TileRows). float32 and odd
// widths: multiply_any, whatever the rows.

#include <algorithm>
#include <cstdlib>

#include "cuda/backend.h"
#include "cuda/device/launch.cuh"
#include "cuda/products/cublas.h"
#include "cuda/products/multiply.h"

namespace octavo::cuda {

namespace {

// Numbers that are dequantized at a time, so that a large head needs no copy as large.
constexpr std::int64_t kMostDequantized = std::int64_t{1} << 25;

// Outputs that are dequantized at a time: all, or whole tiles.
std::int64_t outputs_at_a_time(std::int64_t outputs, std::int64_t inputs) {
  const std::int64_t padded = ceil_div(inputs, kBlock) * kBlock;
  const std::int64_t most = kMostDequantized / padded / 128 * 128;
  return std::min(outputs, most > 0 ? most : 128);
}

std::size_t dequantized_bytes(std::int64_t outputs, std::int64_t inputs) {
  const std::int64_t row_bytes = ceil_div(inputs, kBlock) * kUnitBytes;
  return static_cast<std::size_t>(outputs_at_a_time(outputs, inputs) * row_bytes);
}

// How a product of some rows divides the workspace: counters (which stay zero), then sums of
// shared tiles or what cuBLASLt works with, then dequantized weights.
struct Memory {
  std::size_t sums = kCounterBytes, dequantized = 0, bytes = 0;

  Memory(std::int64_t rows, std::int64_t outputs, std::int64_t inputs, bool is_quantized,
         bool by_library) {
    const std::size_t partial = rows > kFewRows ? partial_bytes(rows, outputs, inputs) : 0;
    const std::size_t library = by_library ? kCublasBytes : 0;
    dequantized = ceil_div(sums + std::max(partial, library), 256) * 256;
    bytes = dequantized + (by_library && is_quantized ? dequantized_bytes(outputs, inputs) : 0);
  }
};

struct LinearContext {
  Stream& stream;
  CublasLt* cublas;  // null: our own kernels
};

Partials partials_in(unsigned char* memory) {
  return {reinterpret_cast<float*>(memory + kCounterBytes),
          reinterpret_cast<std::int32_t*>(memory)};
}

// Of many rows, where the library can. memory: the workspace.
void multiply_by_library(const LinearContext& context, View out, View x, const Matrix& plain,
                         unsigned char* memory) {
  if (!plain.bias && context.cublas->multiply(context.stream, out, x, plain.data,
                                              plain.units * kBlock, memory + kCounterBytes))
    return;
  multiply_tiles(context.stream, out, x, plain, partials_in(memory));
}

void multiply_dequantized(const LinearContext& context, View out, View x, const Matrix& weight,
                          unsigned char* memory, unsigned char* numbers) {
  const auto at_a_time = static_cast<int>(outputs_at_a_time(weight.outputs, weight.inputs));
  for (int first = 0; first < weight.outputs; first += at_a_time) {
    const int count = smaller(at_a_time, weight.outputs - first);
    const Matrix plain =
        dequantize(context.stream, numbers, x.dtype, outputs_of(weight, first, count));
    multiply_by_library(context, out.columns(first, count), x, plain, memory);
  }
}

}  // namespace

bool is_fast(DType x_dtype, const Linear& weight) {
  const WeightFormat& format = weight.format;
  const bool is_known =
      format.is_quantized() ? format.scale_dtype != DType::f32 : format.dtype == x_dtype;
  return x_dtype != DType::f32 && is_known && weight.inputs % 8 == 0;
}

bool is_fast(View x, const Linear& weight) {
  return is_fast(x.dtype, weight) && x.stride % 8 == 0 && is_aligned(x.data, 16);
}

void CudaBackend::linear(View out, View x, const Linear& weight) {
  require(x.cols == weight.inputs && out.cols == weight.outputs && out.rows == x.rows,
          "linear: ", x.rows, " x ", x.cols, " times a matrix ", weight.outputs, " x ",
          weight.inputs, " into ", out.rows, " x ", out.cols);
  require(out.dtype == DType::f32 || out.dtype == x.dtype, "linear writes ", name(out.dtype),
          " from ", name(x.dtype), "; expected f32 or the same");
  if (out.rows == 0 || out.cols == 0) return;
  const Matrix matrix = matrix_of(weight);
  if (!is_fast(x, weight)) return multiply_any(stream_, out, x, matrix);
  if (x.rows <= kFewRows) return multiply_few(stream_, out, {x, nullptr, x.dtype}, matrix);
  // Tiles of 128 outputs would be fewer than a quarter of the processors.
  const bool few_tiles = matrix.outputs <= 32 * stream_.num_processors();
  if (x.rows <= (few_tiles ? 2 * kFewRows : tile_rows_.few))
    return multiply_few_twice(stream_, out, x, matrix);
  const bool is_quantized = weight.format.is_quantized();
  const bool by_library = cublas_ && x.rows > tile_rows_.of(weight.format);
  const Memory layout(x.rows, weight.outputs, weight.inputs, is_quantized, by_library);
  auto* memory = static_cast<unsigned char*>(linear_workspace_.get(layout.bytes));
  const LinearContext context{stream_, cublas_.get()};
  if (!by_library)
    multiply_tiles(stream_, out, x, matrix, partials_in(memory));
  else if (is_quantized)
    multiply_dequantized(context, out, x, matrix, memory, memory + layout.dequantized);
  else
    multiply_by_library(context, out, x, matrix, memory);
}

TileRows TileRows::read_environment() {
  TileRows rows;
  const auto read = [](const char* name, std::int64_t& to) {
    const char* value = std::getenv(name);
    if (!value || !*value) return;
    char* end = nullptr;
    to = std::strtoll(value, &end, 10);
    require(*end == 0 && to >= 0, name, " is \"", value, "\"; expected a number of rows");
  };
  read("OCTAVO_TILES_ROWS", rows.plain);
  read("OCTAVO_QUANTIZED_TILES_ROWS", rows.quantized);
  read("OCTAVO_FEW_ROWS", rows.few);
  require(rows.few <= 2 * kFewRows, "OCTAVO_FEW_ROWS is ", rows.few, "; expected at most ",
          2 * kFewRows);
  return rows;
}

std::size_t CudaBackend::linear_workspace_bytes(const ModelSpec& spec,
                                                const StepLimits& limits) const {
  std::size_t most = kCounterBytes;
  const auto add = [&](std::int64_t rows, std::int64_t outputs, std::int64_t inputs) {
    for (const bool is_quantized : {false, true}) {
      const bool by_library = rows > (is_quantized ? tile_rows_.quantized : tile_rows_.plain);
      const Memory memory(rows, outputs, inputs, is_quantized, by_library);
      most = std::max(most, memory.bytes);
    }
  };
  const std::int64_t tokens = limits.max_num_batched_tokens;
  for (const LayerSpec& layer : spec.layers) {
    add(tokens, layer.qkv_size(), spec.hidden_size);
    add(tokens, spec.hidden_size, layer.q_size());
    if (layer.moe) {
      add(tokens, layer.moe->num_experts, spec.hidden_size);
      continue;
    }
    add(tokens, layer.up_size(), spec.hidden_size);
    add(tokens, spec.hidden_size, layer.intermediate_size);
  }
  add(tokens, spec.vocab_size, spec.hidden_size);  // every token's logits may be wanted
  return most;
}

}  // namespace octavo::cuda

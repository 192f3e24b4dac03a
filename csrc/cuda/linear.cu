// out = x weight^T + bias: which kernel does it.
//
//   rows    plain weights                        quantized weights
//   1-8     multiply_few                         multiply_few
//   9-64    multiply_tiles                       multiply_tiles
//   65-     cuBLASLt, or else multiply_tiles     dequantize and cuBLASLt, or else int8:
//                                                dequantize and multiply_tiles; int4:
//                                                multiply_tiles
//
// Without cuBLASLt, and that is how `deterministic` runs, a row's bits are the same however many
// rows there are (fragments.cuh); with it they are so up to 64 rows. float32 and odd widths:
// multiply_any, whatever the rows.

#include "cuda/cublas.h"
#include "cuda/kernels.h"
#include "cuda/multiply.h"

namespace octavo::cuda {

namespace {

constexpr std::int64_t kFewEnoughForTiles = 64;
// Numbers that are dequantized at a time, so that a large head needs no copy as large.
constexpr std::int64_t kMostDequantized = std::int64_t{1} << 25;

// Outputs that are dequantized at a time: all, or whole tiles.
std::int64_t outputs_at_a_time(std::int64_t outputs, std::int64_t inputs) {
  const std::int64_t padded = (inputs + kBlock - 1) / kBlock * kBlock;
  const std::int64_t most = kMostDequantized / padded / 128 * 128;
  return outputs < most ? outputs : most > 0 ? most : 128;
}

std::size_t dequantized_bytes(std::int64_t outputs, std::int64_t inputs) {
  const std::int64_t row_bytes = (inputs + kBlock - 1) / kBlock * kUnitBytes;
  return static_cast<std::size_t>(outputs_at_a_time(outputs, inputs) * row_bytes);
}

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

// How a product of some rows divides the workspace: counters (which stay zero), then sums of
// shared tiles or what cuBLASLt works with, then dequantized weights.
struct Memory {
  std::size_t sums = kCounterBytes, dequantized = 0, bytes = 0;

  Memory(std::int64_t rows, std::int64_t outputs, std::int64_t inputs, bool is_quantized,
         bool has_cublas) {
    const std::size_t partial = rows > kFewRows ? partial_bytes(rows, outputs, inputs) : 0;
    const bool is_large = rows > kFewEnoughForTiles;
    const std::size_t library = is_large && has_cublas ? kCublasBytes : 0;
    dequantized = aligned(sums + (partial > library ? partial : library));
    bytes = dequantized + (is_large && is_quantized ? dequantized_bytes(outputs, inputs) : 0);
  }
};

// Whether the kernels for tensor cores take it: 16-bit activations, rows of whole 16 bytes.
bool is_fast(View x, const Linear& weight) {
  const WeightFormat& format = weight.format;
  const bool is_known =
      format.is_quantized() ? format.scale_dtype != DType::f32 : format.dtype == x.dtype;
  return x.dtype != DType::f32 && is_known && x.cols % 8 == 0 && x.stride % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
}

// Of many rows. memory: the workspace.
void multiply_many(const LinearContext& context, View out, View x, const Matrix& plain,
                   unsigned char* memory) {
  const Partials partials{reinterpret_cast<float*>(memory + kCounterBytes),
                          reinterpret_cast<std::int32_t*>(memory)};
  const bool plain_sums = !plain.output_scales && !plain.bias;
  if (context.cublas && x.rows > kFewEnoughForTiles && plain_sums &&
      context.cublas->multiply(context.stream, out, x, plain.data, plain.units * kBlock,
                               memory + kCounterBytes))
    return;
  multiply_tiles(context.stream, out, x, plain, partials);
}

void multiply_dequantized(const LinearContext& context, View out, View x, const Matrix& weight,
                          unsigned char* memory, unsigned char* numbers) {
  const auto at_a_time = static_cast<int>(outputs_at_a_time(weight.outputs, weight.inputs));
  for (int first = 0; first < weight.outputs; first += at_a_time) {
    const int count = smaller(at_a_time, weight.outputs - first);
    // cuBLASLt cannot scale each output's sum.
    const bool scaled = context.cublas != nullptr;
    const Matrix plain =
        dequantize(context.stream, numbers, x.dtype, outputs_of(weight, first, count), scaled);
    multiply_many(context, out.columns(first, count), x, plain, memory);
  }
}

}  // namespace

void linear(const LinearContext& context, View out, View x, const Linear& weight) {
  require(x.cols == weight.inputs && out.cols == weight.outputs && out.rows == x.rows,
          "linear: ", x.rows, " x ", x.cols, " times a matrix ", weight.outputs, " x ",
          weight.inputs, " into ", out.rows, " x ", out.cols);
  require(out.dtype == DType::f32 || out.dtype == x.dtype, "linear writes ", name(out.dtype),
          " from ", name(x.dtype), "; expected f32 or the same");
  if (out.rows == 0 || out.cols == 0) return;
  const Matrix matrix = matrix_of(weight);
  if (!is_fast(x, weight)) return multiply_any(context.stream, out, x, matrix);
  if (x.rows <= kFewRows) return multiply_few(context.stream, out, x, matrix);
  const bool is_quantized = weight.format.is_quantized();
  const Memory layout(x.rows, weight.outputs, weight.inputs, is_quantized,
                      context.cublas != nullptr);
  auto* memory = static_cast<unsigned char*>(context.workspace.get(layout.bytes));
  // int8 codes are exact in T, so that without cuBLASLt no bit changes by that way; int4 would.
  const bool pays = context.cublas || matrix.codes == Codes::int8;
  if (is_quantized && x.rows > kFewEnoughForTiles && pays)
    multiply_dequantized(context, out, x, matrix, memory, memory + layout.dequantized);
  else
    multiply_many(context, out, x, matrix, memory);
}

std::size_t linear_workspace_bytes(const ModelSpec& spec, const StepLimits& limits) {
  std::size_t most = kCounterBytes;
  const auto add = [&](std::int64_t rows, std::int64_t outputs, std::int64_t inputs) {
    const Memory memory(rows, outputs, inputs, true, true);
    most = memory.bytes > most ? memory.bytes : most;
  };
  const std::int64_t tokens = limits.max_num_batched_tokens;
  for (const LayerSpec& layer : spec.layers) {
    add(tokens, layer.q_size() + 2 * layer.kv_size(), spec.hidden_size);
    add(tokens, spec.hidden_size, layer.q_size());
    add(tokens, layer.intermediate_size * (layer.gated ? 2 : 1), spec.hidden_size);
    add(tokens, spec.hidden_size, layer.intermediate_size);
  }
  add(tokens, spec.vocab_size, spec.hidden_size);  // every token's logits may be wanted
  return most;
}

}  // namespace octavo::cuda

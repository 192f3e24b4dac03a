// out = x weight^T + bias: which kernel does it.

#include "cuda/cublas.h"
#include "cuda/kernels.h"
#include "cuda/multiply.h"

namespace octavo::cuda {

namespace {

// Whether the kernels for tensor cores take it: 16-bit activations, rows of whole 16 bytes.
bool is_fast(View x, const Linear& weight) {
  const WeightFormat& format = weight.format;
  const DType expected = format.is_quantized() ? format.scale_dtype : format.dtype;
  return x.dtype != DType::f32 && x.dtype == expected && x.cols % 8 == 0 && x.stride % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
}

}  // namespace

void linear(const LinearContext& context, View out, View x, const Linear& weight) {
  require(x.cols == weight.inputs && out.cols == weight.outputs && out.rows == x.rows,
          "linear: ", x.rows, " x ", x.cols, " times a matrix ", weight.outputs, " x ",
          weight.inputs, " into ", out.rows, " x ", out.cols);
  if (out.rows == 0 || out.cols == 0) return;
  const Matrix matrix = matrix_of(weight);
  if (!is_fast(x, weight)) return multiply_any(context.stream, out, x, matrix);
  if (x.rows <= kFewRows) return multiply_few(context.stream, out, x, matrix);
  const std::size_t bytes = partial_bytes(x.rows, weight.outputs, weight.inputs);
  auto* memory = static_cast<unsigned char*>(context.workspace.get(kCounterBytes + bytes));
  Partials partials{reinterpret_cast<float*>(memory + kCounterBytes),
                    reinterpret_cast<std::int32_t*>(memory)};
  if (!weight.format.is_quantized() || x.rows <= kMostQuantizedRows)
    return multiply_tiles(context.stream, out, x, matrix, partials);
  multiply_any(context.stream, out, x, matrix);
}

std::size_t linear_workspace_bytes(const ModelSpec&, const StepLimits&) { return 0; }

std::unique_ptr<CublasLt> CublasLt::open(Stream&) { return nullptr; }

}  // namespace octavo::cuda

// out = x weight^T + bias: which kernel does it.

#include "cuda/cublas.h"
#include "cuda/kernels.h"
#include "cuda/multiply.h"

namespace octavo::cuda {

void linear(const LinearContext& context, View out, View x, const Linear& weight) {
  require(x.cols == weight.inputs && out.cols == weight.outputs && out.rows == x.rows,
          "linear: ", x.rows, " x ", x.cols, " times a matrix ", weight.outputs, " x ",
          weight.inputs, " into ", out.rows, " x ", out.cols);
  if (out.rows == 0 || out.cols == 0) return;
  multiply_any(context.stream, out, x, matrix_of(weight));
}

std::size_t linear_workspace_bytes(const ModelSpec&, const StepLimits&) { return 0; }

std::unique_ptr<CublasLt> CublasLt::open(Stream&) { return nullptr; }

}  // namespace octavo::cuda

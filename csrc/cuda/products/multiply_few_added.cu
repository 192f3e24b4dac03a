// The products of few rows that the residual stream grows by: of attention, and of the MLP.
#include "cuda/products/multiply_few.cuh"

namespace octavo::cuda {

void multiply_few_added(Stream& stream, View residual, const FewInput& x, const Matrix& weight) {
  run_as<false>(stream, AddSums{residual.row(0), residual.stride, weight.outputs}, x, weight);
}

}  // namespace octavo::cuda

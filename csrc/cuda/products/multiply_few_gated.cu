// The product of few rows with gate and up, activated.
#include "cuda/products/multiply_few.cuh"

namespace octavo::cuda {

void multiply_few_gated(Stream& stream, View out, const FewInput& x, const Matrix& weight,
                        Activation activation) {
  run_as(stream, WriteGated{{}, out.data, out.stride, activation, weight.outputs / 2}, x, weight);
}

}  // namespace octavo::cuda

// The product of few rows with gate and up, activated.
#include "cuda/products/multiply_few.cuh"

namespace octavo::cuda {

void multiply_few_gated(Stream& stream, View out, const FewInput& x, const Matrix& weight,
                        Activation activation) {
  const WriteGated target{out.data, out.stride, activation, weight.outputs / 2};
  if (x.norm)
    run_as(stream, target, normed_rows(x), weight, x.dtype);
  else
    run_as(stream, target, stored_rows(x), weight, x.dtype);
}

}  // namespace octavo::cuda

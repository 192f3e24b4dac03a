// The product of few rows with q, k and v, rotated and stored.
#include "cuda/products/multiply_few.cuh"

namespace octavo::cuda {

void multiply_few_rotated(Stream& stream, const FewInput& x, const Matrix& weight,
                          const RopeArguments& rope) {
  const RotateAndStore target{rope, weight.outputs / 2};
  if (x.norm)
    run_as(stream, target, normed_rows(x), weight, x.dtype);
  else
    run_as(stream, target, stored_rows(x), weight, x.dtype);
}

}  // namespace octavo::cuda

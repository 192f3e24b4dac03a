// The product of few rows with q, k and v, rotated and stored.
#include "cuda/products/multiply_few.cuh"

namespace octavo::cuda {

void multiply_few_rotated(Stream& stream, const FewInput& x, const Matrix& weight,
                          const RopeArguments& rope) {
  run_as(stream, RotateAndStore{rope, weight.outputs / 2}, x, weight);
}

}  // namespace octavo::cuda

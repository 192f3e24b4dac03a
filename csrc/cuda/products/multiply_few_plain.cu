// The products of few rows that are written as they are.
#include "cuda/products/multiply_few.cuh"

namespace octavo::cuda {

void multiply_few(Stream& stream, View out, const FewInput& x, const Matrix& weight) {
  run_as(stream, WriteSums{{}, numbers_of(out), weight.outputs}, x, weight);
}

}  // namespace octavo::cuda

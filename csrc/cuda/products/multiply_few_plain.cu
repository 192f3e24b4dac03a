// The products of few rows that are written as they are.
#include "cuda/products/multiply_few.cuh"

namespace octavo::cuda {

void multiply_few(Stream& stream, View out, const FewInput& x, const Matrix& weight) {
  const WriteSums target{numbers_of(out), weight.outputs};
  if (x.norm)
    run_as(stream, target, normed_rows(x), weight, x.dtype);
  else
    run_as(stream, target, stored_rows(x), weight, x.dtype);
}

}  // namespace octavo::cuda

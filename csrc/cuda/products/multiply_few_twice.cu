// The products of 9 to 16 rows by a matrix of few outputs.
#include "cuda/products/multiply_few.cuh"

namespace octavo::cuda {

void multiply_few_twice(Stream& stream, View out, View x, const Matrix& weight) {
  const WriteSums target{{}, numbers_of(out), weight.outputs};
  for_16_bits(x.dtype, [&](auto zero) {
    const TwiceStoredRows source{{numbers_of(x), static_cast<int>(x.rows)}};
    run_format<decltype(zero)>(stream, weight, target, source);
  });
}

}  // namespace octavo::cuda

// Products by tiles of quantized weights: they stay codes in shared memory and become numbers in
// the registers of the one warp that multiplies by them.

#include "cuda/products/tiles.cuh"

namespace octavo::cuda {

void multiply_quantized_tiles(Stream& stream, View out, View x, const Matrix& weight,
                              const Partials& partials) {
  for_16_bits(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (weight.codes == Codes::int8)
      run_rows<T, Codes::int8>(stream, out, x, weight, partials);
    else if (weight.codes == Codes::int8_grouped)
      run_rows<T, Codes::int8_grouped>(stream, out, x, weight, partials);
    else if (weight.codes == Codes::int4)
      run_rows<T, Codes::int4>(stream, out, x, weight, partials);
    else
      run_rows<T, Codes::int4_levels>(stream, out, x, weight, partials);
  });
}

}  // namespace octavo::cuda

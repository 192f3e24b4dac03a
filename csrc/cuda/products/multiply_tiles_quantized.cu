// Products by tiles of quantized weights: they stay codes in shared memory and become numbers in
// the registers of the one warp that multiplies by them.

#include "cuda/products/tiles.cuh"

namespace octavo::cuda {

namespace {

template <class T, Codes codes>
void run(Stream& stream, View out, View x, const Matrix& weight, const Partials& partials) {
  if (x.rows <= SmallTile::rows)
    run_tiles<T, codes, SmallTile>(stream, out, x, weight, partials);
  else if (x.rows <= HalfTile::rows)
    run_tiles<T, codes, HalfTile>(stream, out, x, weight, partials);
  else if (x.rows <= MediumTile<codes>::rows)
    run_tiles<T, codes, MediumTile<codes>>(stream, out, x, weight, partials);
  else
    run_many_rows<T, codes>(stream, out, x, weight, partials);
}

template <class T>
void run(Stream& stream, View out, View x, const Matrix& weight, const Partials& partials) {
  if (weight.codes == Codes::int8)
    run<T, Codes::int8>(stream, out, x, weight, partials);
  else if (weight.codes == Codes::int4)
    run<T, Codes::int4>(stream, out, x, weight, partials);
  else
    run<T, Codes::int4_levels>(stream, out, x, weight, partials);
}

}  // namespace

void multiply_quantized_tiles(Stream& stream, View out, View x, const Matrix& weight,
                              const Partials& partials) {
  if (x.dtype == DType::bf16)
    run<Bf16>(stream, out, x, weight, partials);
  else
    run<F16>(stream, out, x, weight, partials);
}

}  // namespace octavo::cuda

// Products by tiles of plain weights.

#include <algorithm>

#include "cuda/products/tiles.cuh"

namespace octavo::cuda {

std::size_t partial_bytes(std::int64_t rows, std::int64_t outputs, std::int64_t inputs) {
  // Of as many whole tiles as the matrix has or as may be shared, whichever is less. Larger tiles
  // are never shared (run_rows), and smaller ones need less.
  const std::int64_t all =
      ceil_div(rows, MediumTile::rows) * ceil_div(outputs, MediumTile::outputs);
  const auto most = static_cast<std::int64_t>(kCounterBytes / sizeof(std::int32_t));
  const std::int64_t tile_bytes = MediumTile::rows * MediumTile::outputs * 4;
  return static_cast<std::size_t>(std::min(all, most) * tile_bytes *
                                  num_slices(static_cast<int>(inputs)));
}

void multiply_tiles(Stream& stream, View out, View x, const Matrix& weight,
                    const Partials& partials) {
  if (weight.codes >= Codes::int8)
    multiply_quantized_tiles(stream, out, x, weight, partials);
  else if (x.dtype == DType::bf16)
    run_rows<Bf16, Codes::bf16>(stream, out, x, weight, partials);
  else
    run_rows<F16, Codes::f16>(stream, out, x, weight, partials);
}

}  // namespace octavo::cuda

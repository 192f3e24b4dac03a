// Products by tiles of plain weights.

#include <algorithm>

#include "cuda/products/tiles.cuh"

namespace octavo::cuda {

std::size_t partial_bytes(std::int64_t rows, std::int64_t outputs, std::int64_t inputs) {
  // Of as many whole tiles as the matrix has or as may be shared, whichever is less.
  const auto bytes = [&](std::int64_t row_size, std::int64_t output_size) {
    const std::int64_t all = ceil_div(rows, row_size) * ceil_div(outputs, output_size);
    const auto most = static_cast<std::int64_t>(kCounterBytes / sizeof(std::int32_t));
    return std::min(all, most) * row_size * output_size * 4;
  };
  // Larger tiles are never shared (run_rows).
  const std::int64_t most = std::max(bytes(SmallTile::rows, SmallTile::outputs),
                                     bytes(MediumTile::rows, MediumTile::outputs));
  return static_cast<std::size_t>(most * num_slices(static_cast<int>(inputs)));
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

// Products by tiles of plain weights, and the choice of the tile.

#include "cuda/products/tiles.cuh"

namespace octavo::cuda {

namespace {

template <class T>
void run(Stream& stream, View out, View x, const Matrix& weight, const Partials& partials) {
  constexpr Codes kCodes = std::is_same_v<T, Bf16> ? Codes::bf16 : Codes::f16;
  using Medium = MediumTile<kCodes>;
  if (x.rows <= SmallTile::rows)
    run_tiles<T, kCodes, SmallTile>(stream, out, x, weight, partials);
  else if (x.rows <= Medium::rows)
    run_tiles<T, kCodes, Medium>(stream, out, x, weight, partials);
  else
    run_many_rows<T, kCodes>(stream, out, x, weight, partials);
}

}  // namespace

std::size_t partial_bytes(std::int64_t rows, std::int64_t outputs, std::int64_t inputs) {
  using Medium = MediumTile<Codes::bf16>;
  // Of as many whole tiles as the matrix has or as may be shared, whichever is less.
  const auto tiles = [](std::int64_t count, std::int64_t size) {
    return (count + size - 1) / size;
  };
  const auto bytes = [&](std::int64_t row_size, std::int64_t output_size) {
    const std::int64_t all = tiles(rows, row_size) * tiles(outputs, output_size);
    const auto most = static_cast<std::int64_t>(kCounterBytes / sizeof(std::int32_t));
    return (all < most ? all : most) * row_size * output_size * 4;
  };
  // Larger tiles are never shared (run_many_rows).
  const std::int64_t small = bytes(SmallTile::rows, SmallTile::outputs);
  const std::int64_t medium = bytes(Medium::rows, Medium::outputs);
  const std::int64_t most = small > medium ? small : medium;
  return static_cast<std::size_t>(most * num_slices(static_cast<int>(inputs)));
}

void multiply_tiles(Stream& stream, View out, View x, const Matrix& weight,
                    const Partials& partials) {
  if (weight.codes >= Codes::int8)
    multiply_quantized_tiles(stream, out, x, weight, partials);
  else if (x.dtype == DType::bf16)
    run<Bf16>(stream, out, x, weight, partials);
  else
    run<F16>(stream, out, x, weight, partials);
}

}  // namespace octavo::cuda

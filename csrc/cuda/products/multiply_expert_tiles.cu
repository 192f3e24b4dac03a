// Products by tiles of the rows of each expert.
#include "cuda/products/tiles.cuh"

namespace octavo::cuda {

namespace {

template <class T, Codes codes, class Shape>
void run_expert_tiles(Stream& stream, View out, View x, const Matrix& weight,
                      const ExpertTiles& tiles) {
  using S = Stage<codes, Shape>;
  const int num_stages = S::count(stream);
  const LaunchShape shape{dims(tiles.count, ceil_div(weight.outputs, Shape::outputs)),
                          Shape::threads, static_cast<std::size_t>(num_stages) * S::bytes, true};
  launch(stream, "multiply_tile", shape, multiply_tile<T, codes, Shape, ExpertTiles>,
         numbers_of(out), numbers_of(x), weight, num_slices(weight.inputs),
         slice_inputs(weight.inputs) / (S::blocks * kBlock), num_stages, Partials{}, tiles);
}

template <class T, Codes codes>
void run_shape(Stream& stream, View out, View x, const Matrix& weight, const ExpertTiles& tiles,
               int tile_rows) {
  if (tile_rows == SmallTile::rows)
    run_expert_tiles<T, codes, SmallTile>(stream, out, x, weight, tiles);
  else if (tile_rows == MediumTile::rows)
    run_expert_tiles<T, codes, MediumTile>(stream, out, x, weight, tiles);
  else
    run_expert_tiles<T, codes, WideTile>(stream, out, x, weight, tiles);
}

}  // namespace

// As many rows as an expert has if tokens choose evenly, but no more than fit with 16-bit weights.
int expert_tile_rows(const Stream& stream, std::int64_t rows_of_expert) {
  if (rows_of_expert <= SmallTile::rows) return SmallTile::rows;
  const bool may_be_wide = Stage<Codes::bf16, WideTile>::fits(stream);
  return rows_of_expert > MediumTile::rows && may_be_wide ? WideTile::rows : MediumTile::rows;
}

void multiply_experts_tiles(Stream& stream, View out, View x, const Matrix& weight,
                            const ExpertTiles& tiles, int tile_rows) {
  for_16_bits(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr Codes kPlain = std::is_same_v<T, Bf16> ? Codes::bf16 : Codes::f16;
    if (weight.codes == Codes::int8)
      run_shape<T, Codes::int8>(stream, out, x, weight, tiles, tile_rows);
    else if (weight.codes == Codes::int8_grouped)
      run_shape<T, Codes::int8_grouped>(stream, out, x, weight, tiles, tile_rows);
    else if (weight.codes == Codes::int4)
      run_shape<T, Codes::int4>(stream, out, x, weight, tiles, tile_rows);
    else if (weight.codes == Codes::int4_levels)
      run_shape<T, Codes::int4_levels>(stream, out, x, weight, tiles, tile_rows);
    else
      run_shape<T, kPlain>(stream, out, x, weight, tiles, tile_rows);
  });
}

}  // namespace octavo::cuda

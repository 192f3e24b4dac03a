// Products of rows that are sorted by expert: which rows of which expert a block multiplies.
//
// The rows' kernels write a list of tiles (experts.cu): up to so many rows of one expert each, then
// tiles of no rows, so that the host can launch blocks for as many as there may be. A product's
// kernel takes its tile from there, and with it the expert's matrix.
#pragma once

#include "cuda/layout/weights.cuh"

namespace octavo::cuda {

struct ExpertTile {
  int expert;
  int first, rows;  // among the sorted ones
};

// The matrix of one expert, of a Matrix that stands for all of them.
OCTAVO_HOST_DEVICE Matrix expert_of(const Matrix& all, int expert) {
  Matrix one = all;
  const long long rows = static_cast<long long>(expert) * all.outputs;
  const long long scales = rows * all.scales_per_row;
  one.data += rows * all.row_bytes;
  if (all.output_scales) one.output_scales += rows;
  const int scale_bytes = all.scale_dtype == DType::f32 ? 4 : 2;
  if (all.scales) one.scales = static_cast<const char*>(all.scales) + scales * scale_bytes;
  if (all.zeros) one.zeros = static_cast<const char*>(all.zeros) + scales * 2;
  return one;
}

// What blocks of a product multiply. begin(): before anything is read; false: nothing at all.

// All rows by one matrix, a tile after another.
struct AllRows {
  OCTAVO_DEVICE bool begin(unsigned, int&, Numbers&, Numbers&, Matrix&) const { return true; }
};

// Tile `index` of the list. out, x: sorted rows.
struct ExpertTiles {
  const ExpertTile* tiles;
  int count;

  OCTAVO_DEVICE bool begin(unsigned index, int& first_row, Numbers& out, Numbers& x,
                           Matrix& weight) const {
    wait_for_previous_kernel();  // whose work the list may be
    const ExpertTile tile = tiles[index];
    if (tile.rows == 0) return false;
    first_row = tile.first;
    out.rows = x.rows = tile.first + tile.rows;
    weight = expert_of(weight, tile.expert);
    return true;
  }
};

}  // namespace octavo::cuda

// Products of up to 8 rows of each expert: the ends that multiply_few.cuh needs for them.
#pragma once

#include "cuda/products/experts.cuh"
#include "cuda/products/multiply_few.cuh"

namespace octavo::cuda {

// blockIdx.y: the tile. x: of sorted rows, or, where rows_of says which row of x each of them is,
// of others.
struct ExpertRows {
  static constexpr bool kByExpert = true;
  static constexpr int kRowTiles = 1;
  ExpertTiles tiles;
  Numbers x;
  const std::int32_t* rows_of;
  int rows, first;

  template <class Target>
  OCTAVO_DEVICE bool begin_tile(Target& target, Matrix& weight) {
    Numbers none{};
    if (!tiles.begin(blockIdx.y, first, none, x, weight)) return false;
    rows = x.rows - first;
    target.first_row = first;
    return true;
  }

  OCTAVO_HOST_DEVICE int shared_bytes() const { return 0; }
  OCTAVO_DEVICE void begin(unsigned char*) const {}
  template <class T>
  OCTAVO_DEVICE void finish(unsigned char*) const {}
  template <class T>
  OCTAVO_DEVICE const T* row(const unsigned char*, int r) const {
    const long long row = rows_of ? rows_of[first + r] : first + r;
    return static_cast<const T*>(x.data) + row * x.stride;
  }
};

// A target whose rows are those of the tile.
template <class Target>
struct OfTile : Target {
  int first_row = 0;

  template <class T, class... Sums>
  OCTAVO_DEVICE void write(const typename Target::Ahead& ahead, int row, int first, int j,
                           Sums... sums) const {
    Target::template write<T>(ahead, first_row + row, first, j, sums...);
  }
};

namespace {

template <class Target>
void run_experts(Stream& stream, const Target& target, View x, const std::int32_t* rows_of,
                 const Matrix& weight, const ExpertTiles& tiles) {
  const ExpertRows source{tiles, numbers_of(x), rows_of, kFewRows, 0};
  for_16_bits(x.dtype, [&](auto zero) {
    run_format<decltype(zero)>(stream, weight, OfTile<Target>{target}, source);
  });
}

}  // namespace

}  // namespace octavo::cuda

// out = x weight^T + bias by tiles: any number of rows.
//
// A block makes a tile of Shape::rows x Shape::outputs. Stages of weights and activations come into
// shared memory by cp.async, up to four stages ahead of the products (tile_stage.cuh). Each warp
// makes outputs / output_warps x rows / row_warps of the tile.
//
// Where the tiles are too few for the processors, gridDim.z blocks share one: each takes a share
// of the slices and leaves every slice's sum in memory (the first one of all its slices), and the
// last to arrive adds them in ascending order. So the sums' bits depend neither on the number of
// blocks nor on the tile. One thread of a block tells the others', and hears of theirs.
//
// Moves the weights once for every Shape::rows rows and x once for every Shape::outputs outputs
// (from the second cache: the rows' tiles are neighbours in the grid), and of shared tiles 8 bytes
// a sum and slice.
//
//   rows outputs warps  for
//    16    128     8    9 to 16 rows; a warp makes 16 x 16
//    32    128     8    17 to 32 rows of quantized weights; a warp makes 32 x 16, so that codes
//                       become numbers once
//    64    128     8    17 to 64 rows, and more of small matrices; warps of 32 x 32: codes become
//                       numbers twice, and x is read from shared memory half as often
//    96    128     8    65 to 96 and 129 to 192 rows, warps of 48 x 32
//   128    128     8    more rows: 128 to 144 KB of shared memory, warps of 64 x 32. A block moves
//                       512 (bf16), 384 (int8) or 320 bytes (int4) for 16384 products of each
//                       input: the second cache, at 5.5 TB/s, bounds as the tensor cores do
//
// Where two stages of 96 or 128 rows do not fit (99 KiB), the next smaller tile takes their place.
//
// What bounds is the number of instructions: docs/cuda_products.md counts them. Hence stages of 128
// inputs, and everything about addresses that can be is computed before the first one.
#pragma once

#include "cuda/products/multiply.h"
#include "cuda/products/tile_stage.cuh"

namespace octavo::cuda {

// Where the sums of a slice of a shared tile lie: thread by thread, four of each at a time.
template <class Shape>
OCTAVO_DEVICE uint4* place_of_sums(const Partials& partials, int tile, int slices, int slice) {
  const long long quads = (static_cast<long long>(tile) * slices + slice) * Part<Shape>::outputs *
                          Part<Shape>::rows * Shape::threads;
  return reinterpret_cast<uint4*>(partials.sums) + quads +
         computed_anew(static_cast<int>(threadIdx.x));
}

// total += sums, sums = 0. left, where not null: a place for the total, which begins anew.
template <class Shape>
OCTAVO_DEVICE void end_slice(Sums<Shape>& total, Sums<Shape>& sums, uint4* left) {
  for_each_quad<Shape>([&](int i, int j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      total[i][j][k] = add_rn(total[i][j][k], sums[i][j][k]);
      sums[i][j][k] = 0.0f;
    }
    if (!left) return;
    left[(i * Part<Shape>::rows + j) * Shape::threads] = bits_as<uint4>(total[i][j]);
#pragma unroll
    for (int k = 0; k < 4; ++k) total[i][j][k] = 0.0f;
  });
}

// total = 0 + what all blocks left of a tile, from slice `first` on, in ascending order.
template <class Shape>
OCTAVO_DEVICE void add_shares(Sums<Shape>& total, const Partials& partials, int tile, int first,
                              int slices) {
  for (int slice = first; slice < slices; ++slice) {
    const uint4* from = place_of_sums<Shape>(partials, tile, slices, slice);
    for_each_quad<Shape>([&](int i, int j) {
      const uint4 quad = from[(i * Part<Shape>::rows + j) * Shape::threads];
      const float four[4] = {bits_as<float>(quad.x), bits_as<float>(quad.y), bits_as<float>(quad.z),
                             bits_as<float>(quad.w)};
#pragma unroll
      for (int k = 0; k < 4; ++k)
        total[i][j][k] = add_rn(slice == first ? 0.0f : total[i][j][k], four[k]);
    });
  }
}

// Writes the tile by way of shared memory, so that neighbouring threads write neighbouring outputs.
template <class Shape>
OCTAVO_DEVICE void write_tile(const Numbers& out, const Matrix& weight, const Sums<Shape>& total,
                              const Part<Shape>& part, int first_output, int first_row) {
  constexpr int kPitch = Shape::outputs + 4;  // a warp's lanes write to different banks
  auto* tile = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(lane_index());
  __syncthreads();
  for_each_quad<Shape>([&](int i, int j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = part.first_row + 8 * j + 2 * (lane % 4) + k % 2;
      const int output = part.first_output + 16 * i + k / 2 * 8 + lane / 4;
      tile[row * kPitch + output] = total[i][j][k];
    }
  });
  __syncthreads();
  constexpr int kPairs = Shape::outputs / 2;
  const int rows = smaller(Shape::rows, out.rows - first_row);
  for (int i = static_cast<int>(threadIdx.x); i < rows * kPairs; i += Shape::threads) {
    const int row = i / kPairs, output = i % kPairs * 2;
    const float* two = tile + row * kPitch + output;
    write_pair(out, weight, first_row + row, first_output + output, two[0], two[1]);
  }
}

// The last of the blocks that share a tile: true for all of its threads, which have all left their
// sums and passed a barrier since.
OCTAVO_DEVICE bool arrives_last(std::int32_t* counter) {
  auto* last = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) {
    *last = atomic_add_acquire_release(counter, 1) == static_cast<int>(gridDim.z) - 1;
    if (*last) *counter = 0;
  }
  __syncthreads();
  return *last != 0;
}

// grid: (tiles of rows, tiles of outputs, blocks that share a tile). Tiles of experts are not
// shared.
template <class T, Codes codes, class Shape, class Work>
__global__ void __launch_bounds__(Shape::threads, 1)
    multiply_tile(Numbers out, Numbers x, Matrix weight, int slices, int slice_stages,
                  int num_stages, Partials partials, Work work) {
  using S = Stage<codes, Shape>;
  const int ahead = num_stages - 1;
  const int warp = computed_anew(static_cast<int>(warp_index()));
  const Part<Shape> part{warp % Shape::output_warps * (Shape::outputs / Shape::output_warps),
                         warp / Shape::output_warps * (Shape::rows / Shape::row_warps),
                         computed_anew(static_cast<int>(lane_index()))};
  int first_row = static_cast<int>(blockIdx.x) * Shape::rows;
  if (!work.begin(blockIdx.x, first_row, out, x, weight)) return;
  const int first_output = static_cast<int>(blockIdx.y) * Shape::outputs;
  const int tile = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
  const int share = Shape::may_be_shared ? static_cast<int>(blockIdx.z) : 0;
  const int shares = Shape::may_be_shared ? static_cast<int>(gridDim.z) : 1;
  const auto first_slice = [&](int of_share) { return ceil_div(of_share * slices, shares); };
  int slice = first_slice(share);
  const int second = first_slice(1);
  int stage = slice * slice_stages;
  const int first_piece = stage * kUnitBytes;  // times the pieces of a stage
  const int end = smaller(first_slice(share + 1) * slice_stages, ceil_div(weight.units, S::units));
  const int row_bytes = static_cast<int>(weight.row_bytes);
  const int x_bytes = static_cast<int>(x.stride * sizeof(T));
  RowCopier<S::units, Shape::outputs, Shape::threads> codes_copier(
      weight.row(first_output) + S::units * first_piece, row_bytes, weight.outputs - first_output,
      weight.units * kUnitBytes - S::units * first_piece);
  RowCopier<S::blocks, Shape::rows, Shape::threads> x_copier(
      static_cast<const unsigned char*>(x.data) + first_row * x.stride * sizeof(T) +
          S::blocks * first_piece,
      x_bytes, x.rows - first_row,
      weight.inputs * static_cast<int>(sizeof(T)) - S::blocks * first_piece);
  const auto begin_weights = [&](int of_stage, unsigned char* to) {
    if (of_stage >= end) return;
    codes_copier.copy(to);
    if constexpr (is_grouped(codes)) {
      const int first_scale_of = first_scale<codes>(weight, of_stage * S::units);
      unsigned char* tables = to + S::weight_bytes + S::x_bytes;
      copy_scales<Shape>(tables, weight.scales, weight, first_output, first_scale_of);
      if (weight.zeros)
        copy_scales<Shape>(tables + S::scale_bytes, weight.zeros, weight, first_output,
                           first_scale_of);
    }
  };
  const auto begin_x = [&](int of_stage, unsigned char* to) {
    if (of_stage < end) x_copier.copy(to + S::weight_bytes);
    async_commit();
  };

  unsigned char* memory = shared_memory();
  let_next_kernel_start();
  for (int i = 0; i < ahead; ++i) begin_weights(stage + i, memory + i * S::bytes);
  wait_for_previous_kernel();
  for (int i = 0; i < ahead; ++i) begin_x(stage + i, memory + i * S::bytes);

  Sums<Shape> sums = {}, total = {};
  const int last = ahead * S::bytes;  // where the last stage lies
  const auto next = [&](int place) { return place == last ? 0 : place + S::bytes; };
  int read = 0, fill = last;
  for (int left = slice_stages; stage < end; ++stage) {
    if (num_stages == S::most)
      async_wait<S::most - 2>();
    else
      async_wait<S::fewest - 2>();
    __syncthreads();
    begin_weights(stage + ahead, memory + fill);
    begin_x(stage + ahead, memory + fill);
    const auto multiply = [&](auto has_zeros) {
      multiply_stage<T, codes, has_zeros.value>(sums, memory + read, part, weight,
                                                stage * S::units);
    };
    if (codes >= Codes::int4 && weight.zeros)
      multiply(std::bool_constant<(codes >= Codes::int4)>{});
    else
      multiply(std::false_type{});
    read = next(read), fill = next(fill);
    if (--left > 0 && stage + 1 < end) continue;
    left = slice_stages;
    ++slice;
    // The first share's slices need no places of their own: nothing comes before them.
    const bool leaves = shares > 1 && (share > 0 || slice == second);
    end_slice<Shape>(total, sums,
                     leaves ? place_of_sums<Shape>(partials, tile, slices, slice - 1) : nullptr);
  }
  async_wait<0>();
  __syncthreads();  // before shared memory has another use, and after all sums have been left
  if (shares > 1) {
    if (!arrives_last(partials.counters + tile)) return;
    add_shares<Shape>(total, partials, tile, second - 1, slices);
  }
  write_tile<Shape>(out, weight, total, part, first_output, first_row);
}

// Blocks that share a tile: none where there are tiles for more than half of the processors. A
// slice's sums cost a third of its products: no more blocks than processors.
template <class Shape>
int blocks_a_tile(int tiles, int slices, int processors) {
  constexpr int kMostSharedTiles = static_cast<int>(kCounterBytes / sizeof(std::int32_t));
  if (!Shape::may_be_shared || 2 * tiles > processors || tiles > kMostSharedTiles) return 1;
  return smaller(slices, processors / tiles);
}

template <class T, Codes codes, class Shape>
void run_tiles(Stream& stream, View out, View x, const Matrix& weight, const Partials& partials) {
  using S = Stage<codes, Shape>;
  const int row_tiles = ceil_div(static_cast<int>(x.rows), Shape::rows);
  const int output_tiles = ceil_div(weight.outputs, Shape::outputs);
  const int slices = num_slices(weight.inputs);
  const int shares =
      blocks_a_tile<Shape>(row_tiles * output_tiles, slices, stream.num_processors());
  const int num_stages = S::count(stream);
  const LaunchShape shape{dims(row_tiles, output_tiles, shares), Shape::threads,
                          static_cast<std::size_t>(num_stages) * S::bytes,
                          !weight.computed};  // it reads weights before it waits
  launch(stream, "multiply_tile", shape, multiply_tile<T, codes, Shape, AllRows>, numbers_of(out),
         numbers_of(x), weight, slices, slice_inputs(weight.inputs) / (S::blocks * kBlock),
         num_stages, partials, AllRows{});
}

// The tile for so many rows. More than 64: large ones where they fit and are enough for most of the
// processors; else medium ones, whose weights are read again for every 64 rows, but from the second
// cache: products of so few tiles are of small matrices. Blocks that share large tiles would leave
// as many sums, and the last of each would take twice as long to add them.
template <class T, Codes codes>
void run_rows(Stream& stream, View out, View x, const Matrix& weight, const Partials& partials) {
  const auto rows = static_cast<int>(x.rows);
  const auto run = [&](auto shape) {
    run_tiles<T, codes, decltype(shape)>(stream, out, x, weight, partials);
  };
  const auto fits = [&](auto shape) { return Stage<codes, decltype(shape)>::fits(stream); };
  using Large = LargeTile<codes>;
  const int row_tiles = ceil_div(rows, Large::rows);
  if (rows <= SmallTile::rows) return run(SmallTile{});
  if constexpr (is_quantized(codes)) {
    if (rows <= HalfTile::rows) return run(HalfTile{});
  }
  if (rows <= MediumTile::rows || !fits(WideTile{}) ||
      2 * row_tiles * ceil_div(weight.outputs, Large::outputs) <= stream.num_processors())
    run(MediumTile{});
  else if (ceil_div(rows, WideTile::rows) == row_tiles || !fits(Large{}))
    run(WideTile{});
  else
    run(Large{});
}

// Of quantized weights. (multiply_tiles_quantized.cu)
void multiply_quantized_tiles(Stream& stream, View out, View x, const Matrix& weight,
                              const Partials& partials);

}  // namespace octavo::cuda

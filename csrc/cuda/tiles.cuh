// out = x weight^T + bias by tiles: any number of rows.
//
// A block makes a tile of Shape::rows x Shape::outputs. Stages of weights and activations come into
// shared memory by cp.async, up to three stages ahead of the products. Both lie there in pieces of
// 64 bytes a row and unit (weights, still as codes) or block (x), the rows of odd units in swapped
// pairs: so the 16 bytes that a lane needs (fragments.cuh) are read without bank conflicts by plain
// 16-byte loads, 8 lanes at a time from 128 neighbouring bytes, and neither ldmatrix nor a swizzle
// is needed. Each warp makes outputs / output_warps x rows / row_warps of the tile.
//
// Where the tiles are too few for the processors, gridDim.z blocks share one: each takes a share
// of the slices and leaves every slice's sum in memory, and the last to arrive adds them in
// ascending order. So the sums' bits depend neither on the number of blocks nor on the tile.
//
// Moves the weights once for every Shape::rows rows and x once for every Shape::outputs outputs
// (from the second cache: the rows' tiles are neighbours in the grid), and of shared tiles 8 bytes
// a sum and slice.
//
//   rows outputs warps  for
//    16     64     4    9 to 16 rows: decoding; 24 KB of bf16 weights in flight a block, 4 blocks a
//                       processor
//    32    128     4    17 to 32 rows of quantized weights: 24 KB in flight, 2 blocks
//    64    128   4, 8   17 to 64 rows: 48 KB in flight (bf16), 24 KB (int8, int4), 1 to 2 blocks.
//                       x from shared memory is 2 times (bf16) to 8 times (int4) what the weights
//                       are: for 64 rows of int4 it is the products that bound, not the memory
//   128    128     8    more rows: 128 KB of shared memory, warps of 64 x 32
//
// (Little's law asks for 29 KB a processor of an H200, 15 of an A100: multiply_few.cu.)
#pragma once

#include "cuda/fragments.cuh"
#include "cuda/launch.cuh"
#include "cuda/multiply.h"

namespace octavo::cuda {

template <int rows_, int outputs_, int row_warps_, int output_warps_, int blocks_>
struct TileShape {
  static constexpr int rows = rows_, outputs = outputs_;
  static constexpr int row_warps = row_warps_, output_warps = output_warps_;
  static constexpr int threads = row_warps * output_warps * 32;
  static constexpr int blocks = blocks_;  // on a processor, as far as registers go
  static constexpr int stages = 4;
};
using SmallTile = TileShape<16, 64, 1, 4, 4>;
using HalfTile = TileShape<32, 128, 1, 4, 2>;
// int8 codes become numbers once, in one warp; int4 ones twice, or the registers would not do.
template <Codes codes>
using MediumTile =
    TileShape<64, 128, codes == Codes::int8 ? 1 : 2, 4, codes >= Codes::int4 ? 1 : 2>;
using LargeTile = TileShape<128, 128, 2, 4, 1>;

// What a stage holds.
template <Codes codes, class Shape>
struct Stage {
  static constexpr int units = codes < Codes::int8 ? 2 : 1;
  static constexpr int blocks = units * blocks_per_unit(codes);
  static constexpr int weight_bytes = units * Shape::outputs * kUnitBytes;
  static constexpr int x_bytes = blocks * Shape::rows * kUnitBytes;
  // int4: the 16 bytes of each output's scales that hold those of the unit, and as many of zeros.
  static constexpr int scale_bytes = codes < Codes::int4 ? 0 : 16 * Shape::outputs;
  static constexpr int bytes = weight_bytes + x_bytes + 2 * scale_bytes;
};

// Where row `row` of piece `piece` (a unit of weights, a block of x) begins, of `rows` rows.
OCTAVO_DEVICE int piece_offset(int piece, int row, int rows) {
  return (piece * rows + (row ^ (piece & 1))) * kUnitBytes;
}

// Begins to copy weights of a stage to `to`. from: the tile's first row; rows: how many there are.
template <Codes codes, class Shape>
OCTAVO_DEVICE void copy_weights(unsigned char* to, const unsigned char* from, int row_bytes,
                                int rows, int first_unit, int units) {
  constexpr int kUnits = Stage<codes, Shape>::units;
#pragma unroll
  for (int i = 0; i < Stage<codes, Shape>::weight_bytes / 16 / Shape::threads; ++i) {
    const int piece = static_cast<int>(threadIdx.x) + i * Shape::threads;
    const int quarter = piece % 4, unit = piece / 4 % kUnits, row = piece / (4 * kUnits);
    const bool valid = row < rows && first_unit + unit < units;
    const int offset = row * row_bytes + (first_unit + unit) * kUnitBytes + 16 * quarter;
    async_copy_16(to + piece_offset(unit, row, Shape::outputs) + 16 * quarter,
                  from + (valid ? offset : 0), valid);
  }
}

// The same of int4 scales or zero points. from: the tile's first row of them.
template <class Shape>
OCTAVO_DEVICE void copy_scales(unsigned char* to, const std::uint16_t* from, int scales_per_row,
                               int rows, int first) {
#pragma unroll
  for (int row = static_cast<int>(threadIdx.x); row < Shape::outputs; row += Shape::threads) {
    const bool valid = row < rows;
    async_copy_16(to + 16 * row, from + (valid ? row * scales_per_row + first / 8 * 8 : 0), valid);
  }
}

// The same of x. from: the tile's first row of `inputs` numbers.
template <class T, Codes codes, class Shape>
OCTAVO_DEVICE void copy_x(unsigned char* to, const T* from, int stride, int rows, int first_input,
                          int inputs) {
  constexpr int kBlocks = Stage<codes, Shape>::blocks;
  constexpr int kPieces = kBlocks * Shape::rows * 4;
#pragma unroll
  for (int i = 0; i < kPieces / Shape::threads; ++i) {
    const int piece = static_cast<int>(threadIdx.x) + i * Shape::threads;
    const int quarter = piece % 4, block = piece / 4 % kBlocks, row = piece / (4 * kBlocks);
    const int input = first_input + block * kBlock + 8 * quarter;
    const bool valid = row < rows && input < inputs;
    async_copy_16(to + piece_offset(block, row, Shape::rows) + 16 * quarter,
                  from + (valid ? row * stride + input : 0), valid);
  }
  static_assert(kPieces % Shape::threads == 0, "every thread copies as much");
}

// A warp's part of a tile: its own outputs and rows.
template <class Shape>
struct Part {
  static constexpr int outputs = Shape::outputs / Shape::output_warps / 16;  // times 16
  static constexpr int rows = Shape::rows / Shape::row_warps / 8;            // times 8
  int first_output, first_row;                                               // in the tile
};

template <class Shape>
using Sums = float[Part<Shape>::outputs][Part<Shape>::rows][4];

// sums += the products of a stage, whose first unit is first_unit.
template <class T, Codes codes, class Shape>
OCTAVO_DEVICE void multiply_stage(Sums<Shape>& sums, const unsigned char* stage,
                                  const Part<Shape>& part, const Matrix& weight, int first_unit) {
  using S = Stage<codes, Shape>;
  const int lane = static_cast<int>(lane_index()), g = lane / 4, t = lane % 4;
  const unsigned char* xs = stage + S::weight_bytes;
  const unsigned char* all_scales = xs + S::x_bytes + first_scale(weight, first_unit) % 8 * 2;
  const auto scales_of = [&](const unsigned char* rows, int row, int block) {
    return load_scale_pair(reinterpret_cast<const std::uint16_t*>(rows + 16 * row), weight,
                           block / 2);
  };
#pragma unroll
  for (int unit = 0; unit < S::units; ++unit) {
    uint4 bytes[Part<Shape>::outputs][2];
#pragma unroll
    for (int block = 0; block < blocks_per_unit(codes); ++block) {
      std::uint32_t pairs[Part<Shape>::outputs][2][4];
      float scales[Part<Shape>::outputs][2];
#pragma unroll
      for (int i = 0; i < Part<Shape>::outputs; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = part.first_output + 16 * i + 8 * half + g;
          if (block == 0)
            bytes[i][half] = load_16(stage + piece_offset(unit, row, Shape::outputs) + 16 * t);
          std::uint32_t offset = kNoZeros<T, codes>;
          if constexpr (codes >= Codes::int4) {
            const std::uint32_t pair = scales_of(all_scales, row, block);
            scales[i][half] = weight.scale_dtype == DType::bf16 ? scale_of<Bf16>(pair, block)
                                                                : scale_of<F16>(pair, block);
            if (weight.zeros)
              offset =
                  offsets_of<T, codes>(scales_of(all_scales + S::scale_bytes, row, block), block);
          }
          numbers_of_block<T, codes>(pairs[i][half], bytes[i][half], block, offset, weight.levels);
        }
      }
      const int piece = unit * blocks_per_unit(codes) + block;
#pragma unroll
      for (int j = 0; j < Part<Shape>::rows; ++j) {
        const int row = part.first_row + 8 * j + g;
        const uint4 x = load_16(xs + piece_offset(piece, row, Shape::rows) + 16 * t);
#pragma unroll
        for (int i = 0; i < Part<Shape>::outputs; ++i) {
          if constexpr (codes >= Codes::int4)
            multiply_scaled<T>(sums[i][j], pairs[i][0], pairs[i][1], x, scales[i][0], scales[i][1]);
          else
            multiply_block<T>(sums[i][j], pairs[i][0], pairs[i][1], x);
        }
      }
    }
  }
}

// Where the sums of a slice of a shared tile lie: thread by thread, four of each at a time.
template <class Shape>
OCTAVO_DEVICE long long place_of_sums(int tile, int slices, int slice) {
  return (static_cast<long long>(tile) * slices + slice) * Part<Shape>::outputs *
         Part<Shape>::rows * Shape::threads;
}

// total += sums, sums = 0. left, where not null: a place for the sums.
template <class Shape>
OCTAVO_DEVICE void end_slice(Sums<Shape>& total, Sums<Shape>& sums, uint4* left) {
#pragma unroll
  for (int i = 0; i < Part<Shape>::outputs; ++i) {
#pragma unroll
    for (int j = 0; j < Part<Shape>::rows; ++j) {
      if (left) left[(i * Part<Shape>::rows + j) * Shape::threads] = bits_as<uint4>(sums[i][j]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        total[i][j][k] = add_rn(total[i][j][k], sums[i][j][k]);
        sums[i][j][k] = 0.0f;
      }
    }
  }
}

// total = the sum of what all blocks left of a tile, slices in ascending order.
template <class Shape>
OCTAVO_DEVICE void add_shares(Sums<Shape>& total, const uint4* left, int tile, int slices) {
  for (int slice = 0; slice < slices; ++slice) {
    const uint4* from = left + place_of_sums<Shape>(tile, slices, slice);
#pragma unroll
    for (int i = 0; i < Part<Shape>::outputs; ++i) {
#pragma unroll
      for (int j = 0; j < Part<Shape>::rows; ++j) {
        const uint4 quad = from[(i * Part<Shape>::rows + j) * Shape::threads];
        const float four[4] = {bits_as<float>(quad.x), bits_as<float>(quad.y),
                               bits_as<float>(quad.z), bits_as<float>(quad.w)};
#pragma unroll
        for (int k = 0; k < 4; ++k)
          total[i][j][k] = add_rn(slice == 0 ? 0.0f : total[i][j][k], four[k]);
      }
    }
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
#pragma unroll
  for (int i = 0; i < Part<Shape>::outputs; ++i) {
#pragma unroll
    for (int j = 0; j < Part<Shape>::rows; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = part.first_row + 8 * j + 2 * (lane % 4) + k % 2;
        const int output = part.first_output + 16 * i + k / 2 * 8 + lane / 4;
        tile[row * kPitch + output] = total[i][j][k];
      }
    }
  }
  __syncthreads();
  constexpr int kPairs = Shape::outputs / 2;
  const int rows = smaller(Shape::rows, out.rows - first_row);
  for (int i = static_cast<int>(threadIdx.x); i < rows * kPairs; i += Shape::threads) {
    const int row = i / kPairs, output = i % kPairs * 2;
    const float* two = tile + row * kPitch + output;
    write_pair(out, weight, first_row + row, first_output + output, two[0], two[1]);
  }
}

// The last of the blocks that share a tile: true for all of its threads.
OCTAVO_DEVICE bool arrives_last(std::int32_t* counter) {
  auto* last = reinterpret_cast<int*>(shared_memory());
  fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int before = atomic_add(counter, 1);
    *last = before == static_cast<int>(gridDim.z) - 1;
    if (*last) *counter = 0;
  }
  __syncthreads();
  fence();
  return *last != 0;
}

// grid: (tiles of rows, tiles of outputs, blocks that share a tile)
template <class T, Codes codes, class Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    multiply_tile(Numbers out, Numbers x, Matrix weight, int slices, int slice_stages,
                  Partials partials) {
  using S = Stage<codes, Shape>;
  constexpr int kAhead = Shape::stages - 1;
  const int warp = static_cast<int>(warp_index());
  const Part<Shape> part{warp % Shape::output_warps * (Shape::outputs / Shape::output_warps),
                         warp / Shape::output_warps * (Shape::rows / Shape::row_warps)};
  const int first_row = static_cast<int>(blockIdx.x) * Shape::rows;
  const int first_output = static_cast<int>(blockIdx.y) * Shape::outputs;
  const int tile = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
  const int share = static_cast<int>(blockIdx.z), shares = static_cast<int>(gridDim.z);
  int slice = share * slices / shares;
  const int first = slice * slice_stages;
  const int end =
      smaller((share + 1) * slices / shares * slice_stages, ceil_div(weight.units, S::units));
  unsigned char* memory = shared_memory();
  const auto buffer = [&](int stage) {
    return memory + (stage - first) % Shape::stages * S::bytes;
  };
  const int outputs = weight.outputs - first_output;  // from here on
  const unsigned char* codes_of_tile = weight.row(first_output);
  const long long scale_offset = static_cast<long long>(first_output) * weight.scales_per_row;
  const auto begin_weights = [&](int stage) {
    if (stage >= end) return;
    copy_weights<codes, Shape>(buffer(stage), codes_of_tile, static_cast<int>(weight.row_bytes),
                               outputs, stage * S::units, weight.units);
    if constexpr (codes >= Codes::int4) {
      const auto copy = [&](const void* table, int at) {
        copy_scales<Shape>(buffer(stage) + at,
                           static_cast<const std::uint16_t*>(table) + scale_offset,
                           weight.scales_per_row, outputs, first_scale(weight, stage * S::units));
      };
      copy(weight.scales, S::weight_bytes + S::x_bytes);
      if (weight.zeros) copy(weight.zeros, S::weight_bytes + S::x_bytes + S::scale_bytes);
    }
  };
  const T* rows_of_tile = static_cast<const T*>(x.data) + first_row * x.stride;
  const auto begin_x = [&](int stage) {
    if (stage < end)
      copy_x<T, codes, Shape>(buffer(stage) + S::weight_bytes, rows_of_tile,
                              static_cast<int>(x.stride), x.rows - first_row,
                              stage * S::blocks * kBlock, weight.inputs);
    async_commit();
  };

  let_next_kernel_start();
  for (int i = 0; i < kAhead; ++i) begin_weights(first + i);
  wait_for_previous_kernel();
  for (int i = 0; i < kAhead; ++i) begin_x(first + i);

  Sums<Shape> sums = {}, total = {};
  uint4* left = reinterpret_cast<uint4*>(partials.sums) + threadIdx.x;
  for (int stage = first; stage < end; ++stage) {
    async_wait<kAhead - 1>();
    __syncthreads();
    begin_weights(stage + kAhead);
    begin_x(stage + kAhead);
    multiply_stage<T, codes, Shape>(sums, buffer(stage), part, weight, stage * S::units);
    if (stage + 1 < end && (stage + 1) % slice_stages != 0) continue;
    end_slice<Shape>(total, sums,
                     shares > 1 ? left + place_of_sums<Shape>(tile, slices, slice) : nullptr);
    ++slice;
  }
  async_wait<0>();
  __syncthreads();  // before shared memory has another use
  if (shares > 1) {
    if (!arrives_last(partials.counters + tile)) return;
    add_shares<Shape>(total, left, tile, slices);
  }
  write_tile<Shape>(out, weight, total, part, first_output, first_row);
}

// Blocks that share a tile: none where there are tiles for more than half of the processors.
inline int blocks_a_tile(int tiles, int slices, int processors) {
  constexpr int kMostSharedTiles = static_cast<int>(kCounterBytes / sizeof(std::int32_t));
  if (2 * tiles > processors || tiles > kMostSharedTiles) return 1;
  return smaller(slices, 2 * processors / tiles);
}

template <class T, Codes codes, class Shape>
void run_tiles(Stream& stream, View out, View x, const Matrix& weight, const Partials& partials) {
  using S = Stage<codes, Shape>;
  const int row_tiles = ceil_div(static_cast<int>(x.rows), Shape::rows);
  const int output_tiles = ceil_div(weight.outputs, Shape::outputs);
  const int slices = num_slices(weight.inputs);
  const int shares = blocks_a_tile(row_tiles * output_tiles, slices, stream.num_processors());
  LaunchShape shape{dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(output_tiles),
                         static_cast<unsigned>(shares)),
                    dim3(Shape::threads), static_cast<std::size_t>(Shape::stages) * S::bytes};
  shape.overlaps = true;
  launch(stream, "multiply_tile", shape, multiply_tile<T, codes, Shape>, numbers_of(out),
         numbers_of(x), weight, slices, slice_inputs(weight.inputs) / (S::blocks * kBlock),
         partials);
}

// Of quantized weights, up to 64 rows. (multiply_tiles_quantized.cu)
void multiply_quantized_tiles(Stream& stream, View out, View x, const Matrix& weight,
                              const Partials& partials);

}  // namespace octavo::cuda

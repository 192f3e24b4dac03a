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
// of the slices and leaves every slice's sum in memory (the first one of all its slices), and the
// last to arrive adds them in ascending order. So the sums' bits depend neither on the number of
// blocks nor on the tile. One thread of a block tells the others', and hears of theirs.
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
//                       are: for 64 rows of int4 it is the products that bound, not the memory.
//                       More rows of small matrices
//    96    128     8    65 to 96 and 129 to 192 rows, warps of 48 x 32
//   128    128     8    more rows: 96 to 132 KB of shared memory, warps of 64 x 32. A block moves
//                       512 (bf16), 384 (int8) or 320 bytes (int4) for 16384 products of each
//                       input: the second cache, at 5.5 TB/s, bounds as the tensor cores do
//
// (Little's law asks for 29 KB a processor of an H200, 15 of an A100: multiply_few.cuh.)
#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/products/experts.cuh"
#include "cuda/products/fragments.cuh"
#include "cuda/products/multiply.h"

namespace octavo::cuda {

template <int rows_, int outputs_, int row_warps_, int output_warps_, int blocks_>
struct TileShape {
  static constexpr int rows = rows_, outputs = outputs_;
  static constexpr int row_warps = row_warps_, output_warps = output_warps_;
  static constexpr int threads = row_warps * output_warps * 32;
  static constexpr int blocks = blocks_;             // on a processor, as far as registers go
  static constexpr bool may_be_shared = rows <= 64;  // see run_rows
};
using SmallTile = TileShape<16, 64, 1, 4, 4>;
using HalfTile = TileShape<32, 128, 1, 4, 2>;
// int8 codes become numbers once, in one warp; int4 ones twice, or the registers would not do.
template <Codes codes>
using MediumTile = TileShape<64, 128, has_bytes(codes) ? 1 : 2, 4, is_grouped(codes) ? 1 : 2>;
using WideTile = TileShape<96, 128, 2, 4, 1>;
// Levels leave registers for no more than 96 rows.
template <Codes codes>
using LargeTile = TileShape<codes == Codes::int4_levels ? 96 : 128, 128, 2, 4, 1>;

// What a stage holds.
template <Codes codes, class Shape>
struct Stage {
  static constexpr int units = is_quantized(codes) ? 1 : 2;
  static constexpr int blocks = units * blocks_per_unit(codes);
  static constexpr int weight_bytes = units * Shape::outputs * kUnitBytes;
  static constexpr int x_bytes = blocks * Shape::rows * kUnitBytes;
  // Groups: the 16 bytes of each output's scales that hold those of the unit, and as many of zeros.
  static constexpr int scale_bytes = is_grouped(codes) ? 16 * Shape::outputs : 0;
  static constexpr int bytes = weight_bytes + x_bytes + 2 * scale_bytes;
  // How many there are: four, or what an A100 has room for.
  static constexpr int count = 4 * bytes <= 160 * 1024 ? 4 : 3;
  static constexpr int sums_bytes = Shape::rows * (Shape::outputs + 4) * 4;  // see write_tile
  static_assert(sums_bytes <= count * bytes, "the tile's sums take the stages' place");
};

// Where row `row` of piece `piece` (a unit of weights, a block of x) begins, of `rows` rows.
OCTAVO_DEVICE int piece_offset(int piece, int row, int rows) {
  return (piece * rows + (row ^ (piece & 1))) * kUnitBytes;
}

// Begins to copy `pieces` (compile-time) pieces of `all` rows to `to`. from: the first piece of the
// first of `rows` rows, `row_bytes` apart; bytes: how many there are of each row from there on.
template <int pieces, int all, int threads>
OCTAVO_DEVICE void copy_pieces(unsigned char* to, const unsigned char* from, int row_bytes,
                               int rows, int bytes) {
  constexpr int kStep = threads / (4 * pieces);  // rows that the threads copy at a time
  static_assert(kStep % 2 == 0 && all % kStep == 0, "every thread copies as much, of one piece");
  const int thread = computed_anew(static_cast<int>(threadIdx.x));
  const int first = thread / (4 * pieces), at = thread % (4 * pieces) * 16;
  to += piece_offset(at / kUnitBytes, first, all) + at % kUnitBytes;
  const int offset = first * row_bytes + at;
#pragma unroll
  for (int row = 0; row < all; row += kStep) {
    const bool valid = first + row < rows && at < bytes;
    async_copy_16(to + row * kUnitBytes, from + (valid ? offset + row * row_bytes : 0), valid);
  }
}

// The same of scales or zero points, 16 bytes a row. from: the tile's first row of them.
template <class Shape>
OCTAVO_DEVICE void copy_scales(unsigned char* to, const std::uint16_t* from, int scales_per_row,
                               int rows, int first) {
#pragma unroll
  for (int row = computed_anew(static_cast<int>(threadIdx.x)); row < Shape::outputs;
       row += Shape::threads) {
    const bool valid = row < rows;
    async_copy_16(to + 16 * row, from + (valid ? row * scales_per_row + first / 8 * 8 : 0), valid);
  }
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

// Calls body(i, j) for the four sums of each 16 outputs and 8 rows.
template <class Shape, class Body>
OCTAVO_DEVICE void for_each_quad(Body&& body) {
#pragma unroll
  for (int i = 0; i < Part<Shape>::outputs; ++i) {
#pragma unroll
    for (int j = 0; j < Part<Shape>::rows; ++j) body(i, j);
  }
}

// sums += the products of a stage, whose first unit is first_unit.
template <class T, Codes codes, class Shape>
OCTAVO_DEVICE void multiply_stage(Sums<Shape>& sums, const unsigned char* stage,
                                  const Part<Shape>& part, const Matrix& weight, int first_unit) {
  using S = Stage<codes, Shape>;
  const int lane = static_cast<int>(lane_index()), g = lane / 4, t = lane % 4;
  const unsigned char* xs = stage + S::weight_bytes;
  const int first = first_scale<codes>(weight, first_unit) % 8;
  // A scale or zero point of a block; whatever the size of groups, one load and no branch.
  const auto scale_at = [&](const unsigned char* rows, int row, int block) -> std::uint32_t {
    return reinterpret_cast<const std::uint16_t*>(rows +
                                                  16 * row)[first + (block >> weight.scale_shift)];
  };
#pragma unroll
  for (int unit = 0; unit < S::units; ++unit) {
    uint4 bytes[Part<Shape>::outputs][2];
#pragma unroll
    for (int block = 0; block < blocks_per_unit(codes); ++block) {
      std::uint32_t pairs[Part<Shape>::outputs][2][4];
      float scales[Part<Shape>::outputs][2];
      const auto for_each = [&](const auto& body) {
#pragma unroll
        for (int i = 0; i < Part<Shape>::outputs; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            body(i, half, part.first_output + 16 * i + 8 * half + g);
        }
      };
      std::uint32_t offsets[Part<Shape>::outputs][2];
      for_each([&](int i, int half, int) { offsets[i][half] = kNoZeros<T, codes>; });
      if (codes >= Codes::int4 && weight.zeros) {
        for_each([&](int i, int half, int row) {
          const std::uint32_t zero = scale_at(xs + S::x_bytes + S::scale_bytes, row, block);
          offsets[i][half] = offsets_of<T, codes>(zero, 0);
        });
      }
      for_each([&](int i, int half, int row) {
        if (block == 0)
          bytes[i][half] = load_16(stage + piece_offset(unit, row, Shape::outputs) + 16 * t);
        if constexpr (is_grouped(codes)) {
          const std::uint32_t scale = scale_at(xs + S::x_bytes, row, block);
          scales[i][half] = weight.scale_dtype == DType::bf16 ? scale_of<Bf16>(scale, 0)
                                                              : scale_of<F16>(scale, 0);
        }
        numbers_of_block<T, codes>(pairs[i][half], bytes[i][half], block, offsets[i][half],
                                   weight.levels);
      });
      const int piece = unit * blocks_per_unit(codes) + block;
#pragma unroll
      for (int j = 0; j < Part<Shape>::rows; ++j) {
        const int row = part.first_row + 8 * j + g;
        const uint4 x = load_16(xs + piece_offset(piece, row, Shape::rows) + 16 * t);
#pragma unroll
        for (int i = 0; i < Part<Shape>::outputs; ++i) {
          if constexpr (is_grouped(codes))
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
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    multiply_tile(Numbers out, Numbers x, Matrix weight, int slices, int slice_stages,
                  Partials partials, Work work) {
  using S = Stage<codes, Shape>;
  constexpr int kAhead = S::count - 1;
  const int warp = static_cast<int>(warp_index());
  const Part<Shape> part{warp % Shape::output_warps * (Shape::outputs / Shape::output_warps),
                         warp / Shape::output_warps * (Shape::rows / Shape::row_warps)};
  int first_row = static_cast<int>(blockIdx.x) * Shape::rows;
  if (!work.begin(blockIdx.x, first_row, out, x, weight)) return;
  const int first_output = static_cast<int>(blockIdx.y) * Shape::outputs;
  const int tile = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
  const int share = Shape::may_be_shared ? static_cast<int>(blockIdx.z) : 0;
  const int shares = Shape::may_be_shared ? static_cast<int>(gridDim.z) : 1;
  const auto first_slice = [&](int of_share) { return ceil_div(of_share * slices, shares); };
  int slice = first_slice(share);
  const int first = slice * slice_stages;
  const int end = smaller(first_slice(share + 1) * slice_stages, ceil_div(weight.units, S::units));
  unsigned char* memory = shared_memory();
  const auto buffer = [&](int stage) { return memory + (stage - first) % S::count * S::bytes; };
  const int outputs = weight.outputs - first_output;  // from here on
  const unsigned char* codes_of_tile = weight.row(first_output);
  const long long scale_offset = static_cast<long long>(first_output) * weight.scales_per_row;
  const auto begin_weights = [&](int stage) {
    if (stage >= end) return;
    const int at = stage * S::units * kUnitBytes;
    copy_pieces<S::units, Shape::outputs, Shape::threads>(buffer(stage), codes_of_tile + at,
                                                          static_cast<int>(weight.row_bytes),
                                                          outputs, weight.units * kUnitBytes - at);
    if constexpr (is_grouped(codes)) {
      const auto copy = [&](const void* table, int at) {
        copy_scales<Shape>(
            buffer(stage) + at, static_cast<const std::uint16_t*>(table) + scale_offset,
            weight.scales_per_row, outputs, first_scale<codes>(weight, stage * S::units));
      };
      copy(weight.scales, S::weight_bytes + S::x_bytes);
      if (weight.zeros) copy(weight.zeros, S::weight_bytes + S::x_bytes + S::scale_bytes);
    }
  };
  const auto* rows_of_tile =
      static_cast<const unsigned char*>(x.data) + first_row * x.stride * sizeof(T);
  const auto begin_x = [&](int stage) {
    const int at = stage * S::blocks * kUnitBytes;
    if (stage < end)
      copy_pieces<S::blocks, Shape::rows, Shape::threads>(
          buffer(stage) + S::weight_bytes, rows_of_tile + at,
          static_cast<int>(x.stride * sizeof(T)), x.rows - first_row,
          weight.inputs * static_cast<int>(sizeof(T)) - at);
    async_commit();
  };

  let_next_kernel_start();
  for (int i = 0; i < kAhead; ++i) begin_weights(first + i);
  wait_for_previous_kernel();
  for (int i = 0; i < kAhead; ++i) begin_x(first + i);

  Sums<Shape> sums = {}, total = {};
  for (int stage = first, left = slice_stages; stage < end; ++stage) {
    async_wait<kAhead - 1>();
    __syncthreads();
    begin_weights(stage + kAhead);
    begin_x(stage + kAhead);
    multiply_stage<T, codes, Shape>(sums, buffer(stage), part, weight, stage * S::units);
    if (--left > 0 && stage + 1 < end) continue;
    left = slice_stages;
    ++slice;
    // The first share's slices need no places of their own: nothing comes before them.
    const bool leaves = shares > 1 && (share > 0 || slice == first_slice(1));
    end_slice<Shape>(total, sums,
                     leaves ? place_of_sums<Shape>(partials, tile, slices, slice - 1) : nullptr);
  }
  async_wait<0>();
  __syncthreads();  // before shared memory has another use, and after all sums have been left
  if (shares > 1) {
    if (!arrives_last(partials.counters + tile)) return;
    add_shares<Shape>(total, partials, tile, first_slice(1) - 1, slices);
  }
  write_tile<Shape>(out, weight, total, part, first_output, first_row);
}

// Blocks that share a tile: none where there are tiles for more than half of the processors. Of 64
// rows a slice's sums cost a third of its products: no more blocks than processors.
template <class Shape>
int blocks_a_tile(int tiles, int slices, int processors) {
  constexpr int kMostSharedTiles = static_cast<int>(kCounterBytes / sizeof(std::int32_t));
  if (!Shape::may_be_shared || 2 * tiles > processors || tiles > kMostSharedTiles) return 1;
  return smaller(slices, (Shape::rows < 64 ? 2 : 1) * processors / tiles);
}

template <class T, Codes codes, class Shape>
void run_tiles(Stream& stream, View out, View x, const Matrix& weight, const Partials& partials) {
  using S = Stage<codes, Shape>;
  const int row_tiles = ceil_div(static_cast<int>(x.rows), Shape::rows);
  const int output_tiles = ceil_div(weight.outputs, Shape::outputs);
  const int slices = num_slices(weight.inputs);
  const int shares =
      blocks_a_tile<Shape>(row_tiles * output_tiles, slices, stream.num_processors());
  const LaunchShape shape{dims(row_tiles, output_tiles, shares), Shape::threads,
                          static_cast<std::size_t>(S::count) * S::bytes,
                          !weight.computed};  // it reads weights before it waits
  launch(stream, "multiply_tile", shape, multiply_tile<T, codes, Shape, AllRows>, numbers_of(out),
         numbers_of(x), weight, slices, slice_inputs(weight.inputs) / (S::blocks * kBlock),
         partials, AllRows{});
}

// The tile for so many rows. More than 64: large ones where they are enough for most of the
// processors; else medium ones, whose weights are read again for every 64 rows, but from the second
// cache: products of so few tiles are of small matrices. Blocks that share large tiles would leave
// as many sums, and the last of each would take twice as long to add them.
template <class T, Codes codes>
void run_rows(Stream& stream, View out, View x, const Matrix& weight, const Partials& partials) {
  const auto rows = static_cast<int>(x.rows);
  const auto run = [&](auto shape) {
    run_tiles<T, codes, decltype(shape)>(stream, out, x, weight, partials);
  };
  using Medium = MediumTile<codes>;
  using Large = LargeTile<codes>;
  const int row_tiles = ceil_div(rows, Large::rows);
  if (rows <= SmallTile::rows) return run(SmallTile{});
  if constexpr (is_quantized(codes)) {
    if (rows <= HalfTile::rows) return run(HalfTile{});
  }
  if (rows <= Medium::rows ||
      2 * row_tiles * ceil_div(weight.outputs, Large::outputs) <= stream.num_processors())
    run(Medium{});
  else if (ceil_div(rows, WideTile::rows) == row_tiles)
    run(WideTile{});
  else
    run(Large{});
}

// Of quantized weights. (multiply_tiles_quantized.cu)
void multiply_quantized_tiles(Stream& stream, View out, View x, const Matrix& weight,
                              const Partials& partials);

}  // namespace octavo::cuda

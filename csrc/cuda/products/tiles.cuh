// out = x weight^T + bias by tiles: any number of rows.
//
// A block makes a tile of Shape::rows x Shape::outputs. Stages of weights and activations come into
// shared memory by cp.async, up to four stages ahead of the products. Both lie there in pieces of
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

#include "cuda/device/launch.cuh"
#include "cuda/products/experts.cuh"
#include "cuda/products/fragments.cuh"
#include "cuda/products/multiply.h"

namespace octavo::cuda {

template <int rows_, int outputs_, int row_warps_, int output_warps_>
struct TileShape {
  static constexpr int rows = rows_, outputs = outputs_;
  static constexpr int row_warps = row_warps_, output_warps = output_warps_;
  static constexpr int threads = row_warps * output_warps * 32;
  static constexpr bool may_be_shared = rows <= 64;  // see run_rows
};
using SmallTile = TileShape<16, 128, 1, 8>;
using HalfTile = TileShape<32, 128, 1, 8>;
using MediumTile = TileShape<64, 128, 2, 4>;
using WideTile = TileShape<96, 128, 2, 4>;
// Levels leave registers for no more than 96 rows.
template <Codes codes>
using LargeTile = TileShape<codes == Codes::int4_levels ? 96 : 128, 128, 2, 4>;

// What a stage holds: 128 inputs.
template <Codes codes, class Shape>
struct Stage {
  static constexpr int blocks = 4;
  static constexpr int units = blocks / blocks_per_unit(codes);
  static constexpr int weight_bytes = units * Shape::outputs * kUnitBytes;
  static constexpr int x_bytes = blocks * Shape::rows * kUnitBytes;
  // Groups: the 16 bytes of each output's scales that hold those of the stage; as many of zeros.
  static constexpr int scale_bytes = is_grouped(codes) ? 16 * Shape::outputs : 0;
  static constexpr int bytes = weight_bytes + x_bytes + 2 * scale_bytes;
  // How many there are: five, or what an A100 has room for; two where a block may not have so much
  // shared memory (99 KiB on GPUs of 8.6, 8.9 and 12.0).
  static constexpr int room = 160 * 1024 / bytes;
  static constexpr int most = room < 5 ? room : 5, fewest = 2;
  static constexpr int sums_bytes = Shape::rows * (Shape::outputs + 4) * 4;  // see write_tile
  static_assert(sums_bytes <= fewest * bytes, "the tile's sums take the stages' place");

  static bool fits(const Stream& stream, std::size_t stages = fewest) {
    return stages * bytes <= stream.max_shared_bytes();
  }
  static int count(const Stream& stream) { return fits(stream, most) ? most : fewest; }
};

// Where row `row` of piece `piece` (a unit of weights, a block of x) begins, of `rows` rows.
OCTAVO_DEVICE int piece_offset(int piece, int row, int rows) {
  return (piece * rows + (row ^ (piece & 1))) * kUnitBytes;
}

// A thread's share of copying `all` rows of `pieces` pieces, stage by stage: chunks of 16 bytes of
// every kStep-th row. What does not change from stage to stage is computed once.
template <int pieces, int all, int threads>
class RowCopier {
 public:
  // from: the first piece of the first of `rows` rows, row_bytes apart; bytes: how many there are
  // of each row from there on. Rows that there are not are copies of the last one, since nothing
  // becomes of their sums; bytes that there are not are zeros.
  OCTAVO_DEVICE RowCopier(const unsigned char* from, int row_bytes, int rows, int bytes) {
    const int thread = static_cast<int>(threadIdx.x);
    const int first = thread / (4 * pieces), at = thread % (4 * pieces) * 16;
    from_ = from + at;
    left_ = bytes - at;
    to_ = piece_offset(at / kUnitBytes, first, all) + at % kUnitBytes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) offsets_[i] = smaller(first + i * kStep, rows - 1) * row_bytes;
  }
  // Begins to copy the next stage's.
  OCTAVO_DEVICE void copy(unsigned char* to) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      async_copy_16(to + to_ + i * kStep * kUnitBytes, from_ + offsets_[i], left_ > 0);
    from_ += pieces * kUnitBytes;
    left_ -= pieces * kUnitBytes;
  }

 private:
  static constexpr int kStep = threads / (4 * pieces);  // rows that the threads copy at a time
  static constexpr int kCount = all / kStep;
  static_assert(kStep % 2 == 0 && all % kStep == 0, "every thread copies as much, of one piece");
  const unsigned char* from_;
  int left_, to_, offsets_[kCount];
};

// The same of scales or zero points: the 16 bytes of each output that hold those of a stage.
template <class Shape>
OCTAVO_DEVICE void copy_scales(unsigned char* to, const void* table, const Matrix& weight,
                               int first_output, int first) {
  const int output = static_cast<int>(threadIdx.x);
  static_assert(Shape::outputs <= Shape::threads, "a thread copies those of one output");
  if (output >= Shape::outputs) return;
  const long long row = smaller(first_output + output, weight.outputs - 1);
  async_copy_16(to + 16 * output, static_cast<const std::uint16_t*>(table) +
                                      row * weight.scales_per_row + first / 8 * 8);
}

// A warp's part of a tile: its own outputs and rows.
template <class Shape>
struct Part {
  static constexpr int outputs = Shape::outputs / Shape::output_warps / 16;  // times 16
  static constexpr int rows = Shape::rows / Shape::row_warps / 8;            // times 8
  int first_output, first_row;                                               // in the tile
  int lane;
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

// Calls body(i, half, the output in the tile) for each of a lane's outputs.
template <class Shape, class Body>
OCTAVO_DEVICE void for_each_output(const Part<Shape>& part, Body&& body) {
#pragma unroll
  for (int i = 0; i < Part<Shape>::outputs; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      body(i, half, part.first_output + 16 * i + 8 * half + part.lane / 4);
  }
}

// sums += the products of a stage, whose first unit is first_unit.
template <class T, Codes codes, bool has_zeros, class Shape>
OCTAVO_DEVICE void multiply_stage(Sums<Shape>& sums, const unsigned char* stage,
                                  const Part<Shape>& part, const Matrix& weight, int first_unit) {
  using S = Stage<codes, Shape>;
  constexpr int kBlocks = blocks_per_unit(codes);
  const int g = part.lane / 4, t = part.lane % 4;
  const unsigned char* xs = stage + S::weight_bytes;
  uint4 bytes[Part<Shape>::outputs][2];
  uint2 scales[Part<Shape>::outputs][2], zeros[Part<Shape>::outputs][2];
  if constexpr (is_grouped(codes)) {
    const unsigned char* tables =
        xs + S::x_bytes + first_scale<codes>(weight, first_unit) % 8 / 4 * 8;
    for_each_output(part, [&](int i, int half, int output) {
      scales[i][half] = load_8(tables + 16 * output);
      if constexpr (has_zeros) zeros[i][half] = load_8(tables + S::scale_bytes + 16 * output);
    });
  }
#pragma unroll
  for (int block = 0; block < S::blocks; ++block) {
    const int unit = first_unit + block / kBlocks, of_unit = block % kBlocks;
    std::uint32_t pairs[Part<Shape>::outputs][2][4];
    float scale[Part<Shape>::outputs][2];
    for_each_output(part, [&](int i, int half, int output) {
      if (of_unit == 0) {
        const int at = piece_offset(block / kBlocks, output, Shape::outputs);
        bytes[i][half] = load_16(stage + at + 16 * t);
      }
      const auto pair_of = [&](uint2 raw) {
        return scale_pair_of<codes>(raw, weight, unit, of_unit / 2);
      };
      std::uint32_t offset = kNoZeros<T, codes>;
      if constexpr (has_zeros) offset = offsets_of<T, codes>(pair_of(zeros[i][half]), of_unit);
      if constexpr (is_grouped(codes)) {
        const std::uint32_t two = pair_of(scales[i][half]);
        // Both, since to choose one of them is less than a branch.
        const float of_bf16 = scale_of<Bf16>(two, of_unit), of_f16 = scale_of<F16>(two, of_unit);
        scale[i][half] = weight.scale_dtype == DType::bf16 ? of_bf16 : of_f16;
      }
      numbers_of_block<T, codes>(pairs[i][half], bytes[i][half], of_unit, offset, weight.levels);
    });
#pragma unroll
    for (int j = 0; j < Part<Shape>::rows; ++j) {
      const int row = part.first_row + 8 * j + g;
      const uint4 x = load_16(xs + piece_offset(block, row, Shape::rows) + 16 * t);
#pragma unroll
      for (int i = 0; i < Part<Shape>::outputs; ++i) {
        if constexpr (is_grouped(codes))
          multiply_scaled<T>(sums[i][j], pairs[i][0], pairs[i][1], x, scale[i][0], scale[i][1]);
        else
          multiply_block<T>(sums[i][j], pairs[i][0], pairs[i][1], x);
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

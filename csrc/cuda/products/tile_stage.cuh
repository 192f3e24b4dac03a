// The stages of a tile's products (tiles.cuh): how they come into shared memory, and how a warp
// multiplies one.
//
// Weights and activations lie there in pieces of 64 bytes a row and unit (weights, still as codes)
// or block (x), the rows of odd units in swapped pairs: so the 16 bytes that a lane needs
// (fragments.cuh) are read without bank conflicts by plain 16-byte loads, 8 lanes at a time from
// 128 neighbouring bytes, and neither ldmatrix nor a swizzle is needed.
#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/products/experts.cuh"
#include "cuda/products/fragments.cuh"

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

}  // namespace octavo::cuda

// How weight matrices lie in device memory: one layout for all kernels.
//
// A matrix (outputs, inputs) is kept output by output. A row is a sequence of units of 64 bytes,
// padded with zeros to whole units; a unit holds 32 inputs of 16 bits, 64 of 8 or 128 of 4, that
// is 1, 2 or 4 blocks of 32 inputs (float32 rows, which have no tensor core kernels, are plain rows
// with the same padding). In a warp lane 4 g + t takes bytes 16 t .. 16 t + 15 of a unit of row g,
// and finds in them inputs 8 t .. 8 t + 7 of every block of the unit:
//
//   16 bits: input i of the unit at number i
//   8 bits:  byte 16 t + 8 block + 4 (j / 4) + {0, 2, 1, 3}[j % 4], j = 0 .. 7
//   4 bits:  word 4 t + block, nibble j / 2 for an even j, 4 + j / 2 for an odd one
//
// so that one load of 16 bytes a lane gives operands of mma.m16n8k16 without any exchange, and the
// two numbers of a pair lie 16 bits apart, where a mask makes bf16 or f16 pairs of them. That the
// tensor core multiplies inputs in another order than they lie in makes no difference to it, since
// the activations are taken in the same order: see fragments.cuh.
//
// Scales: int8 has a float32 for each output. Formats in groups have for each output and group a
// bf16 where the format's scales are such, and else a float32 (with float32 activations) or an f16,
// which is what the files of such formats hold; rows of them are padded to 16 bytes. Where the
// format has zero points they lie in the same order, as bf16 of 8 + zero (with levels of their own:
// of the zero).
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "core/view.h"
#include "cuda/device/primitives.cuh"

namespace octavo::cuda {

constexpr int kBlock = 32;      // inputs
constexpr int kUnitBytes = 64;  // of a row

// What a weight is, as kernels tell formats apart; int8_grouped and what follows is in groups.
enum class Codes : int { f32, f16, bf16, int8, int8_grouped, int4, int4_levels };

struct Levels {  // int4_levels: what the 16 codes stand for
  std::uint32_t words[4];
};

// A packed matrix as kernels get it, by value.
struct Matrix {
  const unsigned char* data = nullptr;
  const void* scales = nullptr;          // of groups
  const void* zeros = nullptr;           // int4; null: none
  const float* output_scales = nullptr;  // int8; null: none
  const float* bias = nullptr;           // null: none
  long long row_bytes = 0;
  int outputs = 0;
  int inputs = 0;
  int units = 0;           // of a row
  int scale_shift = 0;     // log2 of the blocks that share a scale
  int scales_per_row = 0;  // of groups
  Codes codes = Codes::f32;
  DType scale_dtype = DType::f32;  // of groups
  Levels levels = {};
  bool computed = false;  // by the kernel before: not to be read before that has ended

  OCTAVO_HOST_DEVICE const unsigned char* row(int output) const {
    return data + output * row_bytes;
  }
};

OCTAVO_HOST_DEVICE constexpr bool is_quantized(Codes codes) { return codes >= Codes::int8; }
OCTAVO_HOST_DEVICE constexpr bool is_grouped(Codes codes) { return codes >= Codes::int8_grouped; }
OCTAVO_HOST_DEVICE constexpr bool has_bytes(Codes codes) {
  return codes == Codes::int8 || codes == Codes::int8_grouped;
}
// Of a row's unit: 64 bytes.
OCTAVO_HOST_DEVICE constexpr int blocks_per_unit(Codes codes) {
  return !is_quantized(codes) ? 1 : has_bytes(codes) ? 2 : 4;
}

// Where in its row an input's code lies; int4: times two, in nibbles.
OCTAVO_HOST_DEVICE int place_of(Codes codes, int input) {
  const int j = input % 8, t = input % kBlock / 8;
  if (has_bytes(codes)) {
    const int swapped = j % 4 == 1 ? 2 : j % 4 == 2 ? 1 : j % 4;
    return input / 64 * 64 + 16 * t + 8 * (input % 64 / kBlock) + j / 4 * 4 + swapped;
  }
  const int nibble = j % 2 * 4 + j / 2;
  return input / 128 * 128 + 8 * (4 * t + input % 128 / kBlock) + nibble;
}

// A View as kernels get it.
struct Numbers {
  void* data;
  DType dtype;
  int rows;
  long long stride;
};
inline Numbers numbers_of(View view) {
  return {view.data, view.dtype, static_cast<int>(view.rows), view.stride};
}

// What makes weights of the codes of one block: (level - zero) * scale.
struct BlockScale {
  float scale, zero;
};
OCTAVO_DEVICE BlockScale block_scale_at(const Matrix& m, int output, int input) {
  const long long at =
      static_cast<long long>(output) * m.scales_per_row + (input / kBlock >> m.scale_shift);
  BlockScale s{read_number(m.scales, m.scale_dtype, at), 0.0f};
  if (m.zeros) s.zero = read_number(m.zeros, DType::bf16, at);
  if (m.zeros && m.codes == Codes::int4) s.zero -= 8.0f;
  return s;
}
// code: 4 bits, or a byte's.
OCTAVO_DEVICE float weight_of(const Matrix& m, BlockScale s, int code) {
  const int level = has_bytes(m.codes) ? static_cast<std::int8_t>(code)
                    : m.codes == Codes::int4
                        ? code - 8
                        : static_cast<std::int8_t>(m.levels.words[code / 4] >> code % 4 * 8);
  return (static_cast<float>(level) - s.zero) * s.scale;
}

// One weight, for what need not be fast.
OCTAVO_DEVICE float weight_at(const Matrix& m, int output, int input) {
  const unsigned char* row = m.row(output);
  if (m.codes == Codes::f32) return read_number(row, DType::f32, input);
  if (m.codes == Codes::f16) return read_number(row, DType::f16, input);
  if (m.codes == Codes::bf16) return read_number(row, DType::bf16, input);
  const int place = place_of(m.codes, input);
  if (m.codes == Codes::int8)
    return static_cast<float>(static_cast<std::int8_t>(row[place])) * m.output_scales[output];
  const int code = has_bytes(m.codes) ? row[place] : row[place / 2] >> place % 2 * 4 & 15;
  return weight_of(m, block_scale_at(m, output, input), code);
}

// The packed matrix behind a Linear that make_linear made.
Matrix matrix_of(const Linear& linear);

}  // namespace octavo::cuda

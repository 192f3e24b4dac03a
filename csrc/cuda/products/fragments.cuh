// From packed weights to operands of mma.m16n8k16, in registers.
//
// Everywhere weights are the operand a, 16 outputs at a time, and activations the operand b, 8 rows
// at a time: few rows then fill a tensor core as well as many. Of a block of 32 inputs lane
// 4 g + t holds inputs 8 t .. 8 t + 7 of outputs g and g + 8 and of row g, 16 bytes of 16-bit
// numbers each; its first and second pair are what mma calls k = 2 t, 2 t + 1 and
// k = 2 t + 8, 2 t + 9 of a first product, the third and fourth those of a second one. So a block
// is two products whose inputs are {8 t .. 8 t + 3} and {8 t + 4 .. 8 t + 7}, t = 0 .. 3, in every
// kernel.
//
// One order of summation for all kernels, and so the same bits of a row whatever the number of rows
// it is multiplied with: the inputs fall into at most 8 slices, whose length depends on the number
// of inputs alone. The products of a slice are added one after another into one accumulator of the
// tensor core that begins with 0; the slices' sums are added in ascending order in float32. Of int4
// each block has an accumulator that begins with 0, and the slice's sum grows by it times the
// block's scale, fused: so weights meet activations as exact whole numbers.
//
// Codes become numbers as in Frantar et al. 2024 ("Marlin"), and Kim et al. 2022 ("Who says
// elephants can't run"): a code's bits are put below the exponent of 128 (bf16) or 1024 (f16),
// which makes them 128 + code, exactly.
#pragma once

#include "cuda/device/tensor_cores.cuh"
#include "cuda/layout/weights.cuh"

namespace octavo::cuda {

constexpr int kMostSlices = 8;

// Inputs of a slice: whole units of every format.
OCTAVO_HOST_DEVICE int slice_inputs(int inputs) {
  return round_up(ceil_div(inputs, kMostSlices), 128);
}
OCTAVO_HOST_DEVICE int num_slices(int inputs) { return ceil_div(inputs, slice_inputs(inputs)); }

// Pairs of one 16-bit number.
template <class T>
constexpr std::uint32_t kOnes = std::is_same_v<T, Bf16> ? 0x3f803f80u : 0x3c003c00u;
template <class T>  // 128 or 1024: with a code in the lowest bits, that plus the code
constexpr std::uint32_t kBases = std::is_same_v<T, Bf16> ? 0x43004300u : 0x64006400u;
template <class T>
constexpr std::uint32_t kMinusBases = kBases<T> | 0x80008000u;
template <class T>  // -(128 + 8), -(1024 + 8)
constexpr std::uint32_t kUniformOffsets = std::is_same_v<T, Bf16> ? 0xc308c308u : 0xe408e408u;

// Signed bytes of inputs 0, 2, 1, 3 -> pairs of inputs 0, 1 and 2, 3.
template <class T>
OCTAVO_DEVICE void pairs_of_bytes(std::uint32_t& first, std::uint32_t& second,
                                  std::uint32_t bytes) {
  if constexpr (std::is_same_v<T, Bf16>) {
    // A bf16 has room for seven of the bits: (128 + low seven) - (128 or, of a negative one, 256).
    const auto pair = [](std::uint32_t two) {
      const std::uint32_t low = and_or(two, 0x007f007fu, kBases<T>);
      const std::uint32_t less = and_or(two, 0x00800080u, kBases<T>);
      return fma2<T>(less, kOnes<T> | 0x80008000u, low);
    };
    first = pair(bytes);
    second = pair(bytes >> 8);
  } else {
    constexpr std::uint32_t kOffsets = 0xe480e480u;   // -(1024 + 128)
    const std::uint32_t above = bytes ^ 0x80808080u;  // plus 128
    first = fma2<T>(and_or(above, 0x00ff00ffu, kBases<T>), kOnes<T>, kOffsets);
    second = fma2<T>(and_or(above >> 8, 0x00ff00ffu, kBases<T>), kOnes<T>, kOffsets);
  }
}

// The levels, one a byte, of the four codes in the lower half of `codes`.
OCTAVO_DEVICE std::uint32_t look_up(std::uint32_t codes, const Levels& levels) {
  const std::uint32_t low = permute_bytes(levels.words[0], levels.words[1], codes & 0x7777u);
  const std::uint32_t high = permute_bytes(levels.words[2], levels.words[3], codes & 0x7777u);
  return permute_bytes(low, high, 0x3210u + (codes >> 1 & 0x4444u));
}

// Where the first scale of a unit lies in its row of them.
template <Codes codes>
OCTAVO_DEVICE int first_scale(const Matrix& m, int unit) {
  return blocks_per_unit(codes) * unit >> m.scale_shift;
}

// Scales or zero points of a unit as they lie in memory: the 8 bytes of the row that hold them,
// which one load brings whatever the size of groups. To be asked for early, and told apart where
// they are used.
template <Codes codes>
OCTAVO_DEVICE uint2 load_scales(const void* table, const Matrix& m, int output, int unit) {
  return load_8(static_cast<const std::uint16_t*>(table) +
                static_cast<long long>(output) * m.scales_per_row +
                first_scale<codes>(m, unit) / 4 * 4);
}
// Those of blocks 2 pair and 2 pair + 1, in the lower and the upper half.
template <Codes codes>
OCTAVO_DEVICE std::uint32_t scale_pair_of(uint2 raw, const Matrix& m, int unit, int pair) {
  const auto first = static_cast<std::uint32_t>(first_scale<codes>(m, unit) % 4);
  const std::uint32_t low = first + static_cast<std::uint32_t>(2 * pair >> m.scale_shift);
  const std::uint32_t high = first + static_cast<std::uint32_t>((2 * pair + 1) >> m.scale_shift);
  return permute_bytes(raw.x, raw.y, low * 0x22u + high * 0x2200u + 0x1010u);
}

// The scale of the first or second block of a pair. Scale: Bf16 or F16.
template <class Scale>
OCTAVO_DEVICE float scale_of(std::uint32_t pair, int block) {
  const float2 two = unpack2<Scale>(pair);
  return block % 2 ? two.y : two.x;
}

// What is added to a pair of codes as they are read to make it levels less zero points.
// zeros: those of the block and its neighbour.
template <class T, Codes codes>
OCTAVO_DEVICE std::uint32_t offsets_of(std::uint32_t zeros, int block) {
  constexpr std::uint32_t kSigns = 0x80008000u;
  if constexpr (std::is_same_v<T, Bf16>) {
    const std::uint32_t zero = permute_bytes(zeros, 0, block % 2 ? 0x3232u : 0x1010u);
    if (codes == Codes::int4_levels) return zero ^ kSigns;
    return fma2<T>(zero, kOnes<T> | kSigns, kMinusBases<T>);
  } else {
    const float zero = scale_of<Bf16>(zeros, block);
    const float offset = codes == Codes::int4_levels ? -zero : -1024.0f - zero;
    return pack2<T>(offset, offset);
  }
}

// Pairs of the 8 numbers that a lane's 16 bytes of a unit hold of a block, before any scale: exact.
// offsets: see offsets_of.
template <class T, Codes codes>
OCTAVO_DEVICE void numbers_of_block(std::uint32_t (&pairs)[4], const uint4& bytes, int block,
                                    std::uint32_t offsets, const Levels& levels) {
  const std::uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  if constexpr (!is_quantized(codes)) {
    for (int i = 0; i < 4; ++i) pairs[i] = words[i];
  } else if constexpr (has_bytes(codes)) {
    pairs_of_bytes<T>(pairs[0], pairs[1], words[2 * block]);
    pairs_of_bytes<T>(pairs[2], pairs[3], words[2 * block + 1]);
  } else if constexpr (codes == Codes::int4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t pair = and_or(words[block] >> 4 * i, 0x000f000fu, kBases<T>);
      pairs[i] = fma2<T>(pair, kOnes<T>, offsets);
    }
  } else {
    const std::uint32_t even = look_up(words[block], levels);  // inputs 0, 2, 4, 6
    const std::uint32_t odd = look_up(words[block] >> 16, levels);
    pairs_of_bytes<T>(pairs[0], pairs[1], permute_bytes(even, odd, 0x5410u));
    pairs_of_bytes<T>(pairs[2], pairs[3], permute_bytes(even, odd, 0x7632u));
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = fma2<T>(pairs[i], kOnes<T>, offsets);
  }
}

// Offsets of a format without zero points.
template <class T, Codes codes>
constexpr std::uint32_t kNoZeros = codes == Codes::int4 ? kUniformOffsets<T> : 0;

// sums (16 outputs x 8 rows) += a block of weights (a lane's parts of outputs g and g + 8) times a
// block of activations.
template <class T>
OCTAVO_DEVICE void multiply_block(float (&sums)[4], const std::uint32_t (&upper)[4],
                                  const std::uint32_t (&lower)[4], const uint4& x) {
  multiply_accumulate<T>(sums, {upper[0], lower[0], upper[1], lower[1]}, {x.x, x.y});
  multiply_accumulate<T>(sums, {upper[2], lower[2], upper[3], lower[3]}, {x.z, x.w});
}

// The same of a format in groups, with the scales of outputs g and g + 8.
template <class T>
OCTAVO_DEVICE void multiply_scaled(float (&sums)[4], const std::uint32_t (&upper)[4],
                                   const std::uint32_t (&lower)[4], const uint4& x,
                                   float upper_scale, float lower_scale) {
  float whole[4] = {};
  multiply_block<T>(whole, upper, lower, x);
  sums[0] = fma_rn(whole[0], upper_scale, sums[0]);
  sums[1] = fma_rn(whole[1], upper_scale, sums[1]);
  sums[2] = fma_rn(whole[2], lower_scale, sums[2]);
  sums[3] = fma_rn(whole[3], lower_scale, sums[3]);
}

// What an output becomes of its sum. scale: int8's of the output, where it is there already.
OCTAVO_DEVICE float finished(const Matrix& m, int output, float sum, float scale) {
  if (m.output_scales) sum = multiply_rn(sum, scale);
  return m.bias ? add_rn(sum, m.bias[output]) : sum;
}
OCTAVO_DEVICE float finished(const Matrix& m, int output, float sum) {
  return finished(m, output, sum, m.output_scales ? m.output_scales[output] : 1.0f);
}

// Writes the sums of outputs `output` (an even one) and the next, as far as there are such.
OCTAVO_DEVICE void write_pair(const Numbers& out, const Matrix& weight, int row, int output,
                              float first, float second) {
  if (output >= weight.outputs) return;
  const long long at = row * out.stride + output;
  first = finished(weight, output, first);
  if (output + 1 == weight.outputs) return write_number(out.data, out.dtype, at, first);
  second = finished(weight, output + 1, second);
  if (out.dtype == DType::f32 || out.stride % 2 || reinterpret_cast<std::uintptr_t>(out.data) % 4) {
    write_number(out.data, out.dtype, at, first);
    return write_number(out.data, out.dtype, at + 1, second);
  }
  static_cast<std::uint32_t*>(out.data)[at / 2] =
      out.dtype == DType::bf16 ? pack2<Bf16>(first, second) : pack2<F16>(first, second);
}

}  // namespace octavo::cuda

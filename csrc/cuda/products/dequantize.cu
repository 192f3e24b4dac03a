// Quantized weights -> plain ones of a 16-bit type T, for products of so many rows that it pays to
// do it once for all of them.
//
// A thread takes 16 bytes of codes, lane t's part of a unit, and writes 16 bytes for each of the
// unit's blocks: 16 inputs of int8, 32 of int4, scaled and rounded to T. Moves the codes once, and
// 2 or 4 times as many bytes of results, which the product then finds in the second cache if they
// are few.

#include "cuda/device/launch.cuh"
#include "cuda/products/fragments.cuh"
#include "cuda/products/multiply.h"

namespace octavo::cuda {

namespace {

constexpr int kThreads = 256;

template <class T, Codes codes>
__global__ void dequantize_units(unsigned char* to, long long to_row_bytes, Matrix weight) {
  const int item = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  const int t = item % 4, unit = item / 4;
  const int output = static_cast<int>(blockIdx.x);
  wait_for_previous_kernel();
  if (unit >= weight.units) return;
  const uint4 bytes = load_16_once(weight.row(output) + unit * kUnitBytes + 16 * t);
  uint2 scales = {}, zeros = {};
  if constexpr (is_grouped(codes)) {
    scales = load_scales<codes>(weight.scales, weight, output, unit);
    if (weight.zeros) zeros = load_scales<codes>(weight.zeros, weight, output, unit);
  }
#pragma unroll
  for (int block = 0; block < blocks_per_unit(codes); ++block) {
    const int place = unit * blocks_per_unit(codes) + block;
    if (place * kUnitBytes >= to_row_bytes) break;  // padding
    std::uint32_t pairs[4], offset = kNoZeros<T, codes>;
    float scale = 1.0f;
    const auto pair_of = [&](uint2 raw) {
      return scale_pair_of<codes>(raw, weight, unit, block / 2);
    };
    if constexpr (is_grouped(codes)) {
      if (weight.zeros) offset = offsets_of<T, codes>(pair_of(zeros), block);
      const std::uint32_t pair = pair_of(scales);
      scale = weight.scale_dtype == DType::bf16 ? scale_of<Bf16>(pair, block)
                                                : scale_of<F16>(pair, block);
    } else {
      scale = weight.output_scales[output];
    }
    numbers_of_block<T, codes>(pairs, bytes, block, offset, weight.levels);
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack2<T>(pairs[i]);
      pairs[i] = pack2<T>(two.x * scale, two.y * scale);
    }
    store_16(to + output * to_row_bytes + place * kUnitBytes + 16 * t,
             uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
  }
}

}  // namespace

Matrix dequantize(Stream& stream, void* to, DType dtype, const Matrix& weight) {
  Matrix plain = weight;
  plain.data = static_cast<unsigned char*>(to);
  plain.scales = plain.zeros = nullptr;
  plain.output_scales = nullptr;
  plain.computed = true;
  plain.codes = dtype == DType::bf16 ? Codes::bf16 : Codes::f16;
  plain.units = ceil_div(weight.inputs, kBlock);
  plain.row_bytes = static_cast<long long>(plain.units) * kUnitBytes;
  const dim3 grid = dims(weight.outputs, ceil_div(4 * weight.units, kThreads));
  const auto run = [&](auto kernel) {
    launch(stream, "dequantize", {grid, kThreads, 0, true}, kernel, static_cast<unsigned char*>(to),
           plain.row_bytes, weight);
  };
  for_16_bits(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (weight.codes == Codes::int8)
      run(dequantize_units<T, Codes::int8>);
    else if (weight.codes == Codes::int8_grouped)
      run(dequantize_units<T, Codes::int8_grouped>);
    else if (weight.codes == Codes::int4)
      run(dequantize_units<T, Codes::int4>);
    else
      run(dequantize_units<T, Codes::int4_levels>);
  });
  return plain;
}

Matrix outputs_of(const Matrix& weight, int first, int count) {
  Matrix part = weight;
  part.data = weight.row(first);
  part.outputs = count;
  if (weight.bias) part.bias += first;
  if (weight.output_scales) part.output_scales += first;
  const long long skipped = static_cast<long long>(first) * weight.scales_per_row;
  const auto skip = [&](const void* table) {
    return static_cast<const void*>(static_cast<const std::uint16_t*>(table) + skipped);
  };
  if (weight.scales) part.scales = skip(weight.scales);
  if (weight.zeros) part.zeros = skip(weight.zeros);
  return part;
}

}  // namespace octavo::cuda

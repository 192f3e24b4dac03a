// out = x weight^T + bias of 1 to 8 rows: decoding, where the time is that of reading the weights.
//
// A block makes 16 outputs, with a warp for every slice of the inputs (fragments.cuh). A lane loads
// 16 bytes of two outputs at a time, straight into the operands of the tensor core: for these few
// rows it is not a faster multiplier but a shorter program, one instruction for 256 weights whether
// the rows are 1 or 8. At 4.8 TB/s a processor of an H200 has time for 14 instructions a weight of
// bf16, 7 of int8, 3.5 of int4; int8 takes 3.0 and int4 2.6 (3.6 where a slice is longer than the
// ring), counted in the machine code for sm_90.
//
// In flight are up to 8 KB a warp of bf16, 4 of int8, 2 of int4: a ring of 8, 4 or 2 units of each
// of the two outputs, begun before the kernel before has ended (only x is its work) and refilled as
// they are used. For 2048 inputs a slice is 256, and all of a warp's weights are on their way at
// once. 2048 outputs are 128 blocks, that is 64 KB of bf16 a processor of an H200 or A100; where
// there are more, two blocks at a time (int4: three) make that 128, 64 and 48 KB. Little's law asks
// for 4.8 TB/s * 0.8 us / 132 = 29 KB. All blocks of a matrix of up to 264 * 16 = 4224 outputs run
// at once, so that no wave is left half empty; larger ones have many more blocks than a wave.
//
// Moves the weights once, and x (16 inputs' worth of every row for each 16 weights) from the
// caches.

#include "cuda/fragments.cuh"
#include "cuda/launch.cuh"
#include "cuda/multiply.h"

namespace octavo::cuda {

namespace {

constexpr int kOutputs = 16;
constexpr int kAheadBlocks = 4;  // of x
constexpr int kPitch = 20;       // of sums in shared memory: lanes in different banks

// Scale: of int4. has_zeros: int4.
template <class T, Codes codes, class Scale, bool has_zeros>
__global__ void __launch_bounds__(kMostSlices* kWarp, codes >= Codes::int4 && !has_zeros ? 3 : 2)
    multiply_rows(Numbers out, Numbers x, Matrix weight, int slice_units) {
  constexpr int kBlocks = blocks_per_unit(codes);
  constexpr int kRing = codes < Codes::int8 ? 8 : codes == Codes::int8 ? 4 : 2;
  constexpr bool kScaled = codes >= Codes::int4;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int slice = static_cast<int>(threadIdx.x / kWarp);
  const int g = lane / 4, t = lane % 4;
  const int first_output = static_cast<int>(blockIdx.x) * kOutputs;
  const int first_unit = slice * slice_units;
  const int units = smaller(slice_units, weight.units - first_unit);
  // Outputs that there are not read the last one's weights, and are not written.
  const int upper = smaller(first_output + g, weight.outputs - 1);
  const int lower = smaller(first_output + g + 8, weight.outputs - 1);
  const unsigned char* upper_codes = weight.row(upper) + first_unit * kUnitBytes + 16 * t;
  const unsigned char* lower_codes = weight.row(lower) + first_unit * kUnitBytes + 16 * t;

  let_next_kernel_start();
  uint4 ring[kRing][2];
  UnitScales scales[kScaled ? kRing : 1][2], zeros[has_zeros ? kRing : 1][2];
  const auto fetch = [&](int slot, int unit) {
    ring[slot][0] = load_16_once(upper_codes + unit * kUnitBytes);
    ring[slot][1] = load_16_once(lower_codes + unit * kUnitBytes);
    if constexpr (kScaled) {
      scales[slot][0] = load_scales(weight.scales, weight, upper, first_unit + unit);
      scales[slot][1] = load_scales(weight.scales, weight, lower, first_unit + unit);
      if constexpr (has_zeros) {
        zeros[slot][0] = load_scales(weight.zeros, weight, upper, first_unit + unit);
        zeros[slot][1] = load_scales(weight.zeros, weight, lower, first_unit + unit);
      }
    }
  };
#pragma unroll
  for (int u = 0; u < kRing; ++u) {
    ring[u][0] = ring[u][1] = uint4{0, 0, 0, 0};
    if (u < units) fetch(u, u);
  }
#pragma unroll
  for (int u = 0; u < kRing; ++u) {
    keep_in_registers(ring[u][0]);
    keep_in_registers(ring[u][1]);
  }
  wait_for_previous_kernel();

  const int first_input = first_unit * kBlocks * kBlock + 8 * t;
  const int end_input = smaller(weight.inputs, (first_unit + units) * kBlocks * kBlock);
  // Blocks of the slice of which the lane has numbers; the others are zeros.
  const int x_blocks = g < x.rows ? ceil_div(end_input - first_input, kBlock) : 0;
  const T* xs = static_cast<const T*>(x.data) + (g < x.rows ? g * x.stride : 0) + first_input;
  uint4 ahead[kAheadBlocks];
  const auto fetch_x = [&](int slot, int block) {
    ahead[slot] = block < x_blocks ? load_16(xs + block * kBlock) : uint4{0, 0, 0, 0};
  };
#pragma unroll
  for (int b = 0; b < kAheadBlocks; ++b) fetch_x(b, b);

  float sums[4] = {};
  for (int base = 0; base < units; base += kRing) {
#pragma unroll
    for (int u = 0; u < kRing; ++u) {
      const int unit = base + u;
      if (unit >= units) break;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int slot = (u * kBlocks + block) % kAheadBlocks;
        std::uint32_t a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          std::uint32_t offset = kNoZeros<T, codes>;
          if constexpr (has_zeros)
            offset = offsets_of<T, codes>(zeros[u][half].words[block / 2], block);
          numbers_of_block<T, codes>(a[half], ring[u][half], block, offset, weight.levels);
        }
        if constexpr (kScaled)
          multiply_scaled<T>(sums, a[0], a[1], ahead[slot],
                             scale_of<Scale>(scales[u][0].words[block / 2], block),
                             scale_of<Scale>(scales[u][1].words[block / 2], block));
        else
          multiply_block<T>(sums, a[0], a[1], ahead[slot]);
        fetch_x(slot, unit * kBlocks + block + kAheadBlocks);
      }
      if (unit + kRing < units) fetch(u, unit + kRing);
    }
  }

  auto* partial = reinterpret_cast<float*>(shared_memory());  // [slices][8 rows][kPitch]
  for (int i = 0; i < 4; ++i)
    partial[(slice * kFewRows + 2 * t + i % 2) * kPitch + g + i / 2 * 8] = sums[i];
  __syncthreads();
  const int slices = static_cast<int>(blockDim.x / kWarp);
  for (int i = static_cast<int>(threadIdx.x); i < x.rows * kOutputs;
       i += static_cast<int>(blockDim.x)) {
    const int r = i / kOutputs, output = first_output + i % kOutputs;
    if (output >= weight.outputs) continue;
    float sum = 0.0f;
    for (int s = 0; s < slices; ++s)
      sum = add_rn(sum, partial[(s * kFewRows + r) * kPitch + i % kOutputs]);
    write_number(out.data, out.dtype, r * out.stride + output, finished(weight, output, sum));
  }
}

template <class T, Codes codes, class Scale = Bf16, bool has_zeros = false>
void run(Stream& stream, View out, View x, const Matrix& weight) {
  const int slices = num_slices(weight.inputs);
  LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(weight.outputs, kOutputs))),
                    dim3(static_cast<unsigned>(slices) * kWarp),
                    static_cast<std::size_t>(slices) * kFewRows * kPitch * sizeof(float)};
  shape.overlaps = true;
  const int slice_units = slice_inputs(weight.inputs) / (blocks_per_unit(codes) * kBlock);
  launch(stream, "multiply_few", shape, multiply_rows<T, codes, Scale, has_zeros>, numbers_of(out),
         numbers_of(x), weight, slice_units);
}

template <class T, Codes codes>
void run_scaled(Stream& stream, View out, View x, const Matrix& weight) {
  const bool is_bf16 = weight.scale_dtype == DType::bf16;
  if (weight.zeros && is_bf16) return run<T, codes, Bf16, true>(stream, out, x, weight);
  if (weight.zeros) return run<T, codes, F16, true>(stream, out, x, weight);
  if (is_bf16) return run<T, codes, Bf16>(stream, out, x, weight);
  run<T, codes, F16>(stream, out, x, weight);
}

template <class T>
void run(Stream& stream, View out, View x, const Matrix& weight) {
  switch (weight.codes) {
    case Codes::int8:
      return run<T, Codes::int8>(stream, out, x, weight);
    case Codes::int4:
      return run_scaled<T, Codes::int4>(stream, out, x, weight);
    case Codes::int4_levels:
      return run_scaled<T, Codes::int4_levels>(stream, out, x, weight);
    default:
      return run<T, Codes::bf16>(stream, out, x, weight);
  }
}

}  // namespace

void multiply_few(Stream& stream, View out, View x, const Matrix& weight) {
  if (x.dtype == DType::bf16)
    run<Bf16>(stream, out, x, weight);
  else
    run<F16>(stream, out, x, weight);
}

}  // namespace octavo::cuda

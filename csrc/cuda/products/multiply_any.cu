// out = x weight^T + bias for everything that no faster kernel takes: float32 activations, weights
// of another type than the activations, widths that are no multiple of 8.
//
// A block makes 16 rows times 32 outputs. It walks over the inputs in steps of 32; of each it turns
// 16 x 32 numbers of x and 32 x 32 weights into float32 in shared memory, and thread (o, r) adds
// their products for output o and rows r, r + 4, r + 8, r + 12, inputs in ascending order, fused.
// So a row's bits depend on nothing but the row. Moves the weights once for every 16 rows, and x
// once for every 32 outputs.

#include "cuda/device/launch.cuh"
#include "cuda/products/experts.cuh"
#include "cuda/products/multiply.h"

namespace octavo::cuda {

namespace {

constexpr int kRows = kAnyRows, kOutputs = 32, kInputs = 32, kThreads = 128;
constexpr int kRowsPerThread = kRows * kOutputs / kThreads;
constexpr int kPitch = kInputs + 1;  // in other banks than the row above

template <class Work>
__global__ void multiply_any_tile(Numbers out, Numbers x, Matrix weight, Work work) {
  auto* weights = reinterpret_cast<float*>(shared_memory());  // [kOutputs][kPitch]
  float* xs = weights + kOutputs * kPitch;                    // [kRows][kPitch]
  const int first_output = static_cast<int>(blockIdx.x) * kOutputs;
  int first_row = static_cast<int>(blockIdx.y) * kRows;
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % 32, line = thread / 32;
  if (!work.begin(blockIdx.y, first_row, out, x, weight)) return;
  wait_for_previous_kernel();
  float sums[kRowsPerThread] = {};
  for (int begin = 0; begin < weight.inputs; begin += kInputs) {
    const int input = begin + column;
    for (int i = line; i < kOutputs; i += kThreads / 32) {
      const int output = first_output + i;
      weights[i * kPitch + column] = output < weight.outputs && input < weight.inputs
                                         ? weight_at(weight, output, input)
                                         : 0.0f;
    }
    for (int i = line; i < kRows; i += kThreads / 32) {
      const int row = first_row + i;
      xs[i * kPitch + column] = row < x.rows && input < weight.inputs
                                    ? read_number(x.data, x.dtype, row * x.stride + input)
                                    : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < kInputs; ++k) {
      for (int i = 0; i < kRowsPerThread; ++i)
        sums[i] = fma_rn(xs[(line + 4 * i) * kPitch + k], weights[column * kPitch + k], sums[i]);
    }
    __syncthreads();
  }
  const int output = first_output + column;
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int row = first_row + line + 4 * i;
    if (row >= x.rows || output >= weight.outputs) continue;
    const float bias = weight.bias ? weight.bias[output] : 0.0f;
    write_number(out.data, out.dtype, row * out.stride + output, add_rn(sums[i], bias));
  }
}

template <class Work>
void run(Stream& stream, View out, View x, const Matrix& weight, int row_tiles, const Work& work) {
  const LaunchShape shape{dims(ceil_div(weight.outputs, kOutputs), row_tiles), kThreads,
                          (kOutputs + kRows) * kPitch * sizeof(float), true};
  launch(stream, "multiply_any", shape, multiply_any_tile<Work>, numbers_of(out), numbers_of(x),
         weight, work);
}

}  // namespace

void multiply_any(Stream& stream, View out, View x, const Matrix& weight) {
  run(stream, out, x, weight, ceil_div(static_cast<int>(x.rows), kRows), AllRows{});
}

void multiply_experts_any(Stream& stream, View out, View x, const Matrix& weight,
                          const ExpertTiles& tiles) {
  run(stream, out, x, weight, tiles.count, tiles);
}

}  // namespace octavo::cuda

// Biases and penalties of single logits. reference/sampling.py defines them.
#include "cuda/backend.h"
#include "cuda/elementwise/elementwise.cuh"

namespace octavo::cuda {

namespace {

constexpr unsigned kThreads = 256;

// out = logits, 4 bytes read and 4 written a number. blockIdx.y: row.
__global__ void copy_logits(float* out, std::int64_t out_stride, const float* logits,
                            std::int64_t stride, int vocab) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t row = blockIdx.y;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < vocab;
       i += static_cast<int>(gridDim.x * blockDim.x))
    out[row * out_stride + i] = logits[row * stride + i];
}

// x = x / repetition where x > 0, else x * repetition; then + bias. A block a row, a thread an
// entry; no token stands twice in a row.
__global__ void adjust(float* logits, std::int64_t stride, LogitAdjustments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t row = blockIdx.x;
  const int end = a.row_starts[row + 1];
  for (int i = a.row_starts[row] + static_cast<int>(threadIdx.x); i < end;
       i += static_cast<int>(blockDim.x)) {
    float& x = logits[row * stride + a.token_ids[i]];
    const float scaled = x > 0.0f ? divide_rn(x, a.repetition[i]) : multiply_rn(x, a.repetition[i]);
    x = add_rn(scaled, a.bias[i]);
  }
}

}  // namespace

void CudaBackend::adjust_logits(View out, View logits, const LogitAdjustments& adjustments) {
  if (out.rows == 0 || out.cols == 0) return;
  const auto rows = static_cast<unsigned>(out.rows);
  const auto vocab = static_cast<int>(out.cols);
  if (out.data != logits.data) {
    const unsigned blocks = blocks_of(out.cols, 8 * kThreads);
    launch(stream_, "copy_logits", {{blocks, rows}, {kThreads}, 0, true}, copy_logits,
           static_cast<float*>(out.data), out.stride, static_cast<const float*>(logits.data),
           logits.stride, vocab);
  }
  launch(stream_, "adjust", {{rows}, {kThreads}, 0, true}, adjust, static_cast<float*>(out.data),
         out.stride, adjustments);
}

}  // namespace octavo::cuda

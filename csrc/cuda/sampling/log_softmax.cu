// Log-probabilities of whole rows, for evaluation.
#include "cuda/backend.h"
#include "cuda/elementwise/elementwise.cuh"
#include "cuda/sampling/exact_math.cuh"

namespace octavo::cuda {

namespace {

constexpr unsigned kThreads = 512;

// out = (x - max) - log(sum of e^(x - max)).
//
// A block a row, which it reads three times (from the second cache after the first); 4 bytes read
// and 4 written a number. The sum is in fixed point: exact, so that its order does not matter.
__global__ void __launch_bounds__(kThreads)
    log_softmax_rows(float* out, const float* x, std::int64_t out_stride, std::int64_t x_stride,
                     int width, bool aligned) {
  auto* sums = reinterpret_cast<Wide*>(shared_memory());       // kMostWarps
  auto* maxima = reinterpret_cast<float*>(sums + kMostWarps);  // kMostWarps
  let_next_kernel_start();
  wait_for_previous_kernel();
  x += blockIdx.x * x_stride;
  out += blockIdx.x * out_stride;
  const int first = static_cast<int>(4 * threadIdx.x), step = static_cast<int>(4 * kThreads);

  float most = -INFINITY;
  for (int col = first; col < width; col += step) {
    const float4 four = load_four(x + col, width - col, aligned, -INFINITY);
    most = fmaxf(most, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
  }
  most = block_max(most, maxima);
  Wide total = 0;
  for (int col = first; col < width; col += step) {
    const float4 four = load_four(x + col, width - col, aligned, -INFINITY);
    total += exp_fixed(add_rn(four.x, -most)) + exp_fixed(add_rn(four.y, -most)) +
             exp_fixed(add_rn(four.z, -most)) + exp_fixed(add_rn(four.w, -most));
  }
  total = block_reduce(total, sums, [](Wide a, Wide b) { return a + b; });
  const float log_total = log_of_total(total);
  for (int col = first; col < width; col += step) {
    const float4 four = load_four(x + col, width - col, aligned);
    store_four(
        out + col,
        {add_rn(add_rn(four.x, -most), -log_total), add_rn(add_rn(four.y, -most), -log_total),
         add_rn(add_rn(four.z, -most), -log_total), add_rn(add_rn(four.w, -most), -log_total)},
        width - col, aligned);
  }
}

}  // namespace

void CudaBackend::log_softmax(View out, View logits) {
  require_shape("log_softmax", logits, out.rows, out.cols);
  require_f32("log_softmax", out);
  require_f32("log_softmax", logits);
  if (out.rows == 0 || out.cols == 0) return;
  const std::size_t shared = kMostWarps * (sizeof(Wide) + sizeof(float));
  launch(stream_, "log_softmax_rows", {{static_cast<unsigned>(out.rows)}, {kThreads}, shared, true},
         log_softmax_rows, static_cast<float*>(out.data), static_cast<const float*>(logits.data),
         out.stride, logits.stride, out.cols, fours_aligned(out) && fours_aligned(logits));
}

}  // namespace octavo::cuda

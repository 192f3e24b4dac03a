// Norms, alone and fused with the addition before them; of heads, in place.
#include "cuda/backend.h"
#include "cuda/elementwise/elementwise.cuh"
#include "cuda/elementwise/norm.cuh"

namespace octavo::cuda {

namespace {

struct NormArguments {
  void* out;
  float* residual;
  const void* added;           // null: the residual is what is normalized, and stays as it is
  const float *weight, *bias;  // bias: null for none
  std::int64_t out_stride, residual_stride, added_stride;  // in numbers
  int width;
  float eps;
  bool centered;  // layer norm: of x - mean(x)
  bool rows_aligned, weights_aligned;
};

constexpr unsigned kMostThreads = 1024;
constexpr std::int64_t kMostWidth = 4 * kMostNormGroups * std::int64_t{kMostThreads};

// residual += added; out = residual / sqrt(mean(residual^2) + eps) * weight + bias; centered: the
// same of residual - mean(residual).
//
// A block a row. The row stays in registers: group g of thread t is columns 4 (t + g blockDim.x)
// and the three behind. The order of the sums depends on the width alone. Reads and writes each
// number once: 4 bytes of the residual, sizeof(T) of added and of out; the weights, which the
// kernel before does not write, are read while it still runs.
template <class T, int num_groups>
__global__ void __launch_bounds__(kMostThreads) norm_rows(NormArguments a) {
  auto* sums = reinterpret_cast<float*>(shared_memory());  // 2 * kMostWarps
  const std::int64_t row = blockIdx.x;
  const int first = static_cast<int>(4 * threadIdx.x), step = static_cast<int>(4 * blockDim.x);
  float4 weight[num_groups], x[num_groups];
  let_next_kernel_start();
#pragma unroll
  for (int g = 0; g < num_groups; ++g) {
    const int col = first + g * step;
    weight[g] = load_four(a.weight + col, a.width - col, a.weights_aligned);
  }
  wait_for_previous_kernel();

  float* residual = a.residual + row * a.residual_stride;
#pragma unroll
  for (int g = 0; g < num_groups; ++g) {
    const int col = first + g * step;
    x[g] = load_four(residual + col, a.width - col, a.rows_aligned);
    if (a.added) {
      const T* added = static_cast<const T*>(a.added) + row * a.added_stride;
      const float4 more = load_four(added + col, a.width - col, a.rows_aligned);
      x[g] = {x[g].x + more.x, x[g].y + more.y, x[g].z + more.z, x[g].w + more.w};
      store_four(residual + col, x[g], a.width - col, a.rows_aligned);
    }
  }
  if (a.centered) {
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < num_groups; ++g) sum += (x[g].x + x[g].y) + (x[g].z + x[g].w);
    const float mean = block_sum(sum, sums + kMostWarps) / static_cast<float>(a.width);
#pragma unroll
    for (int g = 0; g < num_groups; ++g) {
      const int left = a.width - (first + g * step);  // behind the row's end stay zeros
      if (left > 0) x[g].x -= mean;
      if (left > 1) x[g].y -= mean;
      if (left > 2) x[g].z -= mean;
      if (left > 3) x[g].w -= mean;
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int g = 0; g < num_groups; ++g) squares = add_squares(squares, x[g]);
  const float scale = norm_scale(block_sum(squares, sums), a.width, a.eps);

  T* out = static_cast<T*>(a.out) + row * a.out_stride;
#pragma unroll
  for (int g = 0; g < num_groups; ++g) {
    const int col = first + g * step;
    float4 y = scaled(x[g], scale, weight[g]);
    if (a.bias) {
      const float4 bias = load_four(a.bias + col, a.width - col, a.weights_aligned);
      y = {y.x + bias.x, y.y + bias.y, y.z + bias.z, y.w + bias.w};
    }
    store_four(out + col, y, a.width - col, a.rows_aligned);
  }
}

// residual += added (null: stays); out = residual. blockIdx.x: row; blockIdx.y and threads: four
// columns each.
constexpr unsigned kPassThreads = 256;

template <class T>
__global__ void __launch_bounds__(kPassThreads) pass_rows(NormArguments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int col = static_cast<int>(4 * (blockIdx.y * kPassThreads + threadIdx.x));
  float* residual = a.residual + blockIdx.x * a.residual_stride + col;
  float4 x = load_four(residual, a.width - col, a.rows_aligned);
  if (a.added) {
    const T* added = static_cast<const T*>(a.added) + blockIdx.x * a.added_stride + col;
    const float4 more = load_four(added, a.width - col, a.rows_aligned);
    x = {x.x + more.x, x.y + more.y, x.z + more.z, x.w + more.w};
    store_four(residual, x, a.width - col, a.rows_aligned);
  }
  T* out = static_cast<T*>(a.out) + blockIdx.x * a.out_stride + col;
  store_four(out, x, a.width - col, a.rows_aligned);
}

struct HeadArguments {
  void* x;
  const float* weight;
  std::int64_t stride;  // in numbers
  int width;
  float eps;
  bool aligned, weights_aligned;
};

// Numbers of one head, x = x / sqrt(mean(x^2) + eps) * weight, in place. blockIdx.x: row;
// blockIdx.y: head. Threads have groups of four columns; what they read is read again, from the
// first-level cache, once the sum is known. The order of the sums is that of norm_rows.
template <class T>
__global__ void __launch_bounds__(kMostThreads) norm_heads_kernel(HeadArguments a) {
  auto* sums = reinterpret_cast<float*>(shared_memory());
  let_next_kernel_start();
  wait_for_previous_kernel();
  T* x = static_cast<T*>(a.x) + blockIdx.x * a.stride + blockIdx.y * a.width;
  const int first = static_cast<int>(4 * threadIdx.x), step = static_cast<int>(4 * blockDim.x);
  float squares = 0.0f;
  for (int col = first; col < a.width; col += step)
    squares = add_squares(squares, load_four(x + col, a.width - col, a.aligned));
  const float scale = norm_scale(block_sum(squares, sums), a.width, a.eps);
  for (int col = first; col < a.width; col += step) {
    const float4 weight = load_four(a.weight + col, a.width - col, a.weights_aligned);
    const float4 y = scaled(load_four(x + col, a.width - col, a.aligned), scale, weight);
    store_four(x + col, y, a.width - col, a.aligned);
  }
}

void launch_norm(Stream& stream, const char* op, View out, View residual, const View* added,
                 const Norm& norm) {
  require_shape(op, residual, out.rows, out.cols);
  require_f32(op, residual);
  require(out.cols <= kMostWidth, op, " of rows of ", out.cols, " numbers; the kernel takes up to ",
          kMostWidth);
  if (out.rows == 0 || out.cols == 0) return;
  NormArguments a{};
  a.out = out.data;
  a.residual = static_cast<float*>(residual.data);
  a.added = added ? added->data : nullptr;
  a.weight = norm.weight;
  a.bias = norm.bias;
  a.out_stride = out.stride;
  a.residual_stride = residual.stride;
  a.added_stride = added ? added->stride : 0;
  a.width = static_cast<int>(out.cols);
  a.eps = norm.spec.eps;
  a.centered = norm.spec.kind == NormKind::layer;
  a.rows_aligned =
      fours_aligned(out) && fours_aligned(residual) && (!added || fours_aligned(*added));
  a.weights_aligned = is_aligned(norm.weight, 16) && is_aligned(norm.bias, 16);

  if (norm.spec.kind == NormKind::none) {
    const LaunchShape pass{dims(out.rows, ceil_div(out.cols, 4 * kPassThreads)), kPassThreads, 0,
                           true};
    return for_type(op, out.dtype, [&](auto zero) {
      launch(stream, "pass_rows", pass, pass_rows<decltype(zero)>, a);
    });
  }
  const NormShape shared = norm_shape(a.width);
  const unsigned threads = static_cast<unsigned>(shared.warps) * kWarp;
  const LaunchShape shape{dims(out.rows), threads, 2 * kMostWarps * sizeof(float), true};
  for_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(stream, "norm_rows", shape,
           shared.groups == 1 ? norm_rows<T, 1> : norm_rows<T, kMostNormGroups>, a);
  });
}

}  // namespace

void CudaBackend::norm(View out, View x, const Norm& norm) {
  launch_norm(stream_, "norm", out, x, nullptr, norm);
}

void CudaBackend::add_norm(View out, View residual, View x, const Norm& norm) {
  require_shape("add_norm", x, out.rows, out.cols);
  require_same_dtype("add_norm", out, x);
  launch_norm(stream_, "add_norm", out, residual, &x, norm);
}

void CudaBackend::norm_heads(View x, const Norm& norm, std::int64_t width) {
  require(norm.spec.kind == NormKind::rms && !norm.bias,
          "norm_heads takes an rms norm without a bias");
  require(width >= 1 && x.cols % width == 0, "norm_heads got rows of ", x.cols,
          " numbers; expected a multiple of ", width);
  require(width <= kMostWidth, "norm_heads got heads of ", width, " numbers; expected at most ",
          kMostWidth);
  if (x.rows == 0 || x.cols == 0) return;
  HeadArguments a{};
  a.x = x.data;
  a.weight = norm.weight;
  a.stride = x.stride;
  a.width = static_cast<int>(width);
  a.eps = norm.spec.eps;
  a.aligned = fours_aligned(x) && width % 4 == 0;
  a.weights_aligned = is_aligned(norm.weight, 16);
  const unsigned threads = static_cast<unsigned>(norm_shape(a.width).warps) * kWarp;
  const LaunchShape shape{dims(x.rows, x.cols / width), threads, kMostWarps * sizeof(float), true};
  for_type("norm_heads", x.dtype, [&](auto zero) {
    launch(stream_, "norm_heads", shape, norm_heads_kernel<decltype(zero)>, a);
  });
}

}  // namespace octavo::cuda

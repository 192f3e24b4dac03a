// The ops that touch each number once: activations, copied rows.
#include "cuda/backend.h"
#include "cuda/elementwise/activation.cuh"
#include "cuda/elementwise/elementwise.cuh"

namespace octavo::cuda {

namespace {

struct ActivationArguments {
  void* out;
  const void* x;
  std::int64_t out_stride, x_stride;  // in numbers
  int width;
  bool gated, aligned;
};

// out = activation(gate) * up, x being gate and up side by side; not gated: out = activation(x).
// blockIdx.x: row; blockIdx.y and threads: kPerThread numbers each, in groups of four.
// Reads 2 * width numbers (not gated: width) of a row, writes width.
constexpr unsigned kActivationThreads = 256, kActivationGroups = 2;

template <class T, Activation activation>
__global__ void __launch_bounds__(kActivationThreads) activate_rows(ActivationArguments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const T* x = static_cast<const T*>(a.x) + blockIdx.x * a.x_stride;
  T* out = static_cast<T*>(a.out) + blockIdx.x * a.out_stride;
  const int first =
      static_cast<int>(4 * (blockIdx.y * kActivationGroups * kActivationThreads + threadIdx.x));
  float4 value[kActivationGroups], up[kActivationGroups];
#pragma unroll
  for (unsigned group = 0; group < kActivationGroups; ++group) {
    const int col = first + static_cast<int>(4 * group * kActivationThreads);
    value[group] = load_four(x + col, a.width - col, a.aligned);
    if (a.gated) up[group] = load_four(x + a.width + col, a.width - col, a.aligned);
  }
#pragma unroll
  for (unsigned group = 0; group < kActivationGroups; ++group) {
    const int col = first + static_cast<int>(4 * group * kActivationThreads);
    float4 y = activate<activation>(value[group]);
    if (a.gated) {
      y = {y.x * up[group].x, y.y * up[group].y, y.z * up[group].z, y.w * up[group].w};
    }
    store_four(out + col, y, a.width - col, a.aligned);
  }
}

template <class T>
auto activation_kernel(Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return activate_rows<T, Activation::gelu>;
    case Activation::gelu_tanh:
      return activate_rows<T, Activation::gelu_tanh>;
    case Activation::relu:
      return activate_rows<T, Activation::relu>;
    default:
      return activate_rows<T, Activation::silu>;
  }
}

// x = factor * x, or cap * tanh(factor * x / cap): `by` is the factor before the hyperbolic
// tangent, and cap 0 for none. blockIdx.x: row; blockIdx.y and threads: four columns each.
constexpr unsigned kScaleThreads = 256;

template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_rows(void* x, std::int64_t stride, int width, float by, float cap, bool aligned) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int col = static_cast<int>(4 * (blockIdx.y * kScaleThreads + threadIdx.x));
  T* at = static_cast<T*>(x) + blockIdx.x * stride + col;
  const auto scaled = [&](float number) {
    const float y = multiply_rn(number, by);
    return cap == 0.0f ? y : multiply_rn(tanhf(y), cap);
  };
  const float4 four = load_four(at, width - col, aligned);
  store_four(at, {scaled(four.x), scaled(four.y), scaled(four.z), scaled(four.w)}, width - col,
             aligned);
}

// out[i] = x[rows[i]], rows of `units` units of type Unit. blockIdx.x: i; blockIdx.y, threads: one
// unit each. Reads and writes each row once.
constexpr unsigned kCopyThreads = 256;

template <class Unit>
__global__ void __launch_bounds__(kCopyThreads)
    copy_rows(void* out, const void* x, const std::int32_t* rows, std::int64_t out_stride,
              std::int64_t x_stride, int units) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int unit = static_cast<int>(blockIdx.y * kCopyThreads + threadIdx.x);
  if (unit >= units) return;
  const Unit* from = static_cast<const Unit*>(x) + rows[blockIdx.x] * x_stride;
  (static_cast<Unit*>(out) + blockIdx.x * out_stride)[unit] = from[unit];
}

template <class Unit>
void launch_copy(Stream& stream, View out, View x, const std::int32_t* rows) {
  const std::int64_t per_unit = static_cast<std::int64_t>(sizeof(Unit)) * 8 / bits_of(out.dtype);
  const std::int64_t units = out.cols / per_unit;
  const dim3 grid = dims(out.rows, ceil_div(units, kCopyThreads));
  launch(stream, "copy_rows", {grid, kCopyThreads, 0, true}, copy_rows<Unit>, out.data, x.data,
         rows, out.stride / per_unit, x.stride / per_unit, units);
}

}  // namespace

void CudaBackend::gated_activation(View out, View x, Activation activation, bool gated) {
  require_shape("gated_activation", x, out.rows, gated ? 2 * out.cols : out.cols);
  require_same_dtype("gated_activation", out, x);
  if (out.rows == 0 || out.cols == 0) return;
  ActivationArguments a{out.data,
                        x.data,
                        out.stride,
                        x.stride,
                        static_cast<int>(out.cols),
                        gated,
                        fours_aligned(out) && fours_aligned(x) && (!gated || out.cols % 4 == 0)};
  const dim3 grid = dims(out.rows, ceil_div(out.cols, 4 * kActivationGroups * kActivationThreads));
  for_type("gated_activation", out.dtype, [&](auto zero) {
    launch(stream_, "activate_rows", {grid, kActivationThreads, 0, true},
           activation_kernel<decltype(zero)>(activation), a);
  });
}

void CudaBackend::scale(View x, float factor, float cap) {
  if (x.rows == 0 || x.cols == 0) return;
  const dim3 grid = dims(x.rows, ceil_div(x.cols, 4 * kScaleThreads));
  for_type("scale", x.dtype, [&](auto zero) {
    launch(stream_, "scale_rows", {grid, kScaleThreads, 0, true}, scale_rows<decltype(zero)>,
           x.data, x.stride, x.cols, cap == 0.0f ? factor : factor / cap, cap, fours_aligned(x));
  });
}

void CudaBackend::take_rows(View out, View x, const std::int32_t* rows) {
  require_shape("take_rows", x, x.rows, out.cols);
  require_same_dtype("take_rows", out, x);
  if (out.rows == 0 || out.cols == 0) return;
  const auto fits = [&](std::int64_t bytes) {
    const std::int64_t numbers = bytes * 8 / bits_of(out.dtype);
    const auto at =
        reinterpret_cast<std::uintptr_t>(out.data) | reinterpret_cast<std::uintptr_t>(x.data);
    return numbers > 0 && (out.cols | out.stride | x.stride) % numbers == 0 &&
           at % static_cast<std::uintptr_t>(bytes) == 0;
  };
  if (fits(16))
    launch_copy<uint4>(stream_, out, x, rows);
  else if (fits(4))
    launch_copy<std::uint32_t>(stream_, out, x, rows);
  else
    launch_copy<std::uint16_t>(stream_, out, x, rows);
}

}  // namespace octavo::cuda

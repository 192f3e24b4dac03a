// The arithmetic of a norm, for the op (norm.cu) and for products that normalize their own x
// (multiply_few.cuh): one order of sums, and so the same bits.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/layout/weights.cuh"

namespace octavo::cuda {

// How a row is shared out: thread t of `warps` warps has the groups t + k 32 warps, k < groups, of
// four columns each. Each adds its squares in ascending order, warps add in a butterfly, and the
// warps' sums are added in ascending order.
struct NormShape {
  int warps, groups;
};
constexpr int kMostNormGroups = 4;  // of a thread
OCTAVO_HOST_DEVICE NormShape norm_shape(int width) {
  const int fours = ceil_div(width, 4), warp = static_cast<int>(kWarp);
  const int groups = fours <= static_cast<int>(kMostWarps) * warp ? 1 : kMostNormGroups;
  return {ceil_div(fours, groups * warp), groups};
}

OCTAVO_DEVICE float add_squares(float sum, float4 x) {
  const float low = add_rn(multiply_rn(x.x, x.x), multiply_rn(x.y, x.y));
  return add_rn(sum, add_rn(low, add_rn(multiply_rn(x.z, x.z), multiply_rn(x.w, x.w))));
}

// By what a row is multiplied.
OCTAVO_DEVICE float norm_scale(float squares, int width, float eps) {
  return reciprocal_sqrt(add_rn(divide_rn(squares, static_cast<float>(width)), eps));
}

OCTAVO_DEVICE float4 scaled(float4 x, float scale, float4 weight) {
  return {multiply_rn(multiply_rn(x.x, scale), weight.x),
          multiply_rn(multiply_rn(x.y, scale), weight.y),
          multiply_rn(multiply_rn(x.z, scale), weight.z),
          multiply_rn(multiply_rn(x.w, scale), weight.w)};
}

// ---- a few rows, normalized by a block of any number of warps into its shared memory ----

// Rows of the residual stream, to be normalized without a mean or a bias, of a width whose shape
// has one group a thread: up to 4096.
struct RowsToNorm {
  const float* data;
  long long stride;  // in numbers, a multiple of 4, as the width is
  const float* weight;
  int rows, width;
  float eps;

  OCTAVO_HOST_DEVICE int warps() const { return ceil_div(width, 4 * static_cast<int>(kWarp)); }
  // In shared memory: the normalized rows, T each, apart by a stride that puts two of them in
  // different banks; a weight each column; sums of warps.
  OCTAVO_HOST_DEVICE int out_stride() const { return round_up(width, kBlock) + kBlock; }
  OCTAVO_HOST_DEVICE int weights_at() const { return rows * out_stride() * 2; }
  OCTAVO_HOST_DEVICE int sums_at() const { return weights_at() + width * 4; }
  OCTAVO_HOST_DEVICE int shared_bytes() const { return sums_at() + rows * warps() * 4; }
};

inline RowsToNorm rows_to_norm(View residual, const Norm& norm) {
  return {residual.row(0),
          residual.stride,
          norm.weight,
          static_cast<int>(residual.rows),
          static_cast<int>(residual.cols),
          norm.spec.eps};
}

// Before the wait for the kernel before: the weights are sent for.
OCTAVO_DEVICE void begin_norm(const RowsToNorm& a, unsigned char* shared) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int col = 4 * thread; col < a.width; col += 4 * threads)
    async_copy_16_cached(shared + a.weights_at() + 4 * col, a.weight + col);
  async_commit();
}

// Four butterflies in six shuffles, which halve how many values there are at first: in lanes 0, 16,
// 8 and 24 the sums that warp_sum would give of values 0, 1, 2 and 3.
OCTAVO_DEVICE float warp_sums(const float (&values)[4], int lane) {
  const auto halve = [&](float first, float second, unsigned mask) {
    const bool keeps_second = lane & static_cast<int>(mask);
    return add_rn(keeps_second ? second : first, shuffle_xor(keeps_second ? first : second, mask));
  };
  float sum = halve(halve(values[0], values[1], 16), halve(values[2], values[3], 16), 8);
  for (unsigned mask = 4; mask; mask /= 2) sum = add_rn(sum, shuffle_xor(sum, mask));
  return sum;
}

// After the wait. A warp does the work of several of norm_rows, four at a time, whose loads are
// under way at once. Rows are read twice, the second time from the first-level cache.
template <class T>
OCTAVO_DEVICE void finish_norm(const RowsToNorm& a, unsigned char* shared) {
  constexpr int kLanes = static_cast<int>(kWarp), kAtOnce = 4;
  T* out = reinterpret_cast<T*>(shared);
  const auto* weight = reinterpret_cast<const float*>(shared + a.weights_at());
  auto* sums = reinterpret_cast<float*>(shared + a.sums_at());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kLanes, apart = threads / kLanes, warps = a.warps();
  const float* row = a.data + 4 * lane;
  int warp = thread / kLanes;  // of norm_rows, in its row
  for (int first = warp; first < a.rows * warps; first += kAtOnce * apart) {
    float squares[kAtOnce];
    float4 x[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      for (; warp >= warps; warp -= warps) row += a.stride;
      const int col = 4 * kLanes * warp;
      const bool exists = first + n * apart < a.rows * warps && col + 4 * lane < a.width;
      x[n] = exists ? bits_as<float4>(load_16(row + col)) : float4{0.0f, 0.0f, 0.0f, 0.0f};
      warp += apart;
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) squares[n] = add_squares(0.0f, x[n]);
    const float sum = warp_sums(squares, lane);
    const int index = first + (lane / 16 + lane / 8 % 2 * 2) * apart;
    if (lane % 8 == 0 && index < a.rows * warps) sums[index] = sum;
  }
  async_wait<0>();
  __syncthreads();
  for (int r = 0; r < a.rows; ++r) {
    const float* row_sums = sums + r * warps;
    float sum = row_sums[0];
    for (int i = 1; i < warps; ++i) sum = add_rn(sum, row_sums[i]);
    const float scale = norm_scale(sum, a.width, a.eps);
#pragma unroll 2
    for (int col = 4 * thread; col < a.width; col += 4 * threads) {
      const float4 x = bits_as<float4>(load_16(a.data + r * a.stride + col));
      const float4 y = scaled(x, scale, bits_as<float4>(load_16(weight + col)));
      store_8(out + r * a.out_stride() + col, {pack2<T>(y.x, y.y), pack2<T>(y.z, y.w)});
    }
  }
  __syncthreads();
}

}  // namespace octavo::cuda

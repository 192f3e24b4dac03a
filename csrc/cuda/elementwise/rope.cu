// Rotary position embedding of q and k, and storing k and v in the paged cache.

#include "cuda/backend.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/elementwise/rope.cuh"

namespace octavo::cuda {

namespace {

constexpr unsigned kHeadsPerBlock = 4;  // a warp each
constexpr int kPairsPerLane = 4;        // head_dim up to 256

// One head's vector of one token, by one warp: lane i has the pairs i + 32 n.
struct HeadVector {
  float first[kPairsPerLane], second[kPairsPerLane];
};

// A number's magnitude as an integer: larger for a larger one, the largest for a NaN.
OCTAVO_DEVICE int magnitude_of(float x) { return bits_as<int>(fabsf(x)); }

// The scale of int8 numbers whose largest magnitude is given; a NaN where one of them is.
OCTAVO_DEVICE float scale_of(int largest) {
  return largest > 0 ? divide_rn(bits_as<float>(largest), 127.0f) : 1.0f;
}

// Puts a key or value where it belongs.
OCTAVO_DEVICE void store_vector(const RopeArguments& a, const Place& place, const HeadVector& x) {
  const int half = (a.head_dim + 1) / 2, lane = static_cast<int>(lane_index());
  float scale = 1.0f;
  if (place.cache.dtype == DType::int8) {
    int largest = 0;
    for (int n = 0; n < kPairsPerLane; ++n)
      largest = larger(largest, larger(magnitude_of(x.first[n]), magnitude_of(x.second[n])));
    scale = scale_of(warp_reduce(largest, [](int a, int b) { return larger(a, b); }));
    if (lane == 0) place.set_scale(scale);
  }
  for (int n = 0; n < kPairsPerLane; ++n) {
    const int i = lane + 32 * n;
    if (i >= half) continue;
    place.store(a.lower(i), x.first[n], scale);
    if (a.upper(i) < a.head_dim) place.store(a.upper(i), x.second[n], scale);
  }
}

// x[i], x[i + pairs] = x[i] cos - x[i + pairs] sin, x[i + pairs] cos + x[i] sin, rounded to T, in
// place for q and k; then k and v, as rounded, to the slots. Heads are numbered q, k, v.
//
// Block (t, j): token t, heads 4 j to 4 j + 3, a warp each. Moves T (2 q + 2 k + v) + cache (k + v)
// bytes: for 32 + 8 + 8 heads of 64 bf16 numbers 13 KiB a token. A step of one token is 12 blocks,
// all of whose loads are under way at once; the angles are read before the kernel before has ended.
template <class T>
__global__ void rope_and_store_kernel(RopeArguments a) {
  let_next_kernel_start();
  const int token = static_cast<int>(blockIdx.x), lane = static_cast<int>(lane_index());
  const int head = static_cast<int>(blockIdx.y * kHeadsPerBlock + warp_index());
  if (head >= a.num_heads + 2 * a.num_kv_heads) {
    wait_for_previous_kernel();  // a kernel must not end before the one ahead of it
    return;
  }
  const int half = (a.head_dim + 1) / 2;
  const bool is_value = head >= a.num_heads + a.num_kv_heads;
  const int slot = head < a.num_heads ? -1 : a.slots[token];
  const bool rotates = a.cosines && !is_value;

  float cosine[kPairsPerLane] = {}, sine[kPairsPerLane] = {};
  if (rotates) {
    const std::int64_t angles = static_cast<std::int64_t>(a.rows[token]) * a.pairs;
    for (int n = 0; n < kPairsPerLane; ++n) {
      const int i = lane + 32 * n;
      if (i >= a.pairs) continue;
      cosine[n] = a.cosines[angles + i];
      sine[n] = a.sines[angles + i];
    }
  }
  wait_for_previous_kernel();
  if (!rotates && slot < 0) return;
  T* row = static_cast<T*>(a.qkv) + token * a.stride + head * a.head_dim;
  HeadVector x = {};
  for (int n = 0; n < kPairsPerLane; ++n) {
    const int i = lane + 32 * n;
    if (i >= half) continue;
    T &low = row[a.lower(i)], &high = row[a.upper(i)];
    x.first[n] = to_float(low);
    if (a.upper(i) < a.head_dim) x.second[n] = to_float(high);
    if (!rotates || i >= a.pairs) continue;
    const float first = x.first[n], second = x.second[n];
    const T lower = turned_first<T>(first, second, cosine[n], sine[n]);
    const T upper = turned_second<T>(first, second, cosine[n], sine[n]);
    low = lower;
    high = upper;
    x.first[n] = to_float(lower);
    x.second[n] = to_float(upper);
  }
  if (slot >= 0) store_vector(a, Place(a, slot, head), x);
}

// ---- the same, 16 bytes at a time ----

constexpr unsigned kWideThreads = 64;

// 8 numbers of either half of a head's vector.
struct WidePiece {
  float first[8], second[8];
};

template <class T>
OCTAVO_DEVICE void rotate(WidePiece& x, const float (&cosine)[8], const float (&sine)[8]) {
  for (int i = 0; i < 8; ++i) {
    const float first = x.first[i], second = x.second[i];
    x.first[i] = to_float(turned_first<T>(first, second, cosine[i], sine[i]));
    x.second[i] = to_float(turned_second<T>(first, second, cosine[i], sine[i]));
  }
}

// scale: of int8.
template <class T>
OCTAVO_DEVICE void store_wide(const Place& place, const WidePiece& x, int piece, int half,
                              float scale) {
  const KvLayout& cache = place.cache;
  if (cache.dtype == DType::int8 && piece == 0) place.set_scale(scale);
  if (!place.is_value && cache.dtype == (std::is_same_v<T, Bf16> ? DType::bf16 : DType::f16)) {
    unsigned char* key = place.items + 2 * cache.key_item(place.within, 8 * piece);
    store_16(key, pack_eight<T>(x.first));
    store_16(key + 2 * half, pack_eight<T>(x.second));
    return;
  }
  for (int i = 0; i < 8; ++i) {
    place.store(8 * piece + i, x.first[i], scale);
    place.store(8 * piece + i + half, x.second[i], scale);
  }
}

// Thread i of block (t, j): piece p = (64 j + i) % (head_dim / 16) of a head of token t. For heads
// of 16, 32, 64, 128 or 256 numbers of 16 bits whose rows are aligned. The same bits as above, with
// an eighth of the threads: 3 blocks of 64 a token for 48 heads of 64.
template <class T>
__global__ void rope_and_store_wide_kernel(RopeArguments a) {
  let_next_kernel_start();
  const int pieces = a.head_dim / 16, half = a.head_dim / 2, token = static_cast<int>(blockIdx.x);
  const int index = static_cast<int>(blockIdx.y * kWideThreads + threadIdx.x);
  const int head = index / pieces, piece = index % pieces;
  const bool exists = head < a.num_heads + 2 * a.num_kv_heads;
  const bool is_value = head >= a.num_heads + a.num_kv_heads;
  const bool rotates = exists && a.cosines && !is_value;
  const int slot = exists && head >= a.num_heads ? a.slots[token] : -1;
  float cosine[8], sine[8];
  if (rotates) {
    const std::int64_t angles = static_cast<std::int64_t>(a.rows[token]) * half + 8 * piece;
    load_eight(cosine, a.cosines + angles);
    load_eight(sine, a.sines + angles);
  }
  wait_for_previous_kernel();
  WidePiece x = {};
  T* row = static_cast<T*>(a.qkv) + token * a.stride + head * a.head_dim + 8 * piece;
  if (rotates || slot >= 0) {
    unpack_eight<T>(x.first, load_16(row));
    unpack_eight<T>(x.second, load_16(row + half));
  }
  if (rotates) {
    rotate<T>(x, cosine, sine);
    store_16(row, pack_eight<T>(x.first));
    store_16(row + half, pack_eight<T>(x.second));
  }
  float scale = 1.0f;
  if (a.cache.dtype == DType::int8) {
    int largest = 0;
    for (int i = 0; i < 8; ++i)
      largest = larger(largest, larger(magnitude_of(x.first[i]), magnitude_of(x.second[i])));
    for (int mask = pieces / 2; mask; mask /= 2)
      largest = larger(largest, shuffle_xor(largest, static_cast<unsigned>(mask)));
    scale = scale_of(largest);
  }
  if (slot >= 0) store_wide<T>(Place(a, slot, head), x, piece, half, scale);
}

bool can_be_wide(View qkv, const RopeArguments& a) {
  const int dim = a.head_dim;
  return bits_of(qkv.dtype) == 16 && dim >= 16 && (dim & (dim - 1)) == 0 && 2 * a.pairs == dim &&
         qkv.stride % 8 == 0 && is_aligned(qkv.data, 16) && is_aligned(a.cosines, 16) &&
         is_aligned(a.sines, 16) && is_aligned(a.cache.data, 16);
}

}  // namespace

void CudaBackend::rope_and_store(View qkv, const Rope* rope, const LayerSpec& layer, KvLayer& kv,
                                 const Step& step) {
  require(qkv.cols == layer.qkv_size(), "qkv has ", qkv.cols, " columns; expected ",
          layer.qkv_size());
  require(!rope || layer.head_dim % 2 == 0, "head_dim is ", layer.head_dim,
          "; only an even one can be rotated");
  if (step.num_tokens == 0) return;
  const RopeArguments a = rope_arguments(qkv, rope, layer, kv, step);
  const int heads = a.num_heads + 2 * a.num_kv_heads;
  if (can_be_wide(qkv, a)) {
    const dim3 grid = dims(step.num_tokens, ceil_div(heads * (a.head_dim / 16), kWideThreads));
    return for_16_bits(qkv.dtype, [&](auto zero) {
      launch(stream_, "rope_and_store", {grid, kWideThreads, 0, true},
             rope_and_store_wide_kernel<decltype(zero)>, a);
    });
  }
  const dim3 grid = dims(step.num_tokens, ceil_div(heads, kHeadsPerBlock));
  for_type("rope_and_store", qkv.dtype, [&](auto zero) {
    launch(stream_, "rope_and_store", {grid, kWarp * kHeadsPerBlock, 0, true},
           rope_and_store_kernel<decltype(zero)>, a);
  });
}

}  // namespace octavo::cuda

// Attention for whatever the fast kernels do not take: float32, mixed formats, any head_dim, capped
// scores.
//
//   out[t, h] = sum over visible j of softmax_j(scale * q[t, h] . k[j]) v[j]
//
// A warp takes one query head of one token through the context, 32 keys at a time (Milakov &
// Gimelshein 2018, arXiv 1805.02867): lane i scores key 32 n + i, then each lane adds up the values
// of dimensions i, i + 32, ... All of it is float32, and a row's sums depend on the row alone.
//
// Over a bf16 cache (reference/ops.py, attention with dtype "bf16") q is rounded to bf16, and so
// are the weights before they meet v; their sum is not. A weight is 2^(s - N), N being the greatest
// score so far, made whole: another N changes all weights by a power of two, on which no rounding
// depends, so that they round alike in tiles of any size.
//
// K and V are read once for every query head: group times the bytes that are needed, in pieces.
#include "cuda/attention/attention.cuh"

namespace octavo::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kMaxHeadDim = 256;
constexpr int kDimsPerLane = kMaxHeadDim / 32;

// Where a key is: its KV head's items of its block, and its number in the block.
struct Place {
  const unsigned char* items;
  int within;
};
OCTAVO_DEVICE Place find_key(const AttentionArguments& a, int seq, int kv_head, int key) {
  const int block = a.table_of(seq)[key / a.cache.block_size];
  return {a.cache.data + a.cache.head_at(block, kv_head), key % a.cache.block_size};
}

OCTAVO_DEVICE float scale_of(const KvLayout& cache, const Place& place, bool of_value) {
  if (cache.dtype != DType::int8) return 1.0f;
  const auto* scales = reinterpret_cast<const float*>(place.items + cache.scales_at());
  return scales[of_value ? cache.block_size + place.within : place.within];
}

OCTAVO_DEVICE float score(const AttentionArguments& a, const float* q, const Place& place) {
  float sum = 0.0f;
  for (int d = 0; d < a.head_dim; ++d)
    sum =
        fma_rn(q[d], load_item(place.items, a.cache.dtype, a.cache.key_item(place.within, d)), sum);
  const float scaled = multiply_rn(multiply_rn(sum, scale_of(a.cache, place, false)), a.scale);
  return a.cap == 0.0f ? scaled : multiply_rn(tanhf(scaled), a.cap);
}

OCTAVO_DEVICE float to_bf16_and_back(float x) { return to_float(from_float<Bf16>(x)); }

template <class T>
__global__ void attend_simply_kernel(AttentionArguments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int token = static_cast<int>(blockIdx.x), lane = static_cast<int>(lane_index());
  const int head = static_cast<int>(blockIdx.y * kWarps + warp_index());
  if (head >= a.num_heads) return;
  float* q = reinterpret_cast<float*>(shared_memory()) + warp_index() * kMaxHeadDim;
  const T* from = static_cast<const T*>(a.q) + token * a.q_stride + head * a.head_dim;
  const bool rounds = a.cache.dtype == DType::bf16;
  for (int d = lane; d < a.head_dim; d += 32) {
    const float x = to_float(from[d]);
    q[d] = rounds ? to_bf16_and_back(x) : x;
  }
  sync_warp();

  const int kv_head = head / a.group;
  const int seq = last_sequence(a.num_seqs, [&](int i) { return a.row_starts[i] <= token; });
  const int position = a.context_lens[seq] - (a.row_starts[seq + 1] - token);  // < 0: padding
  const Visible visible = visible_keys(position, a.window);
  float max = minus_infinity(), sum = 0.0f, out[kDimsPerLane] = {};
  for (int tile = visible.begin / 32 * 32; tile < visible.end; tile += 32) {
    const int key = tile + lane;
    const bool sees = visible.begin <= key && key < visible.end;
    Place place{};
    if (sees) place = find_key(a, seq, kv_head, key);
    const float mine = sees ? score(a, q, place) : minus_infinity();
    const float greatest = warp_max(mine);
    const float new_max = fmaxf(max, rounds ? ceilf(greatest) : greatest);
    const float keep = shrink(max, new_max);
    const float weight = shrink(mine, new_max);
    sum = fma_rn(sum, keep, warp_sum(weight));
    max = new_max;
    const float used = rounds ? to_bf16_and_back(weight) : weight;
    const float scaled = sees ? multiply_rn(used, scale_of(a.cache, place, true)) : 0.0f;
    for (int n = 0; n < kDimsPerLane; ++n) out[n] = multiply_rn(out[n], keep);
    for (int i = 0; i < 32; ++i) {
      const float w = shuffle(scaled, static_cast<unsigned>(i));
      if (tile + i < visible.begin || tile + i >= visible.end) continue;
      const Place value = find_key(a, seq, kv_head, tile + i);
      for (int n = 0; n < kDimsPerLane; ++n) {
        const int d = lane + 32 * n;
        if (d >= a.head_dim) continue;
        out[n] = fma_rn(
            w, load_item(value.items, a.cache.dtype, a.cache.value_item(value.within, d)), out[n]);
      }
    }
  }
  T* to = static_cast<T*>(a.out) + token * a.out_stride + head * a.head_dim;
  for (int n = 0; n < kDimsPerLane; ++n) {
    const int d = lane + 32 * n;
    if (d < a.head_dim) to[d] = from_float<T>(position < 0 ? 0.0f : divide_rn(out[n], sum));
  }
}

}  // namespace

void attend_simply(Stream& stream, DType dtype, const AttentionArguments& a) {
  const LaunchShape shape{dims(a.num_tokens, ceil_div(a.num_heads, kWarps)), kWarp * kWarps,
                          kWarps * kMaxHeadDim * sizeof(float), true};
  for_type("attention", dtype, [&](auto zero) {
    launch(stream, "attend_simply", shape, attend_simply_kernel<decltype(zero)>, a);
  });
}

}  // namespace octavo::cuda

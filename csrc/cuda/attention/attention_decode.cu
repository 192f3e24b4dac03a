// Attention of sequences that bring few tokens: decoding, and verifying speculated tokens.
//
// A block is 4 warps and serves 16 query rows (all query heads of a KV head, of one token or of
// several) over some splits of the context. Of every 4 tiles of a split each warp takes one: it
// loads 64 keys and values from the cache straight into registers, 16 bytes a lane at a time and
// all of them before it uses the first, and computes the tile's part (attention_tile.cuh); the
// parts are folded, in order, by way of shared memory, while with head_dim 64 the next tiles are
// on their way. A block that has all splits of its rows writes the result. Otherwise splits' states
// go to the workspace, and the last block to arrive folds them in ascending order, so that it does
// not matter which block computed what or when.
//
// Bytes: 2 x context x head_dim numbers a KV head, once; a split's state is 4 (head_dim + 2) bytes
// a row: for 4 heads of 64, 1 KiB beside the 64 KiB of 256 keys in bf16, less in longer splits.
//
// In flight: a warp's tile is 16 KiB (bf16, head_dim 64). On an H200 4.8 TB/s at 0.8 us need 3.8
// MB, 29 KiB a processor, two warps; two blocks fit, even where a thread takes 255 registers.
// Blocks: a sequence of 2048 tokens and 8 KV heads has 8 x 8 of them, one of 16k 48 x 8.
//
// With programmatic dependent launch a block loads its first keys and values before the kernel
// ahead of it has ended: only tokens of this step are stored by kernels of this step.

#include "cuda/attention/attention_worker.cuh"

namespace octavo::cuda {

using namespace decoding;

namespace {

// A row's state, spread over 8 threads: thread c of them has dimensions 4 (c + 8 i) .. + 3.
template <int kDim>
struct State {
  float max, sum;
  float4 values[kDim / 32];

  OCTAVO_DEVICE void clear() {
    max = minus_infinity();
    sum = 0.0f;
#pragma unroll
    for (float4& v : values) v = {0.0f, 0.0f, 0.0f, 0.0f};
  }
  OCTAVO_DEVICE void keep(Kept<kDim>& to) const {
    to.max[threadIdx.x] = max;
    to.sum[threadIdx.x] = sum;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) to.values[i][threadIdx.x] = values[i];
  }
  OCTAVO_DEVICE void take(const Kept<kDim>& from) {
    max = from.max[threadIdx.x];
    sum = from.sum[threadIdx.x];
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) values[i] = from.values[i][threadIdx.x];
  }
  OCTAVO_DEVICE void add(const Fold& f, float part_sum, const float4 (&part)[kDim / 32]) {
    max = f.max;
    sum = fold(f, sum, part_sum);
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      float4& v = values[i];
      v = {fold(f, v.x, part[i].x), fold(f, v.y, part[i].y), fold(f, v.z, part[i].z),
           fold(f, v.w, part[i].w)};
    }
  }
};

// The thread's row of the 16, and its number among the row's 8 threads.
OCTAVO_DEVICE int my_row() { return static_cast<int>(threadIdx.x / 8); }
OCTAVO_DEVICE int my_column() { return static_cast<int>(threadIdx.x % 8); }

// Folds the parts of the warps, which are of ascending tiles, into the state of the split.
template <int kDim>
OCTAVO_DEVICE void fold_parts(State<kDim>& state, const Parts<kDim>& parts, int count) {
  const int row = my_row();
  for (int warp = 0; warp < count; ++warp) {
    float4 part[kDim / 32];
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i)
      part[i] = bits_as<float4>(load_16(&parts.values[warp][row][4 * (my_column() + 8 * i)]));
    state.add(fold_of_tile(state.max, state.sum, parts.max[warp][row]), parts.sum[warp][row], part);
  }
}

template <int kDim>
OCTAVO_DEVICE void add_to_total(Kept<kDim>& kept, const State<kDim>& split, bool is_first) {
  State<kDim> total;
  is_first ? total.clear() : total.take(kept);
  total.add(fold_of(total.max, split.max), split.sum, split.values);
  total.keep(kept);
}

// Of a split and a row in the workspace: values, maximum and sum.
template <int kDim>
constexpr int kPartialStride = kDim + 4;
template <int kDim>
OCTAVO_DEVICE float* partial_of(const DecodeWork& work, const Rows& rows, int num_kv_heads, int row,
                                int split) {
  const std::int64_t index =
      static_cast<std::int64_t>(computed_anew(rows.seq) * work.max_rows + rows.first_row + row) *
          num_kv_heads +
      rows.kv_head;
  return work.partials + (index * work.max_splits + split) * kPartialStride<kDim>;
}

template <int kDim>
OCTAVO_DEVICE void write_partial(float* to, const State<kDim>& state) {
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i)
    store_16(to + 4 * (my_column() + 8 * i), bits_as<uint4>(state.values[i]));
  if (my_column() == 0) {
    to[kDim] = state.max;
    to[kDim + 1] = state.sum;
  }
}

template <class T, class Item, int kDim>
OCTAVO_DEVICE void write_row(const AttentionArguments& a, const Rows& rows,
                             const State<kDim>& total) {
  T* out = rows.numbers_of(a, static_cast<T*>(a.out), a.out_stride, my_row());
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const float4& v = total.values[i];
    auto* to = reinterpret_cast<std::uint32_t*>(out + 4 * (my_column() + 8 * i));
    to[0] = result_of<T>(v.x, v.y, total.sum);
    to[1] = result_of<T>(v.z, v.w, total.sum);
  }
}

// Folds the splits' states into the result. All threads take part however few rows there are
// (kMost: 4, 8 or 16), each with its dimensions of all splits; the loads of as many splits as
// registers allow (20 for 4 rows of 64) are begun before the first is folded.
template <class T, class Item, int kDim, int kMost>
OCTAVO_DEVICE void fold_splits(const AttentionArguments& a, const DecodeWork& work,
                               const Rows& rows, int count) {
  constexpr int kThreadsOfRow = kThreads / kMost, kPairs = kDim / kThreadsOfRow / 2;
  constexpr int kAhead = kPairs == 1 ? 20 : 24 / kPairs;
  const int thread = computed_anew(static_cast<int>(threadIdx.x));
  const int row = thread / kThreadsOfRow, dim = thread % kThreadsOfRow * 2 * kPairs;
  if (row >= rows.count) return;
  const float* from = partial_of<kDim>(work, rows, a.num_heads / a.group, row, 0);
  float max = minus_infinity(), sum = 0.0f;
  float2 total[kPairs] = {};
  for (int first = 0; first < count; first += kAhead) {
    float2 part[kAhead][kPairs], state[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const float* split =
          from + static_cast<std::int64_t>(smaller(first + n, count - 1)) * kPartialStride<kDim>;
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        part[n][i] = *reinterpret_cast<const float2*>(split + dim + 2 * i);
      state[n] = *reinterpret_cast<const float2*>(split + kDim);
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (first + n >= count) continue;
      const Fold f = fold_of(max, state[n].x);
      max = f.max;
      sum = fold(f, sum, state[n].y);
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        total[i] = {fold(f, total[i].x, part[n][i].x), fold(f, total[i].y, part[n][i].y)};
    }
  }
  T* out = rows.numbers_of(a, static_cast<T*>(a.out), a.out_stride, row) + dim;
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
    reinterpret_cast<std::uint32_t*>(out)[i] = result_of<T>(total[i].x, total[i].y, sum);
}

// Whether this block is the last of `count` to arrive; the counter is then zero again.
template <int kDim>
OCTAVO_DEVICE bool arrive(std::int32_t* counter, int count, Parts<kDim>& parts) {
  __syncthreads();
  if (threadIdx.x == 0) {
    parts.is_last = atomic_add_acquire_release(counter, 1) == count - 1;
    if (parts.is_last) *counter = 0;
  }
  __syncthreads();
  return parts.is_last;
}

// One set of up to 16 rows: this block's share of the splits, and perhaps the result. entry: of the
// block table, for this warp's first tile where contexts begin with key 0.
template <class T, class Item, int kDim>
OCTAVO_DEVICE void attend_rows(const AttentionArguments& a, const DecodeWork& work,
                               const Rows& rows, int worker, int entry) {
  const Tiles seen = tiles_of(a, rows);
  const int first_split = split_of_tile(seen.first);
  const int end_split = split_of_tile(seen.end - 1) + 1;
  int workers = smaller(work.workers, end_split - first_split);
  if (rows.first_row + rows.count > work.max_rows) workers = 1;
  if (worker >= workers) return;

  auto& parts = *reinterpret_cast<Parts<kDim>*>(shared_memory());
  const int warp = static_cast<int>(warp_index()), num_kv_heads = a.num_heads / a.group;
  const bool has_row = my_row() < rows.count;
  const auto entry_of = [&](int tile) {
    return load_table_entry(a, a.table_of(computed_anew(rows.seq)), tile);
  };
  const auto first_of = [&](int split) { return larger(split_begin(split), seen.first); };
  const auto end_of = [&](int split) { return smaller(split_begin(split + 1), seen.end); };
  using Worker = TileWorker<T, Item, kDim>;
  Worker tiles(a, rows);
  State<kDim> state;
  // Tiles at .. at + 3 of the split, one a warp.
  int split = first_split + worker, at = first_of(split);
  if (a.window > 0 || !Worker::kLoadsAhead) entry = entry_of(at + warp);  // registers are short
  if (Worker::kLoadsAhead && at + warp < end_of(split)) tiles.begin(at + warp, entry);
  for (bool is_first = true; split < end_split;) {
    const int end = end_of(split), tile = at + warp;
    const bool goes_on = at + kWarps < end;
    const int next_split = goes_on ? split : split + workers;
    const int next_at = goes_on ? at + kWarps : first_of(next_split), next = next_at + warp;
    const bool has_next = next_split < end_split && next < end_of(next_split);
    const int next_entry = entry_of(next);
    if (!Worker::kLoadsAhead && tile < end) tiles.begin(tile, entry);
    if (tile < end)
      tiles.work(tile, has_next ? next : -1, next_entry, parts, rows.count > 8);
    else if (Worker::kLoadsAhead && has_next)
      tiles.begin(next, next_entry);
    entry = next_entry;
    wait_for_previous_kernel();  // whose input may be this kernel's output
    __syncthreads();
    if (has_row) {
      is_first ? state.clear() : state.take(parts.split);
      fold_parts(state, parts, smaller(end - at, kWarps));
      if (goes_on)
        state.keep(parts.split);
      else if (workers > 1)
        write_partial(partial_of<kDim>(work, rows, num_kv_heads, my_row(), split - first_split),
                      state);
      else
        add_to_total(parts.total, state, split == first_split);
    }
    __syncthreads();
    is_first = !goes_on;
    split = next_split;
    at = next_at;
  }
  if (workers > 1) {
    const int set = rows.first_row / kRows;
    const int counter = (rows.seq * work.sets + set) * num_kv_heads + rows.kv_head;
    if (!arrive(work.counters + counter, workers, parts)) return;
    const int count = end_split - first_split;
    if (rows.count <= 4)
      fold_splits<T, Item, kDim, 4>(a, work, rows, count);
    else if (rows.count <= 8)
      fold_splits<T, Item, kDim, 8>(a, work, rows, count);
    else
      fold_splits<T, Item, kDim, 16>(a, work, rows, count);
  } else if (has_row) {
    state.take(parts.total);
    write_row<T, Item, kDim>(a, rows, state);
  }
}

// Block (i, h, w): set i % sets of the rows of sequence i / sets (and every sets-th after it),
// KV head h, worker w of those that share the splits.
template <class T, class Item, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    decode_attention_kernel(AttentionArguments a, DecodeWork work) {
  let_next_kernel_start();
  Rows rows{};
  const int seq = static_cast<int>(blockIdx.x) / work.sets;
  // Long splits come last: the blocks that begin with them start first.
  const int worker = work.workers - 1 - static_cast<int>(blockIdx.z);
  const int entry =
      load_table_entry(a, a.table_of(seq), split_begin(worker) + static_cast<int>(warp_index()));
  rows.kv_head = static_cast<int>(blockIdx.y);
  const int num_tokens = rows.take_sequence(a, seq);
  const bool is_mine = work.max_tokens == 0 || num_tokens <= work.max_tokens;
  const int num_rows = is_mine ? num_tokens * a.group : 0;
  rows.first_row = static_cast<int>(blockIdx.x) % work.sets * kRows;
  for (; rows.first_row < num_rows; rows.first_row += work.sets * kRows) {
    rows.count = smaller(num_rows - rows.first_row, kRows);
    if (rows.context > 0) {
      attend_rows<T, Item, kDim>(a, work, rows, worker, entry);
    } else if (worker == 0) {
      wait_for_previous_kernel();
      rows.clear<T>(a);
    }
  }
  wait_for_previous_kernel();  // a kernel must not end before the one ahead of it
}

}  // namespace

void attend_few(Stream& stream, DType dtype, const AttentionArguments& a, const DecodeWork& work) {
  const dim3 grid = dims(a.num_seqs * work.sets, a.num_heads / a.group, work.workers);
  for_tile(dtype, a, [&](auto tile) {
    using Shape = decltype(tile);
    launch(stream, "decode_attention", {grid, kThreads, sizeof(Parts<Shape::kDim>), true},
           decode_attention_kernel<typename Shape::T, typename Shape::Item, Shape::kDim>, a, work);
  });
}

}  // namespace octavo::cuda

// Attention of sequences that bring few tokens: decoding, and verifying speculated tokens.
//
// A block is 4 warps and serves 16 query rows (all query heads of a KV head, of one token or of
// several) over some splits of the context. Of every 4 tiles of a split each warp takes one: it
// loads 64 keys and values from the cache straight into registers, 16 bytes a lane at a time and
// all of them before it uses the first, and computes the tile's part (attention_tile.cuh); the
// parts are folded, in order, by way of shared memory. A block that has all splits of its rows
// writes the result. Otherwise splits' states go to the workspace, and the last block to arrive
// folds them in ascending order, so that it does not matter which block computed what or when.
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

#include "cuda/attention_plan.cuh"
#include "cuda/attention_tile.cuh"

namespace octavo::cuda {

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16;

// The states of 16 rows, as the threads that fold them hold them, while these do other things.
template <int kDim>
struct Kept {
  float4 values[kDim / 32][kThreads];
  float max[kThreads], sum[kThreads];
};

// Rows of a part in shared memory, apart by 8 numbers more than they have, so that the lanes of a
// warp write to different banks.
template <int kDim>
struct Parts {
  static constexpr int kStride = kDim + 8;
  float values[kWarps][kRows][kStride];
  float max[kWarps][kRows], sum[kWarps][kRows];
  float scales[kWarps][2][kTileKeys];  // int8: of the keys and values of the warp's tile
  Kept<kDim> split, total;
  int is_last;
};

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
  OCTAVO_DEVICE void add(float part_max, float part_sum, const float4 (&part)[kDim / 32]) {
    const Fold f = fold_of(max, part_max);
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

// What a block works on at a time.
struct Rows {
  int seq, kv_head;
  int first_token;       // of the sequence, in the step
  int first_row, count;  // of the sequence's rows
  int first_position;    // of the sequence's first new token
  int context;
  int first_tile, end_tile;  // that any of the rows sees
};

template <class T>
OCTAVO_DEVICE T* row_of(T* data, std::int64_t stride, const AttentionArguments& a, const Rows& rows,
                        int row) {
  const int index = rows.first_row + row;
  return data + (rows.first_token + index / a.group) * stride +
         (rows.kv_head * a.group + index % a.group) * a.head_dim;
}

// One warp's tile: everything from loading to its part in shared memory.
template <class T, class Item, int kDim>
class TileWorker {
 public:
  using Shape = Tile<T, Item, kDim>;
  // What is loaded at a time: 16 x 16 bytes a lane. More (bf16 and head_dim 128) are two halves, of
  // the keys by groups, of the values by dimensions.
  static constexpr int kAll = kTileKeys * Shape::kRowBytes / (32 * 16);
  static constexpr int kHalves = kAll > 16 ? 2 : 1;
  static constexpr int kPart = kAll / kHalves;

  OCTAVO_DEVICE TileWorker(const AttentionArguments& a, const Rows& rows) : a_(a), rows_(rows) {}

  OCTAVO_DEVICE void work(int tile, int entry, Parts<kDim>& parts, bool upper_rows) {
    const Page page = page_of(a_.cache, rows_.kv_head, tile, rows_.context, entry);
    const bool is_past = (tile + 1) * kTileKeys <= rows_.first_position;
    if (!is_past) wait_for_previous_kernel();
    const Sight sight = look(tile);
    uint4 first[kPart], second[kPart];
    float s[8][4] = {};
    float2 key_scales, value_scales;
    LaneScales scales{};
    if constexpr (Shape::kScaled) load_scales(key_scales, value_scales, page);
    if constexpr (kHalves == 1) {
      load_keys<0>(first, page);
      load_values<0>(second, page);
      load_rows();
      if constexpr (Shape::kScaled) scales = share(parts, key_scales, value_scales);
      score<0>(s, first);
    } else {
      load_keys<0>(first, page);
      load_keys<1>(second, page);
      load_rows();
      score<0>(s, first);
      load_values<0>(first, page);
      score<1>(s, second);
      load_values<1>(second, page);
    }
    const int g = static_cast<int>(lane_index() / 4), warp = static_cast<int>(warp_index());
    RowPart part[2] = {weigh<T, Item, kDim>(s, 0, a_.scale, sight, scales), {}};
    if (upper_rows) part[1] = weigh<T, Item, kDim>(s, 1, a_.scale, sight, scales);
    for (int half = 0; half < 2; ++half) {
      parts.max[warp][g + 8 * half] = part[half].max;
      parts.sum[warp][g + 8 * half] = part[half].sum;
    }
    std::uint32_t p[4][4];
    pack_weights<T>(p, s);
    if constexpr (kHalves == 1) {
      add_up<0>(p, second, sight, parts, upper_rows);
    } else {
      add_up<0>(p, first, sight, parts, upper_rows);
      add_up<1>(p, second, sight, parts, upper_rows);
    }
  }

 private:
  OCTAVO_DEVICE Sight look(int tile) const {
    Sight sight{tile * kTileKeys, rows_.context, a_.window, false, {}};
    const int g = static_cast<int>(lane_index() / 4);
    const auto position = [&](int row) {
      return rows_.first_position + (rows_.first_row + (row < rows_.count ? row : 0)) / a_.group;
    };
    sight.position[0] = position(g);
    sight.position[1] = position(g + 8);
    sight.all = sight.first_key + kTileKeys <= position(0) + 1 &&
                sight.first_key >= visible_keys(position(rows_.count - 1), a_.window).begin;
    return sight;
  }

  // Queries, once the kernel that rotated them has ended: for each tile anew, from the first cache,
  // rather than to keep registers for them.
  OCTAVO_DEVICE void load_rows() {
    wait_for_previous_kernel();
    const int g = static_cast<int>(lane_index() / 4);
    const T* q = static_cast<const T*>(a_.q);
    load_queries<T, Item, kDim>(
        q_, g < rows_.count ? row_of(q, a_.q_stride, a_, rows_, g) : nullptr,
        g + 8 < rows_.count ? row_of(q, a_.q_stride, a_, rows_, g + 8) : nullptr);
  }

  // Piece c of the key of product t, group: entry (group, t, c), counted within the half.
  template <int kHalf>
  OCTAVO_DEVICE void load_keys(uint4 (&to)[kPart], const Page& page) const {
    const auto g = lane_index() / 4, j = lane_index() % 4;
    constexpr int kPagesOfGroup = kTilePages / Shape::kGroups;
#pragma unroll
    for (int n = 0; n < kPart / Shape::kPieces / Shape::kProducts; ++n) {
      const int group = kHalf * (Shape::kGroups / kHalves) + n;
      const unsigned in_group = Shape::kItems == 8 ? g / 4 : g / 2;
      const Page from = shuffle_page(page, static_cast<unsigned>(group * kPagesOfGroup) + in_group);
      const unsigned char* keys = a_.cache.data + from.head + from.within * Shape::kRowBytes;
#pragma unroll
      for (int t = 0; t < Shape::kProducts; ++t) {
        const int key = key_of_product<Shape::kItems>(t) % kPageTokens;
#pragma unroll
        for (int c = 0; c < Shape::kPieces; ++c)
          to[(n * Shape::kProducts + t) * Shape::kPieces + c] =
              load_16(keys + key * Shape::kRowBytes + 64 * c + 16 * j);
      }
    }
  }

  template <int kHalf>
  OCTAVO_DEVICE void score(float (&s)[8][4], const uint4 (&pieces)[kPart]) const {
    constexpr int kCount = kPart / Shape::kPieces;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
#pragma unroll
      for (int c = 0; c < Shape::kPieces; ++c)
        multiply_piece<T, Item, kDim>(s[kHalf * kCount + t], q_, c, pieces[t * Shape::kPieces + c]);
    }
  }

  // The piece of dimension g of product n: entry (n, group), counted within the half.
  template <int kHalf>
  OCTAVO_DEVICE void load_values(uint4 (&to)[kPart], const Page& page) const {
    const auto g = lane_index() / 4, j = lane_index() % 4;
    constexpr int kDimBytes = kPageTokens * static_cast<int>(sizeof(Item));
    constexpr int kProducts = kDim / 8 / kHalves;
    const int values_at = a_.cache.block_size * Shape::kRowBytes;
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const Page from = shuffle_page(page, Shape::kItems == 8 ? 2 * group + j / 2 : j);
      const unsigned char* values = a_.cache.data + from.head + values_at +
                                    from.within * Shape::kRowBytes +
                                    (Shape::kItems == 8 ? j % 2 * 16 : 0);
#pragma unroll
      for (int n = 0; n < kProducts; ++n)
        to[n * Shape::kGroups + group] =
            load_16(values + (8 * (kHalf * kProducts + n) + static_cast<int>(g)) * kDimBytes);
    }
  }

  // int8: lane i loads the scales of keys 2 i and 2 i + 1, and all get theirs from shared memory.
  OCTAVO_DEVICE void load_scales(float2& keys, float2& values, const Page& page) const {
    const Page from = shuffle_page(page, lane_index() / 8);
    const auto* at =
        reinterpret_cast<const float*>(a_.cache.data + from.head + a_.cache.scales_at()) +
        from.within + lane_index() % 8 * 2;
    keys = *reinterpret_cast<const float2*>(at);
    values = *reinterpret_cast<const float2*>(at + a_.cache.block_size);
  }
  OCTAVO_DEVICE LaneScales share(Parts<kDim>& parts, float2 keys, float2 values) const {
    auto& to = parts.scales[warp_index()];
    *reinterpret_cast<float2*>(to[0] + 2 * lane_index()) = keys;
    *reinterpret_cast<float2*>(to[1] + 2 * lane_index()) = values;
    sync_warp();
    return {to[0] + 16 * (lane_index() % 4), to[1] + 16 * (lane_index() % 4)};
  }

  template <int kHalf>
  OCTAVO_DEVICE void add_up(const std::uint32_t (&p)[4][4], uint4 (&pieces)[kPart],
                            const Sight& sight, Parts<kDim>& parts, bool upper_rows) const {
    const int g = static_cast<int>(lane_index() / 4), j = static_cast<int>(lane_index() % 4);
    if (sight.first_key + kTileKeys > sight.context) {
#pragma unroll
      for (int i = 0; i < kPart; ++i)
        pieces[i] = without_unwritten<Item>(
            pieces[i], sight.first_key + i % Shape::kGroups * 4 * Shape::kItems, sight.context);
    }
    auto& to = parts.values[warp_index()];
    constexpr int kProducts = kDim / 8 / kHalves;
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      float acc[4] = {};
#pragma unroll
      for (int group = 0; group < Shape::kGroups; ++group)
        add_piece<T, Item, kDim>(acc, p, group, pieces[n * Shape::kGroups + group]);
      const int dim = 8 * (kHalf * kProducts + n) + 2 * j;
      to[g][dim] = acc[0];
      to[g][dim + 1] = acc[1];
      if (!upper_rows) continue;
      to[g + 8][dim] = acc[2];
      to[g + 8][dim + 1] = acc[3];
    }
  }

  const AttentionArguments& a_;
  const Rows& rows_;
  std::uint32_t q_[kDim / 16][4];
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
    state.add(parts.max[warp][row], parts.sum[warp][row], part);
  }
}

template <int kDim>
OCTAVO_DEVICE void add_to_total(Kept<kDim>& kept, const State<kDim>& split, bool is_first) {
  State<kDim> total;
  is_first ? total.clear() : total.take(kept);
  total.add(split.max, split.sum, split.values);
  total.keep(kept);
}

// A row's part of the workspace: of each split values, maximum and sum.
template <int kDim>
OCTAVO_DEVICE float* partial_of(const DecodeWork& work, const Rows& rows, int num_kv_heads,
                                int split) {
  const std::int64_t row =
      static_cast<std::int64_t>(rows.seq * work.max_rows + rows.first_row + my_row()) *
          num_kv_heads +
      rows.kv_head;
  return work.partials + (row * work.max_splits + split) * (kDim + 4);
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

// Folds the splits' states: some are loaded before the first is used.
template <int kDim>
OCTAVO_DEVICE void fold_splits(State<kDim>& total, const float* from, int count) {
  constexpr int kAhead = 512 / kDim;
  total.clear();
  for (int first = 0; first < count; first += kAhead) {
    float4 part[kAhead][kDim / 32];
    float max[kAhead], sum[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const float* split =
          from + static_cast<std::int64_t>(first + n < count ? first + n : count - 1) * (kDim + 4);
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i)
        part[n][i] = bits_as<float4>(load_16(split + 4 * (my_column() + 8 * i)));
      max[n] = split[kDim];
      sum[n] = split[kDim + 1];
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (first + n < count) total.add(max[n], sum[n], part[n]);
    }
  }
}

template <class T, class Item, int kDim>
OCTAVO_DEVICE void write_row(const AttentionArguments& a, const Rows& rows,
                             const State<kDim>& total) {
  T* out = row_of(static_cast<T*>(a.out), a.out_stride, a, rows, my_row());
  const float sum = multiply_rn(total.sum, Tile<T, Item, kDim>::kBoost);
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const float4& v = total.values[i];
    const auto value = [&](float x) { return add_rn(divide_rn(x, sum), 0.0f); };  // no -0
    auto* to = reinterpret_cast<std::uint32_t*>(out + 4 * (my_column() + 8 * i));
    to[0] = pack2<T>(value(v.x), value(v.y));
    to[1] = pack2<T>(value(v.z), value(v.w));
  }
}

// Padding has no context: its rows become 0.
template <class T>
OCTAVO_DEVICE void clear_rows(const AttentionArguments& a, const Rows& rows) {
  wait_for_previous_kernel();
  if (my_row() >= rows.count) return;
  T* out = row_of(static_cast<T*>(a.out), a.out_stride, a, rows, my_row());
  for (int d = my_column(); d < a.head_dim; d += 8) out[d] = from_float<T>(0.0f);
}

// Whether this block is the last of `count` to arrive; the counter is then zero again.
template <int kDim>
OCTAVO_DEVICE bool arrive(std::int32_t* counter, int count, Parts<kDim>& parts) {
  fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    parts.is_last = atomic_add(counter, 1) == count - 1;
    if (parts.is_last) *counter = 0;
  }
  __syncthreads();
  fence();
  return parts.is_last;
}

// One set of up to 16 rows: this block's share of the splits, and perhaps the result. entry: of the
// block table, for this warp's first tile where contexts begin with key 0.
template <class T, class Item, int kDim>
OCTAVO_DEVICE void attend_rows(const AttentionArguments& a, const DecodeWork& work,
                               const Rows& rows, int set, int worker, int entry) {
  const int first_split = split_of_tile(rows.first_tile);
  const int num_splits = split_of_tile(rows.end_tile - 1) - first_split + 1;
  int workers = work.workers < num_splits ? work.workers : num_splits;
  if (rows.first_row + rows.count > work.max_rows) workers = 1;
  if (worker >= workers) return;

  auto& parts = *reinterpret_cast<Parts<kDim>*>(shared_memory());
  const std::int32_t* table = a.block_tables + static_cast<std::int64_t>(rows.seq) * a.max_blocks;
  const int warp = static_cast<int>(warp_index()), num_kv_heads = a.num_heads / a.group;
  const bool has_row = my_row() < rows.count;
  const auto entry_of = [&](int tile) {
    return load_table_entry(table, a.max_blocks, a.cache.block_size, tile);
  };
  const auto first_of = [&](int split) { return most(split_begin(split), rows.first_tile); };
  if (a.window > 0) entry = entry_of(first_of(first_split + worker) + warp);
  TileWorker<T, Item, kDim> tiles(a, rows);
  State<kDim> state;
  for (int split = first_split + worker; split < first_split + num_splits; split += workers) {
    const int begin = first_of(split), end = least(split_begin(split + 1), rows.end_tile);
    for (int at = begin; at < end; at += kWarps) {
      const int next = at + kWarps < end ? at + kWarps : split_begin(split + workers);
      const int next_entry = entry_of(next + warp);
      if (at + warp < end) tiles.work(at + warp, entry, parts, rows.count > 8);
      entry = next_entry;
      wait_for_previous_kernel();  // whose input may be this kernel's output
      __syncthreads();
      if (has_row) {
        at == begin ? state.clear() : state.take(parts.split);
        fold_parts(state, parts, least(end - at, kWarps));
        if (at + kWarps < end)
          state.keep(parts.split);
        else if (workers > 1)
          write_partial(partial_of<kDim>(work, rows, num_kv_heads, split - first_split), state);
        else
          add_to_total(parts.total, state, split == first_split);
      }
      __syncthreads();
    }
  }
  if (workers > 1) {
    const int counter = (rows.seq * work.sets + set) * num_kv_heads + rows.kv_head;
    if (!arrive(work.counters + counter, workers, parts)) return;
    if (has_row) fold_splits(state, partial_of<kDim>(work, rows, num_kv_heads, 0), num_splits);
  } else if (has_row) {
    state.take(parts.total);
  }
  if (has_row) write_row<T, Item, kDim>(a, rows, state);
}

// What registers leave room for without spilling: 24 KiB (int8) or 32 KiB and more on their way to
// each processor.
template <class Item, int kDim>
constexpr int blocks_of_processor() {
  return sizeof(Item) == 1 && kDim == 64 ? 3 : 2;
}

// Block (i, h, w): set i % sets of the rows of sequence i / sets (and every sets-th after it),
// KV head h, worker w of those that share the splits.
template <class T, class Item, int kDim>
__global__ void __launch_bounds__(kThreads, blocks_of_processor<Item, kDim>())
    decode_attention_kernel(AttentionArguments a, DecodeWork work) {
  let_next_kernel_start();
  Rows rows{};
  rows.seq = static_cast<int>(blockIdx.x) / work.sets;
  // Long splits come last: the blocks that begin with them start first.
  const int worker = work.workers - 1 - static_cast<int>(blockIdx.z);
  const int entry = load_table_entry(
      a.block_tables + static_cast<std::int64_t>(rows.seq) * a.max_blocks, a.max_blocks,
      a.cache.block_size, split_begin(worker) + static_cast<int>(warp_index()));
  rows.kv_head = static_cast<int>(blockIdx.y);
  rows.first_token = a.row_starts[rows.seq];
  const int num_tokens = a.row_starts[rows.seq + 1] - rows.first_token;
  rows.context = a.context_lens[rows.seq];
  rows.first_position = rows.context - num_tokens;
  const bool is_mine = work.max_tokens == 0 || num_tokens <= work.max_tokens;
  const int num_rows = is_mine ? num_tokens * a.group : 0;
  for (int set = static_cast<int>(blockIdx.x) % work.sets; set * kRows < num_rows;
       set += work.sets) {
    rows.first_row = set * kRows;
    rows.count = num_rows - rows.first_row < kRows ? num_rows - rows.first_row : kRows;
    if (rows.context == 0) {
      if (worker == 0) clear_rows<T>(a, rows);
      continue;
    }
    const Visible first = visible_keys(rows.first_position + rows.first_row / a.group, a.window);
    const Visible last =
        visible_keys(rows.first_position + (rows.first_row + rows.count - 1) / a.group, a.window);
    rows.first_tile = first.begin / kTileKeys;
    rows.end_tile = (last.end + kTileKeys - 1) / kTileKeys;
    attend_rows<T, Item, kDim>(a, work, rows, set, worker, entry);
  }
  wait_for_previous_kernel();  // a kernel must not end before the one ahead of it
}

template <class T, class Item, int kDim>
void launch_decode(Stream& stream, const AttentionArguments& a, const DecodeWork& work) {
  const LaunchShape shape{
      dim3(static_cast<unsigned>(a.num_seqs * work.sets),
           static_cast<unsigned>(a.num_heads / a.group), static_cast<unsigned>(work.workers)),
      dim3(kThreads), sizeof(Parts<kDim>), true};
  launch(stream, "decode_attention", shape, decode_attention_kernel<T, Item, kDim>, a, work);
}

template <class T, class Item>
void launch_decode(Stream& stream, const AttentionArguments& a, const DecodeWork& work) {
  if (a.head_dim == 64)
    launch_decode<T, Item, 64>(stream, a, work);
  else
    launch_decode<T, Item, 128>(stream, a, work);
}

}  // namespace

void attend_few(Stream& stream, DType dtype, const AttentionArguments& a, const DecodeWork& work) {
  const bool scaled = a.cache.dtype == DType::int8;
  if (dtype == DType::bf16) {
    scaled ? launch_decode<Bf16, std::int8_t>(stream, a, work)
           : launch_decode<Bf16, Bf16>(stream, a, work);
  } else {
    scaled ? launch_decode<F16, std::int8_t>(stream, a, work)
           : launch_decode<F16, F16>(stream, a, work);
  }
}

}  // namespace octavo::cuda

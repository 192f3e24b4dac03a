// Attention of sequences that bring many tokens: prompts, whole or in chunks.
//
// FlashAttention-2 (Dao 2023, arXiv 2307.08691) over the paged cache. A block takes up to 128 query
// rows of a sequence and KV head (a row: a token and one of the group's query heads; token by
// token) through all tiles of 64 keys that they see. While a tile is worked on, the next is on its
// way to shared memory (cp.async, two stages), as it lies in the cache: int8 is widened where
// fragments are loaded. The new tokens' keys and values are read from the cache like all others.
//
// The arithmetic is that of attention_tile.cuh, tile by tile and split by split. So beside what
// FlashAttention-2 does, P V of a tile is computed on its own before it is added, and the state of
// a split is folded into the result where the split ends (every 256 to 2048 keys), which lies in
// shared memory meanwhile. That is the price of equal bits in any chunking.
//
// Rows a warp: 32 with head_dim 64, where a fragment of K or V then serves two products, or 16 with
// 128. Shared memory: two stages of 2 x 64 x head_dim numbers and 128 x head_dim floats: 69 KiB
// with 64 and 133 KiB with 128 numbers of 2 bytes. With head_dim 128 a block takes 64 rows where it
// may have only 99 KiB (GPUs of 8.6, 8.9 and 12.0).
//
// Arithmetic: 4 x head_dim a query row and key that it sees; tiles that no row of a warp sees are
// left out. Bytes: K and V once a block, 2 x head_dim numbers a key for 128 rows.

#include "cuda/attention/attention_stage.cuh"

namespace octavo::cuda {

using namespace prefilling;

namespace {

// Query rows of a block.
template <int kDim, int kWarps>
constexpr int kRows = 16 * kBands<kDim> * kWarps;

template <class T, class Item, int kDim, int kWarps>
struct Shared {
  Stage<T, Item, kDim> stages[2];
  // Results so far, as the threads hold them: [16 rows x 8 dimensions][thread].
  float4 total[kBands<kDim> * kDim / 8][32 * kWarps];
  float2 total_state[kBands<kDim> * 2][32 * kWarps];  // maximum and sum
  Rows rows;  // for the few tiles that need them, and the end: registers are short meanwhile
};

// Block i has rows_of_block rows of the sequence s for which first_set(s) <= i < first_set(s + 1),
// where there are so many: ids that are not used are fewer than sequences, and no block needs to
// know more than row_starts to find its own.
template <int rows_of_block>
OCTAVO_DEVICE bool find_rows(Rows& rows, const AttentionArguments& a, int id, int min_tokens) {
  const auto first_set = [&](int seq) {
    return static_cast<int>(static_cast<std::int64_t>(a.row_starts[seq]) * a.group /
                            rows_of_block) +
           seq;
  };
  const int seq = last_sequence(a.num_seqs, [&](int i) { return first_set(i) <= id; });
  const int num_tokens = rows.take_sequence(a, seq), num_rows = num_tokens * a.group;
  rows.first_row = (id - first_set(seq)) * rows_of_block;
  rows.count = smaller(num_rows - rows.first_row, rows_of_block);
  return num_tokens > min_tokens && rows.count > 0;
}

template <int kDim>
OCTAVO_DEVICE int first_row_of_warp() {
  return static_cast<int>(warp_index()) * 16 * kBands<kDim>;
}
// Whether any row of the warp sees a key of the tile.
template <int kDim>
OCTAVO_DEVICE bool warp_sees(const AttentionArguments& a, const Rows& rows, int tile) {
  const int first = first_row_of_warp<kDim>();
  const int last = smaller(first + 16 * kBands<kDim>, rows.count) - 1;
  return first < rows.count && tile * kTileKeys <= rows.position(a, last) &&
         (tile + 1) * kTileKeys > visible_keys(rows.position(a, first), a.window).begin;
}

// What a warp holds of its rows: 16 a band. Halves: rows g and g + 8.
template <class T, class Item, int kDim>
struct Bands {
  static constexpr int kCount = kBands<kDim>;
  std::uint32_t q[kCount][kDim / 16][4];
  float values[kCount][kDim / 8][4];  // of the split
  float max[kCount][2], sum[kCount][2];
  Tiles full{0, 0};  // those of which all of the warp's rows see all keys

  OCTAVO_DEVICE void clear_split() {
#pragma unroll
    for (int band = 0; band < kCount; ++band) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (float& x : values[band][n]) x = 0.0f;
      }
      max[band][0] = max[band][1] = minus_infinity();
      sum[band][0] = sum[band][1] = 0.0f;
    }
  }
};

template <class T, class Item, int kDim>
OCTAVO_DEVICE void load_bands(Bands<T, Item, kDim>& bands, const AttentionArguments& a,
                              const Rows& rows) {
  constexpr int kCount = kBands<kDim>;
  const int g = static_cast<int>(lane_index() / 4);
  const int warp_row = first_row_of_warp<kDim>();
  const T* q = static_cast<const T*>(a.q);
#pragma unroll
  for (int band = 0; band < kCount; ++band) {
    const T* from[2];
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * band + g + 8 * half;
      from[half] = row < rows.count ? rows.numbers_of(a, q, a.q_stride, row) : nullptr;
    }
    load_queries<T, Item, kDim>(bands.q[band], from[0], from[1]);
  }
  if (warp_row >= rows.count) return;
  const int last_row = smaller(warp_row + 16 * kCount, rows.count) - 1;
  const int seen_by_all = visible_keys(rows.position(a, last_row), a.window).begin;
  bands.full = {(seen_by_all + kTileKeys - 1) / kTileKeys,
                (rows.position(a, warp_row) + 1) / kTileKeys};
}

// S of all bands.
template <class T, class Item, int kDim>
OCTAVO_DEVICE void score_tile(float (&s)[kBands<kDim>][8][4], const Bands<T, Item, kDim>& bands,
                              const Stage<T, Item, kDim>& stage) {
  using Shape = Tile<T, Item, kDim>;
  const int j = static_cast<int>(lane_index() % 4);
  const unsigned char* from[Shape::kPieces];
#pragma unroll
  for (int c = 0; c < Shape::kPieces; ++c)
    from[c] = stage.keys + stage.key_at(key_of_product<Shape::kItems>(0), 4 * c + j);
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const int key = t / Shape::kProducts * 4 * Shape::kItems + t % Shape::kProducts * 2;
#pragma unroll
    for (int c = 0; c < Shape::kPieces; ++c) {
      const uint4 piece = load_16(from[c] + key * Shape::kRowBytes);
#pragma unroll
      for (int band = 0; band < kBands<kDim>; ++band)
        multiply_piece<T, Item>(s[band][t], bands.q[band], c, piece);
    }
  }
}

// acc += P V of a group of keys.
template <class T, class Item, int kDim>
OCTAVO_DEVICE void add_group(float (&acc)[kDim / 8][kBands<kDim>][4],
                             const std::uint32_t (&p)[kBands<kDim>][4][4], int group,
                             const Stage<T, Item, kDim>& stage) {
  using Shape = Tile<T, Item, kDim>;
  using From = Stage<T, Item, kDim>;
  constexpr int kDimBytes = kPageTokens * static_cast<int>(sizeof(Item));
  const int lane = computed_anew(static_cast<int>(lane_index())), g = lane / 4, j = lane % 4;
  const int at = Shape::kItems == 8 ? (2 * group + j / 2) * From::kPageStride + j % 2 * 16
                                    : j * From::kPageStride;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    const uint4 piece = load_16(stage.values + at + (8 * n + g) * kDimBytes);
#pragma unroll
    for (int band = 0; band < kBands<kDim>; ++band)
      multiply_piece<T, Item>(acc[n][band], p[band], group, piece);
  }
}

// Groups of keys one after the other, so that the tensor cores have the P V of one to do while the
// weights of the next are computed.
template <bool kSeesAll, class T, class Item, int kDim>
OCTAVO_DEVICE void work_on_tile(Bands<T, Item, kDim>& bands, const AttentionArguments& a,
                                const Rows& rows, const Stage<T, Item, kDim>& stage, int tile) {
  constexpr int kCount = kBands<kDim>;
  const int first_key = tile * kTileKeys;
  const int j = static_cast<int>(lane_index() % 4);
  const int at = Tile<T, Item, kDim>::kScaled ? 16 * j : 0;
  const LaneScales scales{stage.key_scales + at, stage.value_scales + at};
  float s[kCount][8][4] = {};
  score_tile(s, bands, stage);
#pragma unroll
  for (int row = 0; row < 2 * kCount; ++row)
    scale_scores<T, Item, kDim>(s[row / 2], row % 2, scales);
  if constexpr (!kSeesAll) {
#pragma unroll
    for (int row = 0; row < 2 * kCount; ++row) {
      const int index = first_row_of_warp<kDim>() + static_cast<int>(lane_index() / 4) + 8 * row;
      const int position = rows.position(a, smaller(index, rows.count - 1));
      hide_unseen<T, Item, kDim>(s[row / 2], row % 2, first_key, visible_keys(position, a.window));
    }
  }
  Fold folds[kCount][2];
  float from[kCount][2], sums[kCount][2] = {};
#pragma unroll
  for (int band = 0; band < kCount; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float max = max_of_row<T, Item, kDim>(s[band], half, a.scale);
      folds[band][half] = fold_of_tile(bands.max[band][half], bands.sum[band][half], max);
      // Where the tile does not count, weights become 0.
      from[band][half] = folds[band][half].take == 0.0f ? -minus_infinity() : max;
    }
  }
  std::uint32_t p[kCount][4][4];
  float acc[kDim / 8][kCount][4] = {};
#pragma unroll
  for (int group = 0; group < Tile<T, Item, kDim>::kGroups; ++group) {
#pragma unroll
    for (int band = 0; band < kCount; ++band) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        sums[band][half] = weigh_group<T, Item, kDim>(sums[band][half], s[band], half, group,
                                                      a.scale, from[band][half], scales);
      pack_group<T, Item>(p[band], s[band], group);
    }
    add_group(acc, p, group, stage);
  }
#pragma unroll
  for (int band = 0; band < kCount; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Fold& f = folds[band][half];
      float& sum = bands.sum[band][half];
      bands.max[band][half] = f.max;
      sum = fma_rn(sum, f.keep, sum_of_row(sums[band][half]));
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          float& value = bands.values[band][n][e];
          value = fma_rn(value, f.keep, acc[n][band][e]);
        }
      }
    }
  }
}

// There is nothing yet.
template <class T, class Item, int kDim, int kWarps>
OCTAVO_DEVICE void clear_total(Shared<T, Item, kDim, kWarps>& shared) {
  for (auto& numbers : shared.total) numbers[threadIdx.x] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (auto& state : shared.total_state) state[threadIdx.x] = {minus_infinity(), 0.0f};
}

// Folds the split's state into the result, which is in shared memory and in the split's registers
// then.
template <class T, class Item, int kDim, int kWarps>
OCTAVO_DEVICE void end_split(Bands<T, Item, kDim>& bands, Shared<T, Item, kDim, kWarps>& shared) {
#pragma unroll
  for (int band = 0; band < kBands<kDim>; ++band) {
    Fold f[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2& total = shared.total_state[2 * band + half][threadIdx.x];
      const float2 before = total;
      f[half] = fold_of(before.x, bands.max[band][half]);
      bands.sum[band][half] = fold(f[half], before.y, bands.sum[band][half]);
      total = {f[half].max, bands.sum[band][half]};
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      float4& total = shared.total[band * kDim / 8 + n][threadIdx.x];
      const float4 before = total;
      auto& x = bands.values[band][n];
      x[0] = fold(f[0], before.x, x[0]);
      x[1] = fold(f[0], before.y, x[1]);
      x[2] = fold(f[1], before.z, x[2]);
      x[3] = fold(f[1], before.w, x[3]);
      total = {x[0], x[1], x[2], x[3]};
    }
  }
}

template <class T, class Item, int kDim>
OCTAVO_DEVICE void write_bands(const Bands<T, Item, kDim>& bands, const AttentionArguments& a,
                               const Rows& rows) {
  constexpr int kCount = kBands<kDim>;
  const int g = static_cast<int>(lane_index() / 4), j = static_cast<int>(lane_index() % 4);
  const int warp_row = first_row_of_warp<kDim>();
  for (int band = 0; band < kCount; ++band) {
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * band + g + 8 * half;
      if (row >= rows.count) continue;
      T* out = rows.numbers_of(a, static_cast<T*>(a.out), a.out_stride, row);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float* two = bands.values[band][n] + 2 * half;
        *reinterpret_cast<std::uint32_t*>(out + 8 * n + 2 * j) =
            result_of<T>(two[0], two[1], bands.sum[band][half]);
      }
    }
  }
}

// Block (i, h): rows i of the step, the last ones first since they see most; KV head h.
template <class T, class Item, int kDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kDim == 64 ? 2 : 1)
    prefill_attention_kernel(AttentionArguments a, int min_tokens) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  Rows rows{};
  rows.kv_head = static_cast<int>(blockIdx.y);
  const int id = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  if (!find_rows<kRows<kDim, kWarps>>(rows, a, id, min_tokens)) return;
  if (rows.context == 0) return rows.clear<T>(a);
  const Tiles tiles = tiles_of(a, rows);
  auto& shared = *reinterpret_cast<Shared<T, Item, kDim, kWarps>*>(shared_memory());
  if (threadIdx.x == 0) shared.rows = rows;
  Copier<T, Item, kDim, kWarps> copier(a, rows);
  copier.seek(a.table_of(rows.seq), rows.readable(a), tiles.first);
  copier.copy(shared.stages[tiles.first % 2]);
  copier.seek(a.table_of(rows.seq), rows.readable(a), tiles.first + 1);
  Bands<T, Item, kDim> bands;
  load_bands(bands, a, rows);
  bands.clear_split();
  clear_total(shared);
  for (int tile = tiles.first; tile < tiles.end; ++tile) {
    if (begins_split(tile)) {
      end_split(bands, shared);
      bands.clear_split();
    }
    auto& stage = shared.stages[tile % 2];
    async_wait<0>();
    __syncthreads();  // the tile is there, and nobody works with the other stage any longer
    if (tile + 1 < tiles.end) {
      copier.copy(shared.stages[(tile + 1) % 2]);
      copier.step();
    }
    if (bands.full.first <= tile && tile < bands.full.end) {
      work_on_tile<true>(bands, a, shared.rows, stage, tile);
    } else {
      const Visible readable = shared.rows.readable(a);
      if (!is_readable(readable, tile * kTileKeys)) {  // which is so for all warps
        clear_unreadable(stage, tile * kTileKeys, readable);
        __syncthreads();
      }
      if (warp_sees<kDim>(a, shared.rows, tile))
        work_on_tile<false>(bands, a, shared.rows, stage, tile);
    }
  }
  end_split(bands, shared);
  write_bands(bands, a, shared.rows);
}

template <class T, class Item, int kDim, int kWarps>
void run(Stream& stream, const AttentionArguments& a, int min_tokens) {
  const auto sets = static_cast<std::int64_t>(a.num_tokens) * a.group / kRows<kDim, kWarps>;
  launch(stream, "prefill_attention",
         {dims(sets + a.num_seqs, a.num_heads / a.group), dims(32 * kWarps),
          sizeof(Shared<T, Item, kDim, kWarps>), true},
         prefill_attention_kernel<T, Item, kDim, kWarps>, a, min_tokens);
}

}  // namespace

void attend_many(Stream& stream, DType dtype, const AttentionArguments& a, int min_tokens) {
  for_tile(dtype, a, [&](auto tile) {
    using Shape = decltype(tile);
    using T = typename Shape::T;
    using Item = typename Shape::Item;
    constexpr int kDim = Shape::kDim;
    if constexpr (kDim == 128) {
      if (sizeof(Shared<T, Item, kDim, 8>) <= stream.max_shared_bytes())
        return run<T, Item, kDim, 8>(stream, a, min_tokens);
    }
    run<T, Item, kDim, 4>(stream, a, min_tokens);
  });
}

}  // namespace octavo::cuda

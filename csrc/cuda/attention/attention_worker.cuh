// One warp's part of decoding attention: a tile of 64 keys and up to 16 query rows, from the cache
// through registers to the tile's part in shared memory. attention_decode.cu says what for.
//
// Every load of the tile is begun before the first product: 64 keys and values of 64 bf16 numbers
// are 32 loads of 16 bytes a lane, 16 KiB a warp. With head_dim 64 the next tile's keys are begun
// when half of this one's values have been multiplied, and its values after the other half: memory
// is busy while the warp computes and waits for others.
#pragma once

#include "cuda/attention/attention_tile.cuh"

namespace octavo::cuda::decoding {

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

// One warp's tiles: everything from loading to their parts in shared memory.
template <class T, class Item, int kDim>
class TileWorker {
 public:
  using Shape = Tile<T, Item, kDim>;
  // A lane's pieces of the keys, and of the values. Values are loaded and used in two halves, by
  // dimensions, and so are 32 pieces of keys (16 bits, head_dim 128), by groups.
  static constexpr int kPieces = kTileKeys * Shape::kRowBytes / (32 * 16);
  static constexpr int kKeyHalves = kPieces > 16 ? 2 : 1, kValueHalves = 2;
  static constexpr int kKeyPart = kPieces / kKeyHalves, kValuePart = kPieces / kValueHalves;
  // Whether there are registers for all of a tile at once, and for some of the next one.
  static constexpr bool kLoadsAhead = kDim == 64;

  OCTAVO_DEVICE TileWorker(const AttentionArguments& a, const Rows& rows)
      : a_(a), rows_(rows), readable_(rows.readable(a)) {}

  // Begins to load a tile. entry: its pages' part of the block table.
  OCTAVO_DEVICE void begin(int tile, int entry) {
    begin_keys(tile, entry);
    if constexpr (kKeyHalves == 2)
      load_keys<1>();
    else
      load_values<0>();
    if constexpr (kLoadsAhead) load_values<1>();
  }

  // Computes the part of a tile that has begun, and, where it loads ahead, begins the next one
  // (none: -1).
  OCTAVO_DEVICE void work(int tile, int next, int next_entry, Parts<kDim>& parts, bool upper_rows) {
    const int first_key = tile * kTileKeys;
    float s[8][4] = {};
    load_rows();
    if constexpr (Shape::kScaled) share(parts, first_key);
    score<0>(s);
    if constexpr (kKeyHalves == 2) {
      load_values<0>();
      score<1>(s);
    }
    if constexpr (!kLoadsAhead) load_values<1>();
    weigh_row(0, s, first_key, parts);
    if (upper_rows) weigh_row(1, s, first_key, parts);
    std::uint32_t p[4][4];
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) pack_group<T, Item>(p, s, group);
    add_up<0>(p, first_key, parts, upper_rows);
    if (kLoadsAhead && next >= 0) begin_keys(next, next_entry);
    add_up<1>(p, first_key, parts, upper_rows);
    if (!kLoadsAhead || next < 0) return;
    load_values<0>();
    load_values<1>();
  }

 private:
  OCTAVO_DEVICE void begin_keys(int tile, int entry) {
    page_ = page_of(a_.cache, rows_, readable_, tile, entry);
    const bool is_past = (tile + 1) * kTileKeys <= rows_.first_position;
    if (!is_past) wait_for_previous_kernel();
    if constexpr (Shape::kScaled) load_scales();
    load_keys<0>();
  }

  // Of row g (half 0) or g + 8.
  OCTAVO_DEVICE void weigh_row(int half, float (&s)[8][4], int first_key,
                               Parts<kDim>& parts) const {
    // What the row sees is found anew for each tile: registers are short.
    const int lane = computed_anew(static_cast<int>(lane_index())), row = lane / 4 + 8 * half;
    const auto& tile_scales = parts.scales[warp_index()];
    const LaneScales scales{tile_scales[0] + 16 * (lane % 4), tile_scales[1] + 16 * (lane % 4)};
    scale_scores<T, Item, kDim>(s, half, scales);
    const Visible visible =
        visible_keys(rows_.position(a_, row < rows_.count ? row : 0), a_.window);
    const bool sees_all = visible.begin <= first_key && first_key + kTileKeys <= visible.end;
    if (ballot(!sees_all)) hide_unseen<T, Item, kDim>(s, half, first_key, visible);
    const float max = max_of_row<T, Item, kDim>(s, half, a_.scale);
    const float from = max == minus_infinity() ? 0.0f : max;
    parts.max[warp_index()][row] = max;
    float sum = 0.0f;
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group)
      sum = weigh_group<T, Item, kDim>(sum, s, half, group, a_.scale, from, scales);
    parts.sum[warp_index()][row] = sum_of_row(sum);
  }

  // Queries, once the kernel that rotated them has ended: for each tile anew, from the first cache,
  // rather than to keep registers for them.
  OCTAVO_DEVICE void load_rows() {
    wait_for_previous_kernel();
    const int g = static_cast<int>(lane_index() / 4);
    const T* q = static_cast<const T*>(a_.q);
    const auto row = [&](int i) {
      return i < rows_.count ? rows_.numbers_of(a_, q, a_.q_stride, i) : nullptr;
    };
    load_queries<T, Item, kDim>(q_, row(g), row(g + 8));
  }

  // Piece c of the key of product t, group: entry (group, t, c), counted within the half.
  template <int kHalf>
  OCTAVO_DEVICE void load_keys() {
    auto& to = keys_[kHalf];
    const auto g = lane_index() / 4, j = lane_index() % 4;
    constexpr int kPagesOfGroup = kTilePages / Shape::kGroups;
#pragma unroll
    for (int n = 0; n < kKeyPart / Shape::kPieces / Shape::kProducts; ++n) {
      const int group = kHalf * (Shape::kGroups / kKeyHalves) + n;
      const unsigned in_group = Shape::kItems == 8 ? g / 4 : g / 2;
      const Page from =
          shuffle_page(page_, static_cast<unsigned>(group * kPagesOfGroup) + in_group);
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
  OCTAVO_DEVICE void score(float (&s)[8][4]) const {
    constexpr int kCount = kKeyPart / Shape::kPieces;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
#pragma unroll
      for (int c = 0; c < Shape::kPieces; ++c)
        multiply_piece<T, Item>(s[kHalf * kCount + t], q_, c, keys_[kHalf][t * Shape::kPieces + c]);
    }
  }

  // The piece of dimension g of product n: entry (n, group), counted within the half.
  template <int kHalf>
  OCTAVO_DEVICE void load_values() {
    auto& to = values_[kHalf];
    const auto g = lane_index() / 4, j = lane_index() % 4;
    constexpr int kDimBytes = kPageTokens * static_cast<int>(sizeof(Item));
    constexpr int kProducts = kDim / 8 / kValueHalves;
    const int values_at = a_.cache.block_size * Shape::kRowBytes;
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const Page from = shuffle_page(page_, Shape::kItems == 8 ? 2 * group + j / 2 : j);
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
  OCTAVO_DEVICE void load_scales() {
    const Page from = shuffle_page(page_, lane_index() / 8);
    const auto* at =
        reinterpret_cast<const float*>(a_.cache.data + from.head + a_.cache.scales_at()) +
        from.within + lane_index() % 8 * 2;
    key_scales_ = *reinterpret_cast<const float2*>(at);
    value_scales_ = *reinterpret_cast<const float2*>(at + a_.cache.block_size);
  }
  // Where nothing was ever written, the values' may be NaNs; the weights there are 0.
  OCTAVO_DEVICE void share(Parts<kDim>& parts, int first_key) const {
    float2 values = value_scales_;
    const int key = first_key + 2 * static_cast<int>(lane_index());
    if (!readable_.holds(key)) values.x = 0.0f;
    if (!readable_.holds(key + 1)) values.y = 0.0f;
    auto& to = parts.scales[warp_index()];
    *reinterpret_cast<float2*>(to[0] + 2 * lane_index()) = key_scales_;
    *reinterpret_cast<float2*>(to[1] + 2 * lane_index()) = values;
    sync_warp();
  }

  template <int kHalf>
  OCTAVO_DEVICE void add_up(const std::uint32_t (&p)[4][4], int first_key, Parts<kDim>& parts,
                            bool upper_rows) {
    auto& pieces = values_[kHalf];
    const int g = static_cast<int>(lane_index() / 4), j = static_cast<int>(lane_index() % 4);
    if (!is_readable(readable_, first_key)) {
#pragma unroll
      for (int i = 0; i < kValuePart; ++i)
        pieces[i] = without_unreadable<Item>(
            pieces[i], first_key + i % Shape::kGroups * 4 * Shape::kItems, readable_);
    }
    auto& to = parts.values[warp_index()];
    constexpr int kProducts = kDim / 8 / kValueHalves;
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      float acc[4] = {};
#pragma unroll
      for (int group = 0; group < Shape::kGroups; ++group)
        multiply_piece<T, Item>(acc, p, group, pieces[n * Shape::kGroups + group]);
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
  const Visible readable_;
  std::uint32_t q_[kDim / 16][4];
  Page page_;  // of the tile that is being loaded
  uint4 keys_[kKeyHalves][kKeyPart], values_[kValueHalves][kValuePart];
  float2 key_scales_, value_scales_;  // int8
};

}  // namespace octavo::cuda::decoding

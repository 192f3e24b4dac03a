// A tile of keys and values in shared memory, for the prefill kernel: how it lies there, and how it
// gets there from the cache. attention_prefill.cu says what for.
#pragma once

#include "cuda/attention/attention_tile.cuh"

namespace octavo::cuda::prefilling {

// 16-row products of a warp.
template <int kDim>
constexpr int kBands = kDim == 64 ? 2 : 1;

// A tile in shared memory. Keys: rows, their 64-byte halves swapped in odd ones; values: pages, a
// little apart. So the lanes of a warp that load together find their pieces in different banks.
template <class T, class Item, int kDim>
struct Stage {
  using Shape = Tile<T, Item, kDim>;
  static constexpr int kPageBytes = kPageTokens * Shape::kRowBytes;
  static constexpr int kPageStride = kPageBytes + (Shape::kItems == 8 ? 64 : 32);
  unsigned char keys[kTilePages * kPageBytes];
  unsigned char values[kTilePages * kPageStride];
  // Only int8 has scales; other formats keep 4 unused numbers, for the alignment.
  static constexpr int kScales = Shape::kScaled ? kTileKeys : 4;
  float key_scales[kScales], value_scales[kScales];

  // Where chunk `chunk` (16 bytes) of the key lies. Of keys that are even apart, the same distance.
  OCTAVO_DEVICE static int key_at(int key, int chunk) {
    const int swap = Shape::kRowBytes % 128 == 0 ? key % 2 * 4 : 0;
    return key * Shape::kRowBytes + 16 * (chunk ^ swap);
  }
};

// Copies tiles, one after the other. A warp takes the same page of each tile, or a half of it, so
// that all its lanes need one place in the cache, and find the next without a division.
template <class T, class Item, int kDim, int kWarps>
class Copier {
 public:
  using Shape = Tile<T, Item, kDim>;
  using To = Stage<T, Item, kDim>;
  static constexpr int kThreadsOfPage = 32 * kWarps / kTilePages;

  OCTAVO_DEVICE Copier(const AttentionArguments& a, const Rows& rows)
      : cache_(a.cache), head_(a.cache.data + a.cache.head_at(0, rows.kv_head)) {}

  // To the tile's page. Where none of its keys is readable, the nearest one that has some takes its
  // place, to be read in vain.
  OCTAVO_DEVICE void seek(const std::int32_t* table, const Visible& readable, int tile) {
    const int page = tile * kTilePages + static_cast<int>(threadIdx.x) / kThreadsOfPage;
    const int last = (readable.end - 1) / kPageTokens;
    const int found = smaller(larger(page, readable.begin / kPageTokens), last);
    pages_left_ = last - found;
    within_ = found % pages_of_block();
    at_ = table + found / pages_of_block();
    entry_ = *at_;
  }
  // From the second tile on: to the next one.
  OCTAVO_DEVICE void step() {
    if (pages_left_ < kTilePages) return;
    pages_left_ -= kTilePages;
    within_ += kTilePages;
    int blocks = 0;
#pragma unroll
    for (int i = 0; i < kTilePages; ++i) {
      if (within_ < pages_of_block()) continue;
      within_ -= pages_of_block();
      ++blocks;
    }
    at_ += blocks;
    entry_ = *at_;
  }

  // Begins to copy: pages are contiguous in the cache, keys and values each.
  OCTAVO_DEVICE void copy(To& stage) const {
    const auto index = static_cast<unsigned>(computed_anew(static_cast<int>(threadIdx.x)));
    const int page = static_cast<int>(index / kThreadsOfPage);
    const int thread = static_cast<int>(index % kThreadsOfPage);
    const unsigned char* block = head_ + entry_ * cache_.block_bytes;
    const unsigned char* keys = block + within_ * To::kPageBytes + 16 * thread;
    const unsigned char* values =
        keys + static_cast<unsigned>(computed_anew(cache_.block_size)) * Shape::kRowBytes;
    constexpr int kRowChunks = Shape::kRowBytes / 16;
    unsigned char* keys_to =
        stage.keys + page * To::kPageBytes + To::key_at(thread / kRowChunks, thread % kRowChunks);
    unsigned char* values_to = stage.values + page * To::kPageStride + 16 * thread;
    static_assert(kThreadsOfPage / kRowChunks % 2 == 0, "keys a step apart are swapped alike");
#pragma unroll
    for (int at = 0; at < To::kPageBytes; at += 16 * kThreadsOfPage) {
      async_copy_16(keys_to + at, keys + at);
      async_copy_16(values_to + at, values + at);
    }
    if (Shape::kScaled && thread < 2 * kPageTokens / 4) {
      const int of_values = thread / (kPageTokens / 4), first = thread % (kPageTokens / 4) * 4;
      const auto* scales = reinterpret_cast<const float*>(block + cache_.scales_at());
      async_copy_16(
          (of_values ? stage.value_scales : stage.key_scales) + page * kPageTokens + first,
          scales + of_values * cache_.block_size + within_ * kPageTokens + first);
    }
    async_commit();
  }

 private:
  OCTAVO_DEVICE int pages_of_block() const { return cache_.block_size / kPageTokens; }

  const KvLayout& cache_;
  const unsigned char* head_;  // the KV head's part of block 0
  const std::int32_t* at_;     // in the block table
  std::int32_t entry_;         // what stands there
  int within_;                 // page of the block
  int pages_left_;             // that are readable, after this one
};

// Values of other keys than the readable ones may be anything, and 0 times a NaN is one: makes them
// 0. All threads of the block, between barriers; int8's codes are finite, their scales may not be.
template <class T, class Item, int kDim>
OCTAVO_DEVICE void clear_unreadable(Stage<T, Item, kDim>& stage, int first_key,
                                    const Visible& readable) {
  if constexpr (Tile<T, Item, kDim>::kScaled) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < kTileKeys && !readable.holds(first_key + i)) stage.value_scales[i] = 0.0f;
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < kTileKeys * kDim; i += blockDim.x) {
      const int key = i % kTileKeys, dim = i / kTileKeys;
      if (readable.holds(first_key + key)) continue;
      auto* page = reinterpret_cast<Item*>(stage.values + key / kPageTokens * stage.kPageStride);
      page[dim * kPageTokens + key % kPageTokens] = from_float<Item>(0.0f);
    }
  }
}

}  // namespace octavo::cuda::prefilling

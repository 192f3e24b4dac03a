// The arithmetic of attention on tensor cores, shared by the decode and the prefill kernel, so that
// a query row gets the same bits from either:
//
//   a tile is 64 keys, from a multiple of 64 on. Of each tile on its own: scores S = Q K^T, their
//   maximum, weights P = 2^(S - maximum) rounded to T, their sum before that, and P V.
//   Tiles are folded into the state of their split in ascending order, and splits into the result.
//   Where splits begin depends on the position of the key alone (split_begin below).
//
// With bf16 activations over a bf16 cache these are the products of the definition (attention with
// dtype "bf16" in reference/ops.py): of bf16 queries and keys, and of weights rounded to bf16 and
// values. There the maximum is made whole, so that those of two tiles differ by a power of two, on
// which no rounding depends: each weight rounds as the definition's does.
//
// (Tiling and online softmax: Dao 2023, arXiv 2307.08691; splitting a long context: Flash-Decoding,
// Dao et al. 2023. Tiles and splits have fixed places and a fixed order, so that a row's bits do
// not depend on its batch: docs/cuda.md.) A tile that a row does not see leaves it as it is; hence
// rows may be computed together with any others.
//
// Rows of the 16 x 8 x 16 products are query rows: (token, head of the group), token by token. The
// dimensions that are summed over are permuted such that the 16 bytes that a lane loads are its own
// piece of several fragments. With g = lane / 4, j = lane % 4 and N numbers in 16 bytes:
//
//   Q, K: piece c of a row, bytes 16 j of stretch c of 64 bytes, holds dimensions 4 N c + N j + i;
//         i = 4 s .. 4 s + 3 are the lane's four of the 16 of step s.
//   S:    column 2 j + e of product t is key N j + 2 t + e of 4 N keys. So a lane's scores of
//         products 2 s and 2 s + 1 are its four of the 16 keys of step s of P V, and
//   V:    the piece of dimension g of a product holds keys N j + i.
//
// No number ever moves between lanes; int8 is widened in registers (-127 to 127 are exact in bf16
// and f16). Its scales multiply scores and weights: one for each key, in float32.
#pragma once

#include "cuda/attention/attention.cuh"
#include "cuda/device/tensor_cores.cuh"

namespace octavo::cuda {

constexpr int kTileKeys = 64;
constexpr int kTilePages = kTileKeys / kPageTokens;

// ---- splits: 32 of 256 keys, 32 of 512, 32 of 1024, and then of 2048 ----
// Short contexts need many splits to keep the whole device busy; long ones have enough of longer
// ones, and fewer results to fold: 132 splits at 128k tokens, not 512.
constexpr int kSplitsOfSize = 32;
constexpr int kSplitTiles = 4;  // of the first ones
constexpr int kSplitSizes = 4;

OCTAVO_HOST_DEVICE int split_begin(int split) {  // in tiles
  int begin = 0, tiles = kSplitTiles;
  for (int i = 1; i < kSplitSizes && split >= kSplitsOfSize; ++i) {
    begin += kSplitsOfSize * tiles;
    split -= kSplitsOfSize;
    tiles *= 2;
  }
  return begin + split * tiles;
}
OCTAVO_HOST_DEVICE int split_of_tile(int tile) {
  int split = 0, tiles = kSplitTiles;
  for (int i = 1; i < kSplitSizes && tile >= kSplitsOfSize * tiles; ++i) {
    tile -= kSplitsOfSize * tiles;
    split += kSplitsOfSize;
    tiles *= 2;
  }
  return split + tile / tiles;
}

// As every size divides the places where splits of that size begin.
OCTAVO_DEVICE bool begins_split(int tile) {
  int tiles = kSplitTiles;
#pragma unroll
  for (int i = 1; i < kSplitSizes; ++i)
    if (tile >= kSplitsOfSize * kSplitTiles * ((1 << i) - 1)) tiles = kSplitTiles << i;
  return (tile & (tiles - 1)) == 0;
}

// ---- states ----

// A state of a row is values and a sum of weights, all relative to 2^max. How two become one:
// value = value * keep + part * take.
struct Fold {
  float max, keep, take;
};
OCTAVO_DEVICE float fold(const Fold& f, float value, float part) {
  return fma_rn(value, f.keep, multiply_rn(part, f.take));
}

// Of results so far and a split.
OCTAVO_DEVICE Fold fold_of(float max, float part_max) {
  const float new_max = fmaxf(max, part_max);
  return {new_max, shrink(max, new_max), shrink(part_max, new_max)};
}

// Of a split and its next tile, where it costs most. The state becomes relative to the tile's
// maximum, be it greater or smaller: so `take` is 1, and no part needs to be multiplied. But a tile
// whose greatest weight is less than about 2^-40 of the split's sum so far does not count (take is
// 0): float32 would not show it, and the state would grow too large. max and sum: of the split.
OCTAVO_DEVICE Fold fold_of_tile(float max, float sum, float part_max) {
  const float keep = fast_exp2(add_rn(max, -part_max));
  if (multiply_rn(sum, keep) <= 0x1p40f) return {part_max, keep, 1.0f};
  return {max, 1.0f, 0.0f};  // also where the tile has nothing to see: the product is inf or NaN
}

// ---- fragments ----

// T: of activations, 16 bits. Item: of the cache, T or int8. kDim: head_dim.
template <class T_, class Item_, int dim>
struct Tile {
  using T = T_;
  using Item = Item_;
  static constexpr int kDim = dim;
  static constexpr bool kScaled = sizeof(Item) == 1;
  // Weights' maxima are whole numbers: over a bf16 cache, where it matters how they round.
  static constexpr bool kWhole = std::is_same_v<Item, Bf16>;
  static constexpr int kItems = 16 / static_cast<int>(sizeof(Item));  // N above
  static constexpr int kGroups = kTileKeys / (4 * kItems);            // of 4 N keys
  static constexpr int kProducts = kItems / 2;                        // of 8 keys, in a group
  static constexpr int kPieces = kDim / (4 * kItems);                 // of a key, in a lane
  static constexpr int kSteps = kItems / 4;                           // of 16, in a piece
  static constexpr int kDimSteps = kDim / 16;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Item));
  // int8 weights are multiplied with the values' scales before they are rounded: that they do not
  // become subnormal in f16, all are 2^6 times as large.
  static constexpr float kHeadroom = kScaled && std::is_same_v<T, F16> ? 6.0f : 0.0f;
};

// Steps' fragments b of one piece.
template <class T, class Item>
OCTAVO_DEVICE void widen(std::uint32_t (&b)[16 / sizeof(Item) / 4][2], const uint4& piece) {
  const std::uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  if constexpr (sizeof(Item) == 2) {
    for (int s = 0; s < 2; ++s) {
      b[s][0] = words[2 * s];
      b[s][1] = words[2 * s + 1];
    }
  } else {
    for (int s = 0; s < 4; ++s) {
      for (int i = 0; i < 2; ++i) {
        const unsigned selector = i == 0 ? 0x4140u : 0x4342u;
        if constexpr (std::is_same_v<T, F16>) {
          // 0x6400 + u is 1024 + u; u = code + 128.
          const std::uint32_t biased = permute_bytes(words[s] ^ 0x80808080u, 0x64646464u, selector);
          b[s][i] = fma2<F16>(biased, 0x3c003c00u, 0xe480e480u);  // * 1 - 1152
        } else {
          // With u the code without its sign bit: 0x4380 + u is 2 (128 + u), and 0xc300 plus that
          // bit is -128 or -256. No masks but for whole words.
          const std::uint32_t number = permute_bytes(words[s] | 0x80808080u, 0x43434343u, selector);
          const std::uint32_t sign = permute_bytes(words[s] & 0x80808080u, 0xc3c3c3c3u, selector);
          b[s][i] = fma2<Bf16>(number, 0x3f003f00u, sign);
        }
      }
    }
  }
}

// Fragments a of 16 query rows, of which this lane reads two; null: zeros.
template <class T, class Item, int kDim>
OCTAVO_DEVICE void load_queries(std::uint32_t (&q)[kDim / 16][4], const T* low, const T* high) {
  constexpr int kItems = Tile<T, Item, kDim>::kItems;
  const int j = static_cast<int>(lane_index() % 4);
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {  // 8 dimensions, 2 steps
    const int at = i * 8 / kItems * 4 * kItems + kItems * j + i * 8 % kItems;
    const uint4 x = low ? load_16(low + at) : uint4{0, 0, 0, 0};
    const uint4 y = high ? load_16(high + at) : uint4{0, 0, 0, 0};
    q[2 * i][0] = x.x, q[2 * i][2] = x.y, q[2 * i + 1][0] = x.z, q[2 * i + 1][2] = x.w;
    q[2 * i][1] = y.x, q[2 * i][3] = y.y, q[2 * i + 1][1] = y.z, q[2 * i + 1][3] = y.w;
  }
}

// Which key of its group this lane loads for product t.
template <int kItems>
OCTAVO_DEVICE int key_of_product(int t) {
  const int g = static_cast<int>(lane_index() / 4);
  return kItems * (g / 2) + 2 * t + g % 2;
}

// Of the 16 keys whose scores a lane has, in shared memory: int8's scales of keys and of values.
struct LaneScales {
  const float *keys, *values;
};
OCTAVO_DEVICE float number_of(const float4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// ---- one tile ----

// A lane has scores of row g (half 0) and g + 8 (half 1): columns 2 half and 2 half + 1 of each
// product. The next five functions are about one of these rows.

// int8: the keys' scales.
template <class T, class Item, int kDim>
OCTAVO_DEVICE void scale_scores(float (&s)[8][4], int half, const LaneScales& scales) {
  if constexpr (Tile<T, Item, kDim>::kScaled) {
#pragma unroll
    for (int t = 0; t < 8; t += 2) {
      const auto four = bits_as<float4>(load_16(scales.keys + 2 * t));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[t + i / 2][2 * half + i % 2];
        x = multiply_rn(x, number_of(four, i));
      }
    }
  }
}

// The keys that the row does not see. Only for tiles that have some: on the diagonal, and where the
// window begins.
template <class T, class Item, int kDim>
OCTAVO_DEVICE void hide_unseen(float (&s)[8][4], int half, int first_key, const Visible& visible) {
  using Shape = Tile<T, Item, kDim>;
  const int first = first_key + Shape::kItems * static_cast<int>(lane_index() % 4);
#pragma unroll
  for (int t = 0; t < 8; ++t) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key =
          first + t / Shape::kProducts * 4 * Shape::kItems + t % Shape::kProducts * 2 + e;
      if (!visible.holds(key)) s[t][2 * half + e] = minus_infinity();
    }
  }
}

// The power of two that the row's weights are relative to. scale > 0.
template <class T, class Item, int kDim>
OCTAVO_DEVICE float max_of_row(const float (&s)[8][4], int half, float scale) {
  float max = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
  for (int t = 1; t < 8; ++t) max = fmaxf(max, fmaxf(s[t][2 * half], s[t][2 * half + 1]));
  max = fmaxf(max, shuffle_xor(max, 1));
  max = fmaxf(max, shuffle_xor(max, 2));
  max = multiply_rn(max, scale);
  if (Tile<T, Item, kDim>::kWhole) max = ceilf(max);
  return add_rn(max, -Tile<T, Item, kDim>::kHeadroom);
}

// Turns the scores of a group of keys into weights. Returns `sum` plus these, before the values'
// scales (int8).
template <class T, class Item, int kDim>
OCTAVO_DEVICE float weigh_group(float sum, float (&s)[8][4], int half, int group, float scale,
                                float max, const LaneScales& scales) {
  using Shape = Tile<T, Item, kDim>;
#pragma unroll
  for (int t = group * Shape::kProducts; t < (group + 1) * Shape::kProducts; t += 2) {
    float4 four{};
    if (Shape::kScaled) four = bits_as<float4>(load_16(scales.values + 2 * t));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = s[t + i / 2][2 * half + i % 2];
      x = fast_exp2(fma_rn(x, scale, -max));
      sum = add_rn(sum, x);
      if (Shape::kScaled) x = multiply_rn(x, number_of(four, i));
    }
  }
  return sum;
}

// Of the sums of the row's four lanes.
OCTAVO_DEVICE float sum_of_row(float sum) {
  sum = add_rn(sum, shuffle_xor(sum, 1));
  return add_rn(sum, shuffle_xor(sum, 2));
}

// Fragments a of a group's weights: some of the four steps of a tile.
template <class T, class Item>
OCTAVO_DEVICE void pack_group(std::uint32_t (&p)[4][4], const float (&s)[8][4], int group) {
  constexpr int kSteps = Tile<T, Item, 64>::kSteps;
#pragma unroll
  for (int step = group * kSteps; step < (group + 1) * kSteps; ++step) {
    p[step][0] = pack2<T>(s[2 * step][0], s[2 * step][1]);
    p[step][1] = pack2<T>(s[2 * step][2], s[2 * step][3]);
    p[step][2] = pack2<T>(s[2 * step + 1][0], s[2 * step + 1][1]);
    p[step][3] = pack2<T>(s[2 * step + 1][2], s[2 * step + 1][3]);
  }
}

// sums (16 rows x 8) += the fragments a of rows, steps of piece c, times one piece: scores of 8
// keys (queries times keys), or 8 dimensions of P V (weights times values).
template <class T, class Item, int kCount>
OCTAVO_DEVICE void multiply_piece(float (&sums)[4], const std::uint32_t (&a)[kCount][4], int c,
                                  const uint4& piece) {
  constexpr int kSteps = Tile<T, Item, 64>::kSteps;
  std::uint32_t b[kSteps][2];
  widen<T, Item>(b, piece);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    multiply_accumulate<T>(sums, a[c * kSteps + step], b[step]);
}

// Whether all keys of the tile that begins with first_key are readable (Rows::readable).
OCTAVO_DEVICE bool is_readable(const Visible& readable, int first_key) {
  return readable.begin <= first_key && first_key + kTileKeys <= readable.end;
}

// Values of other keys than the readable ones may be anything, and 0 times a NaN is one: makes them
// 0. They are keys first_key + N j + i of a group. int8 codes are finite; their scales are seen to.
template <class Item>
OCTAVO_DEVICE uint4 without_unreadable(uint4 piece, int first_key, const Visible& readable) {
  if constexpr (sizeof(Item) == 1) return piece;
  const int first = first_key + 8 * static_cast<int>(lane_index() % 4);
  const auto keep = [&](std::uint32_t word, int i) {
    return (readable.holds(first + i) ? word & 0xffffu : 0u) |
           (readable.holds(first + i + 1) ? word & 0xffff0000u : 0u);
  };
  return {keep(piece.x, 0), keep(piece.y, 2), keep(piece.z, 4), keep(piece.w, 6)};
}

// ---- where keys are ----

// Of page lane % 4 of a tile: the block, and where in the block the page begins.
struct Page {
  std::int64_t head;  // bytes from the cache's beginning to the KV head's part of the block
  int within;         // tokens
};

// The entry of a sequence's block table for page lane % 4 of a tile. Reads no further than the
// table's end, but perhaps behind the context or before the window, where entries mean nothing.
OCTAVO_DEVICE int load_table_entry(const AttentionArguments& a, const std::int32_t* table,
                                   int tile) {
  const int key = tile * kTileKeys + kPageTokens * static_cast<int>(lane_index() % 4);
  return table[smaller(key / a.cache.block_size, a.max_blocks - 1)];
}

// All lanes together. Pages without readable keys are replaced by the tile's first one that has
// some, to be read in vain.
OCTAVO_DEVICE Page page_of(const KvLayout& cache, const Rows& rows, const Visible& readable,
                           int tile, int entry) {
  const int key = tile * kTileKeys + kPageTokens * static_cast<int>(lane_index() % 4);
  const int first = larger(readable.begin - tile * kTileKeys, 0) / kPageTokens;
  const int first_entry = shuffle(entry, static_cast<unsigned>(first));
  const bool has_some = readable.begin < key + kPageTokens && key < readable.end;
  return {cache.head_at(has_some ? entry : first_entry, rows.kv_head),
          (has_some ? key : tile * kTileKeys + first * kPageTokens) % cache.block_size};
}
OCTAVO_DEVICE Page shuffle_page(const Page& page, unsigned source) {
  return {shuffle(page.head, source), shuffle(page.within, source)};
}

// Tiles that any of the rows sees: first .. end - 1.
struct Tiles {
  int first, end;
};
OCTAVO_DEVICE Tiles tiles_of(const AttentionArguments& a, const Rows& rows) {
  return {rows.readable(a).begin / kTileKeys, rows.position(a, rows.count - 1) / kTileKeys + 1};
}

// Two numbers of a row's result as they are stored. sum: of its weights.
template <class T>
OCTAVO_DEVICE std::uint32_t result_of(float low, float high, float sum) {
  return pack2<T>(add_rn(divide_rn(low, sum), 0.0f),  // no -0
                  add_rn(divide_rn(high, sum), 0.0f));
}

// Calls body(the Tile of a kernel) for formats and a head_dim as can_use_tensor_cores
// (attention.cu) says.
template <class Body>
void for_tile(DType dtype, const AttentionArguments& a, Body&& body) {
  for_16_bits(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto with = [&](auto item) {
      using Item = decltype(item);
      a.head_dim == 64 ? body(Tile<T, Item, 64>{}) : body(Tile<T, Item, 128>{});
    };
    a.cache.dtype == DType::int8 ? with(std::int8_t{}) : with(T{});
  });
}

}  // namespace octavo::cuda

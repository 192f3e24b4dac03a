// out = x weight^T + bias of 1 to 8 rows: decoding, where the time is that of reading the weights.
// And of 9 to 16 rows by few outputs: each operand of weights meets two tiles of 8 rows.
//
// A block makes 16 outputs at a time, with a warp for every slice of the inputs (fragments.cuh). A
// lane loads 16 bytes of two outputs at a time, straight into the operands of the tensor core: for
// these few rows it is not a faster multiplier but a shorter program, one instruction for 256
// weights whether the rows are 1 or 8. At 4.8 TB/s a processor of an H200 has time for 14
// instructions a weight of bf16, 7 of int8, 3.5 of int4; int8 takes 3.0 and int4 2.6 (3.6 where a
// slice is longer than the ring), counted in the machine code for sm_90.
//
// In flight are up to 8 KB a warp of bf16, 4 of int8 and int4: a ring of 8 or 4 units of each of
// the two outputs, begun before the kernel before has ended (only x is its work) and refilled as
// they are used; int4's scales come with them, as they lie in memory. For 2048 inputs a slice is
// 256, and all of a warp's weights are on their way at once. 2048 outputs are 128 blocks, that is
// 64 KB of bf16 a processor of an H200 or A100; where there are more, two blocks at a time make
// that 128 and 64 KB. Little's law asks for 4.8 TB/s * 0.8 us / 132 = 29 KB.
//
// Of bf16 and int8 a block makes several tiles of 16 outputs where a matrix has more than run at
// once: as a slice of one is used up, the next one's is asked for. On an H100 that is worth 6 % of
// gate and up (measured with a ring in shared memory, which was slower otherwise: for 2048 outputs
// of int8 4.2 us in place of 3.3; int4 lost 8 %, since it has more to compute than to wait for).
//
// Moves the weights once, and x (16 inputs' worth of every row for each 16 weights) from the
// caches.
//
// Where x comes from and what becomes of the sums: few_rows.cuh. This is a header so that files may
// share out the kernels, some twenty formats for each such pair.
#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/products/few_rows.cuh"
#include "cuda/products/fragments.cuh"
#include "cuda/products/multiply.h"

namespace octavo::cuda {

namespace {

constexpr int kAheadBlocks = 4;  // of x, of 8 rows
constexpr int kPitch = 20;       // of sums in shared memory: lanes in different banks

// Of a slice in shared memory: the sums of as many rows as a source may have.
template <class Source>
constexpr int kMostRows = 8 * Source::kRowTiles;
template <class Source>
constexpr int kPartialBytes = kMostRows<Source> * kPitch * 4;

// To measure other choices: -DCMAKE_CUDA_FLAGS=-DOCTAVO_INT4_RING=2.
#ifndef OCTAVO_INT4_RING
#define OCTAVO_INT4_RING 4
#endif
#ifndef OCTAVO_INT8_BLOCKS
#define OCTAVO_INT8_BLOCKS 2
#endif

// Targets that ask for much are those of matrices with few outputs.
template <class Target>
constexpr bool asks_much = !std::is_empty_v<typename Target::Ahead>;

// Units of a ring: what registers leave room for.
template <Codes codes, bool has_zeros, class Target>
constexpr int ring_units = !is_quantized(codes)                                      ? 8
                           : has_bytes(codes)                                        ? 4
                           : has_zeros && (codes > Codes::int4 || asks_much<Target>) ? 2
                           : codes > Codes::int4 ? 3
                                                 : OCTAVO_INT4_RING;
template <Codes codes, bool has_zeros, class Source, class Target>
constexpr int blocks_of_processor = codes == Codes::int8 ? OCTAVO_INT8_BLOCKS
                                    : is_grouped(codes) && Source::kRowTiles > 1            ? 1
                                    : codes > Codes::int4 && has_zeros && asks_much<Target> ? 1
                                                                                            : 2;
// From one tile to the next.
template <Codes codes, class Target>
constexpr bool goes_on = !is_grouped(codes) && !asks_much<Target>;

// The matrix's rows of which lanes 4 g .. 4 g + 3 of a block have parts.
template <class Target>
OCTAVO_DEVICE RowPair rows_of_lane(const Target& target, int first, int g) {
  const int last = target.count - 1 - first;  // of those that there are not, and are not written
  if constexpr (Target::kPairs)
    return target.pair(first, smaller(g, last));
  else
    return {first + smaller(g, last), first + smaller(g + 8, last)};
}

// Outputs, or pairs of them, of a tile.
template <class Target>
constexpr int items_of_tile = Target::kPairs ? kOutputs / 2 : kOutputs;

// What an item's sums are multiplied by: int8's scales of its outputs.
struct ItemScales {
  float upper = 1.0f, lower = 1.0f;
};
template <Codes codes, class Target>
OCTAVO_DEVICE ItemScales scales_of_item(const Target& target, const Matrix& weight, int first,
                                        int j) {
  if constexpr (codes != Codes::int8) return {};
  if constexpr (!Target::kPairs) return {weight.output_scales[first + j], 1.0f};
  const RowPair pair = rows_of_lane(target, first, j);
  return {weight.output_scales[pair.upper], weight.output_scales[pair.lower]};
}

// Adds the slices' sums of a tile, in ascending order, and gives them to the target. partial:
// [slices][most_rows][kPitch]. item, scales: what the thread asked for its first item.
template <class T, Codes codes, int most_rows, class Target>
OCTAVO_DEVICE void finish_tile(const Target& target, typename Target::Ahead item, ItemScales scales,
                               int items, const Matrix& weight, const float* partial, int first) {
  constexpr int kItems = items_of_tile<Target>;
  const auto total = [&](int row, int column, int output, float scale) {
    float sum = 0.0f;
    for (unsigned s = 0; s < blockDim.x / kWarp; ++s)
      sum = add_rn(sum, partial[(s * most_rows + row) * kPitch + column]);
    return finished(weight, output, sum, scale);
  };
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < items; i += static_cast<int>(blockDim.x)) {
    const int row = i / kItems, j = i % kItems;
    if (first + j >= target.count) continue;
    if (i != thread) {
      target.ask(item, row, first, j);
      target.ask_more(item, row, first, j);
      scales = scales_of_item<codes>(target, weight, first, j);
    }
    if constexpr (Target::kPairs) {
      const RowPair pair = target.pair(first, j);
      target.template write<T>(item, row, first, j, total(row, j, pair.upper, scales.upper),
                               total(row, j + 8, pair.lower, scales.lower));
    } else {
      target.template write<T>(item, row, first, j, total(row, j, first + j, scales.upper));
    }
  }
}

// A lane's part of a tile of the matrix.
struct Lines {
  const unsigned char *upper, *lower;  // codes
  int upper_row, lower_row;
};

// Scale: of groups. has_zeros: int4.
template <class T, Codes codes, class Scale, bool has_zeros, class Source, class Target>
__global__ void __launch_bounds__(kMostSlices* kWarp,
                                  blocks_of_processor<codes, has_zeros, Source, Target>)
    multiply_rows(Target target, Source source, Matrix weight, int slice_units) {
  if constexpr (Source::kByExpert) {
    if (!source.begin_tile(target, weight)) return;
  }
  constexpr int kBlocks = blocks_per_unit(codes);
  constexpr int kRing = ring_units<codes, has_zeros, Target>;
  constexpr bool kGoesOn = goes_on<codes, Target>;  // from one tile to the next
  constexpr bool kScaled = is_grouped(codes);
  constexpr int kItems = items_of_tile<Target>;
  constexpr int kRowTiles = Source::kRowTiles, kRows = kMostRows<Source>;
  constexpr int kAhead = kAheadBlocks / kRowTiles;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int slice = static_cast<int>(threadIdx.x / kWarp);
  const int slices = static_cast<int>(blockDim.x / kWarp);
  const int g = lane / 4, t = lane % 4;
  const int first_unit = slice * slice_units;
  const int units = smaller(slice_units, weight.units - first_unit);
  const int tiles = ceil_div(target.count, kItems), step = static_cast<int>(gridDim.x);
  int tile = static_cast<int>(blockIdx.x);
  const auto lines_of = [&](int of_tile) {
    const RowPair rows = rows_of_lane(target, of_tile * kItems, g);
    const int offset = first_unit * kUnitBytes + 16 * t;
    return Lines{weight.row(rows.upper) + offset, weight.row(rows.lower) + offset, rows.upper,
                 rows.lower};
  };

  uint4 ring[kRing][2];
  uint2 scales[kScaled ? kRing : 1][2], zeros[has_zeros ? kRing : 1][2];
  const auto fetch = [&](int slot, const Lines& lines, int unit) {
    ring[slot][0] = load_16_once(lines.upper + unit * kUnitBytes);
    ring[slot][1] = load_16_once(lines.lower + unit * kUnitBytes);
    if constexpr (kScaled) {
      const int of_row = first_unit + unit;
      scales[slot][0] = load_scales<codes>(weight.scales, weight, lines.upper_row, of_row);
      scales[slot][1] = load_scales<codes>(weight.scales, weight, lines.lower_row, of_row);
      if constexpr (has_zeros) {
        zeros[slot][0] = load_scales<codes>(weight.zeros, weight, lines.upper_row, of_row);
        zeros[slot][1] = load_scales<codes>(weight.zeros, weight, lines.lower_row, of_row);
      }
    }
  };

  // An item is an output, or a pair, of a row; thread i finishes items i, i + blockDim.x, ...
  const int items = source.rows * kItems, thread = static_cast<int>(threadIdx.x);
  typename Target::Ahead item = {};
  const auto has_item = [&] {
    return thread < items && tile * kItems + thread % kItems < target.count;
  };
  // What the slices leave of a tile: [slices][kRows][kPitch], twice where there are several tiles,
  // so that a warp that is ahead does not write where others still read.
  auto* partial = reinterpret_cast<float*>(shared_memory());
  const int partial_size = slices * kRows * kPitch;
  unsigned char* shared = shared_memory() + (step < tiles ? 2 : 1) * slices * kPartialBytes<Source>;

  let_next_kernel_start();
  ItemScales item_scales;
  if (has_item()) {
    target.ask(item, thread / kItems, tile * kItems, thread % kItems);
    item_scales = scales_of_item<codes>(target, weight, tile * kItems, thread % kItems);
  }
  Lines lines = lines_of(tile);
#pragma unroll
  for (int u = 0; u < kRing; ++u) {
    ring[u][0] = ring[u][1] = uint4{0, 0, 0, 0};
    if (u < units) fetch(u, lines, u);
  }
#pragma unroll
  for (int u = 0; u < kRing; ++u) {
    for (int half = 0; half < 2; ++half) {
      keep_in_registers(ring[u][half]);
      if constexpr (kScaled) keep_in_registers(scales[u][half]);
      if constexpr (has_zeros) keep_in_registers(zeros[u][half]);
    }
  }
  source.begin(shared);
  wait_for_previous_kernel();
  if (has_item()) target.ask_more(item, thread / kItems, tile * kItems, thread % kItems);
  source.template finish<T>(shared);

  const int first_input = first_unit * kBlocks * kBlock + 8 * t;
  const int end_input = smaller(weight.inputs, (first_unit + units) * kBlocks * kBlock);
  // Blocks of the slice of which the lane has numbers; the others are zeros. Rows that there are
  // not are copies of the first one: nothing becomes of their sums.
  const int x_blocks = ceil_div(end_input - first_input, kBlock);
  const T* xs[kRowTiles];
  for (int i = 0; i < kRowTiles; ++i) {
    const int row = 8 * i + g;
    xs[i] = source.template row<T>(shared, row < source.rows ? row : 0) + first_input;
  }
  uint4 ahead[kAhead][kRowTiles];
  const auto fetch_x = [&](int slot, int block) {
    for (int i = 0; i < kRowTiles; ++i)
      ahead[slot][i] = block < x_blocks ? load_16(xs[i] + block * kBlock) : uint4{0, 0, 0, 0};
  };

  for (bool odd = false; tile < tiles; odd = !odd) {
#pragma unroll
    for (int b = 0; b < kAhead; ++b) fetch_x(b, b);
    const bool has_next = kGoesOn && tile + step < tiles;
    const Lines next = has_next ? lines_of(tile + step) : lines;
    float sums[kRowTiles][4] = {};
    for (int base = 0; base < units; base += kRing) {
#pragma unroll
      for (int u = 0; u < kRing; ++u) {
        const int unit = base + u;
        if (unit >= units) break;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          const int slot = (u * kBlocks + block) % kAhead;
          const auto pair_of = [&](uint2 raw) {
            return scale_pair_of<codes>(raw, weight, first_unit + unit, block / 2);
          };
          std::uint32_t a[2][4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            std::uint32_t offset = kNoZeros<T, codes>;
            if constexpr (has_zeros) offset = offsets_of<T, codes>(pair_of(zeros[u][half]), block);
            numbers_of_block<T, codes>(a[half], ring[u][half], block, offset, weight.levels);
          }
          for (int i = 0; i < kRowTiles; ++i) {
            if constexpr (kScaled)
              multiply_scaled<T>(sums[i], a[0], a[1], ahead[slot][i],
                                 scale_of<Scale>(pair_of(scales[u][0]), block),
                                 scale_of<Scale>(pair_of(scales[u][1]), block));
            else
              multiply_block<T>(sums[i], a[0], a[1], ahead[slot][i]);
          }
          fetch_x(slot, unit * kBlocks + block + kAhead);
        }
        if (unit + kRing < units)
          fetch(u, lines, unit + kRing);
        else if (has_next)
          fetch(u, next, unit + kRing - units);
      }
    }

    float* tile_sums = partial + (odd ? partial_size : 0);
    for (int i = 0; i < 4 * kRowTiles; ++i) {
      const int row = i / 4 * 8 + 2 * t + i % 2;
      tile_sums[(slice * kRows + row) * kPitch + g + i % 4 / 2 * 8] = sums[i / 4][i % 4];
    }
    __syncthreads();
    finish_tile<T, codes, kRows>(target, item, item_scales, items, weight, tile_sums,
                                 tile * kItems);
    tile += step;
    lines = next;
    // Targets that go on ask for nothing themselves.
    if (has_next && has_item())
      item_scales = scales_of_item<codes>(target, weight, tile * kItems, thread % kItems);
  }
}

// Blocks of a product. The next tile's units take the places of this one's where slices are whole
// rings.
template <Codes codes, class Source, class Target>
int blocks_of_product(const Stream& stream, const Matrix& weight, int tiles, int slice_units) {
  const bool may_go_on = goes_on<codes, Target> &&
                         slice_units % ring_units<codes, false, Target> == 0 &&
                         weight.units % slice_units == 0 && !stream.tiles_apart();
  const int at_once = blocks_of_processor<codes, false, Source, Target> * stream.num_processors();
  return may_go_on ? smaller(tiles, at_once) : tiles;
}

template <class T, Codes codes, class Scale, bool has_zeros, class Source, class Target>
void run(Stream& stream, const Target& target, const Source& source, const Matrix& weight) {
  const int slices = num_slices(weight.inputs);
  const int slice_units = slice_inputs(weight.inputs) / (blocks_per_unit(codes) * kBlock);
  const int tiles = ceil_div(target.count, items_of_tile<Target>);
  const int blocks = blocks_of_product<codes, Source, Target>(stream, weight, tiles, slice_units);
  const int bytes =
      (blocks < tiles ? 2 : 1) * slices * kPartialBytes<Source> + source.shared_bytes();
  int groups = 1;
  if constexpr (Source::kByExpert) groups = source.tiles.count;
  const LaunchShape shape{dims(blocks, groups), dims(slices * static_cast<int>(kWarp)),
                          static_cast<std::size_t>(bytes), true};
  launch(stream, "multiply_few", shape, multiply_rows<T, codes, Scale, has_zeros, Source, Target>,
         target, source, weight, slice_units);
}

template <class T, Codes codes, class... Ends>
void run_scaled(Stream& stream, const Matrix& weight, const Ends&... ends) {
  const bool is_bf16 = weight.scale_dtype == DType::bf16;
  if (weight.zeros && is_bf16) return run<T, codes, Bf16, true>(stream, ends..., weight);
  if (weight.zeros) return run<T, codes, F16, true>(stream, ends..., weight);
  if (is_bf16) return run<T, codes, Bf16, false>(stream, ends..., weight);
  run<T, codes, F16, false>(stream, ends..., weight);
}

template <class T, class... Ends>
void run_format(Stream& stream, const Matrix& weight, const Ends&... ends) {
  switch (weight.codes) {
    case Codes::int8:
      return run<T, Codes::int8, Bf16, false>(stream, ends..., weight);
    case Codes::int8_grouped:
      if (weight.scale_dtype == DType::bf16)
        return run<T, Codes::int8_grouped, Bf16, false>(stream, ends..., weight);
      return run<T, Codes::int8_grouped, F16, false>(stream, ends..., weight);
    case Codes::int4:
      return run_scaled<T, Codes::int4>(stream, weight, ends...);
    case Codes::int4_levels:
      return run_scaled<T, Codes::int4_levels>(stream, weight, ends...);
    default:
      return run<T, Codes::bf16, Bf16, false>(stream, ends..., weight);
  }
}

// x: of rows as they are, or where the target may take such (may_norm) to be normalized.
template <bool may_norm = true, class Target>
void run_as(Stream& stream, const Target& target, const FewInput& x, const Matrix& weight) {
  const int rows = static_cast<int>(x.view.rows);
  for_16_bits(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (may_norm) {
      if (x.norm) {
        const NormedRows source{rows_to_norm(x.view, *x.norm), rows};
        return run_format<T>(stream, weight, target, source);
      }
    }
    run_format<T>(stream, weight, target, StoredRows{numbers_of(x.view), rows});
  });
}

}  // namespace

}  // namespace octavo::cuda

// Products with weights in groups, of 4 or 8 bits, on tiles of bf16. The definition differs from
// the whole numbers of linear_integer.h, since in groups of 32 inputs a tile of bytes would be half
// empty, and scaling and adding its sums would take longer than multiplying:
//
//   out = sum over blocks of scale * S,   S = sum over the block's inputs of bf16(x) * level
//
// with blocks as in linear_integer.h: at most 512 inputs, all of one group. Levels less zero points
// are whole numbers below 256 and so exact in bf16. S adds up 32 inputs at a time, in two chains
// that are added at their end (TDPBF16PS). One fused multiply-add multiplies S by its scale and
// adds it to the output.
//
// Codes become bf16 in scratch memory, once for a stretch of two panels and all rows of a block. Of
// the codes of a word two become numbers at once, those of inputs 0 and 2, 1 and 3, 4 and 6, 5 and
// 7, and so x is stored in that order. A block's sums (often of 32 inputs: one product) are
// stored, and while the next ones are multiplied, vectors multiply them by their scales and add
// them to the total: a few blocks at a time, so that the total is loaded and stored once for them.

#include "cpu/kernels/codes_bf16.h"

// A panel that is read alone, and its sums, [16 rows][16].
struct StreamedPanel {
  std::int64_t panel;
  float* sums;
};

template <class Codes>
struct TilesCodes {
  static constexpr int kRowTiles = 2;
  static constexpr bool kStreams = true;  // a single tile of rows
  static constexpr std::int64_t kInputs = TilesBf16::kInputs;
  static constexpr std::int64_t kStretch = 256;       // inputs: two panels' are 16 KiB as bf16
  static constexpr std::int64_t kLongStretch = 1024;  // of no more rows than one call takes
  static constexpr std::int64_t kPart = kLongStretch;
  static constexpr std::int64_t kWidenAhead = 2;  // steps
  static constexpr int kBatch = 4;  // blocks, and steps, whose sums are added together
  const std::int64_t step_bytes = kTileRowBytes, steps;

  explicit TilesCodes(const LinearTask& task) : steps(task.depth / kInputs), codes_(task) {}

  // As many whole groups as fit, or one block of a group.
  static std::int64_t next_stretch(const LinearTask& task, std::int64_t first,
                                   std::int64_t row_tiles) {
    if (task.rows <= kRowTile) return task.depth;  // see stream
    const std::int64_t longest = row_tiles <= kRowTiles ? kLongStretch : kStretch;
    if (task.group_size <= longest) return first + longest / task.group_size * task.group_size;
    return block_end(task, first);
  }

  static std::int64_t input_stride(const LinearTask& task) { return (task.depth + kStretch) / 2; }

  static AheadOf weights_ahead(const LinearTask& task, const PanelPair& pair, std::int64_t first,
                               std::int64_t length) {
    const auto at = [&](int n) {
      return reinterpret_cast<const unsigned char*>(words_at(task, pair.panel[n], first));
    };
    return {at(0), at(1), 4 * length / Codes::kInputsPerWord * kLanes};
  }

  static AheadOf x_ahead(const LinearTask& task, std::int64_t row_tile, std::int64_t first,
                         std::int64_t length) {
    return TilesBf16::x_ahead(task, row_tile, first, length);
  }

  // Memory that accumulate fills when it is called for the first rows.
  static const unsigned char* weights(const LinearTask&, std::int64_t, std::int64_t, std::int64_t,
                                      unsigned char* room) {
    return room;
  }

  template <int MT, int NR, class Beside>
  void accumulate(const LinearTask& task, const RowTiles& rows, const PanelPair& pair,
                  std::int64_t first, std::int64_t last, const unsigned char* const* w, float* sums,
                  std::int64_t sum_stride, Beside&& beside) {
    const auto widen_at = [&](std::int64_t k) {
      for (int n = 0; n < NR && k < last; ++n)
        widen(task, words_at(task, pair.panel[n], k),
              task.zeros ? load_zeros(task, pair.panel[n], k / task.group_size) : zero(),
              const_cast<unsigned char*>(w[n]) + (k - first) / kInputs * kTileBytes);
    };
    for (std::int64_t i = 0; rows.are_first && i < kWidenAhead; ++i) widen_at(first + i * kInputs);
    std::int64_t at = 0;  // step of the stretch
    for (std::int64_t k = first; k < last;) {
      Batch& batch = batches_[turn_];
      batch = {task, pair, MT, NR, sums, sum_stride, k == 0, block_sums_[turn_]};
      for (std::int64_t batch_steps = 0; k < last && batch_steps < kBatch;) {
        const std::int64_t end = block_end(task, k), count = (end - k) / kInputs;
        const unsigned char *x[MT], *w_at[NR];
        for (int m = 0; m < MT; ++m)
          x[m] = TilesBf16::x_tiles(task, rows.tile + m) + k / kInputs * kTileBytes;
        for (int n = 0; n < NR; ++n) w_at[n] = w[n] + at * kTileBytes;
        each_sum<MT, NR>([](auto t, int, int) { tile_zero<t>(); });
        multiply_tiles<DotBf16, MT, NR>(x, w_at, count, step_bytes, [&](std::int64_t step) {
          if (rows.are_first) widen_at(k + (step + kWidenAhead) * kInputs);
          batches_[1 - turn_].add_tile();
          beside(step);
        });
        each_sum<MT, NR>([&](auto t, int m, int n) {
          tile_store<t>(batch.block(batch.blocks, m, n), kTileRowBytes);
        });
        batch.group[batch.blocks++] = k / task.group_size;
        batch_steps += count;
        at += count;
        k = end;
      }
      flush_one(1 - turn_);  // sums that were not added during the tiles' products
      turn_ = 1 - turn_;
    }
  }

  // One tile of rows through all inputs of up to four panels: only reading codes takes time.
  void stream(const LinearTask& task, std::int64_t row_tile, std::int64_t rows,
              const StreamedPanel* panels, int count, unsigned char* room) {
    const auto run = [&](auto num_panels) {
      Stream<num_panels> stream(*this, task, row_tile, rows, panels, room, block_sums_[0]);
      stream.run();
    };
    if (count == 4) return run(std::integral_constant<int, 4>{});
    for (int i = 0; i < count; ++i, ++panels) run(std::integral_constant<int, 1>{});
  }

  // Adds the sums that are still stored.
  void flush() { flush_one(1 - turn_); }

  static Vec finish(const LinearTask&, Vec sum, std::int64_t, std::int64_t) { return sum; }

 private:
  // Some blocks' sums of MT x NR tiles, still to be added to the sums of all blocks.
  struct Batch {
    const LinearTask* task = nullptr;
    PanelPair pair{};
    int num_tiles = 0, panels = 1, done = 0, blocks = 0;
    float* sums = nullptr;
    std::int64_t sum_stride = 0;
    bool is_first = false;
    std::int64_t rows = 0;    // of a tile
    float* memory = nullptr;  // [block][row tile][panel][16][16]
    std::int64_t group[kBatch] = {};

    Batch() = default;
    Batch(const LinearTask& of, const PanelPair& panel_pair, int row_tiles, int num_panels,
          float* to, std::int64_t stride, bool first, float* from)
        : task(&of),
          pair(panel_pair),
          num_tiles(row_tiles * num_panels),
          panels(num_panels),
          sums(to),
          sum_stride(stride),
          is_first(first),
          rows(std::min(kRowTile, of.rows)),
          memory(from) {}

    float* block(int index, int m, int n) const {
      return memory + (index * 4 + m * 2 + n) * kTileSums;
    }

    // Adds one tile of all its blocks; false if none is left.
    bool add_tile() {
      if (done == num_tiles) return false;
      const int m = done / panels, n = done % panels;
      ++done;
      const auto add_blocks = [&](auto less) {
        if (blocks == less + 1) add<less + 1>(m, n);
      };
      unroll(add_blocks, std::make_integer_sequence<int, kBatch>{});
      return true;
    }

    template <int kBlocks>
    void add(int m, int n) const {
      Vec scale[kBlocks];
      OCTAVO_UNROLL
      for (int b = 0; b < kBlocks; ++b) scale[b] = load_scales(*task, pair.panel[n], group[b]);
      float* to = sums + m * sum_stride + n * kTileSums;
      const float* from = block(0, m, n);
      for (std::int64_t i = 0; i < rows * kLanes; i += kLanes) {
        Vec sum = is_first ? zero() : load(to + i);
        OCTAVO_UNROLL
        for (int b = 0; b < kBlocks; ++b)
          sum = fma(load(from + b * 4 * kTileSums + i), scale[b], sum);
        store(to + i, sum);
      }
    }
  };

  static const std::uint32_t* words_at(const LinearTask& task, std::int64_t panel,
                                       std::int64_t input) {
    return task.weight + (panel * task.depth + input) / Codes::kInputsPerWord * kLanes;
  }

  // Several panels at once, since each product waits for the one before it of the same panel.
  template <int NR>
  class Stream {
   public:
    Stream(const TilesCodes& codes, const LinearTask& task, std::int64_t row_tile,
           std::int64_t rows, const StreamedPanel* panels, unsigned char* room, float* block_sums)
        : codes_(codes),
          task_(task),
          panels_(panels),
          num_rows_(rows),
          steps_(codes.steps),
          group_steps_(task.group_size / kInputs),
          x_(TilesBf16::x_tiles(task, row_tile)),
          room_(room),
          block_sums_{block_sums, block_sums + NR * kTileSums} {
      for (int n = 0; n < NR; ++n) {
        words_[n] = words_at(task, panels[n].panel, 0);
        for (std::int64_t i = 0; i < num_rows_ * kLanes; i += kLanes)
          store(panels[n].sums + i, zero());
      }
    }

    void run() {
      for (int i = 0; i < kWidenAhead; ++i) widen_next();
      constexpr std::int64_t kBlockSteps = kIntegerBlock / kInputs;
      std::int64_t step = 0;
      for (std::int64_t group = 0; step < steps_; ++group) {
        const std::int64_t group_end = std::min(steps_, step + group_steps_);
        while (step < group_end) {
          const std::int64_t end = std::min(group_end, step + kBlockSteps);
          each_panel([](auto n) { tile_zero<n>(); });
          for (; step < end; ++step) {
            widen_next();
            tile_load<4>(x_ + step * kTileBytes, kTileRowBytes);
            each_panel([&](auto n) {
              constexpr int kTile = 5 + n % 3;
              tile_load<kTile>(room_of(step, n), kTileRowBytes);
              tile_dot_bf16<n, 4, kTile>();
            });
          }
          each_panel(
              [&](auto n) { tile_store<n>(block_sums_[turn_] + n * kTileSums, kTileRowBytes); });
          turn_ = 1 - turn_;
          if (has_block_) add_block();
          block_group_ = group;
          has_block_ = true;
        }
      }
      turn_ = 1 - turn_;
      add_block();
    }

   private:
    static constexpr std::int64_t kRoomTiles = 4;  // of a panel

    template <class F>
    static void each_panel(F&& f) {
      unroll(f, std::make_integer_sequence<int, NR>{});
    }

    unsigned char* room_of(std::int64_t step, int n) const {
      return room_ + (step % kRoomTiles * NR + n) * kTileBytes;
    }

    void widen_next() {
      if (widened_ == steps_) return;
      OCTAVO_UNROLL
      for (int n = 0; n < NR; ++n) {
        const Vec zeros =
            task_.zeros ? load_zeros(task_, panels_[n].panel, widened_group_) : zero();
        codes_.widen(task_, words_[n], zeros, room_of(widened_, n));
        words_[n] += kInputs / Codes::kInputsPerWord * kLanes;
      }
      ++widened_;
      if (++widened_of_group_ < group_steps_) return;
      widened_of_group_ = 0;
      ++widened_group_;
    }

    // Adds the block before the one being multiplied; its sums are in the other buffer.
    void add_block() const {
      OCTAVO_UNROLL
      for (int n = 0; n < NR; ++n) {
        const Vec scale = load_scales(task_, panels_[n].panel, block_group_);
        prefetch_scales(task_, panels_[n].panel, block_group_, kScalesAhead);
        const float* block = block_sums_[turn_] + n * kTileSums;
        float* sums = panels_[n].sums;
        for (std::int64_t i = 0; i < num_rows_ * kLanes; i += kLanes)
          store(sums + i, fma(load(block + i), scale, load(sums + i)));
      }
    }

    const TilesCodes& codes_;
    const LinearTask& task_;
    const StreamedPanel* const panels_;
    const std::int64_t num_rows_, steps_, group_steps_;
    const unsigned char* const x_;
    unsigned char* const room_;
    float* const block_sums_[2];  // [panel][16][16] each
    const std::uint32_t* words_[NR];
    std::int64_t widened_ = 0, widened_of_group_ = 0, widened_group_ = 0, block_group_ = 0;
    int turn_ = 0;
    bool has_block_ = false;
  };

  // 32 inputs of a panel, as a tile.
  void widen(const LinearTask& task, const std::uint32_t* words, Vec zeros,
             unsigned char* room) const {
    auto* to = reinterpret_cast<std::uint32_t*>(room);
    if (task.zeros)
      codes_.widen(words, to, [&](Words both) { return take_off(both, zeros); });
    else
      codes_.widen(words, to, [](Words both) { return both; });
  }

  // Two levels a word, less the outputs' zero points.
  static Words take_off(Words both, Vec zeros) {
    return as_halves(sub(as_floats(shift_left<16>(both)), zeros),
                     sub(as_floats(clear_low_half(both)), zeros));
  }

  void flush_one(int index) {
    while (batches_[index].add_tile()) {
    }
  }

  alignas(64) float block_sums_[2][kBatch * 4 * kTileSums];
  const Codes codes_;
  Batch batches_[2];
  int turn_ = 0;
};

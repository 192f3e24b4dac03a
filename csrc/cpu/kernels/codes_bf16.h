// Weights in groups, of 4 or 8 bits, where x is rounded to bf16: how codes become numbers, and the
// products of a single row. tiles_codes.h has the definition, and more rows on tiles.
//
// A row would fill a 16th of a tile, and vectors are nearly as fast as memory: levels become
// float32, and are added up in the two chains of a tile.

// The scales of a panel's 16 outputs for one group.
inline Vec load_scales(const LinearTask& task, std::int64_t panel, std::int64_t group) {
  return load_scales(task.scales, task.scale_type, (panel * task.num_groups + group) * kLanes);
}
// Prefetches the scales of groups so many numbers ahead.
inline void prefetch_scales(const LinearTask& task, std::int64_t panel, std::int64_t group,
                            std::int64_t soon) {
  const std::int64_t at = (panel * task.num_groups + group) * kLanes + soon;
  prefetch(address_of_scale(task.scales, task.scale_type, at));
}
inline Vec load_zeros(const LinearTask& task, std::int64_t panel, std::int64_t group) {
  return load(task.zeros + (panel * task.num_groups + group) * kLanes);
}

// Four words, each with another of their bytes in the lowest place: fewer shifts.
struct LoadedBytes {
  Words byte[4];
  explicit LoadedBytes(const std::uint32_t* words)
      : byte{load_words(words), load_words_at<1>(words), load_words_at<2>(words),
             load_words_at<3>(words)} {}
};

// A reader of codes: the inputs of a word, their levels as float32, and 32 inputs of a panel as a
// tile of bf16, in the order of the inputs of x (linear_tiles.h). change: of two levels in a word.
struct Codes4 {
  static constexpr std::int64_t kInputsPerWord = 8;
  alignas(64) float floats[16];
  alignas(64) std::uint16_t halves[32];

  explicit Codes4(const LinearTask& task) {
    for (int i = 0; i < 32; ++i) {
      const int code = i % 16;
      floats[code] = static_cast<float>(task.levels ? int{task.levels[code]} - 128 : code - 8);
      halves[i] = static_cast<std::uint16_t>(float_bits(floats[code]) >> 16);
    }
  }

  using Table = FloatTable;
  Table table() const { return load_float_table(floats); }
  template <int kInput>
  static Vec level(const Table& table, const LoadedBytes& words) {
    const Words code = words.byte[kInput % 4];
    return look_up_floats(table, kInput < 4 ? code : shift_right<4>(code));
  }

  template <class Change>
  void widen(const std::uint32_t* words, std::uint32_t* to, Change&& change) const {
    const HalfTable table = load_half_table(halves);
    OCTAVO_UNROLL
    for (int word = 0; word < 4; ++word, to += 4 * kLanes) {
      prefetch(words + kWordsAhead + word * kLanes);
      const Words raw = load_words(words + word * kLanes);
      store_words(to, change(look_up_halves(table, raw)));
      store_words(to + kLanes, change(look_up_halves(table, shift_halves_right<8>(raw))));
      store_words(to + 2 * kLanes, change(look_up_halves(table, shift_halves_right<4>(raw))));
      store_words(to + 3 * kLanes, change(look_up_halves(table, shift_halves_right<12>(raw))));
    }
  }
};

// Upper halves of float32 numbers: two bf16 in a word.
inline Words as_halves(Vec low, Vec high) {
  return add_words(shift_right<16>(as_words(low)), clear_low_half(as_words(high)));
}

struct Codes8 {
  static constexpr std::int64_t kInputsPerWord = 4;
  explicit Codes8(const LinearTask&) {}

  struct Table {};
  Table table() const { return {}; }
  template <int kInput>
  static Vec level(const Table&, const LoadedBytes& words) {
    return level_of(and_words(words.byte[kInput], splat_word(255)));
  }

  template <class Change>
  void widen(const std::uint32_t* words, std::uint32_t* to, Change&& change) const {
    OCTAVO_UNROLL
    for (int word = 0; word < 8; ++word, to += 2 * kLanes) {
      prefetch(words + kWordsAhead + word * kLanes);
      const Words raw = load_words(words + word * kLanes);
      const auto levels = [&](Words two) {
        const Vec low = level_of(and_words(two, splat_word(255)));
        return change(as_halves(low, level_of(shift_right<16>(two))));
      };
      store_words(to, levels(even_bytes(raw)));
      store_words(to + kLanes, levels(even_bytes(shift_right<8>(raw))));
    }
  }

 private:
  static Vec level_of(Words stored) { return sub(to_floats(stored), splat(128.0f)); }
};

// One row; x: float32 numbers that were rounded to bf16.
template <class Codes>
struct FormatCodes {
  static constexpr int kTileRows = 1, kTilePanels = kPanelsOneRow,
                       kTilePanelsOneRow = kPanelsOneRow;

  typename Codes::Table table;
  explicit FormatCodes(const LinearTask& task) : table(Codes(task).table()) {}

  static std::int64_t next_chunk(const LinearTask& task, std::int64_t) { return task.depth; }

  template <int MR, int NR>
  void accumulate(const LinearTask& task, std::int64_t row, std::int64_t panel, std::int64_t first,
                  std::int64_t last, float* acc) const {
    static_assert(MR == 1);
    constexpr std::int64_t kInputsPerWord = Codes::kInputsPerWord;
    const float* x = static_cast<const float*>(task.x) + row * task.x_stride;
    const std::int64_t panel_words = task.depth / kInputsPerWord * kLanes;
    const std::uint32_t* words = task.weight + panel * panel_words;
    const Ahead ahead(kWordsAhead, panel_words, NR);
    const std::int64_t panel_scales = task.num_groups * kLanes;
    const Ahead scales_ahead(kScalesAhead, panel_scales, NR);
    const std::int64_t group_size = task.group_size;
    const bool has_zeros = task.zeros != nullptr;
    std::int64_t group = first / group_size, group_end = (group + 1) * group_size;
    for (std::int64_t k = first; k < last;) {
      const std::int64_t end = smaller(k + kIntegerBlock, smaller(group_end, last));
      Vec sums[NR], zeros[NR];
      OCTAVO_UNROLL
      for (int n = 0; n < NR; ++n) {
        sums[n] = zero();
        zeros[n] = has_zeros ? load_zeros(task, panel + n, group) : zero();
      }
      for (; k < end; k += kDepthBlock) {
        Vec chain[2][NR];
        OCTAVO_UNROLL
        for (int n = 0; n < NR; ++n) {
          chain[0][n] = zero();
          chain[1][n] = zero();
        }
        for (std::int64_t i = k; i < k + kDepthBlock; i += kInputsPerWord) {
          const std::int64_t at = i / kInputsPerWord * kLanes, soon = at + ahead.from(at);
          OCTAVO_UNROLL
          for (int n = 0; n < NR; ++n) {
            const std::uint32_t* word = words + n * panel_words + at;
            prefetch(words + n * panel_words + soon);
            const LoadedBytes loaded(word);
            const auto add_input = [&](auto input) {
              constexpr int kChain = input % 4 / 2;
              Vec level = Codes::template level<input>(table, loaded);
              if (has_zeros) level = sub(level, zeros[n]);
              chain[kChain][n] = fma(splat(x[i + input]), level, chain[kChain][n]);
            };
            unroll(add_input, std::make_integer_sequence<int, kInputsPerWord>{});
          }
        }
        OCTAVO_UNROLL
        for (int n = 0; n < NR; ++n) sums[n] = add(sums[n], add(chain[0][n], chain[1][n]));
      }
      const std::int64_t soon = scales_ahead.from(group * kLanes);
      OCTAVO_UNROLL
      for (int n = 0; n < NR; ++n) {
        store(acc + n * kLanes,
              fma(sums[n], load_scales(task, panel + n, group), load(acc + n * kLanes)));
        prefetch_scales(task, panel + n, group, soon);
      }
      if (k < group_end) continue;
      ++group;
      group_end += group_size;
    }
  }

  static Vec finish(const LinearTask&, Vec sum, std::int64_t, std::int64_t) { return sum; }
};

// Matrix products: x (rows, depth) times packed weights.
//
// The order of summation is the same for every output, whatever the shape of the tile that
// computes it: within each 32 inputs, those with even and those with odd index are summed apart,
// each by fused multiply-adds in order from zero; the two sums are added; that is added to the
// output so far. It is the order of AMX's TDPBF16PS, so that a tile kernel can give the same bits.
//
// Quantized weights enter these sums as the whole numbers (or levels) they are, exactly; int4
// multiplies each 32 inputs' sum by its group's scale as it is added on, int8 the whole sum at the
// end. Bias comes last.

// Calls f with 0, 1, .. N - 1 as compile-time constants: a shift's distance has to be one.
template <class F, int... J>
inline void unroll(F&& f, std::integer_sequence<int, J...>) {
  (f(std::integral_constant<int, J>{}), ...);
}

// A format takes weights a step of kStep inputs at a time: `load` reads a step of one panel,
// `pair<J>` turns its inputs 2J and 2J + 1 into numbers.
struct FormatF32 {
  static constexpr int kStep = 2, kInputsPerWord = 1;
  static constexpr bool kGrouped = false;
  struct Raw {
    Vec even, odd;
  };
  explicit FormatF32(const LinearTask&) {}
  static Raw load_step(const std::uint32_t* p) {
    return {load(reinterpret_cast<const float*>(p)), load(reinterpret_cast<const float*>(p) + 16)};
  }
  template <int J>
  void pair(const Raw& raw, Vec& even, Vec& odd) const {
    even = raw.even;
    odd = raw.odd;
  }
};

struct FormatBf16 {
  static constexpr int kStep = 2, kInputsPerWord = 2;
  static constexpr bool kGrouped = false;
  using Raw = Words;
  explicit FormatBf16(const LinearTask&) {}
  static Raw load_step(const std::uint32_t* p) { return load_words(p); }
  template <int J>
  void pair(const Raw& raw, Vec& even, Vec& odd) const {
    even = as_floats(shift_left<16>(raw));
    odd = as_floats(clear_low_half(raw));
  }
};

struct FormatInt8 {
  static constexpr int kStep = 4, kInputsPerWord = 4;
  static constexpr bool kGrouped = false;
  using Raw = Words;
  explicit FormatInt8(const LinearTask&) {}
  static Raw load_step(const std::uint32_t* p) { return load_words(p); }
  template <int J>
  void pair(const Raw& raw, Vec& even, Vec& odd) const {
    even = signed_byte<2 * J>(raw);
    odd = signed_byte<2 * J + 1>(raw);
  }
};

struct FormatInt4 {
  static constexpr int kStep = 8, kInputsPerWord = 8;
  static constexpr bool kGrouped = true;
  using Raw = Words;
  Table table;
  explicit FormatInt4(const LinearTask& task) : table(load_table(task.levels)) {}
  static Raw load_step(const std::uint32_t* p) { return load_words(p); }
  template <int J>
  void pair(const Raw& raw, Vec& even, Vec& odd) const {
    even = look_up(table, shift_right<8 * J>(raw));
    odd = look_up(table, shift_right<8 * J + 4>(raw));
  }
};

// Adds inputs [first, last) to the outputs of MR rows and NR panels.
//
// acc: [MR][NR][16], in memory, since the even and odd sums fill the registers.
template <int MR, int NR, class Format>
inline void accumulate(const LinearTask& task, const Format& format, std::int64_t row,
                       std::int64_t panel, std::int64_t first, std::int64_t last, float* acc) {
  const float* x = task.x + row * task.x_stride;
  const std::int64_t panel_words = task.depth / Format::kInputsPerWord * kLanes;
  const std::uint32_t* weight = task.weight + panel * panel_words;
  for (std::int64_t k = first; k < last; k += kDepthBlock) {
    Vec even[MR][NR], odd[MR][NR];
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) even[m][n] = odd[m][n] = zero();
    }
    for (std::int64_t i = k; i < k + kDepthBlock; i += Format::kStep) {
      typename Format::Raw raw[NR];
      for (int n = 0; n < NR; ++n)
        raw[n] = Format::load_step(weight + n * panel_words + i / Format::kInputsPerWord * kLanes);
      const auto add_pair = [&](auto j) {
        Vec weight_even[NR], weight_odd[NR];
        for (int n = 0; n < NR; ++n) format.template pair<j>(raw[n], weight_even[n], weight_odd[n]);
        for (int m = 0; m < MR; ++m) {
          const float* pair = x + m * task.x_stride + i + 2 * j;
          const Vec x_even = splat(pair[0]);
          for (int n = 0; n < NR; ++n) even[m][n] = fma(x_even, weight_even[n], even[m][n]);
          const Vec x_odd = splat(pair[1]);
          for (int n = 0; n < NR; ++n) odd[m][n] = fma(x_odd, weight_odd[n], odd[m][n]);
        }
      };
      unroll(add_pair, std::make_integer_sequence<int, Format::kStep / 2>{});
    }
    const std::int64_t groups = Format::kGrouped ? num_groups(task) : 0;
    for (int n = 0; n < NR; ++n) {
      const std::int64_t scale_at =
          Format::kGrouped ? ((panel + n) * groups + k / task.group_size) * kLanes : 0;
      for (int m = 0; m < MR; ++m) {
        float* sum = acc + (m * NR + n) * kLanes;
        Vec part = add(even[m][n], odd[m][n]);
        if constexpr (Format::kGrouped) {
          if (task.zeros) {
            const float x_sum =
                task.x_sums[(row + m) * (task.depth / kDepthBlock) + k / kDepthBlock];
            part = fma(splat(-x_sum), load(task.zeros + scale_at), part);
          }
          store(sum, fma(part, load(task.scales + scale_at), load(sum)));
        } else {
          store(sum, add(load(sum), part));
        }
      }
    }
  }
}

// Inputs [first, last) of MR rows and NR panels; partial sums wait in `out` between calls.
template <int MR, int NR, class Format>
inline void linear_tile(const LinearTask& task, const Format& format, std::int64_t row,
                        std::int64_t panel, std::int64_t first, std::int64_t last) {
  alignas(64) float acc[MR * NR * kLanes];
  const auto width = [&](int n) {
    const std::int64_t left = task.outputs - (panel + n) * kLanes;
    return left < kLanes ? left : kLanes;
  };
  const auto load_some = [&](const float* p, int n) {
    return width(n) == kLanes ? load(p) : load_tail(p, width(n), 0.0f);
  };
  const auto out = [&](int m, int n) {
    return task.out + (row + m) * task.out_stride + (panel + n) * kLanes;
  };
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n)
      store(acc + (m * NR + n) * kLanes, first == 0 ? zero() : load_some(out(m, n), n));
  }
  accumulate<MR, NR>(task, format, row, panel, first, last, acc);
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) {
      Vec sum = load(acc + (m * NR + n) * kLanes);
      if (last == task.depth) {
        const std::int64_t output = (panel + n) * kLanes;
        if (task.format == DType::int8) sum = mul(sum, load(task.scales + output));
        if (task.bias) sum = add(sum, load_some(task.bias + output, n));
      }
      if (width(n) == kLanes) {
        store(out(m, n), sum);
      } else {
        store_tail(out(m, n), sum, width(n));
      }
    }
  }
}

// All panels of MR rows, NR at a time, then one at a time.
template <int MR, int NR, class Format>
inline void linear_rows(const LinearTask& task, const Format& format, std::int64_t row,
                        std::int64_t first_panel, std::int64_t last_panel, std::int64_t first,
                        std::int64_t last) {
  std::int64_t panel = first_panel;
  for (; panel + NR <= last_panel; panel += NR)
    linear_tile<MR, NR>(task, format, row, panel, first, last);
  for (; panel < last_panel; ++panel) linear_tile<MR, 1>(task, format, row, panel, first, last);
}

template <class Format>
inline void linear_format(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
                          std::int64_t first_panel, std::int64_t last_panel) {
  const Format format(task);
  // So many inputs at a time that two panels' weights stay in the first cache.
  constexpr std::int64_t kDepthChunk = 512;
  const std::int64_t chunk = last_row - first_row > kRows ? kDepthChunk : task.depth;
  for (std::int64_t first = 0; first < task.depth; first += chunk) {
    const std::int64_t last = first + chunk < task.depth ? first + chunk : task.depth;
    for (std::int64_t panel = first_panel; panel < last_panel; panel += kPanelGroup) {
      const std::int64_t end = panel + kPanelGroup < last_panel ? panel + kPanelGroup : last_panel;
      const auto rows = [&](auto num_rows, std::int64_t row) {
        constexpr int kAtOnce = num_rows == 1 ? kPanelsOneRow : kPanels;
        linear_rows<num_rows, kAtOnce>(task, format, row, panel, end, first, last);
      };
      std::int64_t row = first_row;
      for (; row + kRows <= last_row; row += kRows) rows(std::integral_constant<int, kRows>{}, row);
      // What is left is fewer than kRows: the one tile of just that height.
      const auto rest = [&](auto num_rows) {
        if (last_row - row == num_rows + 1) rows(std::integral_constant<int, num_rows + 1>{}, row);
      };
      unroll(rest, std::make_integer_sequence<int, kRows - 1>{});
    }
  }
}

void linear(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
            std::int64_t first_panel, std::int64_t last_panel) {
  const auto run = [&](auto kernel) { kernel(task, first_row, last_row, first_panel, last_panel); };
  switch (task.format) {
    case DType::f32:
      return run(linear_format<FormatF32>);
    case DType::bf16:
      return run(linear_format<FormatBf16>);
    case DType::int8:
      return run(linear_format<FormatInt8>);
    case DType::int4:
      return run(linear_format<FormatInt4>);
    case DType::f16:
      break;  // no packed format
  }
}

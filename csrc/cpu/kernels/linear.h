// Matrix products: x (rows, depth) times packed weights.
//
// The order of summation is the same for every output, whatever the shape of the tile that
// computes it: within each 32 inputs, those with even and those with odd index are summed apart,
// each by fused multiply-adds in order from zero; the two sums are added; that is added to the
// output so far. It is the order of AMX's TDPBF16PS, so that a tile kernel can give the same bits.
// Bias comes last.

struct FormatF32 {
  using Item = float;
  static void pair(const Item* p, Vec& even, Vec& odd) {
    even = load(p);
    odd = load(p + kLanes);
  }
};

struct FormatBf16 {
  using Item = std::uint16_t;
  static void pair(const Item* p, Vec& even, Vec& odd) { load_pairs(p, even, odd); }
};

// Adds `depth` inputs to the outputs of MR rows and NR panels.
//
// x: MR rows, x_stride apart. weight: the first panel, at the first input; panels panel_items
// apart. acc: [MR][NR][16], in memory, since the even and odd sums fill the registers.
template <int MR, int NR, class Format>
inline void accumulate(const float* x, std::int64_t x_stride, const typename Format::Item* weight,
                       std::int64_t panel_items, std::int64_t depth, float* acc) {
  for (std::int64_t k = 0; k < depth; k += kDepthBlock) {
    Vec even[MR][NR], odd[MR][NR];
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) even[m][n] = odd[m][n] = zero();
    }
    for (std::int64_t i = k; i < k + kDepthBlock; i += 2) {
      Vec weight_even[NR], weight_odd[NR];
      for (int n = 0; n < NR; ++n)
        Format::pair(weight + n * panel_items + i * kLanes, weight_even[n], weight_odd[n]);
      for (int m = 0; m < MR; ++m) {
        const Vec x_even = splat(x[m * x_stride + i]);
        for (int n = 0; n < NR; ++n) even[m][n] = fma(x_even, weight_even[n], even[m][n]);
        const Vec x_odd = splat(x[m * x_stride + i + 1]);
        for (int n = 0; n < NR; ++n) odd[m][n] = fma(x_odd, weight_odd[n], odd[m][n]);
      }
    }
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) {
        float* sum = acc + (m * NR + n) * kLanes;
        store(sum, add(load(sum), add(even[m][n], odd[m][n])));
      }
    }
  }
}

// Inputs [first, last) of MR rows and NR panels; partial sums wait in `out` between calls.
template <int MR, int NR, class Format>
inline void linear_tile(const LinearTask& task, std::int64_t row, std::int64_t panel,
                        std::int64_t first, std::int64_t last) {
  alignas(64) float acc[MR * NR * kLanes];
  const auto width = [&](int n) {
    const std::int64_t left = task.outputs - (panel + n) * kLanes;
    return left < kLanes ? left : kLanes;
  };
  const auto out = [&](int m, int n) {
    return task.out + (row + m) * task.out_stride + (panel + n) * kLanes;
  };
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) {
      const Vec start = first == 0           ? zero()
                        : width(n) == kLanes ? load(out(m, n))
                                             : load_tail(out(m, n), width(n), 0.0f);
      store(acc + (m * NR + n) * kLanes, start);
    }
  }
  const std::int64_t panel_items = task.depth * kLanes;
  const auto* weight =
      static_cast<const typename Format::Item*>(task.weight) + panel * panel_items + first * kLanes;
  accumulate<MR, NR, Format>(task.x + row * task.x_stride + first, task.x_stride, weight,
                             panel_items, last - first, acc);
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) {
      Vec sum = load(acc + (m * NR + n) * kLanes);
      if (task.bias && last == task.depth) {
        const float* bias = task.bias + (panel + n) * kLanes;
        sum = add(sum, width(n) == kLanes ? load(bias) : load_tail(bias, width(n), 0.0f));
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
inline void linear_rows(const LinearTask& task, std::int64_t row, std::int64_t first_panel,
                        std::int64_t last_panel, std::int64_t first, std::int64_t last) {
  std::int64_t panel = first_panel;
  for (; panel + NR <= last_panel; panel += NR)
    linear_tile<MR, NR, Format>(task, row, panel, first, last);
  for (; panel < last_panel; ++panel) linear_tile<MR, 1, Format>(task, row, panel, first, last);
}

template <class Format>
inline void linear_few_rows(const LinearTask& task, std::int64_t row, std::int64_t num_rows,
                            std::int64_t first_panel, std::int64_t last_panel, std::int64_t first,
                            std::int64_t last) {
  switch (num_rows) {
    case 1:
      return linear_rows<1, kPanelsOneRow, Format>(task, row, first_panel, last_panel, first, last);
    case 2:
      return linear_rows<2, kPanels, Format>(task, row, first_panel, last_panel, first, last);
    case 3:
      return linear_rows<3, kPanels, Format>(task, row, first_panel, last_panel, first, last);
    case 4:
      return linear_rows<4, kPanels, Format>(task, row, first_panel, last_panel, first, last);
    case 5:
      return linear_rows<5, kPanels, Format>(task, row, first_panel, last_panel, first, last);
    default:
      break;
  }
}

template <class Format>
inline void linear_format(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
                          std::int64_t first_panel, std::int64_t last_panel) {
  // So many inputs at a time that two panels' weights stay in the first cache.
  constexpr std::int64_t kDepthChunk = 512;
  const std::int64_t chunk = last_row - first_row > kRows ? kDepthChunk : task.depth;
  for (std::int64_t first = 0; first < task.depth; first += chunk) {
    const std::int64_t last = first + chunk < task.depth ? first + chunk : task.depth;
    for (std::int64_t panel = first_panel; panel < last_panel; panel += kPanelGroup) {
      const std::int64_t end = panel + kPanelGroup < last_panel ? panel + kPanelGroup : last_panel;
      std::int64_t row = first_row;
      for (; row + kRows <= last_row; row += kRows)
        linear_rows<kRows, kPanels, Format>(task, row, panel, end, first, last);
      for (std::int64_t left = last_row - row; left > 0; left = last_row - row) {
        const std::int64_t few = left < 5 ? left : 5;
        linear_few_rows<Format>(task, row, few, panel, end, first, last);
        row += few;
      }
    }
  }
}

void linear(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
            std::int64_t first_panel, std::int64_t last_panel) {
  if (task.format == DType::bf16) {
    linear_format<FormatBf16>(task, first_row, last_row, first_panel, last_panel);
  } else {
    linear_format<FormatF32>(task, first_row, last_row, first_panel, last_panel);
  }
}

// Matrices: packing them into panels, reading rows back, multiplying by them.

#include "cpu/backend.h"

#include <algorithm>
#include <cmath>

namespace octavo::cpu {

namespace {

std::int64_t padded_depth(std::int64_t inputs) {
  return (inputs + kDepthBlock - 1) / kDepthBlock * kDepthBlock;
}

std::int64_t num_panels(std::int64_t outputs) { return (outputs + kLanes - 1) / kLanes; }

// Where a weight lies: which 32-bit word, and how far up in it. kernels.h has the layout.
struct Place {
  std::int64_t word;
  int shift;
};

struct Packing {
  std::int64_t depth, inputs_per_word, bits;

  explicit Packing(const Linear& linear)
      : depth(padded_depth(linear.inputs)),
        inputs_per_word(32 / bits_of(linear.format.dtype)),
        bits(bits_of(linear.format.dtype)) {}

  std::int64_t panel_words() const { return depth / inputs_per_word * kLanes; }
  Place place(std::int64_t row, std::int64_t input) const {
    return {row / kLanes * panel_words() + input / inputs_per_word * kLanes + row % kLanes,
            static_cast<int>(input % inputs_per_word * bits)};
  }
};

// Packs the rows of one panel, lanes [first_lane, last_lane): code(row, input) gives the bits.
// Inputs outside, lanes inside: what is written lies in one piece.
template <class Code>
void pack_panel(std::uint32_t* panel, const Packing& packing, const HostMatrix& rows,
                std::int64_t first_row, std::int64_t first_lane, std::int64_t last_lane,
                Code&& code) {
  for (std::int64_t i = 0; i < rows.cols; i += packing.inputs_per_word) {
    const std::int64_t end = std::min(rows.cols, i + packing.inputs_per_word);
    std::uint32_t* words = panel + i / packing.inputs_per_word * kLanes;
    for (std::int64_t lane = first_lane; lane < last_lane; ++lane) {
      std::uint32_t word = 0;
      for (std::int64_t j = i; j < end; ++j) {
        const std::uint32_t bits = code(first_row + lane - first_lane, j);
        word |= bits << ((j - i) * packing.bits);
      }
      words[lane] = word;
    }
  }
}

// The scale that makes 127 steps of a row's largest magnitude; 1 for a row of zeros.
float int8_scale(const HostMatrix& rows, std::int64_t row) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < rows.cols; ++i)
    largest = std::max(largest, std::fabs(load_float(rows.data, rows.dtype, row * rows.cols + i)));
  return largest > 0.0f ? largest / 127.0f : 1.0f;
}

std::uint32_t int8_code(float value, float scale) {
  const float steps = std::nearbyint(value / scale);  // ties to even
  const auto code = static_cast<std::int32_t>(std::min(127.0f, std::max(-127.0f, steps)));
  return static_cast<std::uint32_t>(code) & 0xffu;
}

// One float32 an output and group, [panel][group][16].
void pack_grouped(Buffer& buffer, const Linear& linear, std::int64_t first_row, std::int64_t rows,
                  const float* values) {
  const std::int64_t groups = linear.format.groups(linear.inputs);
  for (std::int64_t row = first_row; row < first_row + rows; ++row) {
    for (std::int64_t group = 0; group < groups; ++group) {
      buffer.as<float>()[(row / kLanes * groups + group) * kLanes + row % kLanes] =
          values[(row - first_row) * groups + group];
    }
  }
}

void unpack_row(float* out, const Linear& table, std::int64_t row, bool add) {
  const Packing packing(table);
  const auto* words = table.weight.as<std::uint32_t>();
  const std::int64_t groups = table.format.groups(table.inputs);
  const auto grouped = [&](const Buffer& buffer, std::int64_t group) {
    return buffer.as<float>()[(row / kLanes * groups + group) * kLanes + row % kLanes];
  };
  for (std::int64_t i = 0; i < table.inputs; ++i) {
    const Place place = packing.place(row, i);
    const std::uint32_t bits = words[place.word] >> place.shift;
    float value = 0.0f;
    switch (table.format.dtype) {
      case DType::f32:
        value = bits_float(bits);
        break;
      case DType::bf16:
        value = bf16_to_float(static_cast<std::uint16_t>(bits));
        break;
      case DType::int8:
        value =
            static_cast<float>(static_cast<std::int8_t>(bits & 0xffu)) * grouped(table.scales, 0);
        break;
      case DType::int4: {
        const std::int64_t group = i / table.format.group_size;
        value = table.format.levels[bits & 15u];
        if (table.format.has_zeros) value -= grouped(table.zeros, group);
        value *= grouped(table.scales, group);
        break;
      }
      case DType::f16:
        break;  // never packed
    }
    out[i] = add ? out[i] + value : value;
  }
}

}  // namespace

Linear CpuBackend::make_linear(std::int64_t outputs, std::int64_t inputs,
                               const WeightFormat& format, bool with_bias) {
  require(format.dtype != DType::f16, "the CPU has no f16 weights; take f32 or bf16");
  require(format.dtype != DType::int4 ||
              (format.group_size >= kDepthBlock && format.group_size % kDepthBlock == 0),
          "group_size is ", format.group_size, "; expected a multiple of ", kDepthBlock);
  Linear linear;
  linear.outputs = outputs;
  linear.inputs = inputs;
  linear.format = format;
  const std::int64_t panels = num_panels(outputs);
  const auto floats = [&](std::int64_t count) {
    return Buffer(this, static_cast<std::size_t>(count) * 4);
  };
  linear.weight = floats(panels * Packing(linear).panel_words());
  if (format.is_quantized()) linear.scales = floats(panels * kLanes * format.groups(inputs));
  if (format.has_zeros) linear.zeros = floats(panels * kLanes * format.groups(inputs));
  if (with_bias) linear.bias = floats(outputs);
  return linear;
}

void CpuBackend::pack_rows(Linear& linear, std::int64_t first_row, const HostMatrix& rows) {
  const DType format = linear.format.dtype;
  const bool is_float = rows.dtype != DType::int8 && rows.dtype != DType::int4;
  require(rows.dtype == format || (is_float && format != DType::int4), "a matrix of format ",
          name(format), " does not take ", name(rows.dtype), " rows");
  const Packing packing(linear);
  const std::int64_t last_row = first_row + rows.rows;
  const std::int64_t first_panel = first_row / kLanes;
  pool_.each((last_row - 1) / kLanes - first_panel + 1, [&](std::int64_t index, int) {
    const std::int64_t begin = (first_panel + index) * kLanes;
    const std::int64_t first_lane = std::max<std::int64_t>(0, first_row - begin);
    const std::int64_t last_lane = std::min(kLanes, last_row - begin);
    const std::int64_t source = begin + first_lane - first_row;
    const auto pack = [&](auto&& code) {
      pack_panel(linear.weight.as<std::uint32_t>() + (first_panel + index) * packing.panel_words(),
                 packing, rows, source, first_lane, last_lane, code);
    };
    const auto number = [&](std::int64_t row, std::int64_t i) {
      return load_float(rows.data, rows.dtype, row * rows.cols + i);
    };
    if (format == DType::f32) {
      pack([&](std::int64_t row, std::int64_t i) { return float_bits(number(row, i)); });
    } else if (format == DType::bf16 && rows.dtype == DType::bf16) {
      const auto* bits = static_cast<const std::uint16_t*>(rows.data);
      pack([&](std::int64_t row, std::int64_t i) {
        return std::uint32_t{bits[row * rows.cols + i]};
      });
    } else if (format == DType::bf16) {
      pack([&](std::int64_t row, std::int64_t i) {
        return std::uint32_t{float_to_bf16(number(row, i))};
      });
    } else if (format == DType::int8 && is_float) {
      float scales[kLanes];
      for (std::int64_t lane = first_lane; lane < last_lane; ++lane)
        scales[lane - first_lane] = int8_scale(rows, source + lane - first_lane);
      pack_grouped(linear.scales, linear, begin + first_lane, last_lane - first_lane, scales);
      pack([&](std::int64_t row, std::int64_t i) {
        return int8_code(number(row, i), scales[row - source]);
      });
    } else {
      const auto* bytes = static_cast<const std::uint8_t*>(rows.data);
      const bool halves = format == DType::int4;
      const std::int64_t row_bytes = halves ? (rows.cols + 1) / 2 : rows.cols;
      pack([&](std::int64_t row, std::int64_t i) {
        const std::uint32_t byte = bytes[row * row_bytes + (halves ? i / 2 : i)];
        return halves ? (byte >> (4 * (i % 2))) & 15u : byte;
      });
    }
  });
}

void CpuBackend::pack_scales(Linear& linear, std::int64_t first_row, std::int64_t rows,
                             const float* scales) {
  pack_grouped(linear.scales, linear, first_row, rows, scales);
}

void CpuBackend::pack_zeros(Linear& linear, std::int64_t first_row, std::int64_t rows,
                            const float* zeros) {
  pack_grouped(linear.zeros, linear, first_row, rows, zeros);
}

void CpuBackend::embed(View out, const Linear& table, const Linear* positions, const Step& step) {
  each_row(out, [&](std::int64_t t) {
    const std::int32_t id = step.token_ids[t];
    unpack_row(out.row(t), table, id >= 0 ? id : step.sampled[-1 - id], false);
    if (positions) unpack_row(out.row(t), *positions, step.positions[t], true);
  });
}

// Points the task at x, or at a copy that is rounded, padded and summed up as the format needs it.
void CpuBackend::prepare_input(LinearTask& task, View x, const Linear& weight) {
  if (task.format == DType::f32 && task.depth == weight.inputs) {
    task.x = x.data;
    task.x_stride = x.stride;
    return;
  }
  const std::int64_t blocks = task.zeros ? task.depth / kDepthBlock : 0;
  float* rounded = scratch(linear_scratch_, x.rows * (task.depth + blocks));
  float* sums = rounded + x.rows * task.depth;
  each_row(x, [&](std::int64_t row) {
    float* to = rounded + row * task.depth;
    if (task.format == DType::f32) {
      std::copy_n(x.row(row), x.cols, to);
    } else {
      kernels_.round_bf16(to, x.row(row), x.cols);
    }
    std::fill(to + x.cols, to + task.depth, 0.0f);
    for (std::int64_t block = 0; block < blocks; ++block) {
      float sum = 0.0f;
      for (std::int64_t i = 0; i < kDepthBlock; ++i) sum = sum + to[block * kDepthBlock + i];
      sums[row * blocks + block] = sum;
    }
  });
  task.x = rounded;
  task.x_stride = task.depth;
  task.x_sums = sums;
}

void CpuBackend::linear(View out, View x, const Linear& weight) {
  LinearTask task;
  task.weight = weight.weight.as<std::uint32_t>();
  task.format = weight.format.dtype;
  task.group_size = weight.format.group_size;
  task.scales = weight.scales.as<float>();
  task.zeros = weight.zeros.as<float>();
  task.levels = weight.format.levels.data();
  task.depth = padded_depth(weight.inputs);
  task.outputs = weight.outputs;
  task.bias = weight.bias.as<float>();
  task.out = out.data;
  task.out_stride = out.stride;
  prepare_input(task, x, weight);

  const std::int64_t panels = num_panels(weight.outputs);
  constexpr std::int64_t kFewRows = 8;  // as many rows as stay in the first cache beside weights
  if (x.rows <= kFewRows) {
    // Weights are read once: every thread streams a piece of its own, the same in every step.
    pool_.run([&](int thread) {
      const std::int64_t first = panels * thread / pool_.size();
      const std::int64_t last = panels * (thread + 1) / pool_.size();
      kernels_.linear(task, 0, x.rows, first, last);
    });
    return;
  }
  // Pieces of rows x panels that fit the second cache, taken by whichever thread is free.
  constexpr std::int64_t kRowPiece = 96, kPanelPiece = 8;
  const std::int64_t row_pieces = (x.rows + kRowPiece - 1) / kRowPiece;
  const std::int64_t panel_pieces = (panels + kPanelPiece - 1) / kPanelPiece;
  pool_.each(row_pieces * panel_pieces, [&](std::int64_t index, int) {
    const std::int64_t row = index % row_pieces * kRowPiece;
    const std::int64_t panel = index / row_pieces * kPanelPiece;
    kernels_.linear(task, row, std::min(x.rows, row + kRowPiece), panel,
                    std::min(panels, panel + kPanelPiece));
  });
}

}  // namespace octavo::cpu

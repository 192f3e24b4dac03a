// Matrices: packing them into panels, reading rows back, multiplying by them.

#include "cpu/backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/matrix_task.h"

namespace octavo::cpu {

namespace {

// How weights lie in 32-bit words: kernels.h has the layout.
struct Packing {
  std::int64_t depth, inputs_per_word, bits;

  explicit Packing(const Linear& linear)
      : depth(padded_depth(linear.inputs)),
        inputs_per_word(32 / bits_of(linear.format.dtype)),
        bits(bits_of(linear.format.dtype)) {}

  std::int64_t panel_words() const { return depth / inputs_per_word * kLanes; }
  // How far up in its word an input is.
  int shift(int within) const {
    return bits == 4 ? within % 4 * 8 + within / 4 * 4 : within * static_cast<int>(bits);
  }
};

// Eight int4 codes, the first in the lowest bits -> the first four in the lower halves of the
// bytes, the others in the upper halves.
std::uint32_t interleave_nibbles(std::uint32_t codes) {
  const auto spread = [](std::uint32_t four) {  // 16 bits -> a nibble in each byte
    four = (four | four << 8) & 0x00ff00ffu;
    return (four | four << 4) & 0x0f0f0f0fu;
  };
  return spread(codes & 0xffffu) | spread(codes >> 16) << 4;
}

// Bytes of a row as `stored_word` reads it.
std::int64_t row_bytes(std::int64_t cols, DType format) { return (cols * bits_of(format) + 7) / 8; }

// Word `word` of a row of codes or numbers: 32 of its bits, in the packed order.
std::uint32_t stored_word(const std::uint8_t* row, std::int64_t bytes, DType format,
                          std::int64_t word) {
  std::uint32_t bits = 0;
  const std::int64_t left = bytes - word * 4;
  std::memcpy(&bits, row + word * 4, left < 4 ? static_cast<std::size_t>(left) : 4);
  if (format == DType::int8) return bits ^ 0x80808080u;
  return format == DType::int4 ? interleave_nibbles(bits) : bits;
}

void row_to_floats(float* out, const HostMatrix& rows, std::int64_t row) {
  const std::int64_t at = row * rows.cols;
  const auto convert = [&](DType dtype) {
    for (std::int64_t i = 0; i < rows.cols; ++i) out[i] = load_float(rows.data, dtype, at + i);
  };
  // A loop for each type: the first two become vector instructions.
  if (rows.dtype == DType::f32) return convert(DType::f32);
  if (rows.dtype == DType::bf16) return convert(DType::bf16);
  convert(DType::f16);
}

// Codes of 127 steps of the row's largest magnitude; returns the step, rounded to bf16 as files
// hold it, or 1 for a row of zeros.
float round_to_int8(std::uint8_t* codes, const float* values, std::int64_t count) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < count; ++i)
    largest = std::fabs(values[i]) > largest ? std::fabs(values[i]) : largest;
  float scale = bf16_to_float(float_to_bf16(largest / 127.0f));
  if (!(scale > 0.0f)) scale = 1.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a number added to it becomes whole
  for (std::int64_t i = 0; i < count; ++i) {
    const float steps = (values[i] / scale + kRound) - kRound;  // ties to even
    const float kept = steps > 127.0f     ? 127.0f
                       : steps >= -127.0f ? steps
                                          : -127.0f;  // also of a NaN
    codes[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(kept));
  }
  return scale;
}

// A row of numbers in another format; returns an int8 row's scale.
float round_row(std::uint8_t* out, DType format, const float* values, std::int64_t count) {
  if (format == DType::int8) return round_to_int8(out, values, count);
  if (format == DType::f32) {
    std::memcpy(out, values, static_cast<std::size_t>(count) * 4);
  } else {
    auto* halves = reinterpret_cast<std::uint16_t*>(out);
    for (std::int64_t i = 0; i < count; ++i) halves[i] = float_to_bf16(values[i]);
  }
  return 1.0f;
}

// Calls set(index, value) for one number an output and group, in the order [panel][group][16].
template <class Set>
void pack_grouped(const Linear& linear, std::int64_t first_row, std::int64_t rows,
                  const float* values, Set&& set) {
  const std::int64_t groups = linear.format.groups(linear.inputs);
  for (std::int64_t row = first_row; row < first_row + rows; ++row) {
    for (std::int64_t group = 0; group < groups; ++group) {
      set((row / kLanes * groups + group) * kLanes + row % kLanes,
          values[(row - first_row) * groups + group]);
    }
  }
}

// The scale of an input's group of a row, and its zero point.
struct GroupScale {
  float scale, zero;

  GroupScale(const Linear& linear, std::int64_t row, std::int64_t input) {
    const WeightFormat& format = linear.format;
    const std::int64_t group = format.is_grouped() ? input / format.group_size : 0;
    const std::int64_t at =
        (row / kLanes * format.groups(linear.inputs) + group) * kLanes + row % kLanes;
    scale = load_float(linear.scales.data(), scale_type(format), at);
    zero = format.has_zeros ? linear.zeros.as<std::int8_t>()[at] : 0.0f;
  }
};

}  // namespace

// Adds a row of an embedding table to `out`, or writes it there.
void unpack_row(float* out, const Linear& table, std::int64_t row, bool add) {
  const Packing packing(table);
  const std::uint32_t* word =
      table.weight.as<std::uint32_t>() + row / kLanes * packing.panel_words() + row % kLanes;
  const auto unpack = [&](auto&& value_of) {
    for (std::int64_t i = 0; i < table.inputs; word += kLanes) {
      for (int within = 0; within < packing.inputs_per_word && i < table.inputs; ++within, ++i) {
        const float value = value_of(*word >> packing.shift(within), i);
        out[i] = add ? out[i] + value : value;
      }
    }
  };
  switch (table.format.dtype) {
    case DType::f32:
      return unpack([](std::uint32_t bits, std::int64_t) { return bits_float(bits); });
    case DType::bf16:
      return unpack([](std::uint32_t bits, std::int64_t) {
        return bf16_to_float(static_cast<std::uint16_t>(bits));
      });
    case DType::int8:
    case DType::int4: {
      GroupScale of(table, row, 0);
      std::int64_t group_end = table.format.is_grouped() ? table.format.group_size : table.inputs;
      return unpack([&, group = group_end](std::uint32_t bits, std::int64_t i) mutable {
        if (i == group_end) {
          of = GroupScale(table, row, i);
          group_end += group;
        }
        const int level = packing.bits == 4 ? table.format.levels[bits & 15u]
                                            : static_cast<int>(bits & 255u) - 128;
        return (static_cast<float>(level) - of.zero) * of.scale;
      });
    }
    case DType::f16:
      break;  // never packed
  }
}

Linear CpuBackend::make_linear(std::int64_t outputs, std::int64_t inputs,
                               const WeightFormat& format, bool with_bias, std::int64_t count) {
  require(format.dtype != DType::f16, "the CPU has no f16 weights; take f32 or bf16");
  require(
      format.group_size % kDepthBlock == 0 && (format.is_grouped() || format.dtype != DType::int4),
      "group_size is ", format.group_size, "; expected a multiple of ", kDepthBlock);
  Linear linear;
  linear.outputs = outputs;
  linear.inputs = inputs;
  linear.format = format;
  linear.count = count;
  linear.pitch = num_panels(outputs) * kLanes;
  const std::int64_t panels = num_panels(outputs) * count;
  const auto buffer = [&](std::int64_t numbers, int bits) {
    return Buffer(this, static_cast<std::size_t>(numbers * bits / 8));
  };
  const std::int64_t per_group = panels * kLanes * format.groups(inputs);
  // Kernels may read a few bytes past the last word.
  linear.weight = buffer(panels * Packing(linear).panel_words() + kLanes, 32);
  if (format.is_quantized()) linear.scales = buffer(per_group, bits_of(scale_type(format)));
  if (format.has_zeros) linear.zeros = buffer(per_group, 8);
  if (with_bias) linear.bias = buffer(outputs, 32);
  return linear;
}

void CpuBackend::pack_rows(Linear& linear, std::int64_t first_row, const HostMatrix& rows) {
  const DType format = linear.format.dtype;
  const bool is_float = rows.dtype != DType::int8 && rows.dtype != DType::int4;
  require(rows.dtype == format || (is_float && !linear.format.is_grouped()), "a matrix of format ",
          name(format), linear.format.is_grouped() ? " in groups" : "", " does not take ",
          name(rows.dtype), " rows");
  const bool is_stored = rows.dtype == format && format != DType::f16;
  const std::int64_t bytes = row_bytes(rows.cols, format), words = (bytes + 3) / 4;
  const std::int64_t panel_words = Packing(linear).panel_words();
  const std::int64_t last_row = first_row + rows.rows;
  const auto pack_panel = [&](std::int64_t panel, std::vector<std::uint32_t>& rounded,
                              std::vector<float>& values) {
    const std::int64_t begin = std::max(first_row, panel * kLanes);
    const std::int64_t end = std::min(last_row, (panel + 1) * kLanes);
    const auto* source = static_cast<const std::uint8_t*>(rows.data) + (begin - first_row) * bytes;
    std::int64_t stride = bytes;
    if (!is_stored) {
      stride = words * 4;
      rounded.resize(static_cast<std::size_t>(words * kLanes));
      values.resize(static_cast<std::size_t>(rows.cols));
      auto* out = reinterpret_cast<std::uint8_t*>(rounded.data());
      source = out;
      for (std::int64_t row = begin; row < end; ++row, out += stride) {
        row_to_floats(values.data(), rows, row - first_row);
        const float scale = round_row(out, format, values.data(), rows.cols);
        if (format == DType::int8) linear.scales.as<float>()[row] = scale;
      }
    }
    std::uint32_t* to =
        linear.weight.as<std::uint32_t>() + panel * panel_words + begin - panel * kLanes;
    for (std::int64_t word = 0; word < words; ++word, to += kLanes) {
      for (std::int64_t row = 0; row < end - begin; ++row)
        to[row] = stored_word(source + row * stride, bytes, format, word);
    }
  };
  // Each thread packs the panels that it will multiply by, so that their memory is near it.
  const std::int64_t of_one = num_panels(linear.outputs), begin = first_row / linear.pitch * of_one;
  pool_.run([&](int thread) {
    std::vector<std::uint32_t> rounded;
    std::vector<float> values;
    const ThreadPool::Range mine = pool_.share(of_one, thread);
    for (std::int64_t panel = std::max(begin + mine.begin, first_row / kLanes);
         panel < std::min(begin + mine.end, (last_row - 1) / kLanes + 1); ++panel)
      pack_panel(panel, rounded, values);
  });
}

void CpuBackend::pack_scales(Linear& linear, std::int64_t first_row, std::int64_t rows,
                             const float* scales) {
  const DType dtype = scale_type(linear.format);
  pack_grouped(linear, first_row, rows, scales, [&](std::int64_t index, float value) {
    store_float(linear.scales.data(), dtype, index, value);
  });
}

void CpuBackend::pack_zeros(Linear& linear, std::int64_t first_row, std::int64_t rows,
                            const float* zeros) {
  pack_grouped(linear, first_row, rows, zeros, [&](std::int64_t index, float value) {
    require(value >= -128.0f && value <= 127.0f && value == std::nearbyint(value),
            "a zero point is ", value, "; expected a whole number from -128 to 127");
    linear.zeros.as<std::int8_t>()[index] = static_cast<std::int8_t>(value);
  });
}

void CpuBackend::embed(View out, const Linear& table, const Linear* positions, const Step& step) {
  each_row(out, [&](std::int64_t t) {
    const std::int32_t id = step.token_ids[t];
    unpack_row(out.row(t), table, id >= 0 ? id : step.sampled[-1 - id], false);
    if (positions) unpack_row(out.row(t), *positions, step.positions[t], true);
  });
}

// row_of(row): its numbers, valid until the same thread's next call.
template <class RowOf>
void CpuBackend::prepare_rows(LinearTask& task, View shape, RowOf&& row_of) {
  task.x_stride = kernels_.input_stride(task);
  const std::int64_t words = input_words(task);
  float* memory = scratch(linear_scratch_, words + shape.rows * (1 + task.num_blocks));
  task.x = memory;
  task.x_scales = memory + words;
  task.x_sums = reinterpret_cast<std::int32_t*>(task.x_scales + shape.rows);
  each_row(shape, [&](std::int64_t row) {
    kernels_.prepare_input(task, row, memory + row * task.x_stride, row_of(row), shape.cols);
  });
}

void CpuBackend::prepare_input(LinearTask& task, View x) {
  if (task.format == DType::f32 && task.depth == x.cols) {
    task.x = x.row(0);
    task.x_stride = x.stride;
    return;
  }
  prepare_rows(task, x, [&](std::int64_t row) { return x.row(row); });
}

void CpuBackend::prepare_input(LinearTask& task, const NormedInput& x) {
  prepare_rows(task, x.residual, [&](std::int64_t row) {
    static thread_local std::vector<float> normed;
    normed.resize(static_cast<std::size_t>(x.residual.cols));
    add_and_norm(normed.data(), x, row);
    return normed.data();
  });
}

void CpuBackend::linear(View out, View x, const Linear& weight) {
  MatrixTask task(weight, x.rows);
  task.write_to(out);
  prepare_input(task, x);
  multiply(task);
}

bool CpuBackend::normed_linear(View out, const NormedInput& x, const Linear& weight) {
  MatrixTask task(weight, out.rows);
  task.write_to(out);
  prepare_input(task, x);
  multiply(task);
  return true;
}

bool CpuBackend::normed_mlp(View out, const NormedInput& x, const std::vector<Linear>& up,
                            const Linear& down, Activation activation) {
  // The panels of gate and up have to be of one matrix.
  const std::int64_t width = down.inputs;
  if (up.size() != 1 || up[0].outputs != 2 * width || width % kDepthBlock != 0) return false;
  const std::int64_t rows = out.rows;
  MatrixTask first(up[0], rows), second(down, rows);
  prepare_input(first, x);
  first.up_panels = width / kLanes;
  first.activation = activation;
  second.x_stride = kernels_.input_stride(second);
  const std::int64_t words = std::max(input_words(second), rows * width);
  float* memory = scratch(mlp_scratch_, words);
  const bool is_written = writes_input(first, second, kernels_.groups_take_bf16);
  if (is_written) {
    first.next = &second;
    second.x = second.input = memory;
  } else {
    first.out = memory;
    first.out_stride = width;
  }
  multiply(first);
  if (!is_written) prepare_input(second, {memory, rows, width, width});
  second.write_to(out);
  multiply(second);
  return true;
}

void CpuBackend::multiply(const LinearTask& task) {
  const std::int64_t panels = task.up_panels ? task.up_panels : num_panels(task.outputs);
  const Pieces& pieces = kernels_.pieces;
  if (task.rows <= pieces.stream_rows) {
    // Weights are read once: every thread reads the share that it packed, in pieces, so that other
    // threads can take pieces of a thread that is delayed. Panels of gates are taken in pairs,
    // since tiles write 32 inputs of the next product at a time.
    constexpr std::int64_t kPanels = 8;
    const std::int64_t unit = task.up_panels ? 2 : 1;
    pool_.shares(panels / unit, kPanels / unit, [&](ThreadPool::Range piece) {
      kernels_.linear(task, 0, task.rows, piece.begin * unit, piece.end * unit);
    });
    return;
  }
  const std::int64_t row_pieces = (task.rows + pieces.rows - 1) / pieces.rows;
  std::int64_t rows = pieces.rows;
  if (pieces.keeps_rows) {  // pieces of equal size, at least two tiles of rows
    constexpr std::int64_t kTwoTiles = 2 * kLanes;
    rows = ((task.rows + row_pieces - 1) / row_pieces + kTwoTiles - 1) / kTwoTiles * kTwoTiles;
  }
  const auto panel_pieces = [&](std::int64_t size) { return (panels + size - 1) / size; };
  std::int64_t size = pieces.panels;
  while (size > 4 && row_pieces * panel_pieces(size) < 4 * pool_.size()) size /= 2;
  const auto multiply_piece = [&](std::int64_t row_piece, std::int64_t panel_piece) {
    const std::int64_t row = row_piece * rows, panel = panel_piece * size;
    kernels_.linear(task, row, std::min(task.rows, row + rows), panel,
                    std::min(panels, panel + size));
  };
  if (pieces.keeps_rows) {
    const std::int64_t count = panel_pieces(size);
    pool_.shares(row_pieces * count, 1, [&](ThreadPool::Range piece) {
      multiply_piece(piece.begin / count, piece.begin % count);
    });
    return;
  }
  // A free thread takes the next piece; there are a few for each.
  pool_.each(row_pieces * panel_pieces(size), [&](std::int64_t index, int) {
    multiply_piece(index % row_pieces, index / row_pieces);
  });
}

}  // namespace octavo::cpu

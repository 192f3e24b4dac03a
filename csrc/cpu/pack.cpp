// Packing matrices into panels (kernels.h has the layout), and reading rows back.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/backend.h"
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

// Rows of so many bytes, `stride` apart, become lanes of a panel; order(bits): a word of a row in
// the packed order. A cache line of each row is taken at a time, whose words lie together in `to`.
template <class Order>
void interleave_rows(std::uint32_t* to, const std::uint8_t* rows, std::int64_t count,
                     std::int64_t bytes, std::int64_t stride, Order&& order) {
  const std::int64_t whole = bytes / 4;
  const auto left = static_cast<std::size_t>(bytes % 4);
  std::uint32_t bits = 0;
  for (std::int64_t first = 0; first < whole; first += kLanes) {
    const std::int64_t end = std::min(first + kLanes, whole);
    for (std::int64_t row = 0; row < count; ++row) {
      for (std::int64_t word = first; word < end; ++word) {
        std::memcpy(&bits, rows + row * stride + word * 4, 4);
        to[word * kLanes + row] = order(bits);
      }
    }
  }
  for (std::int64_t row = 0; left && row < count; ++row) {
    bits = 0;
    std::memcpy(&bits, rows + row * stride + whole * 4, left);
    to[whole * kLanes + row] = order(bits);
  }
}

void interleave_rows(std::uint32_t* to, const std::uint8_t* rows, std::int64_t count,
                     std::int64_t bytes, std::int64_t stride, DType format) {
  const auto run = [&](auto&& order) { interleave_rows(to, rows, count, bytes, stride, order); };
  if (format == DType::int8) return run([](std::uint32_t bits) { return bits ^ 0x80808080u; });
  if (format == DType::int4) return run(interleave_nibbles);
  run([](std::uint32_t bits) { return bits; });
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
void pack_grouped(ThreadPool& pool, const Linear& linear, std::int64_t first_row, std::int64_t rows,
                  const float* values, Set&& set) {
  const std::int64_t groups = linear.format.groups(linear.inputs);
  const std::int64_t first_panel = first_row / kLanes;
  pool.each(num_panels(first_row + rows) - first_panel, [&](std::int64_t index, int) {
    const std::int64_t panel = first_panel + index;
    const std::int64_t end = std::min(first_row + rows, (panel + 1) * kLanes);
    for (std::int64_t row = std::max(first_row, panel * kLanes); row < end; ++row) {
      const float* of_row = values + (row - first_row) * groups;
      for (std::int64_t group = 0; group < groups; ++group)
        set((panel * groups + group) * kLanes + row % kLanes, of_row[group]);
    }
  });
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
  const std::int64_t bytes = (rows.cols * bits_of(format) + 7) / 8;  // of a row
  const std::int64_t words = (bytes + 3) / 4, panel_words = Packing(linear).panel_words();
  const std::int64_t last_row = first_row + rows.rows, first_panel = first_row / kLanes;
  const auto num_threads = static_cast<std::size_t>(pool_.size());
  std::vector<std::vector<std::uint32_t>> rounded(num_threads);
  std::vector<std::vector<float>> floats(num_threads);
  if (first_row % linear.pitch == 0) touch_shares(linear, first_row / linear.pitch);
  pool_.each(num_panels(last_row) - first_panel, [&](std::int64_t index, int thread) {
    const std::int64_t panel = first_panel + index;
    const std::int64_t begin = std::max(first_row, panel * kLanes);
    const std::int64_t end = std::min(last_row, (panel + 1) * kLanes);
    const auto* source = static_cast<const std::uint8_t*>(rows.data) + (begin - first_row) * bytes;
    std::int64_t stride = bytes;
    if (!is_stored) {
      stride = words * 4;
      auto& panel_rows = rounded[static_cast<std::size_t>(thread)];
      auto& values = floats[static_cast<std::size_t>(thread)];
      panel_rows.resize(static_cast<std::size_t>(words * kLanes));
      values.resize(static_cast<std::size_t>(rows.cols));
      auto* out = reinterpret_cast<std::uint8_t*>(panel_rows.data());
      source = out;
      for (std::int64_t row = begin; row < end; ++row, out += stride) {
        row_to_floats(values.data(), rows, row - first_row);
        const float scale = round_row(out, format, values.data(), rows.cols);
        if (format == DType::int8) linear.scales.as<float>()[row] = scale;
      }
    }
    std::uint32_t* to =
        linear.weight.as<std::uint32_t>() + panel * panel_words + begin - panel * kLanes;
    interleave_rows(to, source, end - begin, bytes, stride, format);
  });
}

// Each thread touches the panels of one of the matrices that it will multiply by, so that their
// memory is near it, whichever thread fills them: rows may come in runs.
void CpuBackend::touch_shares(const Linear& linear, std::int64_t matrix) {
  constexpr std::int64_t kPageWords = 1024;
  const std::int64_t panels = num_panels(linear.outputs);
  const std::int64_t panel_words = Packing(linear).panel_words();
  pool_.run([&](int thread) {
    const ThreadPool::Range mine = pool_.share(panels, thread);
    auto* words = linear.weight.as<std::uint32_t>() + matrix * panels * panel_words;
    for (std::int64_t at = mine.begin * panel_words; at < mine.end * panel_words;
         at += kPageWords) {
      volatile std::uint32_t* word = words + at;
      *word = *word;
    }
  });
}

void CpuBackend::pack_scales(Linear& linear, std::int64_t first_row, std::int64_t rows,
                             const float* scales) {
  const auto pack = [&](DType dtype) {
    pack_grouped(pool_, linear, first_row, rows, scales, [&](std::int64_t index, float value) {
      store_float(linear.scales.data(), dtype, index, value);
    });
  };
  if (scale_type(linear.format) == DType::f16) return pack(DType::f16);
  pack(scale_type(linear.format));
}

void CpuBackend::pack_zeros(Linear& linear, std::int64_t first_row, std::int64_t rows,
                            const float* zeros) {
  const std::int64_t count = rows * linear.format.groups(linear.inputs);
  const float* wrong = std::find_if(zeros, zeros + count, [](float value) {
    return !(value >= -128.0f && value <= 127.0f && value == std::nearbyint(value));
  });
  if (wrong != zeros + count)
    require(false, "a zero point is ", *wrong, "; expected a whole number from -128 to 127");
  pack_grouped(pool_, linear, first_row, rows, zeros, [&](std::int64_t index, float value) {
    linear.zeros.as<std::int8_t>()[index] = static_cast<std::int8_t>(value);
  });
}

}  // namespace octavo::cpu

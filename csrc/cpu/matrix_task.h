// A packed matrix as the task of a product (kernels.h), and how its parts lie in memory.
#pragma once

#include "core/backend.h"
#include "cpu/kernels.h"

namespace octavo::cpu {

inline std::int64_t padded_depth(std::int64_t inputs) {
  return (inputs + kDepthBlock - 1) / kDepthBlock * kDepthBlock;
}

inline std::int64_t num_panels(std::int64_t outputs) { return (outputs + kLanes - 1) / kLanes; }

// Scales of groups have the format's type, those of whole outputs are float32.
inline DType scale_type(const WeightFormat& format) {
  return format.is_grouped() ? format.scale_dtype : DType::f32;
}

// A task that holds the levels of a matrix, if they are not uniform, as bytes.
struct MatrixTask : LinearTask {
  std::uint8_t own_levels[16];

  MatrixTask(const Linear& matrix, std::int64_t num_rows) {
    const WeightFormat& form = matrix.format;
    weight = matrix.weight.as<std::uint32_t>();
    format = form.dtype;
    activation_bits = static_cast<int>(form.activation_bits);
    group_size = form.group_size;
    scales = matrix.scales.data();
    scale_type = cpu::scale_type(form);
    zeros = matrix.zeros.as<std::int8_t>();
    depth = padded_depth(matrix.inputs);
    num_groups = form.groups(matrix.inputs);
    outputs = matrix.outputs;
    bias = matrix.bias.as<float>();
    rows = num_rows;
    if (form.is_quantized()) num_blocks = block_index(*this, depth - 1) + 1;
    if (!form.has_own_levels()) return;
    for (std::size_t i = 0; i < 16; ++i)
      own_levels[i] = static_cast<std::uint8_t>(form.levels[i] + 128);
    levels = own_levels;
  }
  MatrixTask(const MatrixTask&) = delete;
  MatrixTask& operator=(const MatrixTask&) = delete;

  void write_to(View out) {
    this->out = out.row(0);
    out_stride = out.stride;
  }
};

// Whether a product can write its results as the next one's input. It cannot if that is rounded to
// whole numbers, which takes a whole row, nor if only the next product may use tiles, whose input
// has another layout (float32 never uses tiles, groups of bf16 always, others with many rows).
inline bool writes_input(const LinearTask& task, const LinearTask& next, bool groups_take_bf16) {
  if (is_grouped(next)) return groups_take_bf16 && is_grouped(task);
  return next.format == DType::f32 || (next.format == DType::bf16 && task.format != DType::f32);
}

// 32-bit words of a task's input: whole tiles of rows.
inline std::int64_t input_words(const LinearTask& task) {
  return (task.rows + kLanes - 1) / kLanes * kLanes * task.x_stride;
}

// Memory that is given out from one end to the other, in whole cache lines.
class Arena {
 public:
  explicit Arena(float* memory) : at_(memory) {}

  float* take(std::int64_t count) {
    float* memory = at_;
    at_ += size(count);
    return memory;
  }
  static std::int64_t size(std::int64_t count) { return (count + 15) / 16 * 16; }

 private:
  float* at_;
};

// Numbers of a task's input: its x, scales and sums.
inline std::int64_t input_numbers(const LinearTask& task) {
  return Arena::size(input_words(task) + task.rows * (1 + task.num_blocks));
}

inline void place_input(LinearTask& task, Arena& arena) {
  float* memory = arena.take(input_numbers(task));
  task.x = memory;
  task.x_scales = memory + input_words(task);
  task.x_sums = reinterpret_cast<std::int32_t*>(task.x_scales + task.rows);
}

inline void prepare_row(const Kernels& kernels, const LinearTask& task, std::int64_t row,
                        const float* x, std::int64_t inputs) {
  float* memory = const_cast<float*>(static_cast<const float*>(task.x));
  kernels.prepare_input(task, row, memory + row * task.x_stride, x, inputs);
}

// Writes a row of an embedding table to `out`, or adds it (pack.cpp).
void unpack_row(float* out, const Linear& table, std::int64_t row, bool add);

}  // namespace octavo::cpu

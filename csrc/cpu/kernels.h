// The table of kernels that an instruction set provides, and what they work on.
//
// Every kernel is single-threaded and works on a part of an op; the files of the op families cut
// the work up. Each instruction set's translation unit (isa_*.cpp) compiles the same bodies
// (kernels/*.h) over its own 16-lane vector, so that all of them give the same bits: the order of
// every sum is written down in terms of 16 lanes, and products are fused where the body says so.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/spec.h"

namespace octavo::cpu {

constexpr std::int64_t kLanes = 16;       // outputs of a weight panel, tokens of a key tile
constexpr std::int64_t kDepthBlock = 32;  // inputs that are summed up before they are added on

// Weights of a matrix product, packed in panels of 16 outputs, as 32-bit words:
//   [panel][depth / n][16], a word holding n inputs of one output, the first in the lowest bits
// with n = 1 (f32), 2 (bf16), 4 (int8) or 8 (int4). depth is the number of inputs rounded up to a
// multiple of 32; what is added is zero, or meets an input of zero.
//
// int8: one scale an output, [panel][16]. int4: a scale for each group of inputs,
// [panel][group][16]; a word's four bits choose one of 16 levels, and a group's zero point, in
// units of a level, is taken off: weight = (level - zero) * scale.
struct LinearTask {
  const float* x = nullptr;  // rows of `depth` numbers, bf16-rounded unless the format is f32
  std::int64_t x_stride = 0;
  const float* x_sums = nullptr;  // (rows, depth / 32): sums of 32 inputs each; with zeros only
  const std::uint32_t* weight = nullptr;
  DType format = DType::f32;
  std::int64_t group_size = 0;    // int4: a multiple of 32
  const float* scales = nullptr;  // int8, int4
  const float* zeros = nullptr;   // int4, or null
  const float* levels = nullptr;  // int4: [16]
  std::int64_t depth = 0;
  std::int64_t outputs = 0;
  const float* bias = nullptr;  // or null
  float* out = nullptr;
  std::int64_t out_stride = 0;
};

inline std::int64_t num_groups(const LinearTask& task) {
  return (task.depth + task.group_size - 1) / task.group_size;
}

// How the keys and values of one KV head lie in a block:
//   keys [block_size / 16][head_dim][16], then values [block_size][padded_dim]
// and when they are int8, a float32 scale for each token's key, then for each token's value.
struct KvLayout {
  DType dtype = DType::f32;
  std::int64_t block_size = 0, head_dim = 0, padded_dim = 0, num_kv_heads = 0;

  std::int64_t item_bytes() const { return bits_of(dtype) / 8; }
  std::int64_t scales_at() const { return block_size * (head_dim + padded_dim) * item_bytes(); }
  std::int64_t head_bytes() const {
    return scales_at() + (dtype == DType::int8 ? 2 * block_size * 4 : 0);
  }
  std::int64_t block_bytes() const { return num_kv_heads * head_bytes(); }
  std::int64_t key_item(std::int64_t token, std::int64_t dim) const {
    return (token / kLanes * head_dim + dim) * kLanes + token % kLanes;
  }
  std::int64_t value_item(std::int64_t token, std::int64_t dim) const {
    return block_size * head_dim + token * padded_dim + dim;
  }
};

constexpr int kMaxAttendRows = 16;

// Attention of a few query rows, all of one KV head, over tokens [begin, end) of their sequence.
struct AttendTask {
  const float* q[kMaxAttendRows] = {};         // head_dim numbers each
  std::int64_t position[kMaxAttendRows] = {};  // of each row
  int rows = 0;
  const unsigned char* kv = nullptr;  // the layer's blocks, at the head's place in block 0
  KvLayout layout;
  const std::int32_t* block_table = nullptr;
  std::int64_t begin = 0, end = 0;
  std::int64_t window = 0;
  float scale = 1.0f;
};

// What one range of tokens contributes to a row: softmax numerator, denominator, greatest score.
struct AttendState {
  float* out = nullptr;  // [padded_dim], not yet divided by the sum
  float max = 0.0f;
  float sum = 0.0f;
};

struct Kernels {
  const char* isa = "";
  // Outputs 16 first_panel .. of rows [first_row, last_row).
  void (*linear)(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
                 std::int64_t first_panel, std::int64_t last_panel);
  // Copies x, rounding each number to bf16 (the result is float32 again).
  void (*round_bf16)(float* out, const float* x, std::int64_t count);
  void (*norm)(float* out, const float* x, const float* weight, const float* bias, float eps,
               NormKind kind, std::int64_t count);
  void (*add)(float* residual, const float* x, std::int64_t count);
  // gate null: out = act(up); else out = act(gate) * up.
  void (*activate)(float* out, const float* gate, const float* up, Activation activation,
                   std::int64_t count);
  // Fills states[row], each over the task's range alone.
  void (*attend)(const AttendTask& task, AttendState* states);
  // Folds `part`, a later range of tokens, into `total`.
  void (*merge)(AttendState& total, const AttendState& part, std::int64_t padded_dim);
  // Sampling: see reference/sampling.py for the definition of each.
  void (*exp_weights)(std::uint64_t* out, const float* x, float max, std::int64_t count);
  std::uint64_t (*exp_sum)(const float* x, float max, std::int64_t count);
  void (*gumbel)(float* out, std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position,
                 std::int64_t first_token, std::int64_t count);
  float (*log_positive)(float x);
  float (*max_value)(const float* x, std::int64_t count);
  bool (*all_finite)(const float* x, std::int64_t count);
};

// The instruction sets compiled in that this machine has, slowest first; "scalar" is always there.
std::vector<std::string> available_isas();
std::vector<std::string> compiled_isas();

// "auto" takes the fastest. Throws std::invalid_argument for one that is not available.
const Kernels& kernels_for(const std::string& isa);

}  // namespace octavo::cpu

// The table of kernels that an instruction set provides, and the data they work on.
//
// Every kernel is single-threaded and works on a part of an op; the files of the op families divide
// the work. instruction_set.cpp is compiled once for each instruction set, with the same bodies
// (kernels/*.h) over a different 16-lane vector. All sets give the same bits, except where
// docs/cpu.md says otherwise: the order of every sum is defined over 16 lanes, and products are
// fused only where the body says so.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/spec.h"

namespace octavo::cpu {

constexpr std::int64_t kLanes = 16;       // outputs of a weight panel, tokens of a key tile
constexpr std::int64_t kDepthBlock = 32;  // inputs summed up before they are added to the total

// Up to so many rows, memory limits the speed: all inputs of a panel are read in one pass. More
// rows take the inputs a stretch at a time, so that the weights stay in L2 meanwhile.
constexpr std::int64_t kStreamRows = 8;
constexpr std::int64_t kIntegerBlock = 512;  // codes; the sum of their products fits in 32 bits

// Weights of a matrix product, packed in panels of 16 outputs, as 32-bit words:
//   [panel][depth / n][16], a word holding n inputs of one output
// with n = 1 (f32), 2 (bf16), 4 (int8) or 8 (int4). depth is the number of inputs rounded up to a
// multiple of 32; the padding is zero, or is multiplied by zero. The first input is in the lowest
// bits; of eight int4 inputs the first four are in the lower halves of the four bytes, the others
// in the upper halves.
//
// int8: a byte is the code + 128, its level. int4: four bits choose one of 16 levels. A scale for
// each group of inputs, [panel][group][16], and perhaps a zero point, in units of a level: weight =
// (level - zero) * scale; or int8 with one scale an output, [panel][16].
struct LinearTask {
  // Rows of x as `prepare_input` writes them, x_stride 32-bit words apart; for each row of codes
  // its scale, and the sum of the codes of each block: (rows, num_blocks).
  const void* x = nullptr;
  std::int64_t x_stride = 0;
  float* x_scales = nullptr;
  std::int32_t* x_sums = nullptr;
  const std::uint32_t* weight = nullptr;
  DType format = DType::f32;
  int activation_bits = 16;              // 8: int8 without groups
  std::int64_t group_size = 0;           // a multiple of 32; 0: one scale an output (int8)
  std::int64_t num_groups = 1;           // of a row
  std::int64_t num_blocks = 1;           // of a row
  DType scale_type = DType::f32;         // of groups: f32, f16 or bf16
  const void* scales = nullptr;          // int8, int4
  const std::int8_t* zeros = nullptr;    // int4, or null
  const std::uint8_t* levels = nullptr;  // int4: [16], level + 128; null: uniform, -8 to 7
  std::int64_t rows = 0;
  std::int64_t depth = 0;
  std::int64_t outputs = 0;
  const float* bias = nullptr;  // or null
  float* out = nullptr;
  std::int64_t out_stride = 0;
  // If not 0, the outputs of panel p are gates of those of panel p + up_panels, and
  // activation(gate) * up is stored: to `out`, or as input of the next product.
  std::int64_t up_panels = 0;
  Activation activation = Activation::silu;
  const LinearTask* next = nullptr;  // its x is float32 or bf16, with as many rows
  void* input = nullptr;             // of that product: its x, to be written
};

inline bool is_grouped(const LinearTask& task) { return task.group_size != 0; }
// Integer formats sum up a block of inputs exactly: at most 512, all of one group (the whole row
// without groups), counted from the beginning of the group.
inline std::int64_t group_inputs(const LinearTask& task) {
  return is_grouped(task) ? task.group_size : task.depth;
}
inline std::int64_t blocks_per_group(const LinearTask& task) {
  return (group_inputs(task) + kIntegerBlock - 1) / kIntegerBlock;
}
// Where the block that begins at input k, in group `group`, ends.
inline std::int64_t block_end(const LinearTask& task, std::int64_t k, std::int64_t group) {
  const std::int64_t group_end = (group + 1) * group_inputs(task);
  const std::int64_t end = group_end < task.depth ? group_end : task.depth;
  return k + kIntegerBlock < end ? k + kIntegerBlock : end;
}
inline std::int64_t block_end(const LinearTask& task, std::int64_t k) {
  return block_end(task, k, k / group_inputs(task));
}
inline std::int64_t block_index(const LinearTask& task, std::int64_t k) {
  const std::int64_t group = group_inputs(task);
  return k / group * blocks_per_group(task) + k % group / kIntegerBlock;
}

// How the keys and values of one KV head lie in a block, in float32 and int8:
//   keys [block_size / 16][head_dim][16], then values [block_size][padded_dim]
// in bf16, two dimensions of a key or two tokens' values in each 32-bit word:
//   keys [block_size / 16][key_dim / 2][16][2], then values [block_size / 2][padded_dim][2]
// with key_dim rounded up to an even number; the padding stays zero. int8 also has a float32 scale
// for each token's key, then for each token's value.
struct KvLayout {
  DType dtype = DType::f32;
  std::int64_t block_size = 0, head_dim = 0, key_dim = 0, padded_dim = 0, num_kv_heads = 0;

  bool has_pairs() const { return dtype == DType::bf16; }
  std::int64_t item_bytes() const { return bits_of(dtype) / 8; }
  std::int64_t scales_at() const { return block_size * (key_dim + padded_dim) * item_bytes(); }
  std::int64_t head_bytes() const {
    return scales_at() + (dtype == DType::int8 ? 2 * block_size * 4 : 0);
  }
  std::int64_t block_bytes() const { return num_kv_heads * head_bytes(); }
  std::int64_t key_item(std::int64_t token, std::int64_t dim) const {
    const std::int64_t tile = token / kLanes * key_dim * kLanes, lane = token % kLanes;
    if (has_pairs()) return tile + (dim / 2 * kLanes + lane) * 2 + dim % 2;
    return tile + dim * kLanes + lane;
  }
  std::int64_t value_item(std::int64_t token, std::int64_t dim) const {
    const std::int64_t values = block_size * key_dim;
    if (has_pairs()) return values + (token / 2 * padded_dim + dim) * 2 + token % 2;
    return values + token * padded_dim + dim;
  }
};

// Of bin_weights and take_bin. The last bin begins where nothing has a weight any more: beyond 28.
constexpr int kWeightBins = 2048;
constexpr float kWeightBinsOfOne = 64.0f;

constexpr int kMaxAttendRows = 256;

// Attention of some query rows, all of one KV head, over tokens [begin, end) of their sequence.
struct AttendTask {
  const float* q[kMaxAttendRows];         // head_dim numbers each
  std::int64_t position[kMaxAttendRows];  // of each row: they grow, by one at most
  int rows = 0;
  const unsigned char* kv = nullptr;  // the layer's blocks, at the head's place in block 0
  KvLayout layout;
  const std::int32_t* block_table = nullptr;
  std::int64_t begin = 0, end = 0;
  std::int64_t window = 0;
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: scores are not capped
  bool goes_on = false;  // the same rows as in this thread's previous call
};

// What one range of tokens contributes to a row: softmax numerator, denominator, greatest score
// (over a bf16 cache: in powers of two, rounded up to a whole number).
struct AttendState {
  float* out = nullptr;  // [padded_dim], not yet divided by the sum; rows lie one after another
  float max = 0.0f;
  float sum = 0.0f;
};

// Scales of groups of weights for int4 (kernels/scale_search.h).
struct ScaleTask {
  const float* x = nullptr;  // (members, groups)
  const float* shares =
      nullptr;  // (members, groups), what squared errors count; null: all the same
  std::int64_t members = 0, groups = 0;
  const float* levels = nullptr;  // 16, ascending whole numbers; null: -8 to 7
  // The values that the largest magnitude of a group may get; or, with zero points, which parts of
  // its range a step may be.
  const float* candidates = nullptr;
  std::int64_t num_candidates = 0;
  float* scales = nullptr;  // (groups), all bfloat16 numbers
  float* zeros = nullptr;   // (groups); null: none
};

// How the work of `linear` should be divided: up to so many rows, each thread has its share of the
// panels; more rows are divided into pieces of rows x panels that fit L2. keeps_rows: the rows of x
// stay in L2 while panels pass by, so a thread should continue with the same rows.
struct Pieces {
  std::int64_t stream_rows = kStreamRows;
  std::int64_t rows = 96, panels = 8;
  bool keeps_rows = false;
};

struct Kernels {
  const char* isa = "";
  // The number of 32-bit words of a row of x, in the form that `linear` reads.
  std::int64_t (*input_stride)(const LinearTask& task);
  // Converts row `row` of x, `inputs` numbers, to that form: at `to`, or anywhere in the memory of
  // its 16 rows. Integer formats also write the row's scale and sums.
  void (*prepare_input)(const LinearTask& task, std::int64_t row, void* to, const float* x,
                        std::int64_t inputs);
  // Outputs 16 first_panel .. of rows [first_row, last_row); first_row is a multiple of 16.
  void (*linear)(const LinearTask& task, std::int64_t first_row, std::int64_t last_row,
                 std::int64_t first_panel, std::int64_t last_panel);
  void (*norm)(float* out, const float* x, const float* weight, const float* bias, float eps,
               NormKind kind, std::int64_t count);
  void (*add)(float* residual, const float* x, std::int64_t count);
  // x = factor * x; with a cap that is not 0, x = cap * tanh(factor * x / cap).
  void (*scale)(float* x, float factor, float cap, std::int64_t count);
  // sum += factor * x, the product rounded.
  void (*add_scaled)(float* sum, const float* x, float factor, std::int64_t count);
  // gate null: out = act(up); else out = act(gate) * up.
  void (*activate)(float* out, const float* gate, const float* up, Activation activation,
                   std::int64_t count);
  // Fills states[row], each over the task's range alone. There are whole tiles of 16 states; those
  // after the task's rows may be overwritten.
  void (*attend)(const AttendTask& task, AttendState* states);
  // Merges `part`, a later range of tokens, into `total`.
  void (*merge)(const KvLayout& layout, AttendState& total, const AttendState& part);
  // Sampling: see reference/sampling.py for the definition of each.
  // Bin b: numbers by b / kWeightBinsOfOne or more below max; the last: all that are further below.
  // sums[b] += the weights of its numbers. And which numbers are in a bin; returns how many.
  void (*bin_weights)(std::uint64_t* sums, const float* x, float max, std::int64_t count);
  std::int64_t (*take_bin)(std::int32_t* out, const float* x, float max, int bin,
                           std::int64_t count);
  void (*exp_weights)(std::uint64_t* out, const float* x, float max, std::int64_t count);
  std::uint64_t (*exp_sum)(const float* x, float max, std::int64_t count);
  void (*gumbel)(float* out, std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position,
                 std::int64_t first_token, std::int64_t count);
  std::int64_t (*noisy_best)(const float* scores, std::uint64_t seed, std::uint32_t sample_index,
                             std::uint32_t position, std::int64_t count);
  std::uint32_t (*xtc_word)(std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position);
  float (*log_positive)(float x);
  float (*max_value)(const float* x, std::int64_t count);
  bool (*all_finite)(const float* x, std::int64_t count);
  void (*search_scales)(const ScaleTask& task);
  Pieces pieces = {};
  bool groups_take_bf16 = false;  // x of weights in groups; else whole numbers, as of all int8
};

// The instruction sets compiled in that this machine has, slowest first; "scalar" is always there.
std::vector<std::string> available_isas();
std::vector<std::string> compiled_isas();

// "auto" takes the fastest. Throws std::invalid_argument for one that is not available.
const Kernels& kernels_for(const std::string& isa);

}  // namespace octavo::cpu

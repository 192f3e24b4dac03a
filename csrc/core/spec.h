// The model in numbers: the C++ side of python/octavo/models/spec.py, field for field.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace octavo {

// none: what goes in comes out.
enum class NormKind : std::uint8_t { rms, layer, none };
// Of queries and keys before rope: each head by itself, or all heads of a token together.
enum class QkNorm : std::uint8_t { none, head, row };
enum class Activation : std::uint8_t { silu, gelu, gelu_tanh, relu };

// The format of a matrix in memory and in products. f32 and bf16 are plain numbers. int8 has a
// scale for each output, or for each group of inputs of each output. int4 has a scale, and perhaps
// a zero point, for each group.
struct WeightFormat {
  WeightFormat(DType plain = DType::f32) : dtype(plain) {}

  DType dtype;
  std::int64_t group_size = 0;  // inputs that share a scale, a multiple of 32; 0: all (int8)
  bool has_zeros = false;       // int4: asymmetric
  // int4: the levels of the 16 codes, before the scale.
  std::array<std::int8_t, 16> levels = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  DType scale_dtype = DType::bf16;    // of groups' scales: bf16, f16 or f32
  std::int64_t activation_bits = 16;  // of the codes that x is rounded to; 8: int8 without groups

  bool has_own_levels() const { return levels != WeightFormat().levels; }
  bool is_quantized() const { return dtype == DType::int8 || dtype == DType::int4; }
  bool is_grouped() const { return group_size != 0; }
  std::int64_t groups(std::int64_t inputs) const {
    return is_grouped() ? (inputs + group_size - 1) / group_size : 1;
  }
  bool operator==(const WeightFormat& other) const {
    return dtype == other.dtype && group_size == other.group_size && has_zeros == other.has_zeros &&
           levels == other.levels && scale_dtype == other.scale_dtype &&
           activation_bits == other.activation_bits;
  }
};

struct NormSpec {
  NormKind kind = NormKind::rms;
  float eps = 1e-5f;
  bool bias = false;
};

// The first 2 n elements of a head rotate, for n frequencies; element i with i + n.
struct RopeSpec {
  std::vector<float> frequencies;  // radians a position
  float attention_factor = 1.0f;   // multiplies cosines and sines
  // Of sequences longer than ModelSpec::rope_switch; empty: the same.
  std::vector<float> long_frequencies = {};

  bool operator==(const RopeSpec& other) const {
    return frequencies == other.frequencies && attention_factor == other.attention_factor &&
           long_frequencies == other.long_frequencies;
  }
};

// Each token goes through the experts of its largest router logits; see the Python side.
struct MoeSpec {
  std::int64_t num_experts = 0;
  std::int64_t experts_per_token = 0;
  bool normalize = true;  // the weights of a token's experts: their sum is 1
};

struct LayerSpec {
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t intermediate_size = 0;
  NormSpec norm;
  std::optional<RopeSpec> rope;
  Activation activation = Activation::silu;
  bool gated = true;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  std::int64_t window = 0;    // 0: no limit
  std::int64_t kv_group = 0;  // which of a sequence's block tables
  std::optional<float> attention_scale;
  float attention_softcap = 0.0f;  // a score s becomes cap * tanh(s / cap); 0: stays
  std::optional<NormSpec> output_norm;
  QkNorm qk_norm = QkNorm::none;
  float residual_multiplier = 1.0f;
  std::optional<MoeSpec> moe;

  std::int64_t q_size() const { return num_heads * head_dim; }
  std::int64_t kv_size() const { return num_kv_heads * head_dim; }
  std::int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
  std::int64_t up_size() const { return gated ? 2 * intermediate_size : intermediate_size; }
  // The factor of q.k.
  float score_scale() const {
    return attention_scale.value_or(1.0f / std::sqrt(static_cast<float>(head_dim)));
  }
  // Of queries and keys; qk_norm says whether there is one.
  NormSpec qk_norm_spec() const { return {NormKind::rms, norm.eps, false}; }
};

struct ModelSpec {
  std::string architecture;
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t max_position_embeddings = 0;
  std::vector<LayerSpec> layers;
  NormSpec final_norm;
  bool tie_word_embeddings = false;
  bool learned_positions = false;
  float embed_multiplier = 1.0f;
  float logits_multiplier = 1.0f;
  float logits_softcap = 0.0f;
  std::int64_t rope_switch = 0;  // longer sequences turn by long_frequencies; 0: none
  // Of a part of a model (RuntimeOptions::world_size): which of how many parts of the head it has.
  std::int64_t head_part = 0, head_parts = 1;

  // Of each KV group: its layers' widest window; 0: no limit.
  std::vector<std::int64_t> kv_windows() const {
    std::vector<std::int64_t> windows;
    for (const LayerSpec& layer : layers) {
      const auto group = static_cast<std::size_t>(layer.kv_group);
      if (group >= windows.size()) windows.resize(group + 1, 1);
      std::int64_t& widest = windows[group];
      widest = widest == 0 || layer.window == 0 ? 0 : std::max(widest, layer.window);
    }
    return windows;
  }
};

// How a model is run: the C++ side of RuntimeOptions in python/octavo/config.py.
struct RuntimeOptions {
  std::string dtype = "f32";                    // of every matrix that `formats` does not name
  std::map<std::string, WeightFormat> formats;  // by name without ".weight": "layers.3.q"
  std::string kv_dtype = "f32";
  std::int64_t block_size = 16;
  std::int64_t max_model_len = 0;
  std::int64_t max_num_seqs = 1;
  std::int64_t max_num_batched_tokens = 512;
  int num_threads = 0;
  std::string isa = "auto";
  bool deterministic = false;
  bool graphs = true;
  int device_index = 0;  // which of the machine's devices of that name
  // Which of how many ranks this is, each with a part of every matrix (core/rank_group.h).
  std::int64_t rank = 0, world_size = 1;
};

// Cosines and sines, (rows, frequencies) each. The rows are the positions before `positions`. With
// a rope_switch they follow those of the shorter sequences, which are the positions before it.
struct RopeTables {
  std::vector<float> cosines, sines;
};
RopeTables rope_tables(const RopeSpec& rope, std::int64_t positions, std::int64_t rope_switch = 0);

}  // namespace octavo

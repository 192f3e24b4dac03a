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

enum class NormKind : std::uint8_t { rms, layer };
enum class Activation : std::uint8_t { silu, gelu, gelu_tanh, relu };
enum class RopeScaling : std::uint8_t { none, linear, llama3 };

// The format of a matrix in memory and in products. f32 and bf16 are plain numbers. int8 has a
// scale for each output. int4 has a scale, and perhaps a zero point, for each group of inputs of
// each output.
struct WeightFormat {
  WeightFormat(DType plain = DType::f32) : dtype(plain) {}

  DType dtype;
  std::int64_t group_size = 0;  // int4: inputs that share a scale, a multiple of 32
  bool has_zeros = false;       // int4: asymmetric
  // int4: the levels of the 16 codes, before the scale.
  std::array<std::int8_t, 16> levels = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  DType scale_dtype = DType::bf16;    // int4: the format of scales, bf16 or f32
  std::int64_t activation_bits = 16;  // int8: of the codes that x is rounded to, 8 or 16

  bool has_own_levels() const { return levels != WeightFormat().levels; }
  bool is_quantized() const { return dtype == DType::int8 || dtype == DType::int4; }
  std::int64_t groups(std::int64_t inputs) const {
    return dtype == DType::int4 ? (inputs + group_size - 1) / group_size : 1;
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

struct RopeSpec {
  double theta = 10000.0;
  RopeScaling scaling = RopeScaling::none;
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  std::int64_t original_max_position_embeddings = 8192;

  bool operator==(const RopeSpec& other) const {
    return theta == other.theta && scaling == other.scaling && factor == other.factor &&
           low_freq_factor == other.low_freq_factor && high_freq_factor == other.high_freq_factor &&
           original_max_position_embeddings == other.original_max_position_embeddings;
  }
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

  std::int64_t q_size() const { return num_heads * head_dim; }
  std::int64_t kv_size() const { return num_kv_heads * head_dim; }
  std::int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
  std::int64_t up_size() const { return gated ? 2 * intermediate_size : intermediate_size; }
  // The factor of q.k.
  float score_scale() const {
    return attention_scale.value_or(1.0f / std::sqrt(static_cast<float>(head_dim)));
  }
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
  // A model split over several devices: by columns and rows of its matrices (world_size ranks), or
  // by layers. Declared; `Runtime` refuses all but one rank with all layers.
  std::int64_t rank = 0, world_size = 1;
  std::int64_t first_layer = 0;
  std::optional<std::int64_t> last_layer;  // none: the model's last
};

// Inverse wavelengths of the rotary embedding, head_dim / 2 of them, in radians a position.
//
// float32 exactly as Hugging Face computes them, since a position of 1,500 multiplies any
// difference. Su et al. 2021; "llama3" is the smooth rule of Llama 3.1.
std::vector<float> rope_frequencies(const RopeSpec& rope, std::int64_t head_dim);

}  // namespace octavo

// A model's weights on the device, and the table with the place of each named weight.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/backend.h"

namespace octavo {

// Matrices with the same input; their outputs are concatenated. Neighbours of one format are one
// matrix.
using Stack = std::vector<Linear>;

struct LayerWeights {
  Norm attn_norm;
  Stack qkv;            // q, k, v
  Norm q_norm, k_norm;  // where the layer has qk_norm
  Linear o;
  Norm mlp_norm;
  Linear router;  // of layers with experts; up and down then hold the matrices of all experts
  Stack up;       // gate (when the layer is gated), up
  Linear down;
  Norm attn_out_norm, mlp_out_norm;  // where the layer has output_norm
  const Rope* rope = nullptr;        // null: the layer does not rotate
};

class Weights {
 public:
  // Allocates every weight of `spec`; nothing is loaded yet.
  Weights(Backend& backend, const ModelSpec& spec, const RuntimeOptions& options);
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  // Takes one weight under octavo's name; a quantized matrix also has a ".scale" of shape (rows,
  // groups), and if its format has zero points a ".zero". With first_row it is a run of the rows,
  // and the runs come in order. Throws std::invalid_argument when the model has no such weight, or
  // when its shape is wrong.
  void load(const std::string& name, const void* data, DType dtype,
            const std::vector<std::int64_t>& shape,
            std::optional<std::int64_t> first_row = std::nullopt);

  std::vector<std::string> missing() const;
  std::int64_t bytes() const { return bytes_; }

  Linear embed;
  Linear positions;  // learned positions; outputs == 0 when the model has none
  std::vector<LayerWeights> layers;
  Norm final_norm;
  const Linear& head() const { return lm_head_.outputs ? lm_head_ : embed; }

 private:
  // The place of a named weight: rows of a packed matrix, or of its scales or zero points, or a
  // plain float32 vector.
  enum class Part { values, scales, zeros, vector };
  struct Place {
    Part part = Part::values;
    Linear* matrix = nullptr;
    float* vector = nullptr;  // null: another rank's; it is ignored
    std::int64_t first_row = 0;
    std::vector<std::int64_t> shape;
    std::int64_t loaded_rows = 0;
  };
  struct NamedRows {
    std::string name;
    std::int64_t count;
  };

  WeightFormat format_of(const std::string& name) const;
  Buffer counted(Buffer buffer);
  void count_bytes(const Linear& matrix);
  // Makes `matrix` of these parts, outputs concatenated, in the first one's format. It must not
  // move afterwards: places_ points to it. bias: the model has one. adds_bias: this rank uses it.
  void add_matrix(Linear& matrix, const std::vector<NamedRows>& parts, std::int64_t inputs,
                  bool bias = false, bool adds_bias = true);
  void add_stack(Stack& stack, const std::vector<NamedRows>& parts, std::int64_t inputs, bool bias);
  // The router, and the matrices of all experts, which share the formats of expert 0. prefix: of
  // the layer's names.
  void add_experts(LayerWeights& weights, const LayerSpec& layer, std::int64_t hidden,
                   const std::string& prefix);
  // Says where the rows of `parts` lie in `matrix`, from first_row on.
  void place_parts(Linear& matrix, const std::vector<NamedRows>& parts, std::int64_t first_row,
                   bool bias, bool adds_bias);
  Norm add_norm(const NamedRows& width, const NormSpec& spec);
  const Rope* add_rope(const LayerSpec& layer, std::int64_t max_positions,
                       std::int64_t rope_switch);

  struct RopeTable {
    RopeSpec spec;
    Buffer cosines, sines;
    Rope rope;
  };

  Backend& backend_;
  const RuntimeOptions& options_;
  Linear lm_head_;
  std::int64_t bytes_ = 0;
  std::vector<Buffer> vectors_;
  std::vector<std::unique_ptr<RopeTable>> ropes_;
  std::map<std::string, Place> places_;
};

}  // namespace octavo

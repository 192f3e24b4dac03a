// A model's weights on the device, and the table that says where each named weight belongs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/backend.h"

namespace octavo {

struct LayerWeights {
  Norm attn_norm;
  Linear qkv;  // q, k and v one above the other
  Linear o;
  Norm mlp_norm;
  Linear up;  // gate above up when the layer is gated
  Linear down;
  const Rope* rope = nullptr;  // null: the layer does not rotate
};

class Weights {
 public:
  // Makes room for every weight of `spec`; nothing is loaded yet.
  Weights(Backend& backend, const ModelSpec& spec, DType format, std::int64_t max_positions);
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  // Takes one weight under octavo's name. Throws std::invalid_argument when the model has no such
  // weight, or when its shape is another.
  void load(const std::string& name, const void* data, DType dtype,
            const std::vector<std::int64_t>& shape);

  std::vector<std::string> missing() const;
  std::int64_t bytes() const;

  Linear embed;
  Linear positions;  // learned positions; outputs == 0 when the model has none
  std::vector<LayerWeights> layers;
  Norm final_norm;
  const Linear& head() const { return lm_head_.outputs ? lm_head_ : embed; }

 private:
  // Where a named weight goes: rows of a packed matrix, or a plain float32 vector.
  struct Place {
    Linear* matrix = nullptr;
    float* vector = nullptr;
    std::int64_t first_row = 0;
    std::int64_t rows = 0;
    std::int64_t cols = 0;  // 0 for a vector
    bool loaded = false;
  };

  void add_matrix(const std::string& name, Linear& matrix, std::int64_t first_row,
                  std::int64_t rows, bool bias);
  Norm add_norm(const std::string& name, const NormSpec& spec, std::int64_t width);
  const Rope* add_rope(const LayerSpec& layer, std::int64_t max_positions);

  struct RopeTable {
    RopeSpec spec;
    std::int64_t head_dim;
    Buffer cosines, sines;
    Rope rope;
  };

  Backend& backend_;
  Linear lm_head_;
  std::vector<Buffer> vectors_;
  std::vector<std::unique_ptr<RopeTable>> ropes_;
  std::map<std::string, Place> places_;
};

}  // namespace octavo

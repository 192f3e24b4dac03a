#include "core/weights.h"

#include <cmath>

namespace octavo {

Weights::Weights(Backend& backend, const ModelSpec& spec, DType format, std::int64_t max_positions)
    : backend_(backend) {
  const std::int64_t hidden = spec.hidden_size;
  embed = backend.make_linear(spec.vocab_size, hidden, format, false);
  add_matrix("embed", embed, 0, spec.vocab_size, false);
  if (spec.learned_positions) {
    positions = backend.make_linear(spec.max_position_embeddings, hidden, format, false);
    add_matrix("positions", positions, 0, spec.max_position_embeddings, false);
  }
  layers.resize(spec.layers.size());  // once: places_ keeps pointers into it
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    LayerWeights& weights = layers[i];
    const std::string prefix = text("layers.", i, ".");
    const std::int64_t q = layer.q_size(), kv = layer.kv_size(), mlp = layer.intermediate_size;

    weights.attn_norm = add_norm(prefix + "attn_norm", layer.norm, hidden);
    weights.qkv = backend.make_linear(q + 2 * kv, hidden, format, layer.qkv_bias);
    add_matrix(prefix + "q", weights.qkv, 0, q, layer.qkv_bias);
    add_matrix(prefix + "k", weights.qkv, q, kv, layer.qkv_bias);
    add_matrix(prefix + "v", weights.qkv, q + kv, kv, layer.qkv_bias);
    weights.o = backend.make_linear(hidden, q, format, layer.o_bias);
    add_matrix(prefix + "o", weights.o, 0, hidden, layer.o_bias);

    weights.mlp_norm = add_norm(prefix + "mlp_norm", layer.norm, hidden);
    weights.up = backend.make_linear(layer.gated ? 2 * mlp : mlp, hidden, format, layer.mlp_bias);
    if (layer.gated) add_matrix(prefix + "gate", weights.up, 0, mlp, layer.mlp_bias);
    add_matrix(prefix + "up", weights.up, layer.gated ? mlp : 0, mlp, layer.mlp_bias);
    weights.down = backend.make_linear(hidden, mlp, format, layer.mlp_bias);
    add_matrix(prefix + "down", weights.down, 0, hidden, layer.mlp_bias);
    if (layer.rope) weights.rope = add_rope(layer, max_positions);
  }
  final_norm = add_norm("final_norm", spec.final_norm, hidden);
  if (!spec.tie_word_embeddings) {
    lm_head_ = backend.make_linear(spec.vocab_size, hidden, format, false);
    add_matrix("lm_head", lm_head_, 0, spec.vocab_size, false);
  }
}

void Weights::add_matrix(const std::string& name, Linear& matrix, std::int64_t first_row,
                         std::int64_t rows, bool bias) {
  Place place;
  place.matrix = &matrix;
  place.first_row = first_row;
  place.rows = rows;
  place.cols = matrix.inputs;
  places_[name + ".weight"] = place;
  if (!bias) return;
  Place bias_place;
  bias_place.vector = matrix.bias.as<float>() + first_row;
  bias_place.rows = rows;
  places_[name + ".bias"] = bias_place;
}

Norm Weights::add_norm(const std::string& name, const NormSpec& spec, std::int64_t width) {
  const auto add_vector = [&](const char* part) {
    Buffer& buffer = vectors_.emplace_back(&backend_, static_cast<std::size_t>(width) * 4);
    Place place;
    place.vector = buffer.as<float>();
    place.rows = width;
    places_[name + part] = place;
    return place.vector;
  };
  Norm norm;
  norm.spec = spec;
  norm.weight = add_vector(".weight");
  if (spec.bias) norm.bias = add_vector(".bias");
  return norm;
}

const Rope* Weights::add_rope(const LayerSpec& layer, std::int64_t max_positions) {
  for (const auto& table : ropes_) {
    if (table->spec == *layer.rope && table->head_dim == layer.head_dim) return &table->rope;
  }
  const std::vector<float> frequencies = rope_frequencies(*layer.rope, layer.head_dim);
  const std::size_t half = frequencies.size();
  const std::size_t count = static_cast<std::size_t>(max_positions) * half;
  std::vector<float> cosines(count), sines(count);
  for (std::size_t position = 0; position < static_cast<std::size_t>(max_positions); ++position) {
    for (std::size_t i = 0; i < half; ++i) {
      // The angle is a float32 product, as in Hugging Face; its cosine is rounded once.
      const float angle = static_cast<float>(position) * frequencies[i];
      cosines[position * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sines[position * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
  auto table = std::make_unique<RopeTable>();
  table->spec = *layer.rope;
  table->head_dim = layer.head_dim;
  table->cosines = Buffer(&backend_, count * 4);
  table->sines = Buffer(&backend_, count * 4);
  backend_.upload(table->cosines.data(), cosines.data(), count * 4);
  backend_.upload(table->sines.data(), sines.data(), count * 4);
  table->rope = {table->cosines.as<float>(), table->sines.as<float>()};
  ropes_.push_back(std::move(table));
  return &ropes_.back()->rope;
}

void Weights::load(const std::string& name, const void* data, DType dtype,
                   const std::vector<std::int64_t>& shape) {
  const auto found = places_.find(name);
  require(found != places_.end(), "this model has no weight named \"", name, "\"");
  Place& place = found->second;
  const bool fits = place.matrix ? shape == std::vector<std::int64_t>{place.rows, place.cols}
                                 : shape == std::vector<std::int64_t>{place.rows};
  if (!fits) {
    std::string given, expected = text("(", place.rows);
    for (const std::int64_t size : shape) given += text(given.empty() ? "(" : ", ", size);
    if (place.matrix) expected += text(", ", place.cols);
    require(false, "weight ", name, " has the shape ", given, "); expected ", expected, ")");
  }
  if (place.matrix) {
    backend_.pack_rows(*place.matrix, place.first_row, {data, dtype, place.rows, place.cols});
  } else {
    std::vector<float> values(static_cast<std::size_t>(place.rows));
    for (std::int64_t i = 0; i < place.rows; ++i)
      values[static_cast<std::size_t>(i)] = load_float(data, dtype, i);
    backend_.upload(place.vector, values.data(), values.size() * 4);
  }
  place.loaded = true;
}

std::vector<std::string> Weights::missing() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : places_) {
    if (!place.loaded) names.push_back(name);
  }
  return names;
}

std::int64_t Weights::bytes() const {
  std::size_t total = 0;
  const auto add = [&](const Linear& linear) {
    total += linear.weight.bytes() + linear.bias.bytes();
  };
  for (const LayerWeights& layer : layers) {
    for (const Linear* linear : {&layer.qkv, &layer.o, &layer.up, &layer.down}) add(*linear);
  }
  for (const Linear* linear : {&embed, &positions, &lm_head_}) add(*linear);
  for (const Buffer& vector : vectors_) total += vector.bytes();
  for (const auto& table : ropes_) total += table->cosines.bytes() + table->sines.bytes();
  return static_cast<std::int64_t>(total);
}

}  // namespace octavo

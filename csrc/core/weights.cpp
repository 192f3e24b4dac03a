#include "core/weights.h"

#include <cmath>

namespace octavo {

namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string sizes;
  for (const std::int64_t size : shape) sizes += text(sizes.empty() ? "" : ", ", size);
  return "(" + sizes + ")";
}

}  // namespace

Weights::Weights(Backend& backend, const ModelSpec& spec, const RuntimeOptions& options)
    : backend_(backend), options_(options) {
  const std::int64_t hidden = spec.hidden_size;
  embed = make_matrix("embed", spec.vocab_size, hidden, false);
  add_matrix("embed", embed, 0, spec.vocab_size, false);
  if (spec.learned_positions) {
    positions = make_matrix("positions", spec.max_position_embeddings, hidden, false);
    add_matrix("positions", positions, 0, spec.max_position_embeddings, false);
  }
  layers.resize(spec.layers.size());  // once: places_ keeps pointers into it
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    LayerWeights& weights = layers[i];
    const std::string prefix = text("layers.", i, ".");
    const std::int64_t q = layer.q_size(), kv = layer.kv_size(), mlp = layer.intermediate_size;
    // The outputs of o and down are summed over the ranks: one rank alone adds the bias.
    const bool adds_bias = options.rank == 0;

    weights.attn_norm = add_norm(prefix + "attn_norm", layer.norm, hidden);
    add_stack(weights.qkv, {{prefix + "q", q}, {prefix + "k", kv}, {prefix + "v", kv}}, hidden,
              layer.qkv_bias);
    weights.o = make_matrix(prefix + "o", hidden, q, layer.o_bias && adds_bias);
    add_matrix(prefix + "o", weights.o, 0, hidden, layer.o_bias);

    weights.mlp_norm = add_norm(prefix + "mlp_norm", layer.norm, hidden);
    std::vector<NamedRows> up;
    if (layer.gated) up.push_back({prefix + "gate", mlp});
    up.push_back({prefix + "up", mlp});
    add_stack(weights.up, up, hidden, layer.mlp_bias);
    weights.down = make_matrix(prefix + "down", hidden, mlp, layer.mlp_bias && adds_bias);
    add_matrix(prefix + "down", weights.down, 0, hidden, layer.mlp_bias);
    if (layer.rope) weights.rope = add_rope(layer, options.max_model_len);
  }
  final_norm = add_norm("final_norm", spec.final_norm, hidden);
  if (!spec.tie_word_embeddings) {
    lm_head_ = make_matrix("lm_head", spec.vocab_size, hidden, false);
    add_matrix("lm_head", lm_head_, 0, spec.vocab_size, false);
  }
}

WeightFormat Weights::format_of(const std::string& name) const {
  const auto found = options_.formats.find(name);
  if (found != options_.formats.end()) return found->second;
  return parse_dtype(options_.dtype, "dtype");
}

Linear Weights::make_matrix(const std::string& name, std::int64_t rows, std::int64_t inputs,
                            bool bias) {
  return backend_.make_linear(rows, inputs, format_of(name), bias);
}

void Weights::add_stack(Stack& stack, const std::vector<NamedRows>& parts, std::int64_t inputs,
                        bool bias) {
  stack.reserve(parts.size());
  for (std::size_t begin = 0, end = 0; begin < parts.size(); begin = end) {
    std::int64_t rows = 0;
    const WeightFormat format = format_of(parts[begin].name);
    for (end = begin; end < parts.size() && format_of(parts[end].name) == format; ++end)
      rows += parts[end].rows;
    stack.push_back(backend_.make_linear(rows, inputs, format, bias));
    std::int64_t first_row = 0;
    for (std::size_t i = begin; i < end; ++i) {
      add_matrix(parts[i].name, stack.back(), first_row, parts[i].rows, bias);
      first_row += parts[i].rows;
    }
  }
}

void Weights::add_matrix(const std::string& name, Linear& matrix, std::int64_t first_row,
                         std::int64_t rows, bool bias) {
  Place place;
  place.matrix = &matrix;
  place.first_row = first_row;
  place.shape = {rows, matrix.inputs};
  places_[name + ".weight"] = place;
  place.shape = {rows, matrix.format.groups(matrix.inputs)};
  if (matrix.format.is_quantized()) {
    place.part = Part::scales;
    places_[name + ".scale"] = place;
  }
  if (matrix.format.has_zeros) {
    place.part = Part::zeros;
    places_[name + ".zero"] = place;
  }
  if (!bias) return;
  Place bias_place;
  bias_place.part = Part::vector;
  if (matrix.bias.data()) bias_place.vector = matrix.bias.as<float>() + first_row;
  bias_place.shape = {rows};
  places_[name + ".bias"] = bias_place;
}

Norm Weights::add_norm(const std::string& name, const NormSpec& spec, std::int64_t width) {
  const auto add_vector = [&](const char* part) {
    Buffer& buffer = vectors_.emplace_back(&backend_, static_cast<std::size_t>(width) * 4);
    Place place;
    place.part = Part::vector;
    place.vector = buffer.as<float>();
    place.shape = {width};
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
  require(shape == place.shape, "weight ", name, " has the shape ", shape_text(shape),
          "; expected ", shape_text(place.shape));
  const std::int64_t rows = shape[0];
  if (place.part == Part::values) {
    backend_.pack_rows(*place.matrix, place.first_row, {data, dtype, rows, shape[1]});
    // Numbers that are rounded to int8 on the way bring their scales along.
    if (place.matrix->format.dtype == DType::int8 && dtype != DType::int8)
      places_[name.substr(0, name.size() - std::string(".weight").size()) + ".scale"].loaded = true;
  } else {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    std::vector<float> values(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i)
      values[static_cast<std::size_t>(i)] = load_float(data, dtype, i);
    if (place.part == Part::vector) {
      if (place.vector) backend_.upload(place.vector, values.data(), values.size() * 4);
    } else if (place.part == Part::scales) {
      backend_.pack_scales(*place.matrix, place.first_row, rows, values.data());
    } else {
      backend_.pack_zeros(*place.matrix, place.first_row, rows, values.data());
    }
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
    for (const Buffer* buffer : {&linear.weight, &linear.scales, &linear.zeros, &linear.bias})
      total += buffer->bytes();
  };
  for (const LayerWeights& layer : layers) {
    for (const Stack* stack : {&layer.qkv, &layer.up}) {
      for (const Linear& linear : *stack) add(linear);
    }
    for (const Linear* linear : {&layer.o, &layer.down}) add(*linear);
  }
  for (const Linear* linear : {&embed, &positions, &lm_head_}) add(*linear);
  for (const Buffer& vector : vectors_) total += vector.bytes();
  for (const auto& table : ropes_) total += table->cosines.bytes() + table->sines.bytes();
  return static_cast<std::int64_t>(total);
}

}  // namespace octavo

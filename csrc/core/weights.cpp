#include "core/weights.h"

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
  add_matrix(embed, {{"embed", spec.vocab_size}}, hidden);
  if (spec.learned_positions)
    add_matrix(positions, {{"positions", spec.max_position_embeddings}}, hidden);
  layers.resize(spec.layers.size());  // once: places_ keeps pointers into it
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    LayerWeights& weights = layers[i];
    const auto rows = [&](const char* name, std::int64_t count) {
      return NamedRows{text("layers.", i, ".", name), count};
    };
    const std::int64_t kv = layer.kv_size(), mlp = layer.intermediate_size;
    // The outputs of o and down are summed over the ranks: one rank alone adds the bias.
    const bool adds_bias = options.rank == 0;

    weights.attn_norm = add_norm(rows("attn_norm", hidden), layer.norm);
    add_stack(weights.qkv, {rows("q", layer.q_size()), rows("k", kv), rows("v", kv)}, hidden,
              layer.qkv_bias);
    if (layer.qk_norm != QkNorm::none) {
      const bool by_head = layer.qk_norm == QkNorm::head;
      const NormSpec norm = layer.qk_norm_spec();
      weights.q_norm = add_norm(rows("q_norm", by_head ? layer.head_dim : layer.q_size()), norm);
      weights.k_norm = add_norm(rows("k_norm", by_head ? layer.head_dim : kv), norm);
    }
    add_matrix(weights.o, {rows("o", hidden)}, layer.q_size(), layer.o_bias, adds_bias);

    weights.mlp_norm = add_norm(rows("mlp_norm", hidden), layer.norm);
    if (layer.moe) {
      add_experts(weights, layer, hidden, text("layers.", i, "."));
    } else {
      std::vector<NamedRows> up{rows("up", mlp)};
      if (layer.gated) up.insert(up.begin(), rows("gate", mlp));
      add_stack(weights.up, up, hidden, layer.mlp_bias);
      add_matrix(weights.down, {rows("down", hidden)}, mlp, layer.mlp_bias, adds_bias);
    }
    if (layer.output_norm) {
      weights.attn_out_norm = add_norm(rows("attn_out_norm", hidden), *layer.output_norm);
      weights.mlp_out_norm = add_norm(rows("mlp_out_norm", hidden), *layer.output_norm);
    }
    if (layer.rope) weights.rope = add_rope(layer, options.max_model_len, spec.rope_switch);
  }
  final_norm = add_norm({"final_norm", hidden}, spec.final_norm);
  const std::int64_t head_rows = spec.vocab_size / spec.head_parts;
  if (!spec.tie_word_embeddings) add_matrix(lm_head_, {{"lm_head", head_rows}}, hidden);
}

WeightFormat Weights::format_of(const std::string& name) const {
  const auto found = options_.formats.find(name);
  if (found != options_.formats.end()) return found->second;
  return parse_dtype(options_.dtype, "dtype");
}

Buffer Weights::counted(Buffer buffer) {
  bytes_ += static_cast<std::int64_t>(buffer.bytes());
  return buffer;
}

void Weights::add_stack(Stack& stack, const std::vector<NamedRows>& parts, std::int64_t inputs,
                        bool bias) {
  stack.reserve(parts.size());
  for (auto begin = parts.begin(), end = begin; begin != parts.end(); begin = end) {
    const WeightFormat format = format_of(begin->name);
    while (end != parts.end() && format_of(end->name) == format) ++end;
    add_matrix(stack.emplace_back(), {begin, end}, inputs, bias);
  }
}

void Weights::add_matrix(Linear& matrix, const std::vector<NamedRows>& parts, std::int64_t inputs,
                         bool bias, bool adds_bias) {
  std::int64_t rows = 0;
  for (const NamedRows& part : parts) rows += part.count;
  matrix = backend_.make_linear(rows, inputs, format_of(parts[0].name), bias && adds_bias);
  count_bytes(matrix);
  place_parts(matrix, parts, 0, bias, adds_bias);
}

void Weights::count_bytes(const Linear& matrix) {
  for (const Buffer* buffer : {&matrix.weight, &matrix.scales, &matrix.zeros, &matrix.bias})
    bytes_ += static_cast<std::int64_t>(buffer->bytes());
}

void Weights::add_experts(LayerWeights& weights, const LayerSpec& layer, std::int64_t hidden,
                          const std::string& prefix) {
  const std::int64_t count = layer.moe->num_experts, width = layer.intermediate_size;
  // As wide as activations, never rounded further: a token whose logits are near each other would
  // go to other experts.
  weights.router = backend_.make_linear(count, hidden, backend_.activation_dtype(), false);
  count_bytes(weights.router);
  place_parts(weights.router, {{prefix + "router", count}}, 0, false, false);

  const auto part = [&](std::int64_t expert, const char* name, std::int64_t rows) {
    return NamedRows{text(prefix, "experts.", expert, ".", name), rows};
  };
  const auto add = [&](Linear& matrix, std::int64_t inputs, auto&& parts_of) {
    std::int64_t rows = 0;
    for (const NamedRows& each : parts_of(0)) rows += each.count;
    const WeightFormat format = format_of(parts_of(0)[0].name);
    matrix = backend_.make_linear(rows, inputs, format, false, count);
    count_bytes(matrix);
    for (std::int64_t expert = 0; expert < count; ++expert) {
      const std::vector<NamedRows> parts = parts_of(expert);
      for (const NamedRows& each : parts)
        require(format_of(each.name) == format, "the format of ", each.name, " is not that of ",
                parts_of(0)[0].name, "; expected one for all experts of a layer");
      place_parts(matrix, parts, expert * matrix.pitch, false, false);
    }
  };
  const auto gate = [&](std::int64_t expert) { return part(expert, "gate", width); };
  const auto up = [&](std::int64_t expert) { return part(expert, "up", width); };
  using Parts = std::vector<NamedRows>;
  if (format_of(gate(0).name) == format_of(up(0).name)) {
    weights.up.resize(1);
    add(weights.up[0], hidden, [&](std::int64_t i) { return Parts{gate(i), up(i)}; });
  } else {
    weights.up.resize(2);
    add(weights.up[0], hidden, [&](std::int64_t i) { return Parts{gate(i)}; });
    add(weights.up[1], hidden, [&](std::int64_t i) { return Parts{up(i)}; });
  }
  add(weights.down, width, [&](std::int64_t i) { return Parts{part(i, "down", hidden)}; });
}

void Weights::place_parts(Linear& matrix, const std::vector<NamedRows>& parts,
                          std::int64_t first_row, bool bias, bool adds_bias) {
  const std::int64_t inputs = matrix.inputs;
  Place place;
  place.matrix = &matrix;
  place.first_row = first_row;
  for (const NamedRows& part : parts) {
    const auto add = [&](const char* suffix, Part what, std::vector<std::int64_t> shape) {
      place.part = what;
      place.shape = std::move(shape);
      places_[part.name + suffix] = place;
    };
    const std::int64_t groups = matrix.format.groups(inputs);
    add(".weight", Part::values, {part.count, inputs});
    if (matrix.format.is_quantized()) add(".scale", Part::scales, {part.count, groups});
    if (matrix.format.has_zeros) add(".zero", Part::zeros, {part.count, groups});
    if (bias && adds_bias) place.vector = matrix.bias.as<float>() + place.first_row;
    if (bias) add(".bias", Part::vector, {part.count});
    place.first_row += part.count;
  }
}

Norm Weights::add_norm(const NamedRows& width, const NormSpec& spec) {
  const auto add_vector = [&](const char* suffix) {
    Buffer& buffer = vectors_.emplace_back(
        counted(Buffer(&backend_, static_cast<std::size_t>(width.count) * 4)));
    Place place;
    place.part = Part::vector;
    place.vector = buffer.as<float>();
    place.shape = {width.count};
    places_[width.name + suffix] = place;
    return place.vector;
  };
  Norm norm;
  norm.spec = spec;
  if (spec.kind == NormKind::none) return norm;
  norm.weight = add_vector(".weight");
  if (spec.bias) norm.bias = add_vector(".bias");
  return norm;
}

const Rope* Weights::add_rope(const LayerSpec& layer, std::int64_t max_positions,
                              std::int64_t rope_switch) {
  const auto pairs = static_cast<std::int64_t>(layer.rope->frequencies.size());
  require(2 * pairs <= layer.head_dim, "rope turns ", 2 * pairs, " elements of a head of ",
          layer.head_dim, "; expected no more than it has");
  for (const auto& table : ropes_) {
    if (table->spec == *layer.rope) return &table->rope;
  }
  const RopeTables values = rope_tables(*layer.rope, max_positions, rope_switch);
  const std::size_t bytes = values.cosines.size() * 4;
  auto table = std::make_unique<RopeTable>();
  table->spec = *layer.rope;
  table->cosines = counted(Buffer(&backend_, bytes));
  table->sines = counted(Buffer(&backend_, bytes));
  backend_.upload(table->cosines.data(), values.cosines.data(), bytes);
  backend_.upload(table->sines.data(), values.sines.data(), bytes);
  table->rope = {table->cosines.as<float>(), table->sines.as<float>(), pairs};
  ropes_.push_back(std::move(table));
  return &ropes_.back()->rope;
}

void Weights::load(const std::string& name, const void* data, DType dtype,
                   const std::vector<std::int64_t>& shape, std::optional<std::int64_t> first_row) {
  const auto found = places_.find(name);
  require(found != places_.end(), "this model has no weight named \"", name, "\"");
  Place& place = found->second;
  const std::int64_t begin = first_row.value_or(0), rows = shape.empty() ? 0 : shape[0];
  std::vector<std::int64_t> whole = shape;
  if (first_row && !shape.empty() && (begin == 0 || begin == place.loaded_rows) &&
      begin + rows <= place.shape[0])
    whole[0] = place.shape[0];
  require(whole == place.shape, "weight ", name, " has the shape ", shape_text(shape),
          first_row ? text(" from row ", begin, " on") : "", "; expected ",
          shape_text(place.shape));
  const std::int64_t to_row = place.first_row + begin, end = begin + rows;
  if (place.part == Part::values) {
    backend_.pack_rows(*place.matrix, to_row, {data, dtype, rows, shape[1]});
    // Numbers that are rounded to int8 here give their scales too.
    if (place.matrix->format.dtype == DType::int8 && dtype != DType::int8)
      places_[name.substr(0, name.size() - std::string(".weight").size()) + ".scale"].loaded_rows =
          end;
  } else {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    std::vector<float> values(static_cast<std::size_t>(count));
    const auto convert = [&](DType type) {
      for (std::int64_t i = 0; i < count; ++i)
        values[static_cast<std::size_t>(i)] = load_float(data, type, i);
    };
    if (dtype == DType::f16)
      convert(DType::f16);  // as a constant: scales of a GGUF file are many
    else
      convert(dtype);
    if (place.part == Part::vector) {
      if (place.vector) backend_.upload(place.vector + begin, values.data(), values.size() * 4);
    } else if (place.part == Part::scales) {
      backend_.pack_scales(*place.matrix, to_row, rows, values.data());
    } else {
      backend_.pack_zeros(*place.matrix, to_row, rows, values.data());
    }
  }
  place.loaded_rows = end;
}

std::vector<std::string> Weights::missing() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : places_) {
    if (place.loaded_rows < place.shape[0]) names.push_back(name);
  }
  return names;
}

}  // namespace octavo

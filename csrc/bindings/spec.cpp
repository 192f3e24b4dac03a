// Reads the Python dataclasses field by field, so that they stay the only definition.

#include "bindings/bindings.h"

#include <algorithm>

namespace octavo::bindings {

namespace {

template <class T>
T field(nb::handle object, const char* name) {
  return nb::cast<T>(object.attr(name));
}

NormSpec norm_spec(nb::handle spec) {
  NormSpec norm;
  norm.kind = norm_kind(field<std::string>(spec, "kind"));
  norm.eps = field<float>(spec, "eps");
  norm.bias = field<bool>(spec, "bias");
  return norm;
}

std::optional<MoeSpec> moe_spec(nb::handle spec) {
  if (spec.is_none()) return {};
  MoeSpec moe;
  moe.num_experts = field<std::int64_t>(spec, "num_experts");
  moe.experts_per_token = field<std::int64_t>(spec, "experts_per_token");
  moe.normalize = field<bool>(spec, "normalize");
  require(moe.experts_per_token >= 1 && moe.experts_per_token <= moe.num_experts,
          "experts_per_token is ", moe.experts_per_token, "; expected 1 to num_experts, ",
          moe.num_experts);
  return moe;
}

QkNorm qk_norm(const std::string& name) {
  if (name == "none") return QkNorm::none;
  if (name == "head") return QkNorm::head;
  if (name == "row") return QkNorm::row;
  throw std::invalid_argument(text("qk_norm is \"", name, "\"; expected none, head or row"));
}

std::optional<RopeSpec> rope_spec(nb::handle spec) {
  if (spec.is_none()) return std::nullopt;
  RopeSpec rope{field<std::vector<float>>(spec, "frequencies"),
                field<float>(spec, "attention_factor"),
                field<std::vector<float>>(spec, "long_frequencies")};
  require(rope.long_frequencies.empty() || rope.long_frequencies.size() == rope.frequencies.size(),
          "long_frequencies has ", rope.long_frequencies.size(), " entries; expected ",
          rope.frequencies.size(), ", as frequencies has");
  return rope;
}

LayerSpec layer_spec(nb::handle spec) {
  LayerSpec layer;
  layer.num_heads = field<std::int64_t>(spec, "num_heads");
  layer.num_kv_heads = field<std::int64_t>(spec, "num_kv_heads");
  layer.head_dim = field<std::int64_t>(spec, "head_dim");
  layer.intermediate_size = field<std::int64_t>(spec, "intermediate_size");
  layer.norm = norm_spec(spec.attr("norm"));
  layer.rope = rope_spec(spec.attr("rope"));
  layer.activation = activation(field<std::string>(spec, "activation"));
  layer.gated = field<bool>(spec, "gated");
  layer.qkv_bias = field<bool>(spec, "qkv_bias");
  layer.o_bias = field<bool>(spec, "o_bias");
  layer.mlp_bias = field<bool>(spec, "mlp_bias");
  layer.window = field<std::int64_t>(spec, "window");
  layer.kv_group = field<std::int64_t>(spec, "kv_group");
  layer.attention_scale = field<std::optional<float>>(spec, "attention_scale");
  layer.moe = moe_spec(spec.attr("moe"));
  require(!layer.moe || (layer.gated && !layer.mlp_bias),
          "experts are gated and have no biases; the spec has others");
  layer.attention_softcap = field<float>(spec, "attention_softcap");
  if (!spec.attr("output_norm").is_none()) layer.output_norm = norm_spec(spec.attr("output_norm"));
  layer.qk_norm = qk_norm(field<std::string>(spec, "qk_norm"));
  layer.residual_multiplier = field<float>(spec, "residual_multiplier");
  return layer;
}

}  // namespace

NormKind norm_kind(const std::string& name) {
  if (name == "rms") return NormKind::rms;
  if (name == "layer") return NormKind::layer;
  if (name == "none") return NormKind::none;
  throw std::invalid_argument(text("norm kind is \"", name, "\"; expected rms, layer or none"));
}

Activation activation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  throw std::invalid_argument(
      text("activation is \"", name, "\"; expected silu, gelu, gelu_tanh or relu"));
}

ModelSpec model_spec(nb::handle spec) {
  ModelSpec model;
  model.architecture = field<std::string>(spec, "architecture");
  model.vocab_size = field<std::int64_t>(spec, "vocab_size");
  model.hidden_size = field<std::int64_t>(spec, "hidden_size");
  model.max_position_embeddings = field<std::int64_t>(spec, "max_position_embeddings");
  for (nb::handle layer : nb::cast<nb::sequence>(spec.attr("layers")))
    model.layers.push_back(layer_spec(layer));
  model.final_norm = norm_spec(spec.attr("final_norm"));
  model.tie_word_embeddings = field<bool>(spec, "tie_word_embeddings");
  model.learned_positions = field<bool>(spec, "learned_positions");
  model.embed_multiplier = field<float>(spec, "embed_multiplier");
  model.logits_multiplier = field<float>(spec, "logits_multiplier");
  model.logits_softcap = field<float>(spec, "logits_softcap");
  model.rope_switch = field<std::int64_t>(spec, "rope_switch");
  model.head_part = field<std::int64_t>(spec, "head_part");
  model.head_parts = field<std::int64_t>(spec, "head_parts");
  return model;
}

WeightFormat weight_format(nb::handle format) {
  WeightFormat result;
  result.dtype = parse_dtype(field<std::string>(format, "dtype"), "format dtype");
  result.group_size = field<std::int64_t>(format, "group_size");
  result.has_zeros = field<bool>(format, "has_zeros");
  require(result.group_size >= 0 && (result.dtype != DType::int4 || result.is_grouped()),
          "group_size is ", result.group_size,
          "; expected 1 or more, or 0 for int8 without groups");
  require(result.dtype == DType::int4 || !result.has_zeros, "zero points of ", name(result.dtype),
          "; only int4 has them");
  if (result.dtype == DType::int4) {
    const auto levels = field<std::vector<std::int64_t>>(format, "levels");
    require(levels.size() == result.levels.size(), "levels has ", levels.size(),
            " entries; expected 16");
    for (std::size_t i = 0; i < levels.size(); ++i) {
      require(levels[i] >= -127 && levels[i] <= 127, "levels[", i, "] is ", levels[i],
              "; expected -127 to 127");
      result.levels[i] = static_cast<std::int8_t>(levels[i]);
    }
  }
  result.scale_dtype = parse_dtype(field<std::string>(format, "scale_dtype"), "scale_dtype");
  require(bits_of(result.scale_dtype) >= 16, "scale_dtype is ", name(result.scale_dtype),
          "; expected bf16, f16 or f32");
  result.activation_bits = field<std::int64_t>(format, "activation_bits");
  require(result.activation_bits == 16 ||
              (result.activation_bits == 8 && result.dtype == DType::int8 && !result.is_grouped()),
          "activation_bits is ", result.activation_bits,
          "; expected 16, or 8 with int8 weights of one scale an output");
  return result;
}

RuntimeOptions runtime_options(nb::handle options) {
  RuntimeOptions result;
  result.dtype = field<std::string>(options, "dtype");
  for (const auto& [name, format] : nb::cast<nb::dict>(options.attr("formats")))
    result.formats[nb::cast<std::string>(name)] = weight_format(format);
  result.kv_dtype = field<std::string>(options, "kv_dtype");
  result.block_size = field<std::int64_t>(options, "block_size");
  result.max_model_len = field<std::int64_t>(options, "max_model_len");
  result.max_num_seqs = field<std::int64_t>(options, "max_num_seqs");
  result.max_num_batched_tokens = field<std::int64_t>(options, "max_num_batched_tokens");
  result.num_threads = field<int>(options, "num_threads");
  result.isa = field<std::string>(options, "isa");
  result.deterministic = field<bool>(options, "deterministic");
  result.graphs = field<bool>(options, "graphs");
  result.device_index = field<int>(options, "device_index");
  result.rank = field<std::int64_t>(options, "rank");
  result.world_size = field<std::int64_t>(options, "world_size");
  return result;
}

}  // namespace octavo::bindings

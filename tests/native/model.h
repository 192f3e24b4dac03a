// A small model with every feature of a layer, and steps through it.
#pragma once

#include <cmath>
#include <memory>

#include "check.h"
#include "core/runtime.h"

namespace octavo::tests {

inline RopeSpec plain_rope(std::int64_t head_dim) {
  RopeSpec rope;
  for (std::int64_t i = 0; i < head_dim; i += 2)
    rope.frequencies.push_back(std::pow(10000.0f, -static_cast<float>(i) / head_dim));
  return rope;
}

// Two layers in two KV groups: one with biases and a window; one plain and ungated.
inline ModelSpec small_spec() {
  ModelSpec spec;
  spec.architecture = "SmallForTests";
  spec.vocab_size = 53;
  spec.hidden_size = 24;
  spec.max_position_embeddings = 300;
  LayerSpec first;
  first.num_heads = 6;
  first.num_kv_heads = 2;
  first.head_dim = 10;
  first.intermediate_size = 41;
  first.rope = plain_rope(first.head_dim);
  first.qkv_bias = first.o_bias = first.mlp_bias = true;
  first.window = 40;
  LayerSpec second;
  second.num_heads = 3;
  second.num_kv_heads = 3;
  second.head_dim = 16;
  second.intermediate_size = 30;
  second.norm = {NormKind::layer, 1e-5f, true};
  second.rope = plain_rope(second.head_dim);
  second.rope->attention_factor = 1.25f;
  second.activation = Activation::gelu;
  second.gated = false;
  second.kv_group = 1;
  spec.layers = {first, second};
  return spec;
}

inline RuntimeOptions small_options() {
  RuntimeOptions options;
  options.max_model_len = 300;
  options.max_num_seqs = 6;
  options.max_num_batched_tokens = 128;
  options.num_threads = 2;
  return options;
}

// (name, shape) of every weight of a spec; the same rule as models/spec.py's weight_shapes.
inline std::vector<std::pair<std::string, std::vector<std::int64_t>>> weight_shapes(
    const ModelSpec& spec) {
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> all;
  const std::int64_t hidden = spec.hidden_size;
  const auto norm = [&](const std::string& name, const NormSpec& norm_spec) {
    all.push_back({name + ".weight", {hidden}});
    if (norm_spec.bias) all.push_back({name + ".bias", {hidden}});
  };
  const auto linear = [&](const std::string& name, std::int64_t outputs, std::int64_t inputs,
                          bool bias) {
    all.push_back({name + ".weight", {outputs, inputs}});
    if (bias) all.push_back({name + ".bias", {outputs}});
  };
  linear("embed", spec.vocab_size, hidden, false);
  if (spec.learned_positions) linear("positions", spec.max_position_embeddings, hidden, false);
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    const std::string prefix = text("layers.", i, ".");
    norm(prefix + "attn_norm", layer.norm);
    linear(prefix + "q", layer.q_size(), hidden, layer.qkv_bias);
    linear(prefix + "k", layer.kv_size(), hidden, layer.qkv_bias);
    linear(prefix + "v", layer.kv_size(), hidden, layer.qkv_bias);
    linear(prefix + "o", hidden, layer.q_size(), layer.o_bias);
    norm(prefix + "mlp_norm", layer.norm);
    if (layer.gated) linear(prefix + "gate", layer.intermediate_size, hidden, layer.mlp_bias);
    linear(prefix + "up", layer.intermediate_size, hidden, layer.mlp_bias);
    linear(prefix + "down", hidden, layer.intermediate_size, layer.mlp_bias);
  }
  norm("final_norm", spec.final_norm);
  if (!spec.tie_word_embeddings) linear("lm_head", spec.vocab_size, hidden, false);
  return all;
}

inline void load_all(Runtime& runtime) {
  Numbers numbers(2024);
  for (const auto& [name, shape] : weight_shapes(runtime.spec())) {
    const std::int64_t count = shape[0] * (shape.size() > 1 ? shape[1] : 1);
    const std::vector<float> values = numbers.many(count, shape.size() > 1 ? 0.4f : 1.0f);
    runtime.load(name, values.data(), DType::f32, shape);
  }
}

inline std::unique_ptr<Runtime> small_runtime(const RuntimeOptions& options = small_options(),
                                              std::int64_t num_blocks = 60) {
  auto runtime = std::make_unique<Runtime>("cpu", small_spec(), options);
  load_all(*runtime);
  runtime->alloc_kv(num_blocks);
  return runtime;
}

// Sequences that bring some tokens each; tables give sequence `place` blocks of its own, in
// another order in each KV group.
class BatchBuilder {
 public:
  explicit BatchBuilder(const Runtime& runtime, std::int64_t block_size = 16)
      : groups_(static_cast<std::int64_t>(runtime.spec().kv_windows().size())),
        block_size_(block_size) {
    batch_.row_starts = {0};
    batch_.num_kv_groups = groups_;
  }

  // tokens: the new ones, the last of `context` in all. Logits are wanted of the last `rows`.
  BatchBuilder& add(std::int64_t place, const std::vector<std::int32_t>& tokens,
                    std::int64_t context, std::int64_t rows = 1) {
    places_.push_back(place);
    batch_.token_ids.insert(batch_.token_ids.end(), tokens.begin(), tokens.end());
    const auto end = static_cast<std::int32_t>(batch_.token_ids.size());
    batch_.row_starts.push_back(end);
    batch_.context_lens.push_back(static_cast<std::int32_t>(context));
    for (std::int64_t r = rows; r > 0; --r)
      batch_.logit_rows.push_back(end - static_cast<std::int32_t>(r));
    return *this;
  }

  Batch build() {
    for (const std::int32_t context : batch_.context_lens)
      batch_.max_blocks =
          std::max<std::int64_t>(batch_.max_blocks, (context + block_size_ - 1) / block_size_);
    batch_.block_tables.clear();
    for (std::int64_t group = 0; group < groups_; ++group) {
      for (std::size_t s = 0; s < places_.size(); ++s) {
        const std::int64_t needed = (batch_.context_lens[s] + block_size_ - 1) / block_size_;
        for (std::int64_t b = 0; b < batch_.max_blocks; ++b) {
          const std::int64_t index = group ? kBlocksEach - 1 - b : b;
          batch_.block_tables.push_back(
              b < needed ? static_cast<std::int32_t>(places_[s] * kBlocksEach + index) : -1);
        }
      }
    }
    batch_.sampling.resize(batch_.logit_rows.size());
    return batch_;
  }

 private:
  static constexpr std::int64_t kBlocksEach = 10;

  Batch batch_;
  std::vector<std::int64_t> places_;
  std::int64_t groups_, block_size_;
};

inline std::vector<std::int32_t> some_tokens(std::int64_t count, std::uint64_t seed = 1) {
  Numbers numbers(seed);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
  for (std::int32_t& token : tokens) token = numbers.below(53);
  return tokens;
}

}  // namespace octavo::tests

#include "core/decoder.h"

#include <algorithm>

namespace octavo {

namespace {

// Without taps this is one pointer test: the name is not built.
template <class... Parts>
void tap(TapSink* taps, View rows, const Parts&... name_parts) {
  if (!taps) return;
  const std::string name = text(name_parts...);
  if (taps->wants(name)) taps->record(name, rows);
}

void normalize(Backend& backend, View out, const NormedInput& x) {
  if (x.added.data)
    backend.add_norm(out, x.residual, x.added, x.norm);
  else
    backend.norm(out, x.residual, x.norm);
}

}  // namespace

Decoder::Decoder(Backend& backend, const ModelSpec& spec, const Weights& weights,
                 const Adapters& adapters, std::int64_t max_num_batched_tokens)
    : backend_(backend),
      spec_(spec),
      weights_(weights),
      adapters_(adapters),
      dtype_(backend.activation_dtype()) {
  std::int64_t qkv = 0, attn = 0, up = 0, act = 0, router = 0;
  for (const LayerSpec& layer : spec.layers) {
    qkv = std::max(qkv, layer.qkv_size());
    attn = std::max(attn, layer.q_size());
    if (layer.moe) {
      router = std::max(router, layer.moe->num_experts);
      continue;
    }
    up = std::max(up, layer.up_size());
    act = std::max(act, layer.intermediate_size);
  }
  const auto workspace = [&](std::int64_t cols, DType dtype) {
    const std::int64_t bits = max_num_batched_tokens * cols * bits_of(dtype);
    return Buffer(&backend, static_cast<std::size_t>(bits / 8));
  };
  residual_ = workspace(spec.hidden_size, DType::f32);
  hidden_ = workspace(spec.hidden_size, dtype_);
  qkv_ = workspace(qkv, dtype_);
  attn_ = workspace(attn, dtype_);
  up_ = workspace(up, dtype_);
  act_ = workspace(act, dtype_);
  router_ = workspace(router, DType::f32);
}

std::int64_t Decoder::workspace_bytes() const {
  std::size_t total = 0;
  for (const Buffer* buffer : {&residual_, &hidden_, &qkv_, &attn_, &up_, &act_, &router_})
    total += buffer->bytes();
  return static_cast<std::int64_t>(total);
}

void Decoder::forward(const Step& step, std::vector<KvLayer>& kv, View logits,
                      const NormedRows& normed, TapSink* taps) {
  const View residual{residual_.data(), step.num_tokens, spec_.hidden_size, spec_.hidden_size};
  const View hidden = rows(hidden_, step.num_tokens, spec_.hidden_size);
  const Linear* positions = spec_.learned_positions ? &weights_.positions : nullptr;

  // A fused op has no place between a product and what an adapter adds to it.
  const bool is_plain = !taps && !step.adapters;

  backend_.embed(residual, weights_.embed, positions, step);
  if (step.adapters) backend_.add_low_rank_rows(residual, adapters_.embed(), step);
  if (spec_.embed_multiplier != 1.0f) backend_.scale(residual, spec_.embed_multiplier, 0.0f);
  tap(taps, residual, "embed");
  // The result not yet added to the residual stream: none, or `hidden`.
  View pending;
  for (std::size_t i = 0; i < spec_.layers.size(); ++i) {
    // After a layer of single ops, no whole-layer op can follow: its output is pending.
    if (is_plain && !pending.data && whole_layer(i, hidden, residual, kv, step)) continue;
    attention_half(i, hidden, residual, pending, kv, step, taps);
    mlp_half(i, hidden, residual, step, taps);
    pending = hidden;
  }
  const NormedInput input{residual, pending, weights_.final_norm};
  const std::int64_t own_cols = logits.cols / spec_.head_parts;
  const View own_logits = logits.columns(spec_.head_part * own_cols, own_cols);
  const bool is_kept = normed.keep_rows || normed.tokens.data;
  const bool is_fused = is_plain && !is_kept && step.rows_are_tokens() &&
                        backend_.normed_linear(own_logits, input, weights_.head());
  if (!is_fused) {
    View all = hidden;
    if (normed.tokens.data)
      all = normed.tokens;
    else if (normed.keep_rows && step.rows_are_tokens())
      all = normed.rows;
    normalize(backend_, all, input);
    tap(taps, residual, "layers.", spec_.layers.size() - 1, ".out");
    if (step.num_rows == 0) return;
    View last = all;
    if (!step.rows_are_tokens()) {
      last = normed.rows;
      backend_.take_rows(last, all, step.logit_rows);
    }
    tap(taps, last, "final_norm");
    backend_.linear(own_logits, last, weights_.head());
    if (step.adapters) backend_.add_low_rank(own_logits, last, adapters_.head(), step.row_adapters);
  }
  if (spec_.head_parts > 1) backend_.all_gather(logits);
  if (spec_.logits_multiplier != 1.0f || spec_.logits_softcap != 0.0f)
    backend_.scale(logits, spec_.logits_multiplier, spec_.logits_softcap);
  tap(taps, logits, "logits");
}

bool Decoder::whole_layer(std::size_t i, View hidden, View residual, std::vector<KvLayer>& kv,
                          const Step& step) {
  const LayerSpec& layer = spec_.layers[i];
  const std::int64_t tokens = step.num_tokens;
  return backend_.decode_layer(
      {residual, hidden, rows(qkv_, tokens, layer.qkv_size()), rows(attn_, tokens, layer.q_size()),
       rows(act_, tokens, layer.intermediate_size), layer, weights_.layers[i], kv[i], step});
}

void Decoder::linear_stack(View out, View x, const Stack& stack) {
  std::int64_t first = 0;
  for (const Linear& matrix : stack) {
    backend_.linear(out.columns(first, matrix.outputs), x, matrix);
    first += matrix.outputs;
  }
}

void Decoder::adapt(View out, View x, std::size_t layer, Adapters::Part part, const Step& step) {
  if (step.adapters) backend_.add_low_rank(out, x, adapters_.of_layer(layer, part), step.adapters);
}

// pending: the output of the previous layer's MLP (in `hidden`), which is added to the residual
// stream together with the norm. hidden: on return the attention's output, not yet added.
void Decoder::attention_half(std::size_t i, View hidden, View residual, View pending,
                             std::vector<KvLayer>& kv, const Step& step, TapSink* taps) {
  const LayerSpec& layer = spec_.layers[i];
  const LayerWeights& weights = weights_.layers[i];
  const View qkv = rows(qkv_, step.num_tokens, layer.qkv_size());
  const View q = qkv.columns(0, layer.q_size());
  const View k = qkv.columns(layer.q_size(), layer.kv_size());
  const View v = qkv.columns(layer.q_size() + layer.kv_size(), layer.kv_size());
  const View attn = rows(attn_, step.num_tokens, layer.q_size());

  const NormedInput input{residual, pending, weights.attn_norm};
  const bool is_fused = !taps && !step.adapters && weights.qkv.size() == 1 &&
                        backend_.normed_linear(qkv, input, weights.qkv[0]);
  if (!is_fused) {
    normalize(backend_, hidden, input);
    if (pending.data) tap(taps, residual, "layers.", i - 1, ".out");
    tap(taps, hidden, "layers.", i, ".attn_norm");
    linear_stack(qkv, hidden, weights.qkv);
    adapt(qkv, hidden, i, Adapters::Part::qkv, step);
  }
  tap(taps, q, "layers.", i, ".q");
  tap(taps, k, "layers.", i, ".k");
  tap(taps, v, "layers.", i, ".v");
  if (layer.qk_norm != QkNorm::none) {
    const bool by_head = layer.qk_norm == QkNorm::head;
    backend_.norm_heads(q, weights.q_norm, by_head ? layer.head_dim : q.cols);
    backend_.norm_heads(k, weights.k_norm, by_head ? layer.head_dim : k.cols);
    tap(taps, q, "layers.", i, ".q_norm");
    tap(taps, k, "layers.", i, ".k_norm");
  }
  backend_.rope_and_store(qkv, weights.rope, layer, kv[i], step);
  if (weights.rope) {
    tap(taps, q, "layers.", i, ".q_rope");
    tap(taps, k, "layers.", i, ".k_rope");
  }
  backend_.attention(attn, q, layer, layer.score_scale(), kv[i], step);
  tap(taps, attn, "layers.", i, ".attn");
  backend_.linear(hidden, attn, weights.o);
  adapt(hidden, attn, i, Adapters::Part::o, step);
  finish_sublayer(i, ".attn_out", hidden, weights.attn_out_norm, taps);
}

// hidden: the attention's output; on return the MLP's, not yet added to the residual stream.
void Decoder::mlp_half(std::size_t i, View hidden, View residual, const Step& step, TapSink* taps) {
  const LayerSpec& layer = spec_.layers[i];
  const LayerWeights& weights = weights_.layers[i];
  const std::int64_t width = layer.intermediate_size;
  const NormedInput input{residual, hidden, weights.mlp_norm};
  if (layer.moe) {
    normalize(backend_, hidden, input);
    tap(taps, hidden, "layers.", i, ".mlp_norm");
    const std::int64_t experts = layer.moe->num_experts;
    const View router{router_.data(), hidden.rows, experts, experts, DType::f32};
    backend_.linear(router, hidden, weights.router);
    tap(taps, router, "layers.", i, ".router");
    backend_.moe(hidden, hidden, router, {*layer.moe, weights.up, weights.down, layer.activation});
    return finish_sublayer(i, ".mlp_out", hidden, weights.mlp_out_norm, taps);
  }
  const bool is_fused =
      !taps && !step.adapters && layer.gated &&
      backend_.normed_mlp(hidden, input, weights.up, weights.down, layer.activation);
  if (is_fused) return finish_sublayer(i, ".mlp_out", hidden, weights.mlp_out_norm, taps);
  normalize(backend_, hidden, input);
  tap(taps, hidden, "layers.", i, ".mlp_norm");
  const View up = rows(up_, hidden.rows, layer.up_size());
  const View act = rows(act_, hidden.rows, width);

  linear_stack(up, hidden, weights.up);
  adapt(up, hidden, i, Adapters::Part::up, step);
  if (layer.gated) tap(taps, up.columns(0, width), "layers.", i, ".gate");
  tap(taps, up.columns(layer.up_size() - width, width), "layers.", i, ".up");
  backend_.gated_activation(act, up, layer.activation, layer.gated);
  tap(taps, act, "layers.", i, ".act");
  backend_.linear(hidden, act, weights.down);
  adapt(hidden, act, i, Adapters::Part::down, step);
  finish_sublayer(i, ".mlp_out", hidden, weights.mlp_out_norm, taps);
}

void Decoder::finish_sublayer(std::size_t i, const char* part, View hidden, const Norm& norm,
                              TapSink* taps) {
  const LayerSpec& layer = spec_.layers[i];
  backend_.all_reduce(hidden);
  tap(taps, hidden, "layers.", i, part);
  if (layer.output_norm) {
    backend_.norm_heads(hidden, norm, hidden.cols);
    tap(taps, hidden, "layers.", i, part, "_norm");
  }
  if (layer.residual_multiplier != 1.0f) backend_.scale(hidden, layer.residual_multiplier, 0.0f);
}

}  // namespace octavo

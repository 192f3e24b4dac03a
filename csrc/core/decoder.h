// The forward pass: the only loop over layers in octavo.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/adapters.h"
#include "core/backend.h"
#include "core/weights.h"

namespace octavo {

// Receives intermediate results by name, those for which `wants` returns true.
class TapSink {
 public:
  virtual ~TapSink() = default;
  virtual bool wants(const std::string& name) const = 0;
  virtual void record(const std::string& name, View rows) = 0;
};

// Where the results of the final norm go: the hidden states that become logits.
struct NormedRows {
  View rows;               // (num_rows, hidden): written where not every token has a logit row,
  bool keep_rows = false;  // or where this asks for it
  View tokens;             // (num_tokens, hidden): of all tokens; no data: not wanted
};

class Decoder {
 public:
  Decoder(Backend& backend, const ModelSpec& spec, const Weights& weights, const Adapters& adapters,
          std::int64_t max_num_batched_tokens);

  // Runs the step's tokens through the model, stores their keys and values in `kv` (one entry a
  // layer), and writes the logits of the wanted rows, (num_rows, vocab), to `logits`.
  //
  // taps: null, or the receiver of intermediate results.
  void forward(const Step& step, std::vector<KvLayer>& kv, View logits, const NormedRows& normed,
               TapSink* taps);

  std::int64_t workspace_bytes() const;

 private:
  bool whole_layer(std::size_t layer, View hidden, View residual, std::vector<KvLayer>& kv,
                   const Step& step);
  void attention_half(std::size_t layer, View hidden, View residual, View pending,
                      std::vector<KvLayer>& kv, const Step& step, TapSink* taps);
  void mlp_half(std::size_t layer, View hidden, View residual, const Step& step, TapSink* taps);
  // Adds what the adapters of the step's sequences, if there are any, add to a stack's product.
  void adapt(View out, View x, std::size_t layer, Adapters::Part part, const Step& step);
  // Ends a sublayer: `hidden`, its output, normalized and multiplied where the layer says so. part:
  // of its tap's name. norm: of the layer's output_norm.
  void finish_sublayer(std::size_t layer, const char* part, View hidden, const Norm& norm,
                       TapSink* taps);

  // out = x times each matrix of the stack, side by side.
  void linear_stack(View out, View x, const Stack& stack);

  // The first num_rows rows of a workspace matrix.
  View rows(const Buffer& buffer, std::int64_t num_rows, std::int64_t cols) const {
    return {buffer.data(), num_rows, cols, cols, dtype_};
  }

  Backend& backend_;
  const ModelSpec& spec_;
  const Weights& weights_;
  const Adapters& adapters_;
  DType dtype_;  // of all activations but the residual stream
  // max_num_batched_tokens rows each.
  Buffer residual_, hidden_, qkv_, attn_, up_, act_, router_;
};

}  // namespace octavo

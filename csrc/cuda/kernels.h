// What the CUDA backend is made of: the host side of every op. Each queues its kernels on the
// stream and returns. octavo.reference.ops defines the ops; core/backend.h says what the arguments
// are. A step may be padded: sequences with context_lens 0 and tokens with slot -1, whose rows hold
// numbers of no meaning but must be read and written without harm.
#pragma once

#include <vector>

#include "core/backend.h"
#include "cuda/device/stream.h"

namespace octavo::cuda {

// ---- elementwise.cu: each number touched once ----
void norm(Stream& stream, View out, View x, const Norm& norm);
void add_norm(Stream& stream, View out, View residual, View x, const Norm& norm);
void gated_activation(Stream& stream, View out, View x, Activation activation, bool gated);
void take_rows(Stream& stream, View out, View x, const std::int32_t* rows);

// ---- kv_cache.cu: layout of a block, storing, copying ----
std::int64_t kv_block_bytes(const LayerSpec& layer, DType dtype, std::int64_t block_size);
void rope_and_store(Stream& stream, View qkv, const Rope* rope, const LayerSpec& layer,
                    const KvLayer& kv, const Step& step);
void read_kv(Stream& stream, const KvLayer& kv, std::int64_t num_slots, std::vector<float>& keys,
             std::vector<float>& values);
// pairs: host memory.
void copy_blocks(Stream& stream, const KvLayer& kv, const std::int32_t* pairs,
                 std::int64_t num_pairs);

// ---- attention.cu ----
// Bytes of workspace for the largest step of a model, and counters that stay zero between steps.
std::size_t attention_workspace_bytes(const Stream& stream, const ModelSpec& spec,
                                      const StepLimits& limits);
void attention(Stream& stream, View out, View q, const LayerSpec& layer, float scale,
               const KvLayer& kv, const Step& step, Workspace& workspace);

// ---- linear.cu and its kernels ----
Linear make_linear(Backend& backend, std::int64_t outputs, std::int64_t inputs,
                   const WeightFormat& format, bool with_bias);
void pack_rows(Stream& stream, Linear& linear, std::int64_t first_row, const HostMatrix& rows,
               Workspace& workspace);
void pack_scales(Stream& stream, Linear& linear, std::int64_t first_row, std::int64_t rows,
                 const float* scales);
void pack_zeros(Stream& stream, Linear& linear, std::int64_t first_row, std::int64_t rows,
                const float* zeros);
// Reads rows of packed matrices, quantized ones too (a head may be tied to the embedding).
void embed(Stream& stream, View out, const Linear& table, const Linear* positions,
           const Step& step);
// Up to so many rows products go by tiles of our own; of more by cuBLASLt, where it is to be had.
// To be measured: OCTAVO_TILES_ROWS and OCTAVO_QUANTIZED_TILES_ROWS set them otherwise.
struct TileRows {
  std::int64_t plain = 8, quantized = 128;

  static TileRows read_environment();
  std::int64_t of(const WeightFormat& format) const {
    return format.is_quantized() ? quantized : plain;
  }
};
std::size_t linear_workspace_bytes(const ModelSpec& spec, const StepLimits& limits,
                                   const TileRows& tile_rows);

class CublasLt;  // cublas.h: the library, where it is to be had
struct LinearContext {
  Stream& stream;
  Workspace& workspace;
  CublasLt* cublas = nullptr;  // null: our own kernels
  TileRows tile_rows;
};
// x: rows of bf16, f16 or float32 numbers; out: the same, or float32.
void linear(const LinearContext& context, View out, View x, const Linear& weight);

// ---- decode_layer.cu: ops in one kernel; false where not ----
// dtype: of activations.
bool normed_linear(Stream& stream, DType dtype, View out, const NormedInput& x,
                   const Linear& weight);
// workspace: of attention.
bool decode_layer(Stream& stream, const LayerWork& work, Workspace& workspace);

// ---- logits.cu ----
void adjust_logits(Stream& stream, View out, View logits, const LogitAdjustments& adjustments);
void log_softmax(Stream& stream, View out, View logits);

// ---- sampling.cu ----
std::size_t sampling_workspace_bytes(std::int64_t max_num_rows);
void sample(Stream& stream, const Samples& out, View logits, const std::int32_t* masks,
            const Step& step, Workspace& workspace);

}  // namespace octavo::cuda

// The CUDA backend: every op of core/backend.h as kernels on one stream of one device. backend.cu
// has memory and recorded steps; the rooms have the ops: each queues its kernels and returns.
//
// A step may be padded: sequences with context_lens 0 and tokens with slot -1, whose rows hold
// numbers of no meaning but must be read and written without harm.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "core/backend.h"
#include "cuda/device/graphs.h"
#include "cuda/device/stream.h"

namespace octavo::cuda {

class Collectives;  // device/collectives.h
class CublasLt;     // products/cublas.h

constexpr int kLowRankParts = 3;  // matrices of a stack: q, k and v

// Products of up to so many rows use octavo's own tiles; of more, cuBLASLt, where it is available.
// OCTAVO_TILES_ROWS, OCTAVO_QUANTIZED_TILES_ROWS and OCTAVO_FEW_ROWS set other limits, for
// measuring.
struct TileRows {
  std::int64_t plain = 8, quantized = 128;
  std::int64_t few = 8;  // up to 16: rows that multiply_few takes of any matrix

  static TileRows read_environment();
  std::int64_t of(const WeightFormat& format) const {
    return format.is_quantized() ? quantized : plain;
  }
};

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(const BackendOptions& options);
  ~CudaBackend() override;

  void attach_thread() override { stream_.attach_thread(); }
  void* allocate(std::size_t bytes) override;
  void release(void* data, std::size_t bytes) noexcept override;
  void upload(void* device, const void* host, std::size_t bytes) override;
  void download(void* host, const void* device, std::size_t bytes) override;
  std::size_t available_memory() const override;
  void* allocate_host(std::size_t bytes) override;
  void release_host(void* data) noexcept override;
  void upload_async(void* device, const HostBuffer& host, std::size_t bytes) override;
  void download_async(const HostBuffer& host, const void* device, std::size_t bytes) override;
  void record_event(int index) override;
  void wait_event(int index) override;

  DType activation_dtype() const override { return options_.dtype; }
  StepKey padded(const StepKey& key) const override;
  void prepare(const ModelSpec& spec, const StepLimits& limits) override;

  Linear make_linear(std::int64_t outputs, std::int64_t inputs, const WeightFormat& format,
                     bool with_bias, std::int64_t count) override;
  void pack_rows(Linear& linear, std::int64_t first_row, const HostMatrix& rows) override;
  void pack_scales(Linear& linear, std::int64_t first_row, std::int64_t rows,
                   const float* scales) override;
  void pack_zeros(Linear& linear, std::int64_t first_row, std::int64_t rows,
                  const float* zeros) override;
  void read_kv(const KvLayer& kv, std::int64_t num_slots, std::vector<float>& keys,
               std::vector<float>& values) override;
  std::int64_t kv_block_bytes(const LayerSpec& layer, DType dtype,
                              std::int64_t block_size) const override;
  std::vector<std::string> unsupported(const ModelSpec& spec,
                                       const RuntimeOptions& options) const override;

  void embed(View out, const Linear& table, const Linear* positions, const Step& step) override;
  void norm(View out, View x, const Norm& norm) override;
  void add_norm(View out, View residual, View x, const Norm& norm) override;
  void norm_heads(View x, const Norm& norm, std::int64_t width) override;
  void scale(View x, float factor, float cap) override;
  void linear(View out, View x, const Linear& weight) override;
  bool takes_adapters() const override { return true; }
  void adapters_changed(const std::vector<LowRankStack>& stacks) override;
  void add_low_rank(View out, View x, const LowRankStack& stack,
                    const std::int32_t* adapters) override;
  void add_low_rank_rows(View out, const LowRankStack& stack, const Step& step) override;
  void rope_and_store(View qkv, const Rope* rope, const LayerSpec& layer, KvLayer& kv,
                      const Step& step) override;
  void attention(View out, View q, const LayerSpec& layer, float scale, const KvLayer& kv,
                 const Step& step) override;
  void gated_activation(View out, View x, Activation activation, bool gated) override;
  void moe(View out, View x, View router, const ExpertWork& work) override;
  bool normed_linear(View out, const NormedInput& x, const Linear& weight) override;
  bool decode_layer(const LayerWork& work) override;
  void take_rows(View out, View x, const std::int32_t* rows) override;
  void adjust_logits(View out, View logits, const LogitAdjustments& adjustments) override;
  void sample(const Samples& out, View logits, const std::int32_t* masks,
              const Step& step) override;
  void log_softmax(View out, View logits) override;
  void all_reduce(View x) override;
  void all_gather(View x) override;
  void copy_blocks(KvLayer& kv, const std::int32_t* pairs, std::int64_t num_pairs) override;

  void run(const StepKey& key, const std::function<void()>& record) override;
  void forget_recorded() override;
  WorkCounts counts() const override;
  void sync() override;
  double seconds_of(const std::function<void()>& work) override;
  double measure_bandwidth(double seconds, double num_bytes) override;
  double measure_flops(double seconds) override;

 private:
  // Sum of the growths of all workspaces: recorded graphs hold their addresses.
  std::int64_t growths() const;

  // For the largest step of a model; the first two have counters in front, which stay zero between
  // steps.
  std::size_t attention_workspace_bytes(const ModelSpec& spec, const StepLimits& limits) const;
  std::size_t linear_workspace_bytes(const ModelSpec& spec, const StepLimits& limits) const;
  static std::size_t sampling_workspace_bytes(std::int64_t max_num_rows);
  std::size_t experts_workspace_bytes(const ModelSpec& spec, const StepLimits& limits) const;
  static void add_expert_problems(const ModelSpec& spec, std::vector<std::string>& problems);

  // step: of rows of the embedding, which have no x.
  void add_low_rank(View out, View x, const LowRankStack& stack, const std::int32_t* adapters,
                    const Step* step);

  BackendOptions options_;
  Stream stream_;
  Workspace linear_workspace_, attention_workspace_, sampling_workspace_, experts_workspace_,
      pack_workspace_, low_rank_workspace_, ranks_workspace_;
  // What every adapter adds to every stack, on the device: (stacks, places) of LowRankEntry.
  Buffer low_rank_table_;
  const LowRankStack* low_rank_stacks_ = nullptr;  // the first stack
  std::size_t low_rank_slots_ = 0;
  std::int64_t max_shrunk_ = 0, max_tokens_ = 0;
  const TileRows tile_rows_ = TileRows::read_environment();
  std::unique_ptr<CublasLt> cublas_;  // null: deterministic, or the library is missing
  // Null: one rank. Before graphs_, which are destroyed first: an abort waits for them.
  std::unique_ptr<Collectives> collectives_;
  cudaEvent_t events_[2] = {};
  Graphs graphs_;
  std::int64_t num_uploads_ = 0, num_downloads_ = 0;
};

}  // namespace octavo::cuda

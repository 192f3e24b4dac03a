// The CUDA backend: every op of core/backend.h as kernels on one stream of one device.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "core/backend.h"
#include "cuda/device/graphs.h"
#include "cuda/device/measure.h"
#include "cuda/device/stream.h"
#include "cuda/kernels.h"
#include "cuda/products/cublas.h"

namespace octavo::cuda {

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
  void download_async(unsigned char* host, const void* device, std::size_t bytes) override;
  void record_event(int index) override;
  void wait_event(int index) override;

  DType activation_dtype() const override { return options_.dtype; }
  StepKey padded(const StepKey& key) const override;
  void prepare(const ModelSpec& spec, const StepLimits& limits) override;

  Linear make_linear(std::int64_t outputs, std::int64_t inputs, const WeightFormat& format,
                     bool with_bias) override {
    return cuda::make_linear(*this, outputs, inputs, format, with_bias);
  }
  void pack_rows(Linear& linear, std::int64_t first_row, const HostMatrix& rows) override {
    cuda::pack_rows(stream_, linear, first_row, rows, copy_workspace_);
  }
  void pack_scales(Linear& linear, std::int64_t first_row, std::int64_t rows,
                   const float* scales) override {
    cuda::pack_scales(stream_, linear, first_row, rows, scales);
  }
  void pack_zeros(Linear& linear, std::int64_t first_row, std::int64_t rows,
                  const float* zeros) override {
    cuda::pack_zeros(stream_, linear, first_row, rows, zeros);
  }
  void read_kv(const KvLayer& kv, std::int64_t num_slots, std::vector<float>& keys,
               std::vector<float>& values) override {
    cuda::read_kv(stream_, kv, num_slots, keys, values);
  }
  std::int64_t kv_block_bytes(const LayerSpec& layer, DType dtype,
                              std::int64_t block_size) const override {
    return cuda::kv_block_bytes(layer, dtype, block_size);
  }
  std::vector<std::string> unsupported(const ModelSpec& spec,
                                       const RuntimeOptions& options) const override;

  void embed(View out, const Linear& table, const Linear* positions, const Step& step) override {
    cuda::embed(stream_, out, table, positions, step);
  }
  void norm(View out, View x, const Norm& norm) override { cuda::norm(stream_, out, x, norm); }
  void add_norm(View out, View residual, View x, const Norm& norm) override {
    cuda::add_norm(stream_, out, residual, x, norm);
  }
  void linear(View out, View x, const Linear& weight) override {
    cuda::linear({stream_, linear_workspace_, cublas_.get(), tile_rows_}, out, x, weight);
  }
  void rope_and_store(View qkv, const Rope* rope, const LayerSpec& layer, KvLayer& kv,
                      const Step& step) override {
    cuda::rope_and_store(stream_, qkv, rope, layer, kv, step);
  }
  void attention(View out, View q, const LayerSpec& layer, float scale, const KvLayer& kv,
                 const Step& step) override {
    cuda::attention(stream_, out, q, layer, scale, kv, step, attention_workspace_);
  }
  void gated_activation(View out, View x, Activation activation, bool gated) override {
    cuda::gated_activation(stream_, out, x, activation, gated);
  }
  bool normed_linear(View out, const NormedInput& x, const Linear& weight) override {
    return cuda::normed_linear(stream_, options_.dtype, out, x, weight);
  }
  bool decode_layer(const LayerWork& work) override {
    return cuda::decode_layer(stream_, work, attention_workspace_);
  }
  void take_rows(View out, View x, const std::int32_t* rows) override {
    cuda::take_rows(stream_, out, x, rows);
  }
  void adjust_logits(View out, View logits, const LogitAdjustments& adjustments) override {
    cuda::adjust_logits(stream_, out, logits, adjustments);
  }
  void sample(const Samples& out, View logits, const std::int32_t* masks,
              const Step& step) override {
    cuda::sample(stream_, out, logits, masks, step, sampling_workspace_);
  }
  void log_softmax(View out, View logits) override { cuda::log_softmax(stream_, out, logits); }
  void copy_blocks(KvLayer& kv, const std::int32_t* pairs, std::int64_t num_pairs) override {
    cuda::copy_blocks(stream_, kv, pairs, num_pairs);
  }

  void run(const StepKey& key, const std::function<void()>& record) override;
  void forget_recorded() override;
  WorkCounts counts() const override;
  void sync() override { stream_.sync(); }
  double seconds_of(const std::function<void()>& work) override {
    return cuda::seconds_of(stream_, work);
  }
  double measure_bandwidth(double seconds, double num_bytes) override {
    return cuda::measure_bandwidth(stream_, seconds, num_bytes);
  }
  double measure_flops(double seconds) override { return cuda::measure_flops(stream_, seconds); }

 private:
  // Sum of the growths of all workspaces: recorded graphs hold their addresses.
  std::int64_t growths() const;

  BackendOptions options_;
  Stream stream_;
  Workspace linear_workspace_, attention_workspace_, sampling_workspace_, copy_workspace_;
  const TileRows tile_rows_ = TileRows::read_environment();
  std::unique_ptr<CublasLt> cublas_;  // null: deterministic, or the library is not there
  cudaEvent_t events_[2] = {};
  Graphs graphs_;
  std::int64_t num_uploads_ = 0, num_downloads_ = 0;
};

}  // namespace octavo::cuda

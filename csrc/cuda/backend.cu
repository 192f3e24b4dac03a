#include "cuda/backend.h"

#include <algorithm>

#include "cuda/devices.h"

namespace octavo::cuda {

namespace {

// Batch sizes that steps are padded to: few enough to record them all.
std::int64_t padded_seqs(std::int64_t num_seqs) {
  for (const std::int64_t size : {1, 2, 4, 8, 12, 16, 24, 32, 48, 64}) {
    if (num_seqs <= size) return size;
  }
  return (num_seqs + 31) / 32 * 32;
}

std::int64_t next_power_of_two(std::int64_t value) {
  std::int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

}  // namespace

CudaBackend::CudaBackend(const BackendOptions& options)
    : options_(options),
      stream_(options.device_index),
      linear_workspace_(stream_),
      attention_workspace_(stream_),
      sampling_workspace_(stream_),
      copy_workspace_(stream_) {
  if (!options.deterministic) cublas_ = CublasLt::open(stream_);
  for (cudaEvent_t& event : events_)
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
}

CudaBackend::~CudaBackend() {
  cudaStreamSynchronize(stream_.handle());
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
}

// ---- memory ----

void* CudaBackend::allocate(std::size_t bytes) {
  void* data = allocate_on(stream_, bytes);
  check(cudaMemsetAsync(data, 0, bytes, stream_.handle()), "clearing device memory");
  return data;
}

void CudaBackend::release(void* data, std::size_t) noexcept {
  cudaStreamSynchronize(stream_.handle());  // what was queued may still use it
  cudaFree(data);
}

void CudaBackend::upload(void* device, const void* host, std::size_t bytes) {
  if (bytes == 0) return;
  ++num_uploads_;
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_.handle()),
        "copying to the device");
  stream_.sync();
}

void CudaBackend::download(void* host, const void* device, std::size_t bytes) {
  if (bytes == 0) return;
  ++num_downloads_;
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_.handle()),
        "copying from the device");
  stream_.sync();
}

std::size_t CudaBackend::available_memory() const {
  stream_.attach_thread();  // any thread may ask
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the free memory");
  return free;
}

void* CudaBackend::allocate_host(std::size_t bytes) {
  void* data = nullptr;
  check(cudaHostAlloc(&data, bytes, cudaHostAllocDefault), "allocating pinned host memory");
  return data;
}

void CudaBackend::release_host(void* data) noexcept {
  cudaStreamSynchronize(stream_.handle());
  cudaFreeHost(data);
}

void CudaBackend::upload_async(void* device, const HostBuffer& host, std::size_t bytes) {
  ++num_uploads_;
  check(cudaMemcpyAsync(device, host.data(), bytes, cudaMemcpyHostToDevice, stream_.handle()),
        "copying to the device");
}

void CudaBackend::download_async(const HostBuffer& host, const void* device, std::size_t bytes) {
  ++num_downloads_;
  check(cudaMemcpyAsync(host.data(), device, bytes, cudaMemcpyDeviceToHost, stream_.handle()),
        "copying from the device");
}

void CudaBackend::record_event(int index) {
  check(cudaEventRecord(events_[index], stream_.handle()), "recording an event");
}

void CudaBackend::wait_event(int index) {
  if (cudaEventSynchronize(events_[index]) != cudaSuccess) stream_.sync();  // which says more
}

// ---- the shape of steps ----

StepKey CudaBackend::padded(const StepKey& key) const {
  constexpr std::int64_t kMostTokens = 8;  // a sequence, of steps worth recording
  if (!options_.graphs || key.tokens_per_seq > kMostTokens) return key;
  StepKey result = key;
  result.num_seqs = padded_seqs(key.num_seqs);
  result.max_blocks = next_power_of_two(std::max<std::int64_t>(key.max_blocks, 16));
  return result;
}

void CudaBackend::prepare(const ModelSpec& spec, const StepLimits& limits) {
  const std::int64_t seqs = padded_seqs(limits.max_num_seqs);
  const StepLimits padded{seqs, std::max(limits.max_num_batched_tokens, seqs),
                          limits.max_model_len};
  linear_workspace_.get(linear_workspace_bytes(spec, padded, tile_rows_));
  attention_workspace_.get(attention_workspace_bytes(stream_, spec, padded));
  sampling_workspace_.get(sampling_workspace_bytes(spec.vocab_size, padded.max_num_batched_tokens));
}

std::int64_t CudaBackend::growths() const {
  return linear_workspace_.growths() + attention_workspace_.growths() +
         sampling_workspace_.growths();
}

void CudaBackend::run(const StepKey& key, const std::function<void()>& record) {
  if (!options_.graphs || key.tokens_per_seq == 0 || key.tokens_per_seq > 8)
    record();
  else
    graphs_.run(stream_, key, growths(), record);
}

void CudaBackend::forget_recorded() {
  stream_.sync();  // one may be on its way
  graphs_.clear();
}

WorkCounts CudaBackend::counts() const {
  WorkCounts counts;
  counts.kernels = stream_.num_launched();
  counts.recorded = graphs_.num_recorded();
  counts.replayed = graphs_.num_replayed();
  counts.forgotten = graphs_.num_forgotten();
  counts.uploads = num_uploads_;
  counts.downloads = num_downloads_;
  return counts;
}

std::vector<std::string> CudaBackend::unsupported(const ModelSpec& spec,
                                                  const RuntimeOptions& options) const {
  std::vector<std::string> problems;
  for (const LayerSpec& layer : spec.layers) {
    if (layer.head_dim > 256) {
      problems.push_back(text("head_dim is ", layer.head_dim,
                              "; the attention kernels take up to "
                              "256"));
      break;
    }
  }
  for (const auto& [name, format] : options.formats) {
    if (format.is_quantized() && format.activation_bits != 16) {
      problems.push_back(text("weight ", name,
                              " is w8a8, which is for CPUs: use int8, whose activations keep "
                              "their precision"));
      break;
    }
  }
  return problems;
}

// ---- packing and the ops ----

Linear CudaBackend::make_linear(std::int64_t outputs, std::int64_t inputs,
                                const WeightFormat& format, bool with_bias) {
  return cuda::make_linear(*this, outputs, inputs, format, with_bias);
}

void CudaBackend::pack_rows(Linear& linear, std::int64_t first_row, const HostMatrix& rows) {
  cuda::pack_rows(stream_, linear, first_row, rows, copy_workspace_);
}

void CudaBackend::pack_scales(Linear& linear, std::int64_t first_row, std::int64_t rows,
                              const float* scales) {
  cuda::pack_scales(stream_, linear, first_row, rows, scales);
}

void CudaBackend::pack_zeros(Linear& linear, std::int64_t first_row, std::int64_t rows,
                             const float* zeros) {
  cuda::pack_zeros(stream_, linear, first_row, rows, zeros);
}

void CudaBackend::read_kv(const KvLayer& kv, std::int64_t num_slots, std::vector<float>& keys,
                          std::vector<float>& values) {
  cuda::read_kv(stream_, kv, num_slots, keys, values);
}

std::int64_t CudaBackend::kv_block_bytes(const LayerSpec& layer, DType dtype,
                                         std::int64_t block_size) const {
  return cuda::kv_block_bytes(layer, dtype, block_size);
}

void CudaBackend::embed(View out, const Linear& table, const Linear* positions, const Step& step) {
  cuda::embed(stream_, out, table, positions, step);
}

void CudaBackend::norm(View out, View x, const Norm& norm) { cuda::norm(stream_, out, x, norm); }

void CudaBackend::add_norm(View out, View residual, View x, const Norm& norm) {
  cuda::add_norm(stream_, out, residual, x, norm);
}

void CudaBackend::linear(View out, View x, const Linear& weight) {
  cuda::linear({stream_, linear_workspace_, cublas_.get(), tile_rows_}, out, x, weight);
}

void CudaBackend::rope_and_store(View qkv, const Rope* rope, const LayerSpec& layer, KvLayer& kv,
                                 const Step& step) {
  cuda::rope_and_store(stream_, qkv, rope, layer, kv, step);
}

void CudaBackend::attention(View out, View q, const LayerSpec& layer, float scale,
                            const KvLayer& kv, const Step& step) {
  cuda::attention(stream_, out, q, layer, scale, kv, step, attention_workspace_);
}

void CudaBackend::gated_activation(View out, View x, Activation activation, bool gated) {
  cuda::gated_activation(stream_, out, x, activation, gated);
}

bool CudaBackend::normed_linear(View out, const NormedInput& x, const Linear& weight) {
  return cuda::normed_linear(stream_, options_.dtype, out, x, weight);
}

bool CudaBackend::decode_layer(const LayerWork& work) {
  return cuda::decode_layer(stream_, work, attention_workspace_);
}

void CudaBackend::take_rows(View out, View x, const std::int32_t* rows) {
  cuda::take_rows(stream_, out, x, rows);
}

void CudaBackend::adjust_logits(View out, View logits, const LogitAdjustments& adjustments) {
  cuda::adjust_logits(stream_, out, logits, adjustments);
}

void CudaBackend::sample(const Samples& out, View logits, const std::int32_t* masks,
                         const Step& step) {
  cuda::sample(stream_, out, logits, masks, step, sampling_workspace_);
}

void CudaBackend::log_softmax(View out, View logits) { cuda::log_softmax(stream_, out, logits); }

void CudaBackend::copy_blocks(KvLayer& kv, const std::int32_t* pairs, std::int64_t num_pairs) {
  cuda::copy_blocks(stream_, kv, pairs, num_pairs, copy_workspace_);
}

}  // namespace octavo::cuda

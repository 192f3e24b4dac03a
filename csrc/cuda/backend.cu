#include "cuda/backend.h"

#include <algorithm>

#include "cuda/device/collectives.h"
#include "cuda/products/cublas.h"

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
      experts_workspace_(stream_),
      pack_workspace_(stream_),
      low_rank_workspace_(stream_),
      ranks_workspace_(stream_) {
  if (!options.deterministic) cublas_ = CublasLt::open(stream_);
  if (options.group) collectives_ = Collectives::open(stream_, options.group);
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
  sync();
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

void CudaBackend::sync() {
  stream_.sync();
  if (collectives_) collectives_->check();
}

void CudaBackend::record_event(int index) {
  check(cudaEventRecord(events_[index], stream_.handle()), "recording an event");
}

void CudaBackend::wait_event(int index) {
  stream_.attach_thread();                                                  // any thread may wait
  if (cudaEventSynchronize(events_[index]) != cudaSuccess) stream_.sync();  // which says more
  if (collectives_) collectives_->check();
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
  max_tokens_ = padded.max_num_batched_tokens;
  linear_workspace_.get(linear_workspace_bytes(spec, padded));
  attention_workspace_.get(attention_workspace_bytes(spec, padded));
  experts_workspace_.get(experts_workspace_bytes(spec, padded));
  sampling_workspace_.get(sampling_workspace_bytes(padded.max_num_batched_tokens));
  if (collectives_ && options_.deterministic) {
    const std::int64_t bits =
        padded.max_num_batched_tokens * spec.hidden_size * bits_of(options_.dtype);
    ranks_workspace_.get(static_cast<std::size_t>(options_.group->size() * bits / 8));
  }
}

std::int64_t CudaBackend::growths() const {
  return linear_workspace_.growths() + attention_workspace_.growths() +
         sampling_workspace_.growths() + experts_workspace_.growths() +
         low_rank_workspace_.growths() + ranks_workspace_.growths();
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
  WorkCounts counts = graphs_.counts();
  counts.kernels = stream_.num_launched();
  counts.last_kernels = stream_.launched_last();
  counts.uploads = num_uploads_;
  counts.downloads = num_downloads_;
  return counts;
}

std::vector<std::string> CudaBackend::unsupported(const ModelSpec& spec,
                                                  const RuntimeOptions& options) const {
  std::vector<std::string> problems;
  add_expert_problems(spec, problems);
  for (const LayerSpec& layer : spec.layers) {
    if (layer.head_dim <= 256) continue;
    problems.push_back(
        text("head_dim is ", layer.head_dim, "; the attention kernels take up to 256"));
    break;
  }
  for (const LayerSpec& layer : spec.layers) {
    if (!layer.output_norm ||
        (layer.output_norm->kind == NormKind::rms && !layer.output_norm->bias))
      continue;
    problems.push_back("output_norm is not rms without a bias, which its kernel computes alone");
    break;
  }
  for (const auto& [name, format] : options.formats) {
    if (!format.is_quantized() || format.activation_bits == 16) continue;
    problems.push_back(text("weight ", name,
                            " is w8a8, which is for CPUs: use int8, whose "
                            "activations keep their precision"));
    break;
  }
  return problems;
}

}  // namespace octavo::cuda

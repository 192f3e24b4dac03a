#include "cuda/device/stream.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "core/text.h"

namespace octavo::cuda {

namespace {

// Out of memory, with what was asked for and what is free: MemoryError in Python.
class OutOfDeviceMemory : public std::bad_alloc {
 public:
  explicit OutOfDeviceMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// Whether kernels may overlap with the one before. The driver takes the code that was built for the
// highest capability that is not above the device's; code for less than 9.0 does not wait for the
// kernel before (wait_for_previous_kernel in primitives.cuh).
bool may_overlap(int compute_capability) {
#ifdef __CUDA_ARCH_LIST__
  for (const int built : {__CUDA_ARCH_LIST__})
    if (900 <= built && built <= 10 * compute_capability) return true;
  return false;
#else
  return compute_capability >= 90;
#endif
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  throw DeviceError(
      text(what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")"));
}

Stream::Stream(int device) : device_(device) {
  check(cudaSetDevice(device), "choosing the CUDA device");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "asking for the CUDA device's properties");
  name_ = properties.name;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "asking for a device attribute");
    return value;
  };
  num_processors_ = ask(cudaDevAttrMultiProcessorCount);
  compute_capability_ =
      10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  max_shared_bytes_ = static_cast<std::size_t>(ask(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  can_overlap_ = may_overlap(compute_capability_);
  tiles_apart_ = std::getenv("OCTAVO_CUDA_TILES_APART") != nullptr;
  if (const char* percent = std::getenv("OCTAVO_CUDA_CARVEOUT")) carveout_ = std::atoi(percent);
  check(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking), "creating a CUDA stream");
}

Stream::~Stream() { cudaStreamDestroy(handle_); }

void Stream::attach_thread() const { check(cudaSetDevice(device_), "choosing the CUDA device"); }

void Stream::sync() {
  const cudaError_t error = cudaStreamSynchronize(handle_);
  if (error == cudaSuccess) return;
  const std::string names = launched_last();
  throw DeviceError(text("a kernel failed on ", name_, ": ", cudaGetErrorString(error),
                         ". Launched last: ", names.empty() ? "none" : names,
                         ". Run again with CUDA_LAUNCH_BLOCKING=1 to learn which one it was."));
}

std::string Stream::launched_last() const {
  std::string names;
  const std::uint64_t first =
      num_launched_ > launched_.size() ? num_launched_ - launched_.size() : 0;
  for (std::uint64_t i = first; i < num_launched_; ++i)
    names += text(names.empty() ? "" : ", ", launched_[i % launched_.size()]);
  return names;
}

void* allocate_on(const Stream& stream, std::size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, std::max<std::size_t>(bytes, 1));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for the free memory");
    throw OutOfDeviceMemory(text(stream.device_name(), " has ", free >> 20, " MiB free of ",
                                 total >> 20, " MiB; ", (bytes + 1048575) >> 20,
                                 " MiB were asked for: lower kv_memory_fraction, "
                                 "max_num_batched_tokens or max_num_seqs, or quantize the model"));
  }
  check(error, "allocating device memory");
  return data;
}

Workspace::~Workspace() { cudaFree(data_); }

void* Workspace::get(std::size_t bytes) {
  if (bytes <= bytes_) return data_;
  stream_.sync();  // what was queued may still use the old memory
  check(cudaFree(data_), "freeing a workspace");
  data_ = nullptr;
  bytes_ = 0;
  ++growths_;  // the old address is gone even if the next line throws
  data_ = allocate_on(stream_, bytes);
  bytes_ = bytes;
  check(cudaMemsetAsync(data_, 0, bytes, stream_.handle()), "clearing a workspace");
  return data_;
}

}  // namespace octavo::cuda

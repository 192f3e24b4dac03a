#include "cuda/device/stream.h"

#include <cstdlib>

#include "core/text.h"

namespace octavo::cuda {

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
  tiles_apart_ = std::getenv("OCTAVO_CUDA_TILES_APART") != nullptr;
  check(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking), "creating a CUDA stream");
}

Stream::~Stream() { cudaStreamDestroy(handle_); }

void Stream::attach_thread() const { check(cudaSetDevice(device_), "choosing the CUDA device"); }

void Stream::sync() {
  const cudaError_t error = cudaStreamSynchronize(handle_);
  if (error == cudaSuccess) return;
  std::string names;
  const std::uint64_t first =
      num_launched_ > launched_.size() ? num_launched_ - launched_.size() : 0;
  for (std::uint64_t i = first; i < num_launched_; ++i)
    names += text(names.empty() ? "" : ", ", launched_[i % launched_.size()]);
  throw DeviceError(text("a kernel failed on ", name_, ": ", cudaGetErrorString(error),
                         ". Launched last: ", names.empty() ? "none" : names,
                         ". Run again with CUDA_LAUNCH_BLOCKING=1 to learn which one it was."));
}

}  // namespace octavo::cuda

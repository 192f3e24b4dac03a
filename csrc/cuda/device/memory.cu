#include "cuda/device/memory.h"

#include <algorithm>
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

}  // namespace

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
  data_ = allocate_on(stream_, bytes);
  bytes_ = bytes;
  ++growths_;
  check(cudaMemsetAsync(data_, 0, bytes, stream_.handle()), "clearing a workspace");
  return data_;
}

}  // namespace octavo::cuda

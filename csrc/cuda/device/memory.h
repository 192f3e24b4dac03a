// Device memory.
#pragma once

#include <cstdint>

#include "cuda/device/stream.h"

namespace octavo::cuda {

// Throws std::bad_alloc (MemoryError in Python) that says what was asked for and what is free.
void* allocate_on(const Stream& stream, std::size_t bytes);

// Device memory for what an op keeps between its kernels. It grows when more than ever is asked
// for; the backend asks for the largest step's before the first one, so that no step makes it grow
// (recorded graphs hold its address).
class Workspace {
 public:
  explicit Workspace(Stream& stream) : stream_(stream) {}
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // At least `bytes` bytes, aligned to 256; what they held before is lost. New memory is zero.
  void* get(std::size_t bytes);
  std::size_t bytes() const { return bytes_; }
  std::int64_t growths() const { return growths_; }

 private:
  Stream& stream_;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  std::int64_t growths_ = 0;
};

}  // namespace octavo::cuda

// Memory that notices who writes beside it, and holds poison until somebody writes in it.
#pragma once

#include <cstddef>
#include <utility>

namespace cuda_emulator {

// Aligned to 256 bytes like cudaMalloc's. Guard bytes on both sides tell of writes outside; under
// the address sanitizer the guards are off limits, so reads are caught too, at once.
class GuardedBytes {
 public:
  GuardedBytes() = default;
  explicit GuardedBytes(std::size_t bytes);
  GuardedBytes(GuardedBytes&& other) noexcept { swap(other); }
  GuardedBytes& operator=(GuardedBytes&& other) noexcept {
    swap(other);
    return *this;
  }
  ~GuardedBytes();

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  bool intact() const;  // nobody wrote beside it
  // Writes the guards anew, flipped or as at first. (Under the address sanitizer they are nobody's
  // to read, and stay.)
  void repair(bool flipped = false);

 private:
  void swap(GuardedBytes& other) noexcept {
    std::swap(whole_, other.whole_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(guard_, other.guard_);
  }

  void* whole_ = nullptr;
  unsigned char* data_ = nullptr;
  std::size_t bytes_ = 0;
  unsigned char guard_ = 0;
};

}  // namespace cuda_emulator

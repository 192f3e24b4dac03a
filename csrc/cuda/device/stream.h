// One CUDA device, the stream on which all of its work runs in order, and its memory.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace octavo::cuda {

// The device failed: the message names what was tried and the device's error.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws a DeviceError "WHAT on DEVICE: ERROR" unless the call went well.
void check(cudaError_t error, const char* what);

class Stream {
 public:
  explicit Stream(int device);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // Makes the device the calling thread's own.
  void attach_thread() const;
  // Waits for all that was queued. An error names the kernels that were queued last.
  void sync();

  cudaStream_t handle() const { return handle_; }
  const std::string& device_name() const { return name_; }
  int num_processors() const { return num_processors_; }              // "streaming multiprocessors"
  int compute_capability() const { return compute_capability_; }      // 80, 90, ...
  std::size_t max_shared_bytes() const { return max_shared_bytes_; }  // of one block
  bool can_overlap() const { return can_overlap_; }                   // kernels with the one before

  // For measuring: OCTAVO_CUDA_TILES_APART, a block for every tile of a product of 1 to 8 rows;
  // OCTAVO_CUDA_CARVEOUT, the part of the first-level cache that kernels which overlap want as
  // shared memory, in percent (-1: what the driver chooses for each).
  bool tiles_apart() const { return tiles_apart_; }
  int carveout() const { return carveout_; }

  void note_launch(const char* kernel) { launched_[num_launched_++ % launched_.size()] = kernel; }
  std::int64_t num_launched() const { return static_cast<std::int64_t>(num_launched_); }
  // Names of the latest eight, first to last.
  std::string launched_last() const;

 private:
  int device_;
  cudaStream_t handle_ = nullptr;
  std::string name_;
  int num_processors_ = 0, compute_capability_ = 0;
  std::size_t max_shared_bytes_ = 0;
  bool can_overlap_ = false, tiles_apart_ = false;
  // 164 KB of an H100: the smallest division with room for one block of every tile and two of every
  // other kernel. The rest caches what a processor's blocks read several times: x, norms' weights.
  int carveout_ = 71;
  std::array<const char*, 8> launched_{};  // the latest ones, in turn
  std::uint64_t num_launched_ = 0;
};

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
  std::int64_t growths() const { return growths_; }

 private:
  Stream& stream_;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  std::int64_t growths_ = 0;
};

}  // namespace octavo::cuda

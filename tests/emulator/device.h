// The state of the emulated device, behind the runtime's functions.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "grid.h"
#include "memory.h"
#include "streams.h"

struct CUstream_st : cuda_emulator::Stream {};
struct CUgraph_st {
  cuda_emulator::Graph operations;
};
struct CUgraphExec_st {
  cuda_emulator::Graph operations;
};
struct CUevent_st {
  cuda_emulator::Stream* stream = nullptr;
  std::uint64_t position = 0;
  std::chrono::steady_clock::time_point time;
};

namespace cuda_emulator {

constexpr std::size_t kTotalMemory = std::size_t{2} << 30;

// The device's whole state. One lock: the host's threads take turns.
struct Device {
  std::recursive_mutex mutex;
  std::map<const void*, GuardedBytes> memory;  // by address
  std::set<const void*> host_memory;
  std::size_t used = 0;
  std::set<Stream*> streams;
  CUstream_st default_stream;
  cudaError_t sticky = cudaSuccess;  // after a fault nothing works any more, as on a GPU
  cudaError_t last = cudaSuccess;
  std::string message;  // of the fault
};

using Lock = std::lock_guard<std::recursive_mutex>;

Device& device();

// Remembers the error for cudaGetLastError, and returns it.
cudaError_t note(cudaError_t error);

Stream& stream_of(cudaStream_t stream);
bool any_capture();
void run_all();

// Throw a KernelError where a copy's bytes do not lie where its kind says.
void check_on_device(const char* what, const void* address, std::size_t bytes);
void check_copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);

// Throws a KernelError where somebody wrote beside an allocation.
void check_guards(const char* kernel);

// Runs what may meet faulty kernels; a fault stays, with its text.
template <class Body>
cudaError_t guarded(Body&& body) {
  if (device().sticky != cudaSuccess) return note(device().sticky);
  try {
    body();
  } catch (const KernelError& error) {
    device().message = error.what();
    device().sticky = cudaErrorLaunchFailure;
    return note(device().sticky);
  }
  return cudaSuccess;
}

}  // namespace cuda_emulator

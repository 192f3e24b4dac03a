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
  std::string message;         // of the fault
  std::string launch_message;  // of the latest launch that was refused
};

using Lock = std::lock_guard<std::recursive_mutex>;

Device& device();

// Remembers the error for cudaGetLastError, and returns it.
cudaError_t note(cudaError_t error);

Stream& stream_of(cudaStream_t stream);
// Whether a stream is being captured, which whoever asks would have to wait for: so the capture is
// spoilt.
bool spoils_a_capture();
void run_all();

// Throw a KernelError where a copy's bytes do not lie where its kind says.
void check_on_device(const char* what, const void* address, std::size_t bytes);
void check_copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);

// Runs a kernel and looks for what it should not have done: writes outside of device memory and,
// with options().twice, results that hang on luck. Throws a KernelError.
// started: the kernel, if it has started early.
void run_checked(const Launch& launch, const std::function<void()>& kernel, StartedGrid* started);

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

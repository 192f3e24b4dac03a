// The CUDA runtime's functions, as far as octavo calls them, for a device that is not there:
// devices, errors and memory.
//
// Linked in place of cudart: the declarations are NVIDIA's own (cuda_runtime_api.h).

#include <cuda_runtime.h>

#include <cstring>
#include <utility>

#include "device.h"

using cuda_emulator::check_copy;
using cuda_emulator::check_on_device;
using cuda_emulator::device;
using cuda_emulator::guarded;
using cuda_emulator::GuardedBytes;
using cuda_emulator::Lock;
using cuda_emulator::note;
using cuda_emulator::options;
using cuda_emulator::run_all;
using cuda_emulator::spoils_a_capture;
using cuda_emulator::Stream;
using cuda_emulator::stream_of;

// ---- devices ----

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) {
  return note(index == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  if (index != 0) return note(cudaErrorInvalidDevice);
  *properties = cudaDeviceProp{};
  std::strcpy(properties->name, "CUDA emulator");
  properties->totalGlobalMem = options().memory_bytes;
  properties->major = 9;
  properties->multiProcessorCount = 4;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return note(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(options().max_shared_bytes);
      return cudaSuccess;
    default:
      return note(cudaErrorInvalidValue);
  }
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const Lock lock(device().mutex);
  if (spoils_a_capture()) return note(cudaErrorStreamCaptureUnsupported);
  return guarded(run_all);
}

cudaError_t cudaDeviceReset() {
  const Lock lock(device().mutex);
  device().sticky = device().last = cudaSuccess;
  device().default_stream.clear();
  for (Stream* stream : device().streams) stream->clear();
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// ---- errors ----

cudaError_t cudaGetLastError() {
  const Lock lock(device().mutex);
  return std::exchange(device().last, device().sticky);
}

cudaError_t cudaPeekAtLastError() {
  const Lock lock(device().mutex);
  return device().last;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    default:
      return "cudaError";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  const Lock lock(device().mutex);
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorLaunchFailure:
      return device().message.c_str();
    case cudaErrorInvalidConfiguration:
      return device().launch_message.c_str();
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "unknown error";
  }
}

// ---- memory ----

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  const Lock lock(device().mutex);
  if (spoils_a_capture()) return note(cudaErrorStreamCaptureUnsupported);
  if (device().used + bytes > options().memory_bytes) return note(cudaErrorMemoryAllocation);
  GuardedBytes memory(bytes);
  *pointer = memory.data();
  device().used += bytes;
  device().memory.emplace(*pointer, std::move(memory));
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  const Lock lock(device().mutex);
  if (!pointer) return cudaSuccess;
  const cudaError_t error = guarded(run_all);  // a GPU waits, too
  const auto found = device().memory.find(pointer);
  if (found == device().memory.end()) return note(cudaErrorInvalidValue);
  device().used -= found->second.bytes();
  device().memory.erase(found);
  return error;
}

cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  const Lock lock(device().mutex);
  *pointer = std::malloc(bytes ? bytes : 1);
  if (!*pointer) return note(cudaErrorMemoryAllocation);
  std::memset(*pointer, options().poison, bytes);
  device().host_memory.insert(*pointer);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  const Lock lock(device().mutex);
  if (pointer && !device().host_memory.erase(pointer)) return note(cudaErrorInvalidValue);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  const Lock lock(device().mutex);
  *free = options().memory_bytes - device().used;
  *total = options().memory_bytes;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const Lock lock(device().mutex);
  return guarded([&] {
    check_copy(to, from, bytes, kind);
    stream_of(stream).push([=] {
      if (bytes) std::memcpy(to, from, bytes);
    });
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  const Lock lock(device().mutex);
  if (spoils_a_capture()) return note(cudaErrorStreamCaptureUnsupported);
  return guarded([&] {
    check_copy(to, from, bytes, kind);
    run_all();
    if (bytes) std::memcpy(to, from, bytes);
  });
}

cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t stream) {
  const Lock lock(device().mutex);
  return guarded([&] {
    check_on_device("memset", pointer, bytes);
    stream_of(stream).push([=] {
      if (bytes) std::memset(pointer, value, bytes);
    });
  });
}

cudaError_t cudaMemset(void* pointer, int value, std::size_t bytes) {
  const Lock lock(device().mutex);
  if (spoils_a_capture()) return note(cudaErrorStreamCaptureUnsupported);
  return guarded([&] {
    check_on_device("memset", pointer, bytes);
    run_all();
    if (bytes) std::memset(pointer, value, bytes);
  });
}

// What a kernel's source includes to be compiled by nvcc and for the emulator alike, without
// octavo. octavo's own kernels go through csrc/cuda/device/primitives.cuh instead.
//
// Under nvcc it adds two things to CUDA: shared_memory_as<T>() for the block's dynamic shared
// memory, and LAUNCH(kernel, grid, block, shared_bytes, stream)(arguments...). For the emulator
// (CUDA_EMULATOR defined) it adds what CUDA has and C++ has not (kernel.h).
#pragma once

#include <cuda_runtime.h>

#ifndef CUDA_EMULATOR

template <class T>
__device__ T* shared_memory_as() {
  extern __shared__ __align__(16) unsigned char emulator_portable_bytes[];
  return reinterpret_cast<T*>(emulator_portable_bytes);
}

#define LAUNCH(kernel, grid, block, shared_bytes, stream) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>

#else

#include "kernel.h"
#include "launch.h"

template <class T>
T* shared_memory_as() {
  return static_cast<T*>(cuda_emulator::shared_memory());
}

namespace cuda_emulator {

template <class... Parameters>
auto launcher(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              std::size_t shared_bytes, cudaStream_t stream) {
  return [=](auto... arguments) {
    return enqueue({name, grid, block, shared_bytes}, stream,
                   [=] { kernel(static_cast<Parameters>(arguments)...); });
  };
}

}  // namespace cuda_emulator

#define LAUNCH(kernel, grid, block, shared_bytes, stream) \
  cuda_emulator::launcher(#kernel, kernel, (grid), (block), (shared_bytes), (stream))

#endif

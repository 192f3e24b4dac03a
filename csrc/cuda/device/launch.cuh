// The one way a kernel is launched: on the GPU, or into the emulator's stream.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/text.h"
#include "cuda/device/numbers.cuh"
#include "cuda/device/stream.h"

#ifdef OCTAVO_EMULATED
#include "launch.h"
#endif

namespace octavo::cuda {

// Sizes of a grid or a block.
template <class... Counts>
dim3 dims(Counts... counts) {
  return dim3(static_cast<unsigned>(counts)...);
}

inline bool is_aligned(const void* address, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

// Calls body(a number of the type that dtype stands for).
template <class Body>
void for_type(const char* op, DType dtype, Body&& body) {
  if (dtype == DType::f32)
    body(float{});
  else if (dtype == DType::bf16)
    body(Bf16{});
  else if (dtype == DType::f16)
    body(F16{});
  else
    require(false, op, " takes f32, bf16 or f16 numbers; got ", name(dtype));
}
// The same of bf16 or f16.
template <class Body>
void for_16_bits(DType dtype, Body&& body) {
  dtype == DType::bf16 ? body(Bf16{}) : body(F16{});
}

struct LaunchShape {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  // The kernel calls wait_for_previous_kernel() before it reads what earlier kernels wrote, and
  // may therefore be started before the last of them has ended (sm_90; elsewhere it is not).
  bool overlaps = false;
};

// Queues kernel(arguments...). Throws DeviceError naming kernel, shape and device.
template <class... Parameters, class... Arguments>
void launch(Stream& stream, const char* name, const LaunchShape& shape,
            void (*kernel)(Parameters...), Arguments... arguments) {
#ifdef OCTAVO_EMULATED
  const cudaError_t error = cuda_emulator::enqueue(
      {name, shape.grid, shape.block, shape.shared_bytes, shape.overlaps}, stream.handle(),
      [=] { kernel(static_cast<Parameters>(arguments)...); });
#else
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
  };
  if (shape.shared_bytes > kWithoutAsking)
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
  // Where two kernels divide the first-level cache differently, the second may have to wait until
  // the first has left a processor (CUDA's page on cudaFuncSetCacheConfig), and nothing overlaps.
  const bool overlaps = shape.overlaps && stream.can_overlap();
  if (overlaps) set(cudaFuncAttributePreferredSharedMemoryCarveout, stream.carveout());
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream.handle();
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  if (error == cudaSuccess)
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
  if (error != cudaSuccess) {
    throw DeviceError(text("kernel ", name, ", grid ", shape.grid.x, " x ", shape.grid.y, " x ",
                           shape.grid.z, ", ", shape.block.x * shape.block.y * shape.block.z,
                           " threads, ", shape.shared_bytes, " bytes of shared memory, on ",
                           stream.device_name(), ": ", cudaGetErrorString(error)));
  }
  stream.note_launch(name);
}

}  // namespace octavo::cuda

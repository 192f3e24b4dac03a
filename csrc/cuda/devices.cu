#include <cuda_runtime.h>

#include "cuda/devices.h"

namespace octavo::cuda {

bool is_built() { return true; }

int num_devices() {
  int count = 0;
  // No driver is an answer like any other: there are no devices.
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace octavo::cuda

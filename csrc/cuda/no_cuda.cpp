// Stands in for the CUDA files in builds without CUDA, so that nothing else has to know.

#include "cuda/devices.h"

namespace octavo::cuda {

bool is_built() { return false; }

int num_devices() { return 0; }

}  // namespace octavo::cuda

// How many CUDA devices this machine has: 0 without a driver, and in builds without CUDA.
#pragma once

namespace octavo::cuda {

bool is_built();
int num_devices();

}  // namespace octavo::cuda

// What CUDA C++ has and C++ has not, for kernels that the host's compiler translates.
//
// Included by cuda/device/primitives.cuh when OCTAVO_EMULATED is defined. Shared memory is dynamic
// only (shared_memory()): a `__shared__` variable would be one for all blocks and never poisoned.
#pragma once

#include "grid.h"

#undef __shared__
#define __shared__ static_assert(false, "emulated kernels take their shared memory at the launch")
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __restrict__
#define __restrict__ __restrict

#define threadIdx (::cuda_emulator::current.thread)
#define blockIdx (::cuda_emulator::current.block)
#define blockDim (::cuda_emulator::current.block_size)
#define gridDim (::cuda_emulator::current.grid_size)
#define __syncthreads() ::cuda_emulator::sync_block(__FILE__, __LINE__)

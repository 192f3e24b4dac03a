// How a kernel gets into an emulated stream: what cuda/device/launch.cuh calls in place of <<< >>>.
#pragma once

#include <functional>

#include "grid.h"

namespace cuda_emulator {

// Queues kernel() for every thread of the grid. Faults show when somebody waits, as on a GPU.
cudaError_t enqueue(const Launch& launch, cudaStream_t stream, const std::function<void()>& kernel);

}  // namespace cuda_emulator

// The kernels behind `linear`, each behind a function of the host. linear.cu chooses among them.
#pragma once

#include "core/view.h"
#include "cuda/stream.h"
#include "cuda/weights.cuh"

namespace octavo::cuda {

// Any types, any widths, any strides; slow. (multiply_any.cu)
void multiply_any(Stream& stream, View out, View x, const Matrix& weight);

}  // namespace octavo::cuda

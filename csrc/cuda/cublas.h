// cuBLASLt, opened at run time: octavo is built without it and runs without it.
#pragma once

#include <memory>

#include "core/view.h"
#include "cuda/stream.h"

namespace octavo::cuda {

class Workspace;

class CublasLt {
 public:
  // Null where the library is not to be found, or is older than CUDA 12.
  static std::unique_ptr<CublasLt> open(Stream& stream);
  virtual ~CublasLt() = default;

  // out (rows, outputs) = x (rows, inputs) times weight (outputs, inputs) transposed, plus bias
  // (float32, may be null). x and weight are bf16 or f16, out the same or float32. Sums are
  // float32.
  virtual void multiply(Stream& stream, View out, View x, const void* weight, const float* bias,
                        Workspace& workspace) = 0;
};

}  // namespace octavo::cuda

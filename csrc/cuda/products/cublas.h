// cuBLASLt, opened at run time: octavo is built without it and runs without it.
#pragma once

#include <cstddef>
#include <memory>

#include "core/view.h"
#include "cuda/device/stream.h"

namespace octavo::cuda {

// What a product may work with besides its operands; what NVIDIA advises for sm_90.
constexpr std::size_t kCublasBytes = std::size_t{32} << 20;

class CublasLt {
 public:
  // Null where the library is not found, or is older than CUDA 12.
  static std::unique_ptr<CublasLt> open(Stream& stream);
  // "13.0.2" of the library that `open` would open; empty where there is none.
  static std::string version();
  virtual ~CublasLt() = default;

  // out (rows, outputs) = x (rows, inputs) times weight transposed, whose outputs lie weight_stride
  // numbers apart. x and weight are bf16 or f16, out the same or float32. Sums are float32.
  // workspace: kCublasBytes, aligned to 256. False, and nothing queued, where the library has no
  // algorithm for the shape or refuses it.
  virtual bool multiply(Stream& stream, View out, View x, const void* weight,
                        std::int64_t weight_stride, void* workspace) = 0;
};

}  // namespace octavo::cuda

#include "cuda/devices.h"

#include <cuda_runtime.h>

#include "cuda/backend.h"
#include "cuda/device/collectives.h"
#include "cuda/products/cublas.h"

namespace octavo::cuda {

#ifdef OCTAVO_EMULATED

// Its symbols stay inside their library, but for this one.
__attribute__((visibility("default"))) std::unique_ptr<Backend> make_emulated_backend(
    const BackendOptions& options) {
  return std::make_unique<CudaBackend>(options);
}

#else

namespace {

std::string version(int number) { return text(number / 1000, ".", number % 1000 / 10); }

}  // namespace

bool is_built() { return true; }

int num_devices() {
  int count = 0;
  // No driver is an answer like any other: there are no devices.
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

DeviceInfo device_info() {
  if (num_devices() == 0) return {};
  int driver = 0;
  cudaDriverGetVersion(&driver);
  const std::string library = CublasLt::version(), collectives = Collectives::version();
  return {Stream(0).device_name(), version(CUDART_VERSION), version(driver),
          library.empty() ? "octavo's own: cuBLASLt was not found" : "cuBLASLt " + library,
          collectives.empty() ? "none: NCCL was not found" : "NCCL " + collectives};
}

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice || count == 0) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    cudaGetLastError();
    const std::string found =
        driver == 0 ? "no NVIDIA driver was found"
        : error == cudaErrorInsufficientDriver
            ? text("the driver knows CUDA ", version(driver),
                   " and this octavo was built with CUDA ", version(CUDART_VERSION))
            : std::string("the driver shows no GPU to this process");
    throw std::invalid_argument(
        text("device is \"cuda\", but ", found,
             ": check nvidia-smi, ask the cluster for a GPU, or look at CUDA_VISIBLE_DEVICES; "
             "device \"cpu\" works without"));
  }
  check(error, "counting CUDA devices");
  return std::make_unique<CudaBackend>(options);
}

#endif

}  // namespace octavo::cuda

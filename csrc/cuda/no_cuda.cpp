// Stands in for the CUDA files in builds without CUDA, so that nothing else has to know.

#include "cuda/devices.h"

namespace octavo::cuda {

bool is_built() { return false; }

int num_devices() { return 0; }

DeviceInfo device_info() { return {}; }

std::unique_ptr<Backend> make_backend(const BackendOptions&) {
  throw std::invalid_argument(
      "device is \"cuda\", but this octavo was built without CUDA: install the CUDA toolkit (nvcc, "
      "12.4 or newer) and build it again with `pip install . -C cmake.define.OCTAVO_CUDA=ON`, or "
      "use device \"cpu\"");
}

}  // namespace octavo::cuda

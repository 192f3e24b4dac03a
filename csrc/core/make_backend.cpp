// From a device's name to its backend: the only place that knows which backends were built.

#include <algorithm>

#include "core/backend.h"
#include "cuda/devices.h"

namespace octavo {

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options);

std::vector<std::string> available_devices() {
  std::vector<std::string> devices{"cpu"};
  if (cuda::num_devices() > 0) devices.push_back("cuda");
  return devices;
}

std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options) {
  require(options.num_threads >= 0 && options.num_threads <= 1024, "num_threads is ",
          options.num_threads, "; expected 0 (all cores) to 1024");
  // Where there is no GPU, cuda::make_backend says why.
  const int count = device == "cuda" ? std::max(cuda::num_devices(), 1) : 1;
  require(0 <= options.device_index && options.device_index < count, "device_index is ",
          options.device_index, "; expected 0 to ", count - 1, ", the \"", device,
          "\" devices of this machine");
  if (device == "cpu") return make_cpu_backend(options);
  if (device == "cuda") return cuda::make_backend(options);
#ifdef OCTAVO_EMULATE_CUDA
  if (device == "cuda_emulated") return cuda::make_emulated_backend(options);
#endif
  throw std::invalid_argument(text("device is \"", device, "\"; expected cpu or cuda"));
}

}  // namespace octavo

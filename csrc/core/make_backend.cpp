// From a device's name to its backend: the one place that knows which were built.

#include "core/backend.h"

namespace octavo {

std::unique_ptr<Backend> make_cpu_backend(int num_threads, const std::string& isa);

std::vector<std::string> available_devices() { return {"cpu"}; }

std::unique_ptr<Backend> make_backend(const std::string& device, int num_threads,
                                      const std::string& isa) {
  require(num_threads >= 0 && num_threads <= 1024, "num_threads is ", num_threads,
          "; expected 0 (all cores) to 1024");
  if (device == "cpu") return make_cpu_backend(num_threads, isa);
  throw std::invalid_argument(
      text("device is \"", device, "\"; this version of octavo runs on: cpu"));
}

}  // namespace octavo

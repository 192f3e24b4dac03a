// The CUDA devices of this machine, as far as the rest of octavo knows of them.
#pragma once

#include <memory>
#include <string>

#include "core/backend.h"

namespace octavo::cuda {

bool is_built();

// How many there are: 0 without a driver, and in builds without CUDA.
int num_devices();

// What figures are told with: of the device that a backend takes, empty where there is none.
struct DeviceInfo {
  std::string name;  // "NVIDIA H200"
  std::string runtime,
      driver;               // versions of CUDA: what octavo was built with, what the driver knows
  std::string products;     // whose kernels multiply many rows: "cuBLASLt 13.0.2", or octavo's
  std::string collectives;  // what adds up the results of several GPUs: "NCCL 2.28.3", or none
};
DeviceInfo device_info();

// Throws std::invalid_argument that says what is missing and what to do: octavo built without CUDA,
// no driver, no device, or one that is too old.
std::unique_ptr<Backend> make_backend(const BackendOptions& options);

// The same code on the emulator (docs/emulator.md); in builds for tests alone.
std::unique_ptr<Backend> make_emulated_backend(const BackendOptions& options);

}  // namespace octavo::cuda

// The options, first of all as the environment gives them, and launches that keep to them.

#include <cstdlib>

#include "grid.h"

namespace cuda_emulator {

namespace {

std::uint64_t number_from(const char* variable, std::uint64_t otherwise, std::uint64_t most) {
  const char* given = std::getenv(variable);
  if (!given || !*given) return otherwise;
  char* end = nullptr;
  const std::uint64_t value = std::strtoull(given, &end, 0);
  if (*end || value > most)
    throw KernelError(text_of(variable, " is \"", given, "\"; expected a number from 0 to ", most));
  return value;
}

Options from_environment() {
  Options options;
  options.seed = number_from("CUDA_EMULATOR_SEED", options.seed, ~std::uint64_t{0});
  options.poison =
      static_cast<unsigned char>(number_from("CUDA_EMULATOR_POISON", options.poison, 255));
  options.twice = number_from("CUDA_EMULATOR_TWICE", options.twice, 1) != 0;
  options.early_starts =
      static_cast<unsigned>(number_from("CUDA_EMULATOR_EARLY_STARTS", options.early_starts, 100));
  constexpr const char* kTensorCores = "CUDA_EMULATOR_TENSOR_CORES";
  options.tensor_cores = static_cast<unsigned>(number_from(kTensorCores, 0, 90));
  if (options.tensor_cores && options.tensor_cores != 80 && options.tensor_cores != 90)
    throw KernelError(
        text_of(kTensorCores, " is ", options.tensor_cores, "; expected 0, 80 or 90"));
  options.max_shared_bytes = 1024 * number_from("CUDA_EMULATOR_SHARED_KIB", 163, 227);
  options.memory_bytes = 1024 * number_from("CUDA_EMULATOR_MEMORY_KIB", 2 << 20, 1 << 30);
  return options;
}

}  // namespace

Options& options() {
  static Options instance = from_environment();
  return instance;
}

void check_launch(const Launch& launch) {
  const auto refuse = [&](const std::string& why) {
    throw KernelError(text_of("kernel ", launch.name, " cannot be launched: ", why));
  };
  const std::size_t threads = std::size_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads < 1 || threads > options().max_threads)
    refuse(text_of(threads, " threads a block; expected 1 to ", options().max_threads));
  if (launch.shared_bytes > options().max_shared_bytes)
    refuse(text_of(launch.shared_bytes, " bytes of shared memory; a block can have ",
                   options().max_shared_bytes));
  if (!launch.grid.x || !launch.grid.y || !launch.grid.z || launch.grid.y > 65535 ||
      launch.grid.z > 65535 || launch.grid.x > 0x7fffffffu)
    refuse(text_of("a grid of ", launch.grid.x, " x ", launch.grid.y, " x ", launch.grid.z,
                   " blocks; expected 1 to 2^31 - 1, 65535 and 65535"));
}

}  // namespace cuda_emulator

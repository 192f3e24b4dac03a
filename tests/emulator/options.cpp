// The options, first of all as the environment gives them.

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
    throw KernelError(std::string(variable) + " is \"" + given +
                      "\"; expected a number from 0 to " + std::to_string(most));
  return value;
}

Options from_environment() {
  Options options;
  options.seed = number_from("CUDA_EMULATOR_SEED", options.seed, ~std::uint64_t{0});
  options.poison =
      static_cast<unsigned char>(number_from("CUDA_EMULATOR_POISON", options.poison, 255));
  options.twice = number_from("CUDA_EMULATOR_TWICE", options.twice, 1) != 0;
  return options;
}

}  // namespace

Options& options() {
  static Options instance = from_environment();
  return instance;
}

}  // namespace cuda_emulator

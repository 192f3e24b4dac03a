// Runs the native tests: octavo_tests [PART OF A NAME]. The exit code is 1 when one fails.

#include <cstdio>
#include <exception>

#include "check.h"
#include "cpu/kernels.h"

int main(int argc, char** argv) {
  using namespace octavo::tests;
  const std::string part = argc > 1 ? argv[1] : "";
  int passed = 0, failed = 0;
  std::printf("instruction sets tested:");
  for (const std::string& isa : octavo::cpu::available_isas()) std::printf(" %s", isa.c_str());
  std::printf(" (compiled in:");
  for (const std::string& isa : octavo::cpu::compiled_isas()) std::printf(" %s", isa.c_str());
  std::printf(")\n");
  for (const auto& tests :
       {core_tests(), op_tests(), quantized_tests(), tile_tests(), attention_tests(),
        cuda_attention_tests(), sampling_tests(), runtime_tests(), runtime_error_tests()}) {
    for (const Test& test : tests) {
      if (test.name.find(part) == std::string::npos) continue;
      try {
        test.run();
        ++passed;
        std::printf("ok      %s\n", test.name.c_str());
      } catch (const std::exception& error) {
        ++failed;
        std::printf("FAILED  %s: %s\n", test.name.c_str(), error.what());
      }
      std::fflush(stdout);
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || !passed;
}

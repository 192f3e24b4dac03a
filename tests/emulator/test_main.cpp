// Runs the emulator's own tests: emulator_tests [PART OF A NAME]. The exit code is 1 when one
// fails.

#include <cstdio>
#include <exception>

#include "emulated.h"

int main(int argc, char** argv) {
  using namespace octavo::tests;
  const std::string part = argc > 1 ? argv[1] : "";
  int passed = 0, failed = 0;
  for (const auto& tests : {fault_tests(), memory_fault_tests(), product_tests(), stream_tests(),
                            intrinsic_tests(), sampling_math_tests()}) {
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

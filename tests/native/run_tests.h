// Runs tests by name: the body of a test program's main.
#pragma once

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "check.h"

namespace octavo::tests {

// Those whose names hold the first argument, if there is one. The exit code is 1 when one fails.
inline int run_tests(int argc, char** argv, const std::vector<std::vector<Test>>& parts) {
  const std::string part = argc > 1 ? argv[1] : "";
  int passed = 0, failed = 0;
  for (const auto& tests : parts) {
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

}  // namespace octavo::tests

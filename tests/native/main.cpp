// Runs the native tests: octavo_tests [PART OF A NAME]. The exit code is 1 when one fails.

#include <cstdio>

#include "check.h"
#include "cpu/kernels.h"
#include "run_tests.h"

int main(int argc, char** argv) {
  using namespace octavo::tests;
  std::printf("instruction sets tested:");
  for (const std::string& isa : octavo::cpu::available_isas()) std::printf(" %s", isa.c_str());
  std::printf(" (compiled in:");
  for (const std::string& isa : octavo::cpu::compiled_isas()) std::printf(" %s", isa.c_str());
  std::printf(")\n");
  return run_tests(argc, argv,
                   {core_tests(), op_tests(), quantized_tests(), tile_tests(), attention_tests(),
                    cuda_attention_tests(), sampling_tests(), rank_tests(), runtime_tests(),
                    runtime_error_tests()});
}

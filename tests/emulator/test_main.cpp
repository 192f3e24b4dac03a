// Runs the emulator's own tests: emulator_tests [PART OF A NAME]. The exit code is 1 when one
// fails.

#include "emulated.h"
#include "native/run_tests.h"

int main(int argc, char** argv) {
  using namespace octavo::tests;
  return run_tests(argc, argv,
                   {fault_tests(), memory_fault_tests(), product_tests(), stream_tests(),
                    intrinsic_tests(), sampling_math_tests()});
}

#include "tensor_cores.h"

#include <cstring>

#include "sanitizer.h"

// Kernels spend a quarter of their time here, so it is compiled for wide vectors, too; the
// processor that runs it chooses. (Nothing is fused: the bits are the same.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(EMULATOR_ASAN)
#define EMULATOR_ANY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EMULATOR_ANY_WIDTH
#endif

namespace cuda_emulator {

EMULATOR_ANY_WIDTH
void multiply(double (&sums)[16][8], const double (&a)[16][16], const double (&b)[16][8]) {
  using Row = double __attribute__((vector_size(8 * sizeof(double))));
  Row rows[16];
  std::memcpy(rows, b, sizeof(b));
  for (unsigned m = 0; m < 16; ++m) {
    Row sum = {};
    for (unsigned k = 0; k < 16; ++k) sum += a[m][k] * rows[k];
    std::memcpy(sums[m], &sum, sizeof(sum));
  }
}

}  // namespace cuda_emulator

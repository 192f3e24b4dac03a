// The matrix products of a warp (tensor cores): PTX, section 9.7.14 (mma).
#pragma once

#include "cuda/device/primitives.cuh"

#ifdef OCTAVO_EMULATED
#include "tensor_cores.h"
#endif

namespace octavo::cuda {

// mma.m16n8k16: d (16 x 8, float32) += a (16 x 16) times b (16 x 8), both of T = Bf16 or F16.
// With g = lane / 4 and p = 2 (lane % 4):
//   a[0] = (g, p..p+1), a[1] = (g + 8, p..), a[2] = (g, p + 8..), a[3] = (g + 8, p + 8..)
//   b[0] = (p..p+1, g), b[1] = (p + 8..p + 9, g)
//   d[0..1] = (g, p..p+1), d[2..3] = (g + 8, p..p+1)
template <class T>
OCTAVO_DEVICE void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::multiply_accumulate<T>(d, a, b);
#else
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace octavo::cuda

// The matrix products of a warp (tensor cores), with both bodies as in primitives.cuh.
//
// PTX: "Parallel Thread Execution ISA", section 9.7.14 (mma, ldmatrix).
#pragma once

#include "cuda/device/primitives.cuh"

namespace octavo::cuda {

#ifdef OCTAVO_EMULATED
namespace emulated {
struct MatrixLane {
  const void* row;
  std::uint32_t* to;
  bool transposed;
};
inline void load_matrices(void* const* lanes) {
  std::uint16_t matrix[4][8][8];
  for (unsigned i = 0; i < kWarp; ++i)
    memcpy(matrix[i / 8][i % 8], static_cast<MatrixLane*>(lanes[i])->row, 16);
  for (unsigned i = 0; i < kWarp; ++i) {
    const auto& lane = *static_cast<MatrixLane*>(lanes[i]);
    for (unsigned m = 0; m < 4; ++m) {
      const unsigned row = i / 4, col = 2 * (i % 4);
      const std::uint16_t low = lane.transposed ? matrix[m][col][row] : matrix[m][row][col];
      const std::uint16_t high =
          lane.transposed ? matrix[m][col + 1][row] : matrix[m][row][col + 1];
      lane.to[m] = low | static_cast<std::uint32_t>(high) << 16;
    }
  }
}

template <class T>
struct ProductLane {
  float* d;
  const std::uint32_t *a, *b;
};
template <class T>
inline void multiply(void* const* lanes) {
  float a[16][16], b[16][8];  // (m, k), (k, n)
  for (unsigned i = 0; i < kWarp; ++i) {
    const auto& lane = *static_cast<ProductLane<T>*>(lanes[i]);
    const unsigned group = i / 4, pair = 2 * (i % 4);
    for (unsigned r = 0; r < 4; ++r) {
      const float2 two = unpack2<T>(lane.a[r]);
      float* to = &a[group + 8 * (r % 2)][pair + 8 * (r / 2)];
      to[0] = two.x;
      to[1] = two.y;
    }
    for (unsigned r = 0; r < 2; ++r) {
      const float2 two = unpack2<T>(lane.b[r]);
      b[pair + 8 * r][group] = two.x;
      b[pair + 8 * r + 1][group] = two.y;
    }
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    const auto& lane = *static_cast<ProductLane<T>*>(lanes[i]);
    for (unsigned r = 0; r < 4; ++r) {
      const unsigned m = i / 4 + 8 * (r / 2), n = 2 * (i % 4) + r % 2;
      double sum = 0.0;  // a tensor core rounds once, at the end
      for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(a[m][k]) * b[k][n];
      lane.d[r] = static_cast<float>(sum + lane.d[r]);
    }
  }
}
}  // namespace emulated
#endif

// ldmatrix: four 8 x 8 matrices of 16-bit numbers from shared memory. Lane i hands in the address
// of row i % 8 of matrix i / 8; lane i receives numbers 2 (i % 4) and + 1 of row i / 4 of each.
// transposed: of column i / 4, that is numbers 2 (i % 4) and + 1 down that column.
OCTAVO_DEVICE void load_matrices(std::uint32_t (&to)[4], const void* row, bool transposed = false) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_shared(row, 16, "ldmatrix");
  cuda_emulator::check_aligned(row, 16, "ldmatrix");
  emulated::MatrixLane mine{row, to, transposed};
  cuda_emulator::warp_collective(kAllLanes, transposed ? "ldmatrix.trans" : "ldmatrix", &mine,
                                 emulated::load_matrices);
#else
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

// mma.m16n8k16: d (16 x 8, float32) += a (16 x 16) times b (16 x 8), both of T = Bf16 or F16.
// With g = lane / 4 and p = 2 (lane % 4):
//   a[0] = (g, p..p+1), a[1] = (g + 8, p..), a[2] = (g, p + 8..), a[3] = (g + 8, p + 8..)
//   b[0] = (p..p+1, g), b[1] = (p + 8..p + 9, g)
//   d[0..1] = (g, p..p+1), d[2..3] = (g + 8, p..p+1)
template <class T>
OCTAVO_DEVICE void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
#ifdef OCTAVO_EMULATED
  emulated::ProductLane<T> mine{d, a, b};
  cuda_emulator::warp_collective(kAllLanes, "mma.m16n8k16", &mine, emulated::multiply<T>);
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

// What the instructions of tensor cores do, by all lanes of a warp together. PTX: "Parallel Thread
// Execution ISA", section 9.7.14.
#pragma once

#include <cstdint>
#include <cstring>

#include "grid.h"

namespace cuda_emulator {

// ldmatrix: four 8 x 8 matrices of 16-bit numbers from shared memory. Lane i hands in the address
// of row i % 8 of matrix i / 8; lane i receives numbers 2 (i % 4) and + 1 of row i / 4 of each.
// transposed: of column i / 4, that is numbers 2 (i % 4) and + 1 down that column.
inline void load_matrices(std::uint32_t (&to)[4], const void* row, bool transposed = false) {
  struct Lane {
    const void* row;
    std::uint32_t* to;
    bool transposed;
  } mine{row, to, transposed};
  check_shared(row, 16, "ldmatrix");
  check_aligned(row, 16, "ldmatrix");
  const char* what = transposed ? "ldmatrix.trans" : "ldmatrix";
  warp_collective(0xffffffffu, what, &mine, [](void* const* lanes) {
    std::uint16_t matrix[4][8][8];
    for (unsigned i = 0; i < 32; ++i)
      std::memcpy(matrix[i / 8][i % 8], static_cast<Lane*>(lanes[i])->row, 16);
    for (unsigned i = 0; i < 32; ++i) {
      const auto& lane = *static_cast<Lane*>(lanes[i]);
      const unsigned row = i / 4, col = 2 * (i % 4);
      for (unsigned m = 0; m < 4; ++m) {
        const auto& from = matrix[m];
        const std::uint16_t low = lane.transposed ? from[col][row] : from[row][col];
        const std::uint16_t high = lane.transposed ? from[col + 1][row] : from[row][col + 1];
        lane.to[m] = low | static_cast<std::uint32_t>(high) << 16;
      }
    }
  });
}

// mma.m16n8k16: d (16 x 8, float32) += a (16 x 16) times b (16 x 8), both of T, which has 16 bits.
// With g = lane / 4 and p = 2 (lane % 4), (m, k) of a, (k, n) of b and (m, n) of d:
//   a[0] = (g, p..p+1), a[1] = (g + 8, p..), a[2] = (g, p + 8..), a[3] = (g + 8, p + 8..)
//   b[0] = (p..p+1, g), b[1] = (p + 8..p + 9, g)
//   d[0..1] = (g, p..p+1), d[2..3] = (g + 8, p..p+1)
template <class T>
void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  struct Lane {
    float* d;
    const std::uint32_t *a, *b;
  } mine{d, a, b};
  warp_collective(0xffffffffu, "mma.m16n8k16", &mine, [](void* const* lanes) {
    float a[16][16], b[16][8];
    const auto number = [](std::uint32_t pair, unsigned i) {
      T numbers[2];
      std::memcpy(static_cast<void*>(numbers), &pair, sizeof(pair));
      return static_cast<float>(numbers[i]);
    };
    for (unsigned i = 0; i < 32; ++i) {
      const auto& lane = *static_cast<Lane*>(lanes[i]);
      const unsigned group = i / 4, pair = 2 * (i % 4);
      for (unsigned e = 0; e < 2; ++e) {
        for (unsigned r = 0; r < 4; ++r)
          a[group + 8 * (r % 2)][pair + 8 * (r / 2) + e] = number(lane.a[r], e);
        for (unsigned r = 0; r < 2; ++r) b[pair + 8 * r + e][group] = number(lane.b[r], e);
      }
    }
    for (unsigned i = 0; i < 32; ++i) {
      const auto& lane = *static_cast<Lane*>(lanes[i]);
      for (unsigned r = 0; r < 4; ++r) {
        const unsigned m = i / 4 + 8 * (r / 2), n = 2 * (i % 4) + r % 2;
        double sum = 0.0;  // a tensor core rounds once, at the end
        for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(a[m][k]) * b[k][n];
        lane.d[r] = static_cast<float>(sum + lane.d[r]);
      }
    }
  });
}

}  // namespace cuda_emulator

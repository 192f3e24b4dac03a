// What the instructions of tensor cores do, by all lanes of a warp together. PTX: "Parallel Thread
// Execution ISA", section 9.7.14.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_fp16.h>

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

// c + the sum of 16 products as the tensor cores of a compute capability, 80 or 90, round it.
//
// From Khattak and Mikaitis 2025, "Accurate models of NVIDIA tensor cores" (arXiv 2512.07004), who
// compare such models with an A100 and an H100 bit by bit: c and a group of 8 (80) or 16 (90) exact
// products are cut off, toward zero, 24 or 25 bits below the largest exponent among them (of a
// product, the sum of its factors' exponents; at least -132 or -133), added, and the sum is cut off
// to a float.
inline float add_products(const double (&a)[16], const double (&b)[16], float c,
                          unsigned tensor_cores) {
  const unsigned group = tensor_cores == 80 ? 8 : 16;
  const int bits = tensor_cores == 80 ? 24 : 25;
  for (unsigned first = 0; first < 16; first += group) {
    int most = tensor_cores == 80 ? -132 : -133;
    if (c != 0.0f) most = std::max(most, std::ilogb(c));
    double sum = c;
    for (unsigned k = first; k < first + group; ++k) {
      sum += a[k] * b[k];
      if (a[k] != 0.0 && b[k] != 0.0) most = std::max(most, std::ilogb(a[k]) + std::ilogb(b[k]));
    }
    if (!std::isfinite(sum)) return static_cast<float>(sum);
    const double finest = std::ldexp(1.0, most - bits);
    sum = std::trunc(c / finest);
    for (unsigned k = first; k < first + group; ++k) sum += std::trunc(a[k] * b[k] / finest);
    sum *= finest;
    c = static_cast<float>(sum);
    if (std::abs(static_cast<double>(c)) > std::abs(sum)) c = std::nextafter(c, 0.0f);
  }
  return c;
}

// The number whose 16 bits these are: f16 or bf16. (The headers' conversion of f16 takes a host ten
// times as long, and matrix products call for it all the time.)
template <class T>
double number_of(std::uint32_t bits) {
  const auto as_float = [](std::uint32_t of) {
    float number = 0;
    std::memcpy(&number, &of, sizeof(of));
    return number;
  };
  if constexpr (std::is_same_v<T, __half>) {
    const std::uint32_t size = bits & 0x7fffu;
    const bool is_finite = size < 0x7c00u;
    // The exponent counts from 15 in place of 127.
    const float number =
        is_finite ? as_float(size << 13) * 0x1p112f : as_float(size << 13 | 0x7f800000u);
    return bits & 0x8000u ? -number : number;
  } else {
    return as_float(bits << 16);
  }
}

// sums = a b.
void multiply(double (&sums)[16][8], const double (&a)[16][16], const double (&b)[16][8]);

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
    double a[16][16], b[16][8];
    const auto number = [](std::uint32_t pair, unsigned i) {
      return number_of<T>(pair >> 16 * i & 0xffffu);
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
    double sums[16][8];
    multiply(sums, a, b);
    const unsigned rounding = options().tensor_cores;
    for (unsigned i = 0; i < 32; ++i) {
      const auto& lane = *static_cast<Lane*>(lanes[i]);
      for (unsigned r = 0; r < 4; ++r) {
        const unsigned m = i / 4 + 8 * (r / 2), n = 2 * (i % 4) + r % 2;
        if (rounding == 0) {
          lane.d[r] = static_cast<float>(sums[m][n] + lane.d[r]);
        } else {
          double column[16];
          for (unsigned k = 0; k < 16; ++k) column[k] = b[k][n];
          lane.d[r] = add_products(a[m], column, lane.d[r], rounding);
        }
      }
    }
  });
}

}  // namespace cuda_emulator

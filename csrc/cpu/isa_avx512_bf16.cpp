// The kernels for AVX-512 with VNNI and BF16.

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/intrinsics.h"
#include "cpu/kernels.h"

namespace octavo::cpu {
namespace avx512_bf16 {

// Tiles of the matrix products, rows x panels, so that what they sum up fits the 32 registers:
// fused multiply-adds (even and odd sums), and dot products (16-bit codes; 8-bit ones).
constexpr int kRows = 6;
constexpr int kPanels = 2;
constexpr int kDotRows = 3;
constexpr int kDotRowsOnePass = 6;
constexpr int kDotPanels = 4;
constexpr int kPanelsOneRow = 4;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 8;   // query rows x tiles of keys under way at a time
constexpr int kValueRows = 4;     // query rows that share a load of the values
#define OCTAVO_BF16_DOT

#include "cpu/kernels/vec_avx512.h"
//
#include "cpu/kernels/dot_vnni.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace avx512_bf16

const Kernels& avx512_bf16_kernels() { return avx512_bf16::table("avx512_bf16"); }

}  // namespace octavo::cpu

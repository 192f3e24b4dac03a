// The kernels for AVX-512 (F, BW, DQ, VL).

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/intrinsics.h"
#include "cpu/kernels.h"

namespace octavo::cpu {
namespace avx512 {

// Tiles of the matrix products, rows x panels, so that what they sum up fits the 32 registers:
// fused multiply-adds (even and odd sums), and dot products (16-bit codes; 8-bit ones).
constexpr int kRows = 6;
constexpr int kPanels = 2;
constexpr int kDotRows = 4;
constexpr int kDotRowsOnePass = 4;
constexpr int kDotPanels = 4;
constexpr int kPanelsOneRow = 4;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 8;   // query rows x tiles of keys under way at a time
constexpr int kValueRows = 4;     // query rows that share a load of the values

#include "cpu/kernels/vec_avx512.h"
//
#include "cpu/kernels/dot_madd.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace avx512

const Kernels& avx512_kernels() { return avx512::table("avx512"); }

}  // namespace octavo::cpu

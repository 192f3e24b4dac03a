// The kernels for AVX2, FMA and AVX-VNNI.

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/intrinsics.h"
#include "cpu/kernels.h"

namespace octavo::cpu {
namespace avx2_vnni {

// Tiles of the matrix products, rows x panels, so that what they sum up fits the 16 registers:
// fused multiply-adds (even and odd sums), and dot products (16-bit codes; 8-bit ones).
constexpr int kRows = 3;
constexpr int kPanels = 1;
constexpr int kDotRows = 2;
constexpr int kDotRowsOnePass = 4;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 3;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 4;   // query rows x tiles of keys under way at a time
constexpr int kValueRows = 1;     // query rows that share a load of the values

#include "cpu/kernels/vec_avx2.h"
//
#include "cpu/kernels/dot_vnni.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace avx2_vnni

const Kernels& avx2_vnni_kernels() { return avx2_vnni::table("avx2_vnni"); }

}  // namespace octavo::cpu

// The kernels for NEON with the dot product of signed bytes (ARMv8.2's SDOT).

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/intrinsics.h"
#include "cpu/kernels.h"

namespace octavo::cpu {
namespace neon_dotprod {

// Tiles of the matrix products, rows x panels, so that what they sum up fits the 32 registers:
// fused multiply-adds (even and odd sums), and dot products (16-bit codes; 8-bit ones). Chosen by
// counting registers, not yet by timing.
constexpr int kRows = 2;
constexpr int kPanels = 1;
constexpr int kDotRows = 3;
constexpr int kDotRowsOnePass = 6;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 2;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 4;   // query rows x tiles of keys under way at a time
constexpr int kValueRows = 1;     // query rows that share a load of the values

#include "cpu/kernels/vec_neon.h"
//
#include "cpu/kernels/dot_sdot.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace neon_dotprod

const Kernels& neon_dotprod_kernels() { return neon_dotprod::table("neon_dotprod"); }

}  // namespace octavo::cpu

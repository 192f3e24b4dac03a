// The kernels for any processor, in plain C++.

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace octavo::cpu {
namespace scalar {

// Tiles of the matrix products, rows x panels, so that what they sum up is not too much:
// fused multiply-adds (even and odd sums), and dot products (16-bit codes; 8-bit ones).
constexpr int kRows = 1;
constexpr int kPanels = 1;
constexpr int kDotRows = 1;
constexpr int kDotRowsOnePass = 1;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 1;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 2;   // query rows x tiles of keys under way at a time
constexpr int kValueRows = 1;     // query rows that share a load of the values

#include "cpu/kernels/vec_scalar.h"
//
#include "cpu/kernels/dot_scalar.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace scalar

const Kernels& scalar_kernels() { return scalar::table("scalar"); }

}  // namespace octavo::cpu

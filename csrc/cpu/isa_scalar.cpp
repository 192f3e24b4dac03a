// The kernels for any processor, in plain C++.

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/kernels.h"

namespace octavo::cpu {
namespace scalar {

// A tile of the matrix product: the even and odd sums of kRows x kPanels have to fit in registers.
constexpr int kRows = 1;
constexpr int kPanels = 1;
constexpr int kPanelsOneRow = 1;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreRows = 2;     // query rows that share a load of the keys

#include "cpu/kernels/vec_scalar.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace scalar

const Kernels& scalar_kernels() { return scalar::table("scalar"); }

}  // namespace octavo::cpu

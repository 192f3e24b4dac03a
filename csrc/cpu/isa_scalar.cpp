// The kernels for any processor, in plain C++.

#include "cpu/kernels/includes.h"

namespace octavo::cpu {
namespace scalar {

constexpr int kRows = 1;
constexpr int kPanels = 1;
constexpr int kDotRows = 1;
constexpr int kDotRowsOnePass = 1;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 1;
constexpr int kPanelGroup = 4;
constexpr int kScoreChains = 2;
constexpr int kValueRows = 1;

#include "cpu/kernels/vec_scalar.h"
//
#include "cpu/kernels/dot_scalar.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace scalar

const Kernels& scalar_kernels() { return scalar::table("scalar"); }

}  // namespace octavo::cpu

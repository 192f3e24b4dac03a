// The kernels for NEON, which every AArch64 processor has.

#include "cpu/kernels/includes.h"

namespace octavo::cpu {
namespace neon {

// Chosen by counting registers, not yet by timing.
constexpr int kRows = 2;
constexpr int kPanels = 1;
constexpr int kDotRows = 4;
constexpr int kDotRowsOnePass = 4;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 2;
constexpr int kPanelGroup = 4;
constexpr int kScoreChains = 4;
constexpr int kValueRows = 1;

#include "cpu/kernels/vec_neon.h"
//
#include "cpu/kernels/dot_neon.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace neon

const Kernels& neon_kernels() { return neon::table("neon"); }

}  // namespace octavo::cpu

// The kernels for NEON with the dot product of signed bytes (ARMv8.2's SDOT).

#include "cpu/kernels/includes.h"

namespace octavo::cpu {
namespace neon_dotprod {

// Chosen by counting registers, not yet by timing.
constexpr int kRows = 2;
constexpr int kPanels = 1;
constexpr int kDotRows = 3;
constexpr int kDotRowsOnePass = 6;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 2;
constexpr int kPanelGroup = 4;
constexpr int kScoreChains = 4;
constexpr int kValueRows = 1;

#include "cpu/kernels/vec_neon.h"
//
#include "cpu/kernels/dot_sdot.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace neon_dotprod

const Kernels& neon_dotprod_kernels() { return neon_dotprod::table("neon_dotprod"); }

}  // namespace octavo::cpu

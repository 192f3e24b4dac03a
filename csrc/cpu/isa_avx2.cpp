// The kernels for AVX2 and FMA.

#include "cpu/kernels/includes.h"

namespace octavo::cpu {
namespace avx2 {

constexpr int kRows = 3;
constexpr int kPanels = 1;
constexpr int kDotRows = 4;
constexpr int kDotRowsOnePass = 4;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 3;
constexpr int kPanelGroup = 4;
constexpr int kScoreChains = 4;
constexpr int kValueRows = 1;

#include "cpu/kernels/vec_avx2.h"
//
#include "cpu/kernels/dot_madd.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace avx2

const Kernels& avx2_kernels() { return avx2::table("avx2"); }

}  // namespace octavo::cpu

// The kernels for AVX-512 (F, BW, DQ, VL).

#include "cpu/kernels/includes.h"

namespace octavo::cpu {
namespace avx512 {

constexpr int kRows = 6;
constexpr int kPanels = 2;
constexpr int kDotRows = 4;
constexpr int kDotRowsOnePass = 4;
constexpr int kDotPanels = 4;
constexpr int kPanelsOneRow = 4;
constexpr int kPanelGroup = 4;
constexpr int kScoreChains = 8;
constexpr int kValueRows = 4;

#include "cpu/kernels/vec_avx512.h"
//
#include "cpu/kernels/dot_madd.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace avx512

const Kernels& avx512_kernels() { return avx512::table("avx512"); }

}  // namespace octavo::cpu

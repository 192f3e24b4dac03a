// The kernels for AVX2, FMA and AVX-VNNI.

#include "cpu/kernels/includes.h"

namespace octavo::cpu {
namespace avx2_vnni {

constexpr int kRows = 3;
constexpr int kPanels = 1;
constexpr int kDotRows = 2;
constexpr int kDotRowsOnePass = 4;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 3;
constexpr int kPanelGroup = 4;
constexpr int kScoreChains = 4;
constexpr int kValueRows = 1;

#include "cpu/kernels/vec_avx2.h"
//
#include "cpu/kernels/dot_vnni.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace avx2_vnni

const Kernels& avx2_vnni_kernels() { return avx2_vnni::table("avx2_vnni"); }

}  // namespace octavo::cpu

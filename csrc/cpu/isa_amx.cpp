// The kernels for AMX (tiles of bf16 and int8), beside AVX-512 with VNNI.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>

#include "cpu/intrinsics.h"
#include "cpu/kernels.h"
#include "cpu/kernels/tile_config.h"

namespace octavo::cpu {
namespace amx {

// Tiles of the products by vectors, of a few rows, as in isa_avx512_vnni.cpp.
constexpr int kRows = 6;
constexpr int kPanels = 2;
constexpr int kDotRows = 3;
constexpr int kDotRowsOnePass = 6;
constexpr int kDotPanels = 4;
constexpr int kPanelsOneRow = 4;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 8;   // query rows x tiles of keys under way at a time
constexpr int kValueRows = 4;     // query rows that share a load of the values

#include "cpu/kernels/vec_avx512.h"
//
#include "cpu/kernels/dot_vnni.h"
//
#include "cpu/kernels/bodies.h"
//
#include "cpu/kernels/tile_amx.h"
//
#include "cpu/kernels/linear_tiles.h"

}  // namespace amx

const Kernels& amx_kernels() {
  static const Kernels kernels = amx::with_tiles(amx::table("amx"));
  return kernels;
}

}  // namespace octavo::cpu

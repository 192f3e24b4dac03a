// The kernels for AMX, its tile registers emulated: for tests, and to look into.

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>

#include "cpu/kernels/includes.h"
#include "cpu/kernels/tile_config.h"
#include "cpu/platform.h"

namespace octavo::cpu {
namespace amx_emulated {

#include "cpu/kernels/sizes_avx512_vnni.h"
//
#include "cpu/kernels/vec_avx512.h"
//
#include "cpu/kernels/dot_vnni.h"
//
#include "cpu/kernels/bodies.h"
//
#include "cpu/kernels/tile_emulated.h"
//
#include "cpu/kernels/linear_tiles.h"

}  // namespace amx_emulated

const Kernels& amx_emulated_kernels() {
  static const Kernels kernels = amx_emulated::with_tiles(amx_emulated::table("amx_emulated"));
  return kernels;
}

}  // namespace octavo::cpu

// The kernels for AMX (tiles of bf16 and int8), beside AVX-512 with VNNI.

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>

#include "cpu/kernels/includes.h"
#include "cpu/kernels/tile_config.h"
#include "cpu/platform.h"

namespace octavo::cpu {
namespace amx {

#include "cpu/kernels/sizes_avx512_vnni.h"
//
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

// The kernels for one instruction set: CMakeLists.txt compiles this file once for each.
//
// OCTAVO_ISA is the set's name, and its namespace. OCTAVO_VEC, OCTAVO_DOT and, for a set with
// matrix tiles, OCTAVO_TILE are files of cpu/kernels/: its vectors (vec_*.h), its sums of whole
// numbers (dot_*.h), its tiles (tile_*.h).

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/intrinsics.h"
#include "cpu/kernels.h"
#include "cpu/kernels/tile_config.h"
#include "cpu/platform.h"

// Twice, so that `name` is what OCTAVO_ISA stands for.
#define OCTAVO_JOIN(name, ending) name##ending
#define OCTAVO_KERNELS(name) OCTAVO_JOIN(name, _kernels)
#define OCTAVO_QUOTE(name) #name
#define OCTAVO_TEXT(name) OCTAVO_QUOTE(name)

namespace octavo::cpu {
namespace OCTAVO_ISA {

#include OCTAVO_VEC
//
#include OCTAVO_DOT
//
#include "cpu/kernels/bodies.h"
#if defined(OCTAVO_TILE)
#include OCTAVO_TILE
//
#include "cpu/kernels/linear_tiles.h"
#else
inline const Kernels& with_tiles(const Kernels& kernels) { return kernels; }
#endif

}  // namespace OCTAVO_ISA

const Kernels& OCTAVO_KERNELS(OCTAVO_ISA)() {
  static const Kernels kernels = OCTAVO_ISA::with_tiles(OCTAVO_ISA::table(OCTAVO_TEXT(OCTAVO_ISA)));
  return kernels;
}

}  // namespace octavo::cpu

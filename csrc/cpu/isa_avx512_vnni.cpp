// The kernels for AVX-512 with VNNI.

#include "cpu/kernels/includes.h"

namespace octavo::cpu {
namespace avx512_vnni {

#include "cpu/kernels/sizes_avx512_vnni.h"
//
#include "cpu/kernels/vec_avx512.h"
//
#include "cpu/kernels/dot_vnni.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace avx512_vnni

const Kernels& avx512_vnni_kernels() { return avx512_vnni::table("avx512_vnni"); }

}  // namespace octavo::cpu

// The kernels for AVX-512 with VNNI and BF16.

#include "cpu/kernels/includes.h"

namespace octavo::cpu {
namespace avx512_bf16 {

#define OCTAVO_BF16_DOT

#include "cpu/kernels/sizes_avx512_vnni.h"
//
#include "cpu/kernels/vec_avx512.h"
//
#include "cpu/kernels/dot_vnni.h"
//
#include "cpu/kernels/bodies.h"

}  // namespace avx512_bf16

const Kernels& avx512_bf16_kernels() { return avx512_bf16::table("avx512_bf16"); }

}  // namespace octavo::cpu

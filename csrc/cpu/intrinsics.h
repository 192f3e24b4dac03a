// The intrinsics of x86-64 or of 64-bit ARM.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
// Where a vector's contents do not matter, GCC 12's header initializes it from itself, and warns of
// that wherever it is inlined, mostly with sanitizers (GCC bug 105593). The warnings are off for
// this header, and on for the code that uses it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

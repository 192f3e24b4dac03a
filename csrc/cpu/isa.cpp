// Chooses the instruction set at run time, by feature bits alone.

#include "cpu/kernels.h"
#include "cpu/kernels/tile_config.h"
#include "cpu/platform.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace octavo::cpu {

// OCTAVO_ISAS: X(name) of each that was compiled, slowest first.
#define X(name) const Kernels& name##_kernels();
OCTAVO_ISAS
#undef X

namespace {

struct Entry {
  const char* name;
  bool (*is_available)();
  const Kernels& (*kernels)();
};

// A set may be left out of a build, and then its test is not used.

[[maybe_unused]] bool has_scalar() { return true; }

#if defined(__x86_64__)

// __builtin_cpu_supports also asks whether the system saves the registers (XGETBV); its argument
// has to be a literal.
#define HAS(feature) bool(__builtin_cpu_supports(feature))

// Compilers' lists of features do not all know F16C and AVX-VNNI. Their registers are AVX2's.
[[maybe_unused]] bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return HAS("avx2") && HAS("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1u);
}

[[maybe_unused]] bool has_avx2_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1u);
}

[[maybe_unused]] bool has_avx512() {
  return HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl");
}

[[maybe_unused]] bool has_avx512_vnni() { return has_avx512() && HAS("avx512vnni"); }

[[maybe_unused]] bool has_amx_emulated() { return has_avx512_vnni(); }

[[maybe_unused]] bool has_avx512_bf16() { return has_avx512_vnni() && HAS("avx512bf16"); }

// Tiles of bf16 and int8 (leaf 7), of the size the kernels are written for (leaves 1d and 1e), and
// the system saves them (XCR0, bits 17 and 18) and grants them to this process.
[[maybe_unused]] bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const auto has_leaf = [&](unsigned leaf, unsigned subleaf) {
    return __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx) != 0;
  };
  constexpr unsigned kFeatures = 1u << 22 | 1u << 24 | 1u << 25, kXsave = 1u << 27;
  if (!has_avx512_bf16() || !has_leaf(7, 0) || (edx & kFeatures) != kFeatures) return false;
  if (!has_leaf(0x1d, 1) || eax >> 16 != kTileBytes || ebx != (kNumTiles << 16 | kTileRowBytes) ||
      (ecx & 0xffffu) != kTileRows)
    return false;
  if (!has_leaf(0x1e, 0) || (ebx & 0xffu) < kTileRows || (ebx >> 8 & 0xffffu) < kTileRowBytes)
    return false;
  if (!has_leaf(1, 0) || !(ecx & kXsave)) return false;
  constexpr unsigned kTileState = 1u << 17 | 1u << 18;
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  if ((eax & kTileState) != kTileState) return false;
  static const bool is_granted = request_tile_registers();  // once: it holds for all threads
  return is_granted;
}

#else

[[maybe_unused]] bool has_neon() { return true; }  // a part of AArch64
[[maybe_unused]] bool has_neon_dotprod() { return has_dot_product(); }

#endif

std::vector<Entry> entries() {
#define X(name) {#name, has_##name, name##_kernels},
  return {OCTAVO_ISAS};
#undef X
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : entries()) names.emplace_back(entry.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : entries()) {
    if (entry.is_available()) names.emplace_back(entry.name);
  }
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  std::string names;
  const Entry* chosen = nullptr;
  const std::vector<Entry> list = entries();
  for (const Entry& entry : list) {
    if (!entry.is_available()) continue;
    names += text(names.empty() ? "" : ", ", entry.name);
    if (isa == "auto" || isa == entry.name) chosen = &entry;
  }
  require(chosen, "isa is \"", isa, "\"; this machine and build have: auto, ", names);
  return chosen->kernels();
}

}  // namespace octavo::cpu

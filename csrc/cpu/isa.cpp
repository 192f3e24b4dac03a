// Chooses the instruction set at run time, by feature bits alone.

#include "cpu/kernels.h"

namespace octavo::cpu {

const Kernels& scalar_kernels();
#if defined(OCTAVO_HAVE_AVX2)
const Kernels& avx2_kernels();
#endif
#if defined(OCTAVO_HAVE_AVX512)
const Kernels& avx512_kernels();
#endif

namespace {

struct Entry {
  const char* name;
  bool (*is_available)();
  const Kernels& (*kernels)();
};

// Slowest first. __builtin_cpu_supports also asks whether the system saves the registers (XGETBV).
std::vector<Entry> entries() {
  std::vector<Entry> list{{"scalar", [] { return true; }, scalar_kernels}};
#if defined(OCTAVO_HAVE_AVX2)
  list.push_back(
      {"avx2",
       [] { return bool(__builtin_cpu_supports("avx2")) && bool(__builtin_cpu_supports("fma")); },
       avx2_kernels});
#endif
#if defined(OCTAVO_HAVE_AVX512)
  list.push_back({"avx512",
                  [] {
                    return bool(__builtin_cpu_supports("avx512f")) &&
                           bool(__builtin_cpu_supports("avx512bw")) &&
                           bool(__builtin_cpu_supports("avx512dq")) &&
                           bool(__builtin_cpu_supports("avx512vl"));
                  },
                  avx512_kernels});
#endif
  return list;
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

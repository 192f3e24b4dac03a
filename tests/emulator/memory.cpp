#include "memory.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "grid.h"
#include "sanitizer.h"

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_emulator {

namespace {

constexpr std::size_t kAlignment = 256, kGuard = 256;
constexpr unsigned char kGuardByte = 0xa5;

#ifdef EMULATOR_ASAN
// Adds to the sanitizer's report what it cannot know.
void name_thread(const char*) {
  if (in_kernel()) std::fprintf(stderr, "in %s\n", place_in_kernel().c_str());
}
#else
bool all_are(const unsigned char* bytes, unsigned char value) {
  return bytes[0] == value && std::memcmp(bytes, bytes + 1, kGuard - 1) == 0;
}
#endif

}  // namespace

GuardedBytes::GuardedBytes(std::size_t bytes) : bytes_(bytes) {
  whole_ = std::malloc(bytes + 2 * kGuard + kAlignment);
  if (!whole_) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(whole_) + kGuard + kAlignment - 1;
  data_ = reinterpret_cast<unsigned char*>(address / kAlignment * kAlignment);
  std::memset(data_, options().poison, bytes);
  repair();
#ifdef EMULATOR_ASAN
  static const bool once = (__asan_set_error_report_callback(name_thread), true);
  static_cast<void>(once);
  ASAN_POISON_MEMORY_REGION(data_ - kGuard, kGuard);
  ASAN_POISON_MEMORY_REGION(data_ + bytes, kGuard);
#endif
}

GuardedBytes::~GuardedBytes() {
  if (!whole_) return;
#ifdef EMULATOR_ASAN
  ASAN_UNPOISON_MEMORY_REGION(data_ - kGuard, bytes_ + 2 * kGuard);
#endif
  std::free(whole_);
}

bool GuardedBytes::intact() const {
#ifdef EMULATOR_ASAN
  return true;  // a write would have been reported
#else
  return !data_ || (all_are(data_ - kGuard, guard_) && all_are(data_ + bytes_, guard_));
#endif
}

void GuardedBytes::repair(bool flipped) {
#ifdef EMULATOR_ASAN
  if (guard_) return;
#endif
  guard_ = static_cast<unsigned char>(flipped ? ~kGuardByte : kGuardByte);
  std::memset(data_ - kGuard, guard_, kGuard);
  std::memset(data_ + bytes_, guard_, kGuard);
}

}  // namespace cuda_emulator

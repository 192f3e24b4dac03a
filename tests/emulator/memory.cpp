#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "grid.h"

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_emulator {

namespace {

constexpr std::size_t kAlignment = 256, kGuard = 256;
constexpr unsigned char kGuardByte = 0xa5;

bool all_guard(const unsigned char* bytes) {
  for (std::size_t i = 0; i < kGuard; ++i) {
    if (bytes[i] != kGuardByte) return false;
  }
  return true;
}

}  // namespace

GuardedBytes::GuardedBytes(std::size_t bytes) : bytes_(bytes) {
  whole_ = std::malloc(bytes + 2 * kGuard + kAlignment);
  if (!whole_) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(whole_) + kGuard + kAlignment - 1;
  data_ = reinterpret_cast<unsigned char*>(address / kAlignment * kAlignment);
  std::memset(data_ - kGuard, kGuardByte, kGuard);
  std::memset(data_, options().poison, bytes);
  std::memset(data_ + bytes, kGuardByte, kGuard);
#ifdef EMULATOR_ASAN
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
  return !data_ || (all_guard(data_ - kGuard) && all_guard(data_ + bytes_));
#endif
}

}  // namespace cuda_emulator

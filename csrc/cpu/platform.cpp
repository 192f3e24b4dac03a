#include "cpu/platform.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <set>
#include <string>
#include <thread>

#include "cpu/intrinsics.h"

#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace octavo::cpu {

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

bool request_tile_registers() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// ---- memory ----

namespace {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kLargePage = std::size_t{2} << 20;

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  if (bytes > SIZE_MAX - unit) throw std::bad_alloc();
  return (bytes + unit - 1) / unit * unit;
}

bool takes_whole_pages(std::size_t bytes) {
#if defined(__linux__) || defined(__APPLE__)
  return bytes >= kLargePage;
#else
  return false;
#endif
}

#if defined(__linux__) || defined(__APPLE__)

// Pages that begin on a large page's boundary: maps more than is needed, gives the ends back.
void* map_pages(std::size_t bytes) {
  void* mapped = mmap(nullptr, round_up(bytes, kLargePage) + kLargePage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANON, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<unsigned char*>(mapped);
  const std::size_t head =
      (kLargePage - reinterpret_cast<std::uintptr_t>(begin) % kLargePage) % kLargePage;
  if (head) munmap(begin, head);
  if (head < kLargePage) munmap(begin + head + round_up(bytes, kLargePage), kLargePage - head);
#if defined(__linux__)
  // A refusal costs speed and nothing else.
  (void)madvise(begin + head, round_up(bytes, kLargePage), MADV_HUGEPAGE);
#endif
  return begin + head;
}

#endif

}  // namespace

void* allocate(std::size_t bytes) {
  if (bytes == 0) return nullptr;
#if defined(__linux__) || defined(__APPLE__)
  if (takes_whole_pages(bytes)) return map_pages(bytes);
#endif
  const std::size_t rounded = round_up(bytes, kCacheLine);
  void* data = std::aligned_alloc(kCacheLine, rounded);
  if (!data) throw std::bad_alloc();
  std::memset(data, 0, rounded);
  return data;
}

void release(void* data, std::size_t bytes) noexcept {
#if defined(__linux__) || defined(__APPLE__)
  if (takes_whole_pages(bytes)) {
    munmap(data, (bytes + kLargePage - 1) / kLargePage * kLargePage);
    return;
  }
#endif
  std::free(data);
}

// ---- processors, memory limits ----

#if defined(__linux__)

namespace {

// The first number of a file, or `otherwise` where there is none ("max" in a control group).
double read_number(const std::string& path, double otherwise) {
  std::ifstream file(path);
  double value = 0;
  return file >> value ? value : otherwise;
}

// A control group's CPU quota, rounded up; a very large number without one.
int cpu_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (!(file >> quota >> period) || period <= 0) return 1 << 20;
  return std::max(1, static_cast<int>((quota + period - 1) / period));
}

}  // namespace

std::vector<int> core_processors() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return {};
  // Threads of one core share the list of their siblings.
  std::set<std::string> cores;
  std::vector<int> processors;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string name = std::to_string(cpu);
    std::ifstream file("/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
    std::string siblings;
    if (cores.insert(std::getline(file, siblings) ? siblings : name).second)
      processors.push_back(cpu);
  }
  return processors;
}

void bind_thread(int processor) noexcept {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(processor, &one);
  sched_setaffinity(0, sizeof one, &one);
}

int physical_cores() {
  const std::vector<int> processors = core_processors();
  if (processors.empty())
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return std::max(1, std::min(static_cast<int>(processors.size()), cpu_quota()));
}

std::size_t available_memory() {
  double available = 0;
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) available = std::stod(line.substr(13)) * 1024.0;
  }
  const double limit = read_number("/sys/fs/cgroup/memory.max", 1e18);
  const double used = read_number("/sys/fs/cgroup/memory.current", 0);
  return static_cast<std::size_t>(std::max(0.0, std::min(available, limit - used)));
}

#if defined(__aarch64__)
bool has_dot_product() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#endif

#elif defined(__APPLE__)

namespace {

template <class T>
T sysctl_value(const char* name, T otherwise) {
  T value{};
  std::size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : otherwise;
}

}  // namespace

// macOS takes no orders about processors.
std::vector<int> core_processors() { return {}; }
void bind_thread(int) noexcept {}

int physical_cores() { return std::max(1, sysctl_value<int>("hw.physicalcpu", 1)); }

// Half of what is built in: macOS has no figure that means "without swapping".
std::size_t available_memory() {
  return static_cast<std::size_t>(sysctl_value<std::uint64_t>("hw.memsize", 0) / 2);
}

#if defined(__aarch64__)
bool has_dot_product() { return sysctl_value<int>("hw.optional.arm.FEAT_DotProd", 0) != 0; }
#endif

#else

std::vector<int> core_processors() { return {}; }
void bind_thread(int) noexcept {}
int physical_cores() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }
std::size_t available_memory() { return std::size_t{4} << 30; }
#endif

#if !defined(__aarch64__) || !(defined(__linux__) || defined(__APPLE__))
bool has_dot_product() { return false; }
#endif

}  // namespace octavo::cpu

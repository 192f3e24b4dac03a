#include "cpu/platform.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace octavo::cpu {

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

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

int physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
    return std::max(1u, std::thread::hardware_concurrency());
  // Threads of one core share the list of their siblings.
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string name = std::to_string(cpu);
    std::ifstream file("/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
    std::string siblings;
    cores.insert(std::getline(file, siblings) ? siblings : name);
  }
  return std::max(1, std::min(static_cast<int>(cores.size()), cpu_quota()));
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

void advise_large_pages(void* data, std::size_t bytes) {
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  // A refusal costs speed and nothing else.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

#elif defined(__APPLE__)

namespace {

template <class T>
T sysctl_value(const char* name, T otherwise) {
  T value{};
  std::size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : otherwise;
}

}  // namespace

int physical_cores() { return std::max(1, sysctl_value<int>("hw.physicalcpu", 1)); }

// Half of what is built in: macOS has no figure that means "without swapping".
std::size_t available_memory() {
  return static_cast<std::size_t>(sysctl_value<std::uint64_t>("hw.memsize", 0) / 2);
}

void advise_large_pages(void*, std::size_t) {}

#else

int physical_cores() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }
std::size_t available_memory() { return std::size_t{4} << 30; }
void advise_large_pages(void*, std::size_t) {}

#endif

}  // namespace octavo::cpu

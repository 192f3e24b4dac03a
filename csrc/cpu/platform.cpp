#include "cpu/platform.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "cpu/intrinsics.h"

#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
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

// Pages that begin on a large page's boundary: maps more than is needed and unmaps the ends.
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
  // If this is refused, only speed is lost.
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

namespace {

int least_one(int count) { return std::max(1, count); }

// Without a figure from the system.
int processors_by_count() {
  return least_one(static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

#if defined(__linux__)

std::vector<int> core_processors() {
  // As large as the kernel's own sets, which may be larger than a cpu_set_t.
  std::vector<cpu_set_t> allowed(1);
  while (sched_getaffinity(0, allowed.size() * sizeof(cpu_set_t), allowed.data()) != 0) {
    if (errno != EINVAL || allowed.size() > 64) return {};
    allowed.resize(2 * allowed.size());
  }
  // Threads of one core share the list of their siblings.
  std::set<std::string> cores;
  std::vector<int> processors;
  const std::size_t bytes = allowed.size() * sizeof(cpu_set_t);
  for (int cpu = 0; cpu < static_cast<int>(8 * bytes); ++cpu) {
    if (!CPU_ISSET_S(static_cast<std::size_t>(cpu), bytes, allowed.data())) continue;
    const std::string name = std::to_string(cpu);
    std::ifstream file("/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
    std::string siblings;
    if (cores.insert(std::getline(file, siblings) ? siblings : name).second)
      processors.push_back(cpu);
  }
  return processors;
}

int thread_id() { return static_cast<int>(syscall(SYS_gettid)); }

std::int64_t cpu_time(int id) noexcept {
  // The clock that pthread_getcpuclockid names, by the thread's number.
  const auto clock = static_cast<clockid_t>(~static_cast<unsigned>(id) << 3 | 6u);
  timespec time{};
  if (clock_gettime(clock, &time) != 0) return -1;
  return static_cast<std::int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

void bind_thread(int id, int processor) noexcept {
  constexpr std::size_t kSets = 64;
  cpu_set_t one[kSets] = {};
  CPU_SET_S(static_cast<std::size_t>(processor), sizeof one, one);
  sched_setaffinity(id, sizeof one, one);
}

int physical_cores(const SystemFolders& folders) {
  const int cores = static_cast<int>(core_processors().size());
  const int count = cores > 0 ? cores : processors_by_count();
  // One more thread than whole processors is throttled for part of every period. From a quarter of
  // a processor on it gains more than that costs (docs/cpu.md).
  const double quota = cpu_quota(folders).value_or(count);
  return quota < count ? least_one(static_cast<int>(quota + 0.75)) : count;
}

std::size_t available_memory(const SystemFolders& folders, std::int64_t reserved) {
  constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
  const auto bytes = [](std::int64_t count, std::int64_t unit) {
    return std::min(count, kMost / unit) * unit;
  };
  const std::int64_t page = sysconf(_SC_PAGESIZE);
  const auto kibibytes = number_after(folders.proc + "/meminfo", "MemAvailable:");
  std::int64_t left = kibibytes ? bytes(*kibibytes, 1024) : sysconf(_SC_AVPHYS_PAGES) * page;
  left = std::min(left, memory_room(folders).value_or(kMost));
  rlimit limit{};  // `ulimit -v`
  const auto pages = first_number(folders.proc + "/self/statm");
  if (pages && getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur < kMost)
    left =
        std::min(left, static_cast<std::int64_t>(limit.rlim_cur) - bytes(*pages, page) + reserved);
  return static_cast<std::size_t>(std::max<std::int64_t>(0, left));
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

// macOS does not bind threads to processors.
std::vector<int> core_processors() { return {}; }
int thread_id() { return 0; }
void bind_thread(int, int) noexcept {}
std::int64_t cpu_time(int) noexcept { return -1; }

int physical_cores(const SystemFolders&) {
  return least_one(sysctl_value<int>("hw.physicalcpu", 1));
}

// Half of the machine's memory: macOS has no figure that means "without swapping".
std::size_t available_memory(const SystemFolders&, std::int64_t) {
  return static_cast<std::size_t>(sysctl_value<std::uint64_t>("hw.memsize", 0) / 2);
}

#if defined(__aarch64__)
bool has_dot_product() { return sysctl_value<int>("hw.optional.arm.FEAT_DotProd", 0) != 0; }
#endif

#else

std::vector<int> core_processors() { return {}; }
int thread_id() { return 0; }
void bind_thread(int, int) noexcept {}
std::int64_t cpu_time(int) noexcept { return -1; }
int physical_cores(const SystemFolders&) { return processors_by_count(); }
std::size_t available_memory(const SystemFolders&, std::int64_t) { return std::size_t{4} << 30; }
#endif

#if !defined(__aarch64__) || !(defined(__linux__) || defined(__APPLE__))
bool has_dot_product() { return false; }
#endif

}  // namespace octavo::cpu

// The limits that Linux's control groups set for a process. Docker, Kubernetes, systemd and Slurm
// limit the programs they start with them.
//
// Versions 1 and 2 are read, also both at once. Every group above the process is read, since the
// tightest limit counts. A file that is missing or cannot be parsed limits nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace octavo::cpu {

// The system's folders; tests use others.
struct SystemFolders {
  std::string proc = "/proc";
  std::string cgroup = "/sys/fs/cgroup";
};

// The CPU time of the process in processors, such as 1.5; nothing where no group limits it.
std::optional<double> cpu_quota(const SystemFolders& folders = {});

// Bytes left below the tightest memory limit, 0 where it is exceeded; nothing where no group limits
// memory. Pages that the kernel drops before it refuses memory (of files not used lately) count as
// left.
std::optional<std::int64_t> memory_room(const SystemFolders& folders = {});

// The number in a line such as "MemFree:  12 kB", in the file's own unit; nothing where there is no
// such line, or no number that fits.
std::optional<std::int64_t> number_after(const std::string& path, const std::string& name);

// The whole number that a file begins with; nothing for any other word, such as "max".
std::optional<std::int64_t> first_number(const std::string& path);

}  // namespace octavo::cpu

// What Linux's control groups let a process take of its machine. Docker, Kubernetes, systemd and
// Slurm limit what they start with them.
//
// Versions 1 and 2 are read, also both at once. Every group above the process is asked, since the
// tightest limit counts, wherever it stands. A file that is missing or makes no sense limits
// nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace octavo::cpu {

// Where the system tells about itself; tests give folders of their own.
struct SystemFolders {
  std::string proc = "/proc";
  std::string cgroup = "/sys/fs/cgroup";
};

// Processors' worth of time the process gets, as 1.5; nothing where no group limits it.
std::optional<double> cpu_quota(const SystemFolders& folders = {});

// Bytes left below the tightest memory limit, 0 where it is exceeded; nothing where no group limits
// memory. What the kernel drops before it refuses memory (files' pages not used lately) is left.
std::optional<std::int64_t> memory_room(const SystemFolders& folders = {});

// The number in a line such as "MemFree:  12 kB", in the file's own unit; nothing where there is no
// such line, or no number that fits.
std::optional<std::int64_t> number_after(const std::string& path, const std::string& name);

// The whole number that a file begins with; nothing for any other word, as "max".
std::optional<std::int64_t> first_number(const std::string& path);

}  // namespace octavo::cpu

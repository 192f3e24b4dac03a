#include "cpu/control_groups.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <sstream>
#include <vector>

namespace octavo::cpu {

namespace {

using Number = std::optional<std::int64_t>;
using Strings = std::vector<std::string>;

Strings split(const std::string& text, char separator) {
  Strings parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

bool contains(const Strings& words, const std::string& word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// A word as a number that is not negative; nothing if it is anything else.
Number whole_number(const std::string& word) {
  std::int64_t value = 0;
  const char* end = word.data() + word.size();
  const auto [stop, error] = std::from_chars(word.data(), end, value);
  if (error != std::errc() || stop != end || value < 0) return std::nullopt;
  return value;
}

// The kernel writes spaces in paths as \040.
std::string without_escapes(const std::string& path) {
  std::string plain;
  for (std::size_t i = 0; i < path.size(); ++i) {
    int code = 0;
    const char* digits = path.data() + i + 1;
    if (path[i] == '\\' && i + 3 < path.size() &&
        std::from_chars(digits, digits + 3, code, 8).ptr == digits + 3) {
      plain += static_cast<char>(code);
      i += 3;
    } else {
      plain += path[i];
    }
  }
  return plain;
}

// A folder in which a hierarchy of groups can be seen, and the group that it shows: a container
// often sees its own group alone, while /proc/self/cgroup gives the path on the host.
struct Mount {
  std::string folder, group;
};

// controller: of version 1; "" means version 2. The usual folders first, then those that
// /proc/self/mountinfo lists: "36 35 0:30 GROUP FOLDER options [more] - cgroup cgroup rw,cpu".
std::vector<Mount> mounts_of(const SystemFolders& folders, const std::string& controller) {
  std::vector<Mount> mounts;
  Strings names{controller};
  if (controller.empty()) names.push_back("unified");  // beside version 1
  if (controller == "cpu") names.insert(names.end(), {"cpu,cpuacct", "cpuacct,cpu"});
  for (const std::string& name : names) mounts.push_back({folders.cgroup + "/" + name, "/"});
  std::ifstream file(folders.proc + "/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    const Strings first = split(line.substr(0, dash), ' ');
    const Strings last = split(line.substr(dash + 3), ' ');
    if (first.size() < 5 || last.size() < 3) continue;
    if (controller.empty() ? last[0] == "cgroup2"
                           : last[0] == "cgroup" && contains(split(last[2], ','), controller))
      mounts.push_back({without_escapes(first[4]), without_escapes(first[3])});
  }
  return mounts;
}

// The process's group in a hierarchy: "/" if /proc/self/cgroup does not have it. Its lines are
// "4:cpu,cpuacct:/path", and "0::/path" for version 2.
std::string group_of(const SystemFolders& folders, const std::string& controller) {
  std::ifstream file(folders.proc + "/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string names = line.substr(first + 1, second - first - 1);
    if (controller.empty() ? names.empty() : contains(split(names, ','), controller))
      return line.substr(second + 1);
  }
  return "/";
}

// The folders of all visible groups above the process, and of its own.
Strings groups_of(const SystemFolders& folders, const std::string& controller) {
  const std::string path = group_of(folders, controller);
  Strings groups;
  for (const auto& [folder, shown] : mounts_of(folders, controller)) {
    const bool is_below = shown != "/" && path.compare(0, shown.size(), shown) == 0 &&
                          (path.size() == shown.size() || path[shown.size()] == '/');
    const Strings parts = split(is_below ? path.substr(shown.size()) : path, '/');
    groups.push_back(folder);
    if (contains(parts, "..")) continue;  // outside of the visible part
    std::string group = folder;
    for (const std::string& part : parts) {
      if (!part.empty()) groups.push_back(group += "/" + part);
    }
  }
  return groups;
}

template <class T>
void lower(std::optional<T>& least, T value) {
  least = least ? std::min(*least, value) : value;
}

// Limit minus usage of one group.
Number room_of(const std::string& group, const char* limit, const char* usage, const char* cached) {
  const Number most = first_number(group + "/" + limit), used = first_number(group + "/" + usage);
  if (!most || !used) return std::nullopt;
  const std::int64_t reclaimable = number_after(group + "/memory.stat", cached).value_or(0);
  return std::max<std::int64_t>(0, *most - std::max<std::int64_t>(0, *used - reclaimable));
}

}  // namespace

Number first_number(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  return file >> word ? whole_number(word) : std::nullopt;
}

Number number_after(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string word;
    if (words >> word && word == name) return words >> word ? whole_number(word) : std::nullopt;
  }
  return std::nullopt;
}

std::optional<double> cpu_quota(const SystemFolders& folders) {
  std::optional<double> least;
  const auto see = [&](Number quota, Number period) {
    if (quota && *quota > 0 && period && *period > 0)
      lower(least, static_cast<double>(*quota) / static_cast<double>(*period));
  };
  for (const std::string& group : groups_of(folders, "")) {
    std::ifstream file(group + "/cpu.max");  // "150000 100000", or "max 100000"
    std::string quota, period;
    if (file >> quota >> period) see(whole_number(quota), whole_number(period));
  }
  for (const std::string& group : groups_of(folders, "cpu"))
    see(first_number(group + "/cpu.cfs_quota_us"), first_number(group + "/cpu.cfs_period_us"));
  return least;
}

Number memory_room(const SystemFolders& folders) {
  Number least;
  for (const std::string& group : groups_of(folders, "")) {
    if (const Number room = room_of(group, "memory.max", "memory.current", "inactive_file"))
      lower(least, *room);
  }
  for (const std::string& group : groups_of(folders, "memory")) {
    if (const Number room =
            room_of(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
      lower(least, *room);
  }
  return least;
}

}  // namespace octavo::cpu

// Running a kernel with everything of the device watched.

#include <cstring>
#include <iomanip>
#include <sstream>
#include <vector>

#include "device.h"

namespace cuda_emulator {

namespace {

std::string outside(const GuardedBytes& memory) {
  return "wrote outside of an allocation of " + std::to_string(memory.bytes()) +
         " bytes of device memory";
}

// Throws where somebody wrote beside an allocation. The kernel runs once more for the error to name
// the thread; what it does to the memory does not matter any more.
void check_guards(const Launch& launch, const std::function<void()>& kernel) {
  for (auto& [address, memory] : device().memory) {
    if (memory.intact()) continue;
    GuardedBytes& hit = memory;
    hit.repair();
    run_grid(launch, kernel, [&hit] { return hit.intact() ? std::string() : outside(hit); });
    throw KernelError(std::string("kernel ") + launch.name + " " + outside(hit));
  }
}

using Snapshot = std::vector<std::vector<unsigned char>>;

Snapshot take_snapshot() {
  Snapshot snapshot;
  for (const auto& [address, memory] : device().memory) {
    const auto* bytes = static_cast<const unsigned char*>(memory.data());
    snapshot.emplace_back(bytes, bytes + memory.bytes());
  }
  return snapshot;
}

void restore(const Snapshot& snapshot) {
  std::size_t i = 0;
  for (const auto& [address, memory] : device().memory) {
    if (memory.bytes()) std::memcpy(memory.data(), snapshot[i].data(), memory.bytes());
    ++i;
  }
}

// Other orders of blocks and threads, other poison, other guards, until this goes.
class OtherLuck {
 public:
  OtherLuck() : saved_(options()) {
    options().seed += 0x5eed;
    options().poison = static_cast<unsigned char>(~options().poison);
    for (auto& [address, memory] : device().memory) memory.repair(true);
  }
  ~OtherLuck() {
    options() = saved_;
    for (auto& [address, memory] : device().memory) memory.repair();
  }
  OtherLuck(const OtherLuck&) = delete;
  OtherLuck& operator=(const OtherLuck&) = delete;

 private:
  Options saved_;
};

struct Difference {
  const GuardedBytes* memory = nullptr;  // null: none
  std::size_t byte = 0;
  unsigned char before = 0;
  std::string text;
};

Difference compare(const Snapshot& start, const Snapshot& first) {
  std::size_t i = 0;
  for (const auto& [address, memory] : device().memory) {
    const auto* now = static_cast<const unsigned char*>(memory.data());
    for (std::size_t byte = 0; byte < memory.bytes(); ++byte) {
      if (now[byte] == first[i][byte]) continue;
      std::ostringstream text;
      text << "gives another result when threads run in another order or unwritten memory holds "
              "other bytes: byte "
           << byte << " of an allocation of " << memory.bytes() << " bytes was 0x" << std::hex
           << int{first[i][byte]} << ", then 0x" << int{now[byte]}
           << " (a barrier is missing, or something is read that nobody wrote)";
      return {&memory, byte, start[i][byte], text.str()};
    }
    ++i;
  }
  return {};
}

void run_twice(const Launch& launch, const std::function<void()>& kernel) {
  const Snapshot start = take_snapshot();
  run_grid(launch, kernel);
  check_guards(launch, kernel);
  const Snapshot first = take_snapshot();
  restore(start);
  const OtherLuck luck;
  run_grid(launch, kernel);
  const Difference found = compare(start, first);
  if (!found.memory) return;
  // Once more, to name the thread that writes there.
  restore(start);
  const auto* byte = static_cast<const unsigned char*>(found.memory->data()) + found.byte;
  run_grid(launch, kernel, [&] { return *byte == found.before ? std::string() : found.text; });
  throw KernelError(std::string("kernel ") + launch.name + " " + found.text);
}

}  // namespace

void run_checked(const Launch& launch, const std::function<void()>& kernel, StartedGrid* started) {
  if (started) {
    started->finish();
  } else if (options().twice) {
    run_twice(launch, kernel);
    return;
  } else {
    run_grid(launch, kernel);
  }
  check_guards(launch, kernel);
}

}  // namespace cuda_emulator

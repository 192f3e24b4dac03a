#include "grid.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <sstream>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "turns.h"

namespace cuda_emulator {

Thread current;

namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr unsigned kWarp = 32;

enum class State { ready, at_barrier, in_warp, finished };

struct Copy {
  void* shared;
  const void* global;
  std::size_t bytes, zeros;
};

struct ThreadState {
  Fiber fiber;
  Thread place;
  State state = State::ready;
  const char* waits_at = "";
  int line = 0;
  std::vector<Copy> open_copies;              // begun, not committed
  std::deque<std::vector<Copy>> copy_groups;  // committed, oldest first
};

// Lanes of a warp on their way to a collective operation.
struct Meeting {
  unsigned mask, arrived;
  const char* what;
  void* lanes[kWarp];
};

template <class T>
std::vector<T*>& kept() {
  static auto* all = new std::vector<T*>;
  return *all;
}

// One launch, block after block.
class Grid {
 public:
  Grid(const Launch& launch, const std::function<void()>& kernel, const Watch& watch)
      : launch_(launch), kernel_(kernel), watch_(watch), random_(options().seed + launches_++) {
    check_launch(launch);
    num_threads_ = launch.block.x * launch.block.y * launch.block.z;
    while (threads_.size() < num_threads_) {
      threads_.push_back(new ThreadState);
      stacks_.push_back(allocate_stack(kStackBytes));
    }
    warps_.resize((num_threads_ + kWarp - 1) / kWarp);
  }

  void run() {
    const std::size_t blocks = std::size_t{launch_.grid.x} * launch_.grid.y * launch_.grid.z;
    std::vector<std::size_t> order(blocks);
    for (std::size_t i = 0; i < blocks; ++i) order[i] = i;
    if (options().seed) {
      for (std::size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
    }
    for (const std::size_t block : order) run_block(block);
  }

  void wait(State state, const char* what, int line = 0) {
    ThreadState& thread = *running_;
    thread.state = state;
    thread.waits_at = what;
    thread.line = line;
    switch_fiber(thread.fiber, scheduler_);
    current = thread.place;
  }

  void arrive_at_barrier(const char* file, int line) {
    if (num_at_barrier_++ == 0) {
      barrier_file_ = file;
      barrier_line_ = line;
    } else if (line != barrier_line_ || std::strcmp(file, barrier_file_) != 0) {
      fail(text_of("waits at __syncthreads of ", file, ":", line,
                   " while others of its block wait ", "at ", barrier_file_, ":", barrier_line_));
    }
    if (num_at_barrier_ < num_threads_) {
      wait(State::at_barrier, file, line);
      return;
    }
    num_at_barrier_ = 0;
    for (unsigned i = 0; i < num_threads_; ++i) {
      if (threads_[i] != running_) make_ready(*threads_[i]);
    }
    yield();
  }

  void collect(unsigned mask, const char* what, void* data, void (*body)(void* const*)) {
    const unsigned lane = current.index % kWarp, bit = 1u << lane;
    if (!(mask & bit)) fail(text_of(what, " with a mask that leaves out lane ", lane, " itself"));
    std::vector<Meeting>& meetings = warps_[current.index / kWarp];
    auto found = meetings.end();
    for (auto other = meetings.begin(); other != meetings.end(); ++other) {
      if (other->mask == mask && std::strcmp(other->what, what) == 0) {
        found = other;
      } else if ((other->mask & bit) && (mask & other->arrived)) {  // each waits for the other
        fail(text_of("came to ", what, " (mask ", mask, ") while others of its warp wait in ",
                     other->what, " (mask ", other->mask, ")"));
      }
    }
    if (found == meetings.end()) found = meetings.insert(found, {mask, 0, what, {}});
    found->lanes[lane] = data;
    found->arrived |= bit;
    if (found->arrived != mask) {
      wait(State::in_warp, what);
      return;
    }
    body(found->lanes);
    meetings.erase(found);
    for (unsigned other = 0; other < kWarp; ++other) {
      if (other != lane && (mask >> other & 1u))
        make_ready(*threads_[current.index / kWarp * kWarp + other]);
    }
    yield();
  }

  ThreadState& running() { return *running_; }
  const Launch& launch() const { return launch_; }
  void* shared() const { return shared_.data(); }

  std::string place() const {
    return text_of("kernel ", launch_.name, ", block (", current.block.x, ", ", current.block.y,
                   ", ", current.block.z, "), thread ", current.index);
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw KernelError(text_of(place(), ": ", what));
  }

  template <class... Parts>
  static std::string text_of(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
  }

 private:
  // Runs on a fiber: the whole life of one CUDA thread.
  static void thread_main();

  void make_ready(ThreadState& thread) {
    thread.state = State::ready;
    turns_.add(thread.place.index);
  }

  // Lets the others have a chance to go first.
  void yield() {
    if (!options().seed) return;
    make_ready(*running_);
    wait(State::ready, "");
  }

  void run_block(std::size_t block) {
    const dim3 grid = launch_.grid, size = launch_.block;
    // Its own piece of memory, exactly as long as asked for, so that the address sanitizer sees
    // the first byte behind it.
    shared_ = GuardedBytes(launch_.shared_bytes);
    turns_.start_block(num_threads_, options().seed ? &random_ : nullptr);
    num_at_barrier_ = 0;
    for (std::vector<Meeting>& meetings : warps_) meetings.clear();
    for (unsigned i = 0; i < num_threads_; ++i) {
      ThreadState& thread = *threads_[i];
      thread.place.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      thread.place.block = {static_cast<unsigned>(block % grid.x),
                            static_cast<unsigned>(block / grid.x % grid.y),
                            static_cast<unsigned>(block / grid.x / grid.y)};
      thread.place.block_size = size;
      thread.place.grid_size = grid;
      thread.place.index = i;
      thread.open_copies.clear();
      thread.copy_groups.clear();
      if (thread.state != State::finished) forget_frames(stacks_[i], kStackBytes);
      prepare(thread.fiber, stacks_[i], kStackBytes, &thread_main);
      make_ready(thread);
    }
    schedule(watch_);
    if (shared_.intact()) return;
    if (looks_for_writer_) return;
    // Once more, to name the thread that did it.
    looks_for_writer_ = true;
    shared_watch_ = [this] {
      return shared_.intact() ? std::string()
                              : text_of("wrote outside of its ", launch_.shared_bytes,
                                        " bytes of shared memory");
    };
    std::swap(watch_, shared_watch_);
    run_block(block);
    throw KernelError(text_of("kernel ", launch_.name, ", block ", block, ": wrote outside of its ",
                              launch_.shared_bytes, " bytes of shared memory"));
  }

  void schedule(const Watch& watch) {
    unsigned num_finished = 0;
    while (!turns_.empty()) {
      running_ = threads_[turns_.take()];
      current = running_->place;
      switch_fiber(scheduler_, running_->fiber);
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      if (watch) {
        const std::string seen = watch();
        if (!seen.empty()) fail(seen);
      }
      num_finished += running_->state == State::finished;
    }
    if (num_finished == num_threads_) return;
    for (unsigned i = 0; i < num_threads_; ++i) {
      const ThreadState& thread = *threads_[i];
      if (thread.state == State::finished) continue;
      current = thread.place;
      const std::string place =
          thread.state == State::at_barrier
              ? text_of("__syncthreads of ", thread.waits_at, ":", thread.line)
              : text_of(thread.waits_at);
      fail(text_of("waits for ever in ", place, ": ", num_finished, " of ", num_threads_,
                   " threads have ended, ", num_at_barrier_, " wait at a barrier"));
    }
  }

  const Launch& launch_;
  const std::function<void()>& kernel_;
  Watch watch_, shared_watch_;
  bool looks_for_writer_ = false;
  Random random_;
  unsigned num_threads_ = 0;
  GuardedBytes shared_;
  Fiber scheduler_;
  ThreadState* running_ = nullptr;
  Turns turns_;
  std::vector<std::vector<Meeting>> warps_;  // those under way in each
  unsigned num_at_barrier_ = 0;
  const char* barrier_file_ = "";
  int barrier_line_ = 0;
  std::exception_ptr error_;

  static std::uint64_t launches_;
  // Kept from launch to launch, with their stacks, and never destroyed.
  std::vector<ThreadState*>& threads_ = kept<ThreadState>();
  std::vector<void*>& stacks_ = kept<void>();
};

std::uint64_t Grid::launches_ = 0;

Grid* g_grid = nullptr;

void Grid::thread_main() {
  fiber_started();
  Grid& grid = *g_grid;
  ThreadState& self = grid.running();
  try {
    grid.kernel_();
    if (!self.open_copies.empty() || !self.copy_groups.empty())
      grid.fail("ended without waiting for the asynchronous copies it had begun");
  } catch (...) {
    grid.error_ = std::current_exception();
  }
  self.state = State::finished;
  switch_fiber(self.fiber, grid.scheduler_, true);
}

}  // namespace

void check_launch(const Launch& launch) {
  const auto refuse = [&](const std::string& why) {
    throw KernelError(Grid::text_of("kernel ", launch.name, " cannot be launched: ", why));
  };
  const std::size_t threads = std::size_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads < 1 || threads > options().max_threads)
    refuse(Grid::text_of(threads, " threads a block; expected 1 to ", options().max_threads));
  if (launch.shared_bytes > options().max_shared_bytes)
    refuse(Grid::text_of(launch.shared_bytes, " bytes of shared memory; a block can have ",
                         options().max_shared_bytes));
  if (!launch.grid.x || !launch.grid.y || !launch.grid.z || launch.grid.y > 65535 ||
      launch.grid.z > 65535 || launch.grid.x > 0x7fffffffu)
    refuse(Grid::text_of("a grid of ", launch.grid.x, " x ", launch.grid.y, " x ", launch.grid.z,
                         " blocks; expected 1 to 2^31 - 1, 65535 and 65535"));
}

void run_grid(const Launch& launch, const std::function<void()>& kernel, const Watch& watch) {
  Grid grid(launch, kernel, watch);
  g_grid = &grid;
  try {
    grid.run();
  } catch (...) {
    g_grid = nullptr;
    throw;
  }
  g_grid = nullptr;
}

bool in_kernel() { return g_grid != nullptr; }

std::string place_in_kernel() { return g_grid->place(); }

void* shared_memory() { return g_grid->shared(); }

std::size_t shared_bytes() { return g_grid->launch().shared_bytes; }

void sync_block(const char* file, int line) { g_grid->arrive_at_barrier(file, line); }

void warp_collective(unsigned mask, const char* what, void* data, void (*body)(void* const*)) {
  g_grid->collect(mask, what, data, body);
}

void fail(const std::string& what) {
  if (g_grid) g_grid->fail(what);
  throw KernelError(what);
}

void check_aligned(const void* address, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes)
    fail(Grid::text_of(what, " at ", address, ", which is no multiple of ", bytes,
                       " bytes (a GPU says: misaligned address)"));
}

void check_shared(const void* address, std::size_t bytes, const char* what) {
  const auto* first = static_cast<const unsigned char*>(shared_memory());
  const auto* given = static_cast<const unsigned char*>(address);
  if (given < first || given + bytes > first + shared_bytes())
    fail(Grid::text_of(what, " of ", bytes, " bytes at offset ", given - first,
                       " of shared memory, which has ", shared_bytes(), " bytes"));
}

void async_copy(void* shared, const void* global, std::size_t bytes, std::size_t zeros) {
  check_shared(shared, bytes + zeros, "cp.async");
  check_aligned(shared, bytes + zeros, "cp.async to shared memory");
  if (bytes) check_aligned(global, bytes + zeros, "cp.async from global memory");
  g_grid->running().open_copies.push_back({shared, global, bytes, zeros});
}

void async_commit() {
  ThreadState& thread = g_grid->running();
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void async_wait(unsigned groups_left) {
  ThreadState& thread = g_grid->running();
  while (thread.copy_groups.size() > groups_left) {
    for (const Copy& copy : thread.copy_groups.front()) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
      std::memset(static_cast<unsigned char*>(copy.shared) + copy.bytes, 0, copy.zeros);
    }
    thread.copy_groups.pop_front();
  }
}

}  // namespace cuda_emulator

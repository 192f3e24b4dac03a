#include "grid.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "turns.h"

namespace cuda_emulator {

Thread current;

namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr unsigned kWarp = 32;

enum class State : unsigned char { ready, at_barrier, in_warp, before_previous_kernel, finished };

struct Copy {
  void* shared;
  const void* global;
  std::size_t bytes, zeros;
};

struct ThreadState {
  Fiber fiber;
  void* stack = allocate_stack(kStackBytes);
  uint3 place{};       // in its block
  unsigned index = 0;  // the same as one number
  const char* waits_at = "";
  int line = 0;
  bool waited = false;                        // for the previous kernel
  bool is_unfinished = false;                 // its last grid ended by an error
  std::vector<Copy> open_copies;              // begun, not committed
  std::deque<std::vector<Copy>> copy_groups;  // committed, oldest first
};

// Lanes of a warp on their way to a collective operation.
struct Meeting {
  unsigned mask, arrived;
  const char* what;
  void* lanes[kWarp];
};

// Threads that no grid uses now, kept for the next one with their stacks and never destroyed.
std::vector<ThreadState*>& spare_threads() {
  static auto* spare = new std::vector<ThreadState*>;
  return *spare;
}

class Grid;
Grid* g_grid = nullptr;  // the one whose threads run

// One launch, block after block.
class Grid : public StartedGrid {
 public:
  Grid(const Launch& launch, std::function<void()> kernel, Watch watch = {})
      : launch_(launch),
        kernel_(std::move(kernel)),
        watch_(std::move(watch)),
        random_(options().seed + launches_++) {
    check_launch(launch);
    num_threads_ = launch.block.x * launch.block.y * launch.block.z;
    warps_.resize((num_threads_ + kWarp - 1) / kWarp);
    blocks_.resize(std::size_t{launch_.grid.x} * launch_.grid.y * launch_.grid.z);
    for (std::size_t i = 0; i < blocks_.size(); ++i) blocks_[i] = i;
    if (options().seed) {
      for (std::size_t i = blocks_.size(); i > 1; --i)
        std::swap(blocks_[i - 1], blocks_[random_.below(i)]);
    }
    states_.assign(num_threads_, State::finished);
    while (threads_.size() < num_threads_) {
      if (spare_threads().empty()) spare_threads().push_back(new ThreadState);
      threads_.push_back(spare_threads().back());
      spare_threads().pop_back();
    }
  }
  ~Grid() override {
    for (unsigned i = 0; i < num_threads_; ++i) {
      if (states_[i] != State::finished) threads_[i]->is_unfinished = true;
    }
    spare_threads().insert(spare_threads().end(), threads_.begin(), threads_.end());
  }

  // Runs a block as far as it gets without the kernels ahead.
  void start_early() {
    const Running now(this);
    is_early_ = true;
    begin_block(blocks_[0]);
    schedule();
  }

  void finish() override {
    const Running now(this);
    const bool has_started = std::exchange(is_early_, false);
    if (has_started) current = place_of(blocks_[0]);
    for (unsigned i = 0; has_started && i < num_threads_; ++i) {
      if (states_[i] == State::before_previous_kernel) make_ready(i);
    }
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      if (i > 0 || !has_started) begin_block(blocks_[i]);
      end_block(blocks_[i]);
    }
  }

  void wait_for_previous_kernel() {
    running_->waited = true;
    if (is_early_) wait(State::before_previous_kernel, "wait_for_previous_kernel");
  }

  void wait(State state, const char* what, int line = 0) {
    ThreadState& thread = *running_;
    states_[thread.index] = state;
    thread.waits_at = what;
    thread.line = line;
    leave();
  }

  // Goes on with whoever is next: another thread, or the scheduler where none is ready, one has
  // failed, or somebody watches.
  void leave(bool finished = false) {
    ThreadState& left = *running_;
    if (turns_.empty() || error_ || watch_) {
      switch_fiber(left.fiber, scheduler_, finished);
    } else if (Fiber& next = choose(); &next != &left.fiber) {
      switch_fiber(left.fiber, next, finished);
    }
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
      if (threads_[i] != running_) make_ready(i);
    }
    yield();
  }

  void collect(unsigned mask, const char* what, void* data, void (*body)(void* const*)) {
    const unsigned lane = current.index % kWarp, bit = 1u << lane;
    if (!(mask & bit)) fail(text_of(what, " with a mask that leaves out lane ", lane, " itself"));
    std::vector<Meeting>& meetings = warps_[current.index / kWarp];
    auto found = meetings.end();
    for (auto other = meetings.begin(); other != meetings.end(); ++other) {
      if (other->mask == mask && (other->what == what || !std::strcmp(other->what, what))) {
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
    const unsigned warp = current.index / kWarp;
    for (unsigned other = 0; other < kWarp; ++other) {
      if (mask >> other & 1u) states_[warp * kWarp + other] = State::ready;
    }
    // With this lane, where the others get a chance to go first.
    turns_.add(warp, options().seed ? mask : mask & ~bit);
    if (options().seed) leave();
  }

  ThreadState& running() { return *running_; }
  // Whether a copy that is begun now is done now. Not where everything goes in ascending order, nor
  // in a kernel that was started early, perhaps beside one that on a GPU would not have let it.
  bool copies_at_once() { return options().seed && !is_early_ && random_.below(2) == 1; }
  const Launch& launch() const { return launch_; }
  void* shared() const { return shared_.data(); }

  std::string place() const {
    return text_of("kernel ", launch_.name, ", block (", current.block.x, ", ", current.block.y,
                   ", ", current.block.z, "), thread ", current.index);
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw KernelError(text_of(place(), ": ", what));
  }

 private:
  // Runs on a fiber: the whole life of one CUDA thread.
  static void thread_main();

  void make_ready(unsigned thread) {
    states_[thread] = State::ready;
    turns_.add(thread);
  }

  // Whose turn it is.
  Fiber& choose() {
    running_ = threads_[turns_.take()];
    current.thread = running_->place;
    current.index = running_->index;
    return running_->fiber;
  }

  // Lets the others have a chance to go first.
  void yield() {
    if (!options().seed) return;
    make_ready(running_->index);
    leave();
  }

  // Whose threads `current` and the others mean, until this goes.
  class Running {
   public:
    explicit Running(Grid* grid) { g_grid = grid; }
    ~Running() { g_grid = nullptr; }
    Running(const Running&) = delete;
    Running& operator=(const Running&) = delete;
  };

  // Of the first thread of a block.
  Thread place_of(std::size_t block) const {
    const dim3 grid = launch_.grid;
    const uint3 at = {static_cast<unsigned>(block % grid.x),
                      static_cast<unsigned>(block / grid.x % grid.y),
                      static_cast<unsigned>(block / grid.x / grid.y)};
    return {{}, at, launch_.block, grid, 0};
  }

  void begin_block(std::size_t block) {
    const dim3 size = launch_.block;
    current = place_of(block);
    // Its own piece of memory, exactly as long as asked for, so that the address sanitizer sees
    // the first byte behind it.
    shared_ = GuardedBytes(launch_.shared_bytes);
    turns_.start_block(num_threads_, options().seed ? &random_ : nullptr);
    num_at_barrier_ = 0;
    for (std::vector<Meeting>& meetings : warps_) meetings.clear();
    for (unsigned i = 0; i < num_threads_; ++i) {
      ThreadState& thread = *threads_[i];
      thread.place = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      thread.index = i;
      thread.waited = false;
      thread.open_copies.clear();
      thread.copy_groups.clear();
      if (std::exchange(thread.is_unfinished, false) || states_[i] != State::finished)
        forget_frames(thread.stack, kStackBytes);
      prepare(thread.fiber, thread.stack, kStackBytes, &thread_main);
      make_ready(i);
    }
  }

  void end_block(std::size_t block) {
    schedule();
    if (launch_.overlaps && std::none_of(threads_.begin(), threads_.end(),
                                         [](const ThreadState* each) { return each->waited; }))
      fail(
          "its block ended without wait_for_previous_kernel(), though the kernel was launched to "
          "overlap with the one ahead");
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
    begin_block(block);
    end_block(block);
    throw KernelError(text_of("kernel ", launch_.name, ", block ", block, ": wrote outside of its ",
                              launch_.shared_bytes, " bytes of shared memory"));
  }

  void schedule() {
    while (!turns_.empty()) {
      switch_fiber(scheduler_, choose());
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      if (watch_) {
        const std::string seen = watch_();
        if (!seen.empty()) fail(seen);
      }
    }
    if (is_early_) return;
    const auto num_finished = std::count(states_.begin(), states_.end(), State::finished);
    for (unsigned i = 0; i < num_threads_; ++i) {
      const ThreadState& thread = *threads_[i];
      if (states_[i] == State::finished) continue;
      current.thread = thread.place;
      current.index = i;
      const std::string place =
          states_[i] == State::at_barrier
              ? text_of("__syncthreads of ", thread.waits_at, ":", thread.line)
              : text_of(thread.waits_at);
      fail(text_of("waits for ever in ", place, ": ", num_finished, " of ", num_threads_,
                   " threads have ended, ", num_at_barrier_, " wait at a barrier"));
    }
  }

  const Launch launch_;
  const std::function<void()> kernel_;
  Watch watch_, shared_watch_;
  bool looks_for_writer_ = false;
  Random random_;
  unsigned num_threads_ = 0;
  std::vector<ThreadState*> threads_;
  std::vector<State> states_;        // of the threads; apart, since one lane sets a whole warp's
  std::vector<std::size_t> blocks_;  // in the order in which they run
  bool is_early_ = false;
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
};

std::uint64_t Grid::launches_ = 0;

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
  grid.states_[self.index] = State::finished;
  grid.leave(true);
}

}  // namespace

void run_grid(const Launch& launch, const std::function<void()>& kernel, const Watch& watch) {
  Grid(launch, kernel, watch).finish();
}

std::unique_ptr<StartedGrid> start_grid(const Launch& launch, const std::function<void()>& kernel) {
  auto grid = std::make_unique<Grid>(launch, kernel);
  grid->start_early();
  return grid;
}

bool in_kernel() { return g_grid != nullptr; }

std::string place_in_kernel() { return g_grid->place(); }

void* shared_memory() { return g_grid->shared(); }

std::size_t shared_bytes() { return g_grid->launch().shared_bytes; }

void sync_block(const char* file, int line) { g_grid->arrive_at_barrier(file, line); }

void wait_for_previous_kernel() { g_grid->wait_for_previous_kernel(); }

void warp_collective(unsigned mask, const char* what, void* data, void (*body)(void* const*)) {
  g_grid->collect(mask, what, data, body);
}

void fail(const std::string& what) {
  if (g_grid) g_grid->fail(what);
  throw KernelError(what);
}

void check_aligned(const void* address, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes)
    fail(text_of(what, " at ", address, ", which is no multiple of ", bytes,
                 " bytes (a GPU says: misaligned address)"));
}

void check_shared(const void* address, std::size_t bytes, const char* what) {
  const auto* first = static_cast<const unsigned char*>(shared_memory());
  const auto* given = static_cast<const unsigned char*>(address);
  if (given < first || given + bytes > first + shared_bytes())
    fail(text_of(what, " of ", bytes, " bytes at offset ", given - first,
                 " of shared memory, which has ", shared_bytes(), " bytes"));
}

void async_copy(void* shared, const void* global, std::size_t bytes, std::size_t zeros) {
  check_shared(shared, bytes + zeros, "cp.async");
  check_aligned(shared, bytes + zeros, "cp.async to shared memory");
  if (bytes) check_aligned(global, bytes + zeros, "cp.async from global memory");
  // A copy may be done at once or no sooner than it is waited for: whoever still reads what it
  // overwrites is found out by the one, whoever reads too early by the other.
  if (g_grid->copies_at_once()) {
    std::memcpy(shared, global, bytes);
    std::memset(static_cast<unsigned char*>(shared) + bytes, 0, zeros);
    bytes = zeros = 0;  // what is left is to be waited for
  }
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

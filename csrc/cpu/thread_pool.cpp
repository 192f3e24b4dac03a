#include "cpu/thread_pool.h"

#include <chrono>

#include "cpu/platform.h"

namespace octavo::cpu {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// How long a wait spins: longer than the gaps within a step, but so short that an idle engine does
// not occupy the cores.
constexpr microseconds kSpin{100};
// Between two looks at the CPU time of the thread that is waited for.
constexpr microseconds kLook{10};
// After this a worker gives thread 0 its core. Longer than Python's work between steps on thread
// 0's core, shorter than a time slice of another program.
constexpr microseconds kStuck{400};

// job_: the number of joined workers, whether it is open, its own number.
constexpr std::uint64_t kJoined = 0xffff, kOpen = 0x10000, kNumber = 0x20000;

bool is_new(std::uint64_t job, std::uint64_t seen) {
  return (job & kOpen) != 0 && job / kNumber != seen;
}

}  // namespace

// One wait, which may watch one thread after another.
class ThreadPool::Wait {
 public:
  // Spins a little. Returns whether it is time to look why the wait is long.
  bool is_due() {
    constexpr int kPauses = 8;
    for (int i = 0; i < kPauses; ++i) pause();
    const Clock::time_point now = Clock::now();
    if (now < next_look_) return false;
    next_look_ = now + kLook;
    return true;
  }

  bool is_long() const { return next_look_ - start_ > kSpin; }

  // Whether a thread's CPU time has not advanced since the last look.
  bool stands_still(int id) {
    const Look look{id, cpu_time(id)};
    const bool same = look.id == last_.id && look.time == last_.time && look.time >= 0;
    last_ = look;
    return same;
  }

 private:
  struct Look {
    int id;
    std::int64_t time;
  };
  Clock::time_point start_ = Clock::now(), next_look_ = start_ + kLook;
  Look last_{0, -1};
};

ThreadPool::ThreadPool(int num_threads)
    : processors_(core_processors()),
      threads_(std::make_unique<Thread[]>(static_cast<std::size_t>(num_threads))) {
  if (static_cast<int>(processors_.size()) != num_threads) processors_.clear();
  for (int thread = 0; thread < num_threads; ++thread) at(thread).core.store(thread);
  try {
    for (int thread = 1; thread < num_threads; ++thread)
      workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // for example no memory for a stack: running threads must not outlive the pool
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

// Binds the system's thread `id` (0: the calling one) to the core of thread `thread` of the pool.
void ThreadPool::bind(int thread, int id) {
  if (!processors_.empty())
    bind_thread(id, processors_[static_cast<std::size_t>(at(thread).core.load())]);
}

void ThreadPool::bind_caller() {
  bind(0, 0);
  at(0).id.store(thread_id());
}

void ThreadPool::set_busy(bool is_busy) {
  // Under the lock, so that no thread is bound that may have ended.
  const std::lock_guard<std::mutex> lock(cores_mutex_);
  at(0).is_needed.store(is_busy);
}

// The calling worker swaps cores with thread 0, on which all others depend, permanently.
void ThreadPool::change_cores(int thread) {
  const std::lock_guard<std::mutex> lock(cores_mutex_);
  if (!at(0).is_needed.load()) return;
  at(0).core.store(at(thread).core.exchange(at(0).core.load()));
  // Thread 0 may start on this core before this thread has left it, and so keep it from leaving;
  // then thread 0 binds this thread to its new core (run_erased).
  in_the_way_.store(thread);
  bind(0, at(0).id.load());
  bind(thread, 0);
  in_the_way_.store(0);
}

void ThreadPool::run_erased(Function function, void* context, bool everyone) {
  if (workers_.empty()) {
    function(context, 0);
    return;
  }
  if (const int thread = in_the_way_.load()) bind(thread, at(thread).id.load());
  function_ = function;
  context_ = context;
  finished_.store(0, std::memory_order_relaxed);
  // Sequentially consistent on both sides: either the worker sees the new job before it sleeps, or
  // this thread sees that it sleeps.
  job_.store((job_.load(std::memory_order_relaxed) / kNumber + 1) * kNumber | kOpen);
  if (sleeping_.load() > 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  function(context, 0);
  wait_for_workers(everyone ? size() - 1 : static_cast<int>(job_.fetch_and(~kOpen) & kJoined));
}

// expected: how many workers have to finish the job. A worker that has lost its core in the middle
// of a piece gets the core of the caller, which sleeps, and is sent back when all are done.
void ThreadPool::wait_for_workers(int expected) {
  const auto is_done = [&] { return finished_.load() == expected; };
  bool has_guests = false;
  for (Wait wait; !is_done();) {
    if (!wait.is_due()) continue;
    int other = 1;  // the first that is not done
    while (other < size() && (!at(other).is_needed.load() || at(other).is_guest)) ++other;
    const bool is_stuck = at(0).id.load() && other < size() && !processors_.empty() &&
                          wait.stands_still(at(other).id.load());
    if (!is_stuck && !wait.is_long()) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    if (is_stuck) {
      has_guests = at(other).is_guest = true;
      bind(0, at(other).id.load());
    }
    done_.wait_for(lock, kSpin, is_done);  // not longer: another worker may have lost its core
    caller_sleeps_.store(false);
  }
  for (int other = 1; has_guests && other < size(); ++other) {
    if (!at(other).is_guest) continue;
    at(other).is_guest = false;
    bind(other, at(other).id.load());
  }
}

// Waits for a job that is not `seen`, and joins it. Returns false when the pool ends.
bool ThreadPool::join(int thread, std::uint64_t& seen) {
  for (Wait wait;;) {
    for (std::uint64_t job = job_.load(); is_new(job, seen);) {
      at(thread).is_needed.store(true);  // before the caller counts on it
      if (!job_.compare_exchange_weak(job, job + 1)) continue;
      seen = job / kNumber;
      return true;
    }
    at(thread).is_needed.store(false);
    if (stopping_.load()) return false;
    if (!wait.is_due() || !wait.is_long()) continue;
    if (sleep_until_job(seen)) {
      wait = Wait();
    } else {
      change_cores(thread);
    }
  }
}

// Returns false if thread 0 should work but has not run meanwhile.
bool ThreadPool::sleep_until_job(std::uint64_t seen) {
  const auto has_come = [&] { return stopping_.load() || is_new(job_.load(), seen); };
  const int id = processors_.empty() ? 0 : at(0).id.load();
  std::unique_lock<std::mutex> lock(mutex_);
  sleeping_.fetch_add(1);
  bool is_stuck = false;
  while (!is_stuck && !has_come()) {
    if (!id || !at(0).is_needed.load()) {
      wake_.wait(lock, has_come);
    } else {
      const std::int64_t time = cpu_time(id);
      is_stuck = !wake_.wait_for(lock, kStuck, has_come) && at(0).is_needed.load() && time >= 0 &&
                 cpu_time(id) == time;
    }
  }
  sleeping_.fetch_sub(1);
  return !is_stuck;
}

void ThreadPool::work(int thread) {
  bind(thread, 0);
  at(thread).id.store(thread_id());
  for (std::uint64_t seen = 0; join(thread, seen);) {
    function_(context_, thread);
    finished_.fetch_add(1);
    if (caller_sleeps_.load()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_.notify_one();
    }
  }
}

}  // namespace octavo::cpu

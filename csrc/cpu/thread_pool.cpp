#include "cpu/thread_pool.h"

#include "cpu/platform.h"

namespace octavo::cpu {

namespace {

// About 50 microseconds of waiting: longer than the gaps within a step, short enough that an idle
// engine leaves the cores alone.
constexpr int kSpins = 2000;

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : processors_(core_processors()), next_of_share_(static_cast<std::size_t>(num_threads)) {
  if (static_cast<int>(processors_.size()) != num_threads) processors_.clear();
  for (int thread = 1; thread < num_threads; ++thread)
    workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::bind(int thread) const {
  if (!processors_.empty()) bind_thread(processors_[static_cast<std::size_t>(thread)]);
}

void ThreadPool::bind_caller() const { bind(0); }

void ThreadPool::run_erased(Function function, void* context) {
  if (workers_.empty()) {
    function(context, 0);
    return;
  }
  function_ = function;
  context_ = context;
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  // Sequentially consistent on both sides: either the worker sees the new epoch before it sleeps,
  // or this thread sees that it sleeps.
  epoch_.fetch_add(1);
  if (sleeping_.load() > 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  function(context, 0);
  for (int spins = 0; running_.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      std::this_thread::yield();  // a worker's core may be somebody else's just now
    }
  }
}

void ThreadPool::work(int thread) {
  bind(thread);
  std::uint64_t seen = 0;
  while (true) {
    for (int spins = 0; epoch_.load() == seen; ++spins) {
      if (stopping_.load()) return;
      if (spins < kSpins) {
        pause();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return stopping_.load() || epoch_.load() != seen; });
      sleeping_.fetch_sub(1);
    }
    ++seen;
    function_(context_, thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace octavo::cpu

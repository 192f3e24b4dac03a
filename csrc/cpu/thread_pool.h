// Threads that wait for the next piece of an op: first spinning, then asleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace octavo::cpu {

class ThreadPool {
 public:
  // num_threads counts the calling thread, which works along. Workers are bound to a core each when
  // there are as many threads as cores; with fewer, another program may be using the other cores,
  // and which ones that are, only the system knows.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Binds the calling thread, thread 0 of all calls to come, to a core of its own.
  void bind_caller() const;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(thread) once on every thread and returns when all are done. `body` must not throw.
  template <class Body>
  void run(Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_erased([](void* context, int thread) { (*static_cast<Plain*>(context))(thread); },
               const_cast<void*>(static_cast<const void*>(&body)));
  }

  // Calls body(index, thread) for index 0 .. count - 1, each once, on whichever thread is free.
  template <class Body>
  void each(std::int64_t count, Body&& body) {
    if (count <= 1 || workers_.empty()) {
      for (std::int64_t index = 0; index < count; ++index) body(index, 0);
      return;
    }
    std::atomic<std::int64_t> next{0};
    run([&](int thread) {
      for (std::int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;)
        body(index, thread);
    });
  }

  struct Range {
    std::int64_t begin, end;
  };

  // The thread's own share of `count` things: the same in every call.
  Range share(std::int64_t count, int thread) const {
    return {count * thread / size(), count * (thread + 1) / size()};
  }

  // Calls body(range) until 0 .. count - 1 are covered, each once, `piece` or fewer at a time.
  // Every thread goes through its own share, and then helps those that are behind with theirs.
  template <class Body>
  void shares(std::int64_t count, std::int64_t piece, Body&& body) {
    for (int thread = 0; thread < size(); ++thread)
      next_of_share_[static_cast<std::size_t>(thread)].value.store(share(count, thread).begin);
    run([&](int thread) {
      for (int other = 0; other < size(); ++other) {
        const int owner = (thread + other) % size();
        std::atomic<std::int64_t>& next = next_of_share_[static_cast<std::size_t>(owner)].value;
        const std::int64_t end = share(count, owner).end;
        for (std::int64_t at; (at = next.fetch_add(piece, std::memory_order_relaxed)) < end;)
          body(Range{at, at + piece < end ? at + piece : end});
      }
    });
  }

 private:
  using Function = void (*)(void* context, int thread);

  struct alignas(64) Counter {  // on a cache line of its own
    std::atomic<std::int64_t> value{0};
  };

  void run_erased(Function function, void* context);
  void work(int thread);

  void bind(int thread) const;

  std::vector<std::thread> workers_;
  std::vector<int> processors_;  // one for each thread, or empty: threads go where they like
  std::vector<Counter> next_of_share_;
  Function function_ = nullptr;
  void* context_ = nullptr;
  std::atomic<std::uint64_t> epoch_{0};  // grows by one a job
  std::atomic<int> running_{0};          // workers that have not finished the job
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace octavo::cpu

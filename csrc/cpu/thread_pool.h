// Threads that wait for the next piece of an op: first spinning, then asleep.
//
// Another program may use a part of a core. No more speed than that part should be lost:
// - Work is taken in pieces, and a job ends when its pieces are done: no thread waits for one that
//   has not started on it.
// - A thread that lost its core while others need it is found by its CPU time, which does not
//   advance. Threads here have a core each, so it would wait there for a whole time slice of the
//   other program (4 ms, say). A thread that waits for it gives it its own core instead.
// docs/cpu.md has the figures.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace octavo::cpu {

class ThreadPool {
 public:
  // num_threads counts the calling thread, which works too. Workers are bound to a core each when
  // there are as many threads as cores; with fewer, another program may be using other cores, and
  // only the system knows which.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Binds the calling thread, thread 0 of all later calls, to its own core.
  void bind_caller();

  // While such an object exists, thread 0 works, within jobs or between them, and workers that wait
  // for it give it a core if it does not run.
  class Busy {
   public:
    explicit Busy(ThreadPool& pool) : pool_(pool) { pool_.set_busy(true); }
    ~Busy() { pool_.set_busy(false); }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

   private:
    ThreadPool& pool_;
  };

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(thread) once on every thread and returns when all are done. `body` must not throw.
  template <class Body>
  void run(Body&& body) {
    run_any(body, true);
  }

  // Calls body(index, thread) for index 0 .. count - 1, each once, on any free thread.
  template <class Body>
  void each(std::int64_t count, Body&& body) {
    if (count <= 1 || workers_.empty()) {
      for (std::int64_t index = 0; index < count; ++index) body(index, 0);
      return;
    }
    std::atomic<std::int64_t> next{0};
    run_any(
        [&](int thread) {
          for (std::int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            body(index, thread);
        },
        false);
  }

  struct Range {
    std::int64_t begin, end;
  };

  // The thread's own share of `count` things: the same in every call.
  Range share(std::int64_t count, int thread) const {
    return {count * thread / size(), count * (thread + 1) / size()};
  }

  // Calls body(range) until 0 .. count - 1 are covered, each once, `piece` or fewer at a time.
  // Every thread goes through its core's share, and then takes pieces of the other shares.
  template <class Body>
  void shares(std::int64_t count, std::int64_t piece, Body&& body) {
    for (int core = 0; core < size(); ++core) at(core).next.store(share(count, core).begin);
    run_any(
        [&](int thread) {
          const int first = at(thread).core.load();
          for (int other = 0; other < size(); ++other) {
            const int owner = (first + other) % size();
            std::atomic<std::int64_t>& next = at(owner).next;
            const std::int64_t end = share(count, owner).end;
            for (std::int64_t at; (at = next.fetch_add(piece, std::memory_order_relaxed)) < end;)
              body(Range{at, at + piece < end ? at + piece : end});
          }
        },
        false);
  }

 private:
  using Function = void (*)(void* context, int thread);
  class Wait;

  struct alignas(64) Thread {            // each on separate cache lines
    std::atomic<std::int64_t> next{0};   // the next index of the share that belongs to the core
    std::atomic<int> core{0};            // its own: an index of processors_
    std::atomic<int> id{0};              // the system's; 0 until it is bound
    std::atomic<bool> is_needed{false};  // others may wait for it: it is in a job, or in a step
    bool is_guest = false;               // on thread 0's core, for the rest of a job
  };

  template <class Body>
  void run_any(Body&& body, bool everyone) {
    using Plain = std::remove_reference_t<Body>;
    run_erased([](void* context, int thread) { (*static_cast<Plain*>(context))(thread); },
               const_cast<void*>(static_cast<const void*>(&body)), everyone);
  }

  void stop();
  void run_erased(Function function, void* context, bool everyone);
  void wait_for_workers(int expected);
  void work(int thread);
  bool join(int thread, std::uint64_t& seen);
  bool sleep_until_job(std::uint64_t seen);

  void set_busy(bool is_busy);
  void bind(int thread, int id);
  void change_cores(int thread);

  Thread& at(int index) { return threads_[static_cast<std::size_t>(index)]; }

  std::vector<int> processors_;  // one for each thread, or empty: threads are not bound
  std::unique_ptr<Thread[]> threads_;
  std::vector<std::thread> workers_;
  Function function_ = nullptr;
  void* context_ = nullptr;
  std::atomic<std::uint64_t> job_{0};  // its number, whether it can be joined, how many have
  std::atomic<int> finished_{0};       // workers that have joined it and are done
  std::atomic<int> sleeping_{0};       // workers
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int> in_the_way_{0};  // a worker that may be on the core it has given away, or 0
  std::mutex cores_mutex_;          // held while a thread is bound
};

}  // namespace octavo::cpu

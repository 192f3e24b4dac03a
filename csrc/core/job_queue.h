// A thread for the steps of a runtime.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace octavo {

// Runs jobs one after the other on its own thread, so that `submit` returns at once.
class JobQueue {
 public:
  JobQueue();
  ~JobQueue();  // finishes the queued jobs
  void push(std::function<void()> job);
  // Runs `job` after all others, waits for it, and rethrows its exception here.
  void run(const std::function<void()>& job);
  // Throws in a process that was forked from this one: it has a copy of the queue but not the
  // thread, so a job would never end. `push` and `run` do the same.
  void check_process() const;

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  bool stopping_ = false;
  const long process_;
  std::thread thread_;
};

}  // namespace octavo

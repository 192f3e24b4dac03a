// A thread of its own for the steps of a runtime.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace octavo {

// Runs jobs one after the other on a thread of its own, so that `submit` returns at once.
class JobQueue {
 public:
  JobQueue();
  ~JobQueue();  // finishes what is queued
  void push(std::function<void()> job);
  // Runs `job` behind all others, waits for it, and throws here what it threw there.
  void run(const std::function<void()>& job);
  // Throws in a process that was forked from this one: it has a copy of the queue but no thread, so
  // that a job would never end. `push` and `run` do the same.
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

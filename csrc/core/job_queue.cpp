#include "core/job_queue.h"

#include <unistd.h>

#include <exception>
#include <stdexcept>

#include "core/text.h"

namespace octavo {

JobQueue::JobQueue() : process_(getpid()), thread_([this] { work(); }) {}

JobQueue::~JobQueue() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void JobQueue::check_process() const {
  if (getpid() == process_) return;
  throw std::runtime_error(text("the runtime was made by process ", process_,
                                " and is used by process ", getpid(),
                                ", a fork of it that lacks its threads; make one after the fork"));
}

void JobQueue::push(std::function<void()> job) {
  check_process();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  changed_.notify_one();
}

void JobQueue::run(const std::function<void()>& job) {
  std::mutex mutex;
  std::condition_variable finished;
  bool done = false;
  std::exception_ptr error;
  push([&] {
    try {
      job();
    } catch (...) {
      error = std::current_exception();
    }
    // Notified under the lock: the waiter's condition variable must outlive the call.
    const std::lock_guard<std::mutex> lock(mutex);
    done = true;
    finished.notify_one();
  });
  std::unique_lock<std::mutex> lock(mutex);
  finished.wait(lock, [&] { return done; });
  if (error) std::rethrow_exception(error);
}

void JobQueue::work() {
  while (true) {
    std::function<void()> job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job();
  }
}

}  // namespace octavo

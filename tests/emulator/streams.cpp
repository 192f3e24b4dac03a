#include "streams.h"

#include <utility>

namespace cuda_emulator {

void Stream::push(Operation operation) {
  if (capturing_)
    captured_.push_back(std::move(operation));
  else
    queue_.push_back(std::move(operation));
}

void Stream::run_until(std::uint64_t position) {
  while (done_ < position && !queue_.empty()) {
    start_early(position);
    const Operation operation = std::move(queue_.front());
    queue_.pop_front();
    std::unique_ptr<StartedGrid> started;
    if (!started_.empty()) {
      started = std::move(started_.front());
      started_.pop_front();
    }
    ++done_;
    operation.run(std::move(started));
  }
}

void Stream::start_early(std::uint64_t position) {
  if (options().twice || !queue_.front().is_kernel) return;
  for (std::size_t i = 1; i <= options().early_starts; ++i) {
    if (i >= queue_.size() || done_ + i >= position || !queue_[i].start) return;
    while (started_.size() <= i) started_.emplace_back();
    if (!started_[i]) started_[i] = queue_[i].start();
  }
}

void Stream::clear() {
  done_ = end();
  queue_.clear();
  started_.clear();
  end_capture();
}

Graph Stream::end_capture() {
  capturing_ = false;
  return std::exchange(captured_, {});
}

}  // namespace cuda_emulator

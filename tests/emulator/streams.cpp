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
    const Operation operation = std::move(queue_.front());
    queue_.pop_front();
    ++done_;
    operation();
  }
}

void Stream::clear() {
  done_ = end();
  queue_.clear();
  end_capture();
}

Graph Stream::end_capture() {
  capturing_ = false;
  return std::exchange(captured_, {});
}

}  // namespace cuda_emulator

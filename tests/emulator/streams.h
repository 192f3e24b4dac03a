// Streams, events and graphs of the emulated device.
//
// A stream holds back what it is given until somebody waits for it. So host memory that is
// overwritten too early, or read before it was waited for, shows here, though a fast GPU might
// have been done in time. And where kernels may overlap, those behind the one that runs have
// started.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "grid.h"

namespace cuda_emulator {

// A copy, a kernel or a mark. run: gets what start gave, or null where it was not called.
struct Operation {
  std::function<void(std::unique_ptr<StartedGrid>)> run;
  bool is_kernel = false;
  std::function<std::unique_ptr<StartedGrid>()> start;  // of kernels that overlap; else empty
};
using Graph = std::vector<Operation>;

class Stream {
 public:
  void push(Operation operation);
  void push(std::function<void()> body) {
    Operation operation;
    operation.run = [body = std::move(body)](std::unique_ptr<StartedGrid>) { body(); };
    push(std::move(operation));
  }
  // Does what was pushed up to the position (see `end`), in order.
  void run_until(std::uint64_t position);
  void run() { run_until(end()); }
  std::uint64_t end() const { return done_ + queue_.size(); }
  std::uint64_t done() const { return done_; }

  // Forgets what was pushed and not done.
  void clear();

  void begin_capture() { capturing_ = capture_is_valid_ = true; }
  bool is_capturing() const { return capturing_; }
  // Something was called that cannot be captured: the capture goes on and comes to nothing.
  void spoil_capture() { capture_is_valid_ = false; }
  bool capture_is_valid() const { return capture_is_valid_; }
  Graph end_capture();

 private:
  // Starts the kernels behind the front one that may start before it has ended, up to `position`.
  void start_early(std::uint64_t position);

  std::deque<Operation> queue_;
  std::deque<std::unique_ptr<StartedGrid>> started_;  // of the front ones of the queue, or null
  std::uint64_t done_ = 0;
  bool capturing_ = false, capture_is_valid_ = true;
  Graph captured_;
};

}  // namespace cuda_emulator

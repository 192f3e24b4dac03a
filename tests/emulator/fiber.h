// Stacks that take turns on one host thread: what a CUDA thread runs on in the emulator.
#pragma once

#include <cstddef>

namespace cuda_emulator {

// A stack and the place where it stopped. Not copyable: the stack holds pointers into itself.
struct Fiber {
  void* stack_pointer = nullptr;
  void* stack = nullptr;  // lowest address; null for the host thread's own stack
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // of the address sanitizer

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

// Makes `fiber` start with entry() at the next switch to it. entry must not return; it ends by
// switching away with `finished`. The stack is the caller's and may be used again afterwards.
void prepare(Fiber& fiber, void* stack, std::size_t stack_bytes, void (*entry)());

// To be called before `prepare` where a fiber was given up in the middle: its frames are no more.
void forget_frames(void* stack, std::size_t bytes);

// Leaves `from` where it is and goes on with `to`. finished: `from` will not be resumed.
void switch_fiber(Fiber& from, Fiber& to, bool finished = false);

// To be called first thing on a fiber's new stack.
void fiber_started();

// Memory for one stack, with a page below it that faults when the stack overflows. Kept for good.
void* allocate_stack(std::size_t bytes);

}  // namespace cuda_emulator

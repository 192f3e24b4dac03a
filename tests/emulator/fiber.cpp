#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#include "sanitizer.h"

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) || defined(__aarch64__)
#define EMULATOR_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace cuda_emulator {

namespace {

// The stack that was left last, for fiber_started: the sanitizer wants to know.
#ifdef EMULATOR_ASAN
Fiber* g_left = nullptr;

void finish_switch(void* fake_stack) {
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
  if (g_left && !g_left->stack) {  // the host thread's own stack: only now its bounds are known
    g_left->stack = const_cast<void*>(bottom);
    g_left->stack_bytes = bytes;
  }
}
#endif

}  // namespace

#ifdef EMULATOR_OWN_SWITCH

// Saves what the calling convention makes the callee keep, swaps the stack pointers, restores.
// swapcontext would do, but it asks the kernel for the signal mask each time: 30 times slower.
extern "C" void cuda_emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl cuda_emulator_switch
.type cuda_emulator_switch,@function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch,.-cuda_emulator_switch
)");
constexpr std::size_t kSavedWords = 6;
#else
asm(R"(
.text
.globl cuda_emulator_switch
.type cuda_emulator_switch,%function
cuda_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size cuda_emulator_switch,.-cuda_emulator_switch
)");
#endif

void prepare(Fiber& fiber, void* stack, std::size_t stack_bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = stack_bytes;
  fiber.fake_stack = nullptr;
  const auto top = (reinterpret_cast<std::uintptr_t>(stack) + stack_bytes) & ~std::uintptr_t{15};
  auto** words = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
  // After the pops, `ret` takes the entry; what is left must look like the moment after a call:
  // the stack pointer is 8 below a multiple of 16.
  *--words = nullptr;
  *--words = reinterpret_cast<void*>(entry);
  for (std::size_t i = 0; i < kSavedWords; ++i) *--words = nullptr;
#else
  words -= 20;
  for (int i = 0; i < 20; ++i) words[i] = nullptr;
  words[11] = reinterpret_cast<void*>(entry);  // x30, the return address
#endif
  fiber.stack_pointer = words;
}

#else  // other processors: the C library's contexts, kept at the top of each stack

void prepare(Fiber& fiber, void* stack, std::size_t stack_bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = stack_bytes;
  fiber.fake_stack = nullptr;
  auto* context = new (stack) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = static_cast<char*>(stack) + sizeof(ucontext_t);
  context->uc_stack.ss_size = stack_bytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.stack_pointer = context;
}

static void cuda_emulator_switch(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

#endif

void switch_fiber(Fiber& from, Fiber& to, bool finished) {
#ifdef EMULATOR_ASAN
  g_left = &from;
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  cuda_emulator_switch(&from.stack_pointer, to.stack_pointer);
  finish_switch(from.fake_stack);
#else
  static_cast<void>(finished);
  cuda_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

void forget_frames(void* stack, std::size_t bytes) {
#ifdef EMULATOR_ASAN
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);
#else
  static_cast<void>(stack);
  static_cast<void>(bytes);
#endif
}

void fiber_started() {
#ifdef EMULATOR_ASAN
  finish_switch(nullptr);
#endif
}

void* allocate_stack(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  return static_cast<char*>(memory) + page;
}

}  // namespace cuda_emulator

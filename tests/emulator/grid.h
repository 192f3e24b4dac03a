// Runs the blocks of a kernel on the host: one fiber a CUDA thread, in an order drawn at random.
//
// Inside a block a thread runs until it meets the others (a barrier, a shuffle, a matrix product)
// or ends; then it is another's turn (turns.h). So whatever a kernel leaves to luck on a GPU (who
// writes first, who reads too early) happens here sooner or later, and with a given seed it happens
// again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

namespace cuda_emulator {

template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A mistake of the kernel, in words: kernel, block, thread and what is wrong.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Options {
  // 0: blocks and threads in ascending order. Else the seed of their order.
  std::uint64_t seed = 1;
  // What shared memory holds before a block starts, and device memory before anyone writes.
  // 0xff makes every float, bf16 and f16 a NaN and every integer -1.
  unsigned char poison = 0xff;
  // How many kernels that overlap are started ahead of the one that runs.
  unsigned early_starts = 3;
  // Runs every kernel twice from the same device memory, with other orders, poison and guards, and
  // reports it where the results differ: a race, or a read of what nobody wrote. Slow.
  bool twice = false;
  // How mma.sync rounds. 0: the exact sum, once, to nearest. 80, 90: as the tensor cores of that
  // compute capability do (tensor_cores.h). Slow.
  unsigned tensor_cores = 0;
  std::size_t memory_bytes = std::size_t{2} << 30;  // of the device
  // Limits of one block, as on sm_80.
  unsigned max_threads = 1024;
  std::size_t max_shared_bytes = 163 * 1024;  // 99 on sm_86, sm_89 and sm_120, 227 on sm_90
};

// The options of all launches that follow. At first they are what the environment says:
// CUDA_EMULATOR_SEED, CUDA_EMULATOR_POISON (0 to 255), CUDA_EMULATOR_TWICE (0 or 1),
// CUDA_EMULATOR_EARLY_STARTS, CUDA_EMULATOR_TENSOR_CORES (0, 80 or 90), CUDA_EMULATOR_SHARED_KIB,
// CUDA_EMULATOR_MEMORY_KIB.
Options& options();

struct Launch {
  const char* name = "";
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  // May start before the kernels ahead of it have ended, and calls wait_for_previous_kernel()
  // before it touches what they write (programmatic dependent launch).
  bool overlaps = false;
};

// Throws a KernelError unless a GPU would accept such a launch.
void check_launch(const Launch& launch);

// Looked at whenever a thread has stopped: a text, if there is one, ends the run with an error that
// names this thread. To find out who did what was noticed too late.
using Watch = std::function<std::string()>;

// Runs kernel() once for every thread of the grid. Throws KernelError.
void run_grid(const Launch& launch, const std::function<void()>& kernel, const Watch& watch = {});

// A kernel that has started early: one of its blocks has run up to wait_for_previous_kernel().
class StartedGrid {
 public:
  virtual ~StartedGrid() = default;
  // Does the rest. Throws KernelError.
  virtual void finish() = 0;
};
std::unique_ptr<StartedGrid> start_grid(const Launch& launch, const std::function<void()>& kernel);

// ---- for code running on a fiber ----

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned index;  // of the thread in its block
};
// Of the CUDA thread that runs now.
extern Thread current;

void* shared_memory();
std::size_t shared_bytes();

// __syncthreads(). file and line name the barrier: all threads must come to the same one.
void sync_block(const char* file, int line);

// Ends a part that may run before the kernels ahead have ended: it is run before them, so that what
// it reads too early is what they have not written yet.
void wait_for_previous_kernel();

// What a whole warp does together. Waits until every lane of `mask` has come with the same `what`,
// runs body(data of the lanes) once, and lets all go on. data: the lane's own, alive meanwhile;
// lanes outside of the mask are null in the array of 32 that the body gets.
void warp_collective(unsigned mask, const char* what, void* data, void (*body)(void* const* lanes));

// Throws a KernelError that names kernel, block and thread.
[[noreturn]] void fail(const std::string& what);

// Faults of memory that a GPU reports as "misaligned address" and "illegal memory access".
void check_aligned(const void* address, std::size_t bytes, const char* what);
void check_shared(const void* address, std::size_t bytes, const char* what);

// Whether the calling code runs as a CUDA thread, and "kernel NAME, block (x, y, z), thread n".
bool in_kernel();
std::string place_in_kernel();

// cp.async: copies that are begun now and done no sooner than they are waited for.
void async_copy(void* shared, const void* global, std::size_t bytes, std::size_t zeros);
void async_commit();
void async_wait(unsigned groups_left);

}  // namespace cuda_emulator

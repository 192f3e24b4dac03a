// What the CPU backend asks of the operating system. The only file with system-specific calls.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/control_groups.h"

namespace octavo::cpu {

// Physical cores this process may use: those it may run on, or as many as the quota of its control
// groups keeps busy, if these are fewer; at least 1.
int physical_cores(const SystemFolders& folders = {});

// A logical processor on each physical core this process may run on; empty where the system does
// not let threads be bound to one.
std::vector<int> core_processors();

// The system's number of the calling thread.
int thread_id();

// Binds a thread of this process (0: the calling one) to a logical processor, and moves it there;
// does nothing where that is not allowed.
void bind_thread(int id, int processor) noexcept;

// How long a thread of this process has run, in ns; -1 where the system does not tell.
std::int64_t cpu_time(int id) noexcept;

// Bytes that can be taken without swapping and without being killed. Linux: MemAvailable, or less
// where control groups or `ulimit -v` leave less. reserved: bytes among them that this process has
// mapped and not touched yet, which `ulimit -v` counts.
std::size_t available_memory(const SystemFolders& folders = {}, std::int64_t reserved = 0);

// Zero-filled memory aligned to 64 bytes; throws std::bad_alloc. Large pieces begin on a large page
// where the system has such pages, and take no memory until they are touched: whoever touches a
// page first decides which processor's memory it comes from.
void* allocate(std::size_t bytes);
void release(void* data, std::size_t bytes) noexcept;

// Whether an ARM processor has ARMv8.2's dot products of bytes, which user code cannot ask it for.
bool has_dot_product();

// Asks the system for AMX's tile registers, which it keeps from processes that have not asked:
// their 8 KiB are saved whenever it switches threads. Holds for all threads, also those begun
// earlier.
bool request_tile_registers();

// Tells the processor that this thread is waiting in a loop.
void pause();

}  // namespace octavo::cpu

// The CPU backend's calls to the operating system. The only file with system-specific calls.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/control_groups.h"

namespace octavo::cpu {

// Physical cores this process may use: those it may run on, or fewer if the quota of its control
// groups keeps fewer busy; at least 1.
int physical_cores(const SystemFolders& folders = {});

// A logical processor on each physical core this process may run on; empty where the system does
// not let threads be bound to one.
std::vector<int> core_processors();

// The system's number of the calling thread.
int thread_id();

// Binds a thread of this process (0: the calling one) to a logical processor, and moves it there;
// does nothing where that is not allowed.
void bind_thread(int id, int processor) noexcept;

// The CPU time of a thread of this process, in ns; -1 where the system does not tell.
std::int64_t cpu_time(int id) noexcept;

// Bytes that can be allocated without swapping and without being killed. Linux: MemAvailable, or
// less where control groups or `ulimit -v` leave less. reserved: bytes of these that this process
// has mapped and not touched yet, which `ulimit -v` counts.
std::size_t available_memory(const SystemFolders& folders = {}, std::int64_t reserved = 0);

// Zero-filled memory aligned to 64 bytes; throws std::bad_alloc. Large pieces begin on a large page
// where the system has such pages, and take no memory until they are touched. The thread that
// touches a page first determines the processor whose memory it comes from.
void* allocate(std::size_t bytes);
void release(void* data, std::size_t bytes) noexcept;

// Whether an ARM processor has ARMv8.2's dot products of bytes, which user code cannot ask it for.
bool has_dot_product();

// Asks the system for AMX's tile registers. A process must ask, since their 8 KiB are then saved
// whenever the system switches threads. Holds for all threads, also those begun earlier.
bool request_tile_registers();

// Tells the processor that this thread is waiting in a loop.
void pause();

}  // namespace octavo::cpu

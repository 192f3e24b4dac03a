// What the CPU backend asks of the operating system. The only file with system-specific calls.
#pragma once

#include <cstddef>
#include <vector>

namespace octavo::cpu {

// Physical cores this process may run on, respecting affinity and a container's quota; at least 1.
int physical_cores();

// A logical processor on each physical core this process may run on; empty where the system does
// not let threads be bound to one.
std::vector<int> core_processors();

// Binds the calling thread to a logical processor; does nothing where that is not allowed.
void bind_thread(int processor) noexcept;

// Memory that can be taken without swapping, in bytes, respecting a container's limit.
std::size_t available_memory();

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

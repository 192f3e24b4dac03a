// What the CPU backend asks of the operating system. The only file with system-specific calls.
#pragma once

#include <cstddef>

namespace octavo::cpu {

// Physical cores this process may run on, respecting affinity and a container's quota; at least 1.
int physical_cores();

// Memory that can be taken without swapping, in bytes, respecting a container's limit.
std::size_t available_memory();

// Zero-filled memory aligned to 64 bytes; throws std::bad_alloc. Large pieces begin on a large page
// where the system has such pages, and take no memory until they are touched: whoever touches a
// page first decides which processor's memory it comes from.
void* allocate(std::size_t bytes);
void release(void* data, std::size_t bytes) noexcept;

// Tells the processor that this thread is waiting in a loop.
void pause();

}  // namespace octavo::cpu

// What the CPU backend asks of the operating system. The only file with system-specific calls.
#pragma once

#include <cstddef>

namespace octavo::cpu {

// Physical cores this process may run on, respecting affinity and a container's quota; at least 1.
int physical_cores();

// Memory that can be taken without swapping, in bytes, respecting a container's limit.
std::size_t available_memory();

// Asks for large pages behind [data, data + bytes), where the system has such a request.
void advise_large_pages(void* data, std::size_t bytes);

// Tells the processor that this thread is waiting in a loop.
void pause();

}  // namespace octavo::cpu

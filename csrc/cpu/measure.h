// The limits of this machine, measured: `octavo bench` compares its figures with them.
#pragma once

#include <cstddef>
#include <string>

namespace octavo::cpu {

// Bytes a second that all threads together read from memory: the fastest of several passes over
// one buffer much larger than the caches, each thread reading a part that it touched first.
// num_threads 0: one for each physical core. num_bytes 0: a quarter of the memory available, at
// most 1 GiB. Takes about `seconds`, three passes at least.
double measure_bandwidth(int num_threads, double seconds, std::size_t num_bytes);

// Float32 operations a second (a fused multiply-add counts two) of all threads together, on
// registers: no float32 computation in this instruction set can be faster. Extensions (VNNI, BF16)
// are not measured; but "amx" is products of bf16 tiles, added up in float32. isa: one of
// available_isas(), or "auto" for the fastest of them; throws std::invalid_argument for another.
// "scalar" is plain C++ as compiled, a product and a sum.
double measure_flops(int num_threads, const std::string& isa, double seconds);

}  // namespace octavo::cpu

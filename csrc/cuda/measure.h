// What a CUDA device can do at most, measured: the limits that benchmarks are held against.
#pragma once

#include <string>

namespace octavo::cuda {

// "NVIDIA H200", of the device that a backend takes.
std::string device_name();

// Bytes a second read from device memory by a kernel that does nothing else; the best of several
// passes over num_bytes (0: a quarter of the free memory, at most 4 GiB).
double measure_bandwidth(double seconds, double num_bytes);

// Operations a second of mma.sync with bf16 inputs and float32 sums, multiply-adds counted as two,
// all operands in registers. From sm_90 on, wgmma (which cuBLASLt uses) can do more.
double measure_flops(double seconds);

}  // namespace octavo::cuda

// What a CUDA device can do at most, measured: the limits that benchmarks are held against.
#pragma once

#include <functional>

#include "cuda/device/stream.h"

namespace octavo::cuda {

// Seconds between two events around what `work` queues.
double seconds_of(Stream& stream, const std::function<void()>& work);

// Bytes a second read from device memory by a kernel that does nothing else; the best of several
// passes over num_bytes of random data (0: a quarter of the free memory, at most 4 GiB).
double measure_bandwidth(Stream& stream, double seconds, double num_bytes);

// Operations a second of mma.sync with bf16 inputs and float32 sums, multiply-adds counted as two,
// all operands in registers, and random. From sm_90 on, wgmma (which cuBLASLt uses) can do more.
double measure_flops(Stream& stream, double seconds);

}  // namespace octavo::cuda

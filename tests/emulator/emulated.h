// What the emulator's own tests are written with.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "grid.h"
#include "launch.h"
#include "native/check.h"

namespace octavo::tests {

inline void succeed(cudaError_t error) {
  if (error != cudaSuccess) fail(cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Device memory for `count` numbers.
template <class T>
class Array {
 public:
  explicit Array(std::size_t count) : count_(count) {
    void* data = nullptr;
    succeed(cudaMalloc(&data, count * sizeof(T)));
    data_ = static_cast<T*>(data);
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) { set(values); }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() const { return data_; }
  std::size_t bytes() const { return count_ * sizeof(T); }
  void set(const std::vector<T>& values) {
    succeed(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  std::vector<T> get() const {
    std::vector<T> values(count_);
    succeed(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  std::size_t count_;
  T* data_ = nullptr;
};

// The emulator's options, until this goes.
class With {
 public:
  explicit With(cuda_emulator::Options options) : saved_(cuda_emulator::options()) {
    cuda_emulator::options() = options;
  }
  ~With() { cuda_emulator::options() = saved_; }
  With(const With&) = delete;
  With& operator=(const With&) = delete;

 private:
  cuda_emulator::Options saved_;
};

inline cuda_emulator::Options with_seed(std::uint64_t seed, unsigned char poison = 0xff,
                                        bool twice = false) {
  cuda_emulator::Options options;
  options.seed = seed;
  options.poison = poison;
  options.twice = twice;
  return options;
}

// Runs kernel() on every thread and waits. Returns what the device says is wrong, or "".
template <class Kernel>
std::string outcome(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
                    Kernel&& kernel) {
  cudaError_t error = cuda_emulator::enqueue({name, grid, block, shared_bytes}, nullptr, kernel);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  const std::string message = error == cudaSuccess ? "" : cudaGetErrorString(error);
  if (error != cudaSuccess) cudaDeviceReset();
  cudaGetLastError();
  return message;
}

template <class Kernel>
void run(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, Kernel&& kernel) {
  const std::string message = outcome(name, grid, block, shared_bytes, kernel);
  if (!message.empty()) fail(message);
}

// The message must hold every part.
inline void check_message(const std::string& message, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    if (message.find(part) == std::string::npos)
      fail("the message is \"", message, "\"; expected \"", part, "\" in it");
  }
}

std::vector<Test> fault_tests();
std::vector<Test> memory_fault_tests();
std::vector<Test> product_tests();
std::vector<Test> stream_tests();
std::vector<Test> intrinsic_tests();
std::vector<Test> sampling_math_tests();

}  // namespace octavo::tests

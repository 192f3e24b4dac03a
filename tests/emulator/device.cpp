#include "device.h"

#include "launch.h"

namespace cuda_emulator {

Device& device() {
  static auto* instance = new Device;  // never destroyed: others may free memory at exit
  return *instance;
}

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) device().last = error;
  return error;
}

Stream& stream_of(cudaStream_t stream) {
  return stream && stream != cudaStreamPerThread ? *stream : device().default_stream;
}

bool spoils_a_capture() {
  bool any = false;
  const auto spoil = [&](Stream& stream) {
    if (!stream.is_capturing()) return;
    stream.spoil_capture();
    any = true;
  };
  spoil(device().default_stream);
  for (Stream* stream : device().streams) spoil(*stream);
  return any;
}

void run_all() {
  device().default_stream.run();
  for (Stream* stream : device().streams) stream->run();
}

namespace {

// The device allocation that holds all of these bytes, or none.
const GuardedBytes* find(const void* address, std::size_t bytes) {
  auto found = device().memory.upper_bound(address);
  if (found == device().memory.begin()) return nullptr;
  --found;
  const auto* first = static_cast<const char*>(found->second.data());
  const auto* given = static_cast<const char*>(address);
  return given + bytes <= first + found->second.bytes() ? &found->second : nullptr;
}

}  // namespace

void check_on_device(const char* what, const void* address, std::size_t bytes) {
  if (bytes && !find(address, bytes))
    throw KernelError(std::string(what) + ": " + std::to_string(bytes) +
                      " bytes reach outside of device memory");
}

void check_copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (to_device) check_on_device("the destination of a copy", to, bytes);
  if (from_device) check_on_device("the source of a copy", from, bytes);
  if (bytes && !to_device && find(to, 1))
    throw KernelError("the destination of a copy to the host is device memory");
  if (bytes && !from_device && find(from, 1))
    throw KernelError("the source of a copy from the host is device memory");
}

cudaError_t enqueue(const Launch& launch, cudaStream_t stream,
                    const std::function<void()>& kernel) {
  const Lock lock(device().mutex);
  try {
    check_launch(launch);
  } catch (const KernelError& error) {  // which the device itself survives
    device().launch_message = error.what();
    return note(cudaErrorInvalidConfiguration);
  }
  Operation operation;
  operation.is_kernel = true;
  operation.run = [launch, kernel](std::unique_ptr<StartedGrid> started) {
    run_checked(launch, kernel, started.get());
  };
  if (launch.overlaps) operation.start = [launch, kernel] { return start_grid(launch, kernel); };
  stream_of(stream).push(std::move(operation));
  return note(device().sticky);
}

}  // namespace cuda_emulator

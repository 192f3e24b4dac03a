// Mistakes with memory: outside of an allocation, misaligned, unwritten. Reads outside are seen by
// the address sanitizer alone, writes without it too.

#include <sys/wait.h>
#include <unistd.h>

#include "emulated.h"
#include "programs.cuh"

#if defined(__SANITIZE_ADDRESS__)
#define HAVE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAVE_ASAN 1
#endif
#endif

namespace octavo::tests {

namespace {

using namespace cuda::programs;

constexpr int kCount = 100;

template <ScanFault planted>
std::string scan_outcome() {
  const Array<int> x(std::vector<int>(kCount, 1)), out(kCount);
  return outcome("scan", 1, kCount, 2 * sizeof(int) * kCount,
                 [&] { scan<planted>(out.data(), x.data(), kCount); });
}

// What `body` prints and returns in a process of its own, which the sanitizer may end.
template <class Body>
std::string in_another_process(Body&& body) {
  int ends[2];
  if (pipe(ends) != 0) fail("no pipe");
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    std::string message;
    try {
      message = body();
    } catch (const std::exception& error) {
      message = error.what();
    }
    static_cast<void>(!write(ends[1], message.data(), message.size()));
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char piece[4096];
  for (ssize_t got; (got = read(ends[0], piece, sizeof piece)) > 0;)
    text.append(piece, static_cast<std::size_t>(got));
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return text;
}

void writes_outside() {
#ifdef HAVE_ASAN
  const std::vector<std::string> global = {"AddressSanitizer", "WRITE of size 4",
                                           "in kernel scan, block (0, 0, 0), thread "};
  const std::vector<std::string> shared = global;
#else
  const std::vector<std::string> global = {"kernel scan, block (0, 0, 0), thread ",
                                           "wrote outside of an allocation of 400 bytes of device"};
  const std::vector<std::string> shared = {"kernel scan, block (0, 0, 0), thread 3: ",
                                           "wrote outside of its 800 bytes of shared memory"};
#endif
  check_message(in_another_process(scan_outcome<ScanFault::writes_past_the_end>), global);
  check_message(in_another_process(scan_outcome<ScanFault::writes_before_the_start>), global);
  check_message(in_another_process(scan_outcome<ScanFault::writes_past_shared_memory>), shared);
  CHECK(in_another_process(scan_outcome<ScanFault::none>).empty());
}

void reads_outside() {
  const std::string message = in_another_process(scan_outcome<ScanFault::reads_past_the_end>);
#ifdef HAVE_ASAN
  check_message(message, {"AddressSanitizer", "READ of size 4", "in kernel scan, block (0, 0, 0), ",
                          "thread 99", "programs.cuh"});
#else
  CHECK(message.empty());  // nobody can see it
#endif
}

// Where the value matters, guards of other bytes show it without the sanitizer.
void reads_outside_that_matter() {
#ifndef HAVE_ASAN
  const Array<int> x(std::vector<int>(kCount, 1)), out(kCount);
  const With options(with_seed(1, 0xff, true));
  const std::string message = outcome("shift", 1, kCount, 0, [&] {
    const int i = static_cast<int>(threadIdx.x);
    out.data()[i] = x.data()[i + 1];
  });
  check_message(message, {"kernel shift, block (0, 0, 0), thread 99: "});
#endif
}

void misaligned_loads() {
  const std::vector<float> values = Numbers(2).many(40);
  const Array<float> x(values), out(40);
  run("reverse_fours", 1, 10, 0, [&] { reverse_fours(out.data(), x.data()); });
  CHECK(out.get() == std::vector<float>(values.rbegin(), values.rend()));
  check_message(
      outcome("reverse_fours", 1, 10, 0, [&] { reverse_fours<true>(out.data(), x.data()); }),
      {"kernel reverse_fours, block (0, 0, 0), thread 6: a load of 16 bytes at ",
       "misaligned address"});
}

void device_memory_that_nobody_wrote() {
  for (const unsigned char poison : {0xff, 0x31}) {
    const With options(with_seed(1, poison));
    const Array<unsigned char> fresh(1000);
    CHECK(fresh.get() == std::vector<unsigned char>(1000, poison));
  }
}

void copies_that_go_astray() {
  const Array<int> x(10);
  int host[20] = {};
  const auto message_of = [](cudaError_t error) {
    const std::string message = error == cudaSuccess ? "" : cudaGetErrorString(error);
    cudaDeviceReset();
    return message;
  };
  check_message(message_of(cudaMemcpy(x.data(), host, 44, cudaMemcpyHostToDevice)),
                {"the destination of a copy: 44 bytes reach outside of device memory"});
  check_message(message_of(cudaMemcpy(host, x.data() + 5, 24, cudaMemcpyDeviceToHost)),
                {"the source of a copy: 24 bytes reach outside"});
  check_message(message_of(cudaMemcpy(host, x.data(), 40, cudaMemcpyHostToDevice)),
                {"the destination of a copy: 40 bytes"});
  check_message(message_of(cudaMemcpy(x.data(), x.data(), 40, cudaMemcpyHostToDevice)),
                {"the source of a copy from the host is device memory"});
  check_message(message_of(cudaMemsetAsync(x.data() + 1, 0, 40, nullptr)), {"memset: 40 bytes"});
  CHECK(message_of(cudaMemcpy(x.data(), host, 40, cudaMemcpyHostToDevice)).empty());
}

void out_of_memory() {
  cuda_emulator::Options small;
  small.memory_bytes = 100'000;
  const With options(small);
  std::size_t free = 0, total = 0, after = 0;
  succeed(cudaMemGetInfo(&free, &total));
  CHECK(total == small.memory_bytes && free <= total);
  void* data = nullptr;
  CHECK(cudaMalloc(&data, free + 1) == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaSuccess);
  {
    const Array<int> some(1000);
    succeed(cudaMemGetInfo(&after, &total));
    CHECK(after == free - 4000);
  }
  succeed(cudaMemGetInfo(&after, &total));
  CHECK(after == free);
  CHECK(cudaFree(&free) == cudaErrorInvalidValue);
  cudaGetLastError();
}

// After a fault every call fails, as on a GPU, until the device is reset.
void faults_stay() {
  const Array<int> x(10);
  succeed(cuda_emulator::enqueue({"bad", 1, 1, 0}, nullptr, [&] { cuda_emulator::fail("wrong"); }));
  CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
  int host[10];
  CHECK(cudaMemcpy(host, x.data(), 40, cudaMemcpyDeviceToHost) == cudaErrorLaunchFailure);
  CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
  CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
  check_message(cudaGetErrorString(cudaGetLastError()),
                {"kernel bad, block (0, 0, 0), thread 0: wrong"});
  succeed(cudaDeviceReset());
  succeed(cudaMemcpy(host, x.data(), 40, cudaMemcpyDeviceToHost));
}

}  // namespace

std::vector<Test> memory_fault_tests() {
  return {
      {"out of memory", out_of_memory},
      {"faults stay", faults_stay},
      {"device memory that nobody wrote is poison", device_memory_that_nobody_wrote},
      {"planted: writes outside", writes_outside},
      {"planted: reads outside", reads_outside},
      {"planted: reads outside that matter", reads_outside_that_matter},
      {"planted: misaligned loads", misaligned_loads},
      {"planted: copies that go astray", copies_that_go_astray},
  };
}

}  // namespace octavo::tests

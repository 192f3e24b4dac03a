// The runtime: streams, events, graphs, and what a program gets wrong around them.

#include "emulated.h"
#include "kernel.h"

namespace octavo::tests {

namespace {

using cuda_emulator::enqueue;

class TestStream {
 public:
  TestStream() { succeed(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~TestStream() { cudaStreamDestroy(stream); }
  TestStream(const TestStream&) = delete;
  TestStream& operator=(const TestStream&) = delete;

  void add(int* to, int value, const char* name = "add") {
    succeed(enqueue({name, 1, 1, 0}, stream, [=] { *to += value; }));
  }
  void sync() { succeed(cudaStreamSynchronize(stream)); }

  cudaStream_t stream = nullptr;
};

struct Pinned {
  explicit Pinned(std::size_t count) {
    void* data = nullptr;
    succeed(cudaHostAlloc(&data, count * sizeof(int), cudaHostAllocDefault));
    numbers = static_cast<int*>(data);
  }
  ~Pinned() { cudaFreeHost(numbers); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  int* numbers = nullptr;
};

void work_is_done_in_order() {
  TestStream one;
  const Array<int> x(std::vector<int>{1});
  int* const p = x.data();
  for (int i = 2; i < 5; ++i)
    succeed(enqueue({"multiply", 1, 1, 0}, one.stream, [=] { *p = *p * 10 + i; }));
  one.sync();
  CHECK(x.get()[0] == 1234);
}

// A stream does nothing before somebody waits: host memory that changes meanwhile shows.
void host_memory_overwritten_too_early() {
  TestStream one;
  const Array<int> x(std::vector<int>{0});
  const Pinned host(1);
  host.numbers[0] = 5;
  succeed(cudaMemcpyAsync(x.data(), host.numbers, 4, cudaMemcpyHostToDevice, one.stream));
  host.numbers[0] = 6;  // the mistake
  one.sync();
  CHECK(x.get()[0] == 6);
}

void host_memory_read_too_early() {
  TestStream one;
  const Array<int> x(std::vector<int>{5});
  const Pinned host(1);
  succeed(cudaMemcpyAsync(host.numbers, x.data(), 4, cudaMemcpyDeviceToHost, one.stream));
  CHECK(host.numbers[0] == -1);  // poison
  one.sync();
  CHECK(host.numbers[0] == 5);
}

void events() {
  TestStream one, two;
  const Array<int> x(std::vector<int>{0}), y(std::vector<int>{0});
  cudaEvent_t event = nullptr;
  succeed(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  one.add(x.data(), 1);
  succeed(cudaEventRecord(event, one.stream));
  one.add(x.data(), 10);
  CHECK(cudaEventQuery(event) == cudaErrorNotReady);
  succeed(cudaEventSynchronize(event));
  succeed(cudaEventQuery(event));
  CHECK(*x.data() == 1);  // and no more than that

  int *from = x.data(), *to = y.data();
  succeed(cudaEventRecord(event, one.stream));
  succeed(cudaStreamWaitEvent(two.stream, event, 0));
  succeed(enqueue({"copy", 1, 1, 0}, two.stream, [=] { *to = *from; }));
  two.sync();
  CHECK(*y.data() == 11);
  succeed(cudaEventDestroy(event));
}

// Without the event the second stream reads what the first has not written yet.
void missing_wait_between_streams() {
  TestStream one, two;
  const Array<int> x(std::vector<int>{0}), y(std::vector<int>{0});
  one.add(x.data(), 11);
  int *from = x.data(), *to = y.data();
  succeed(enqueue({"copy", 1, 1, 0}, two.stream, [=] { *to = *from; }));
  two.sync();
  CHECK(*y.data() == 0);
}

cudaGraphExec_t captured(TestStream& stream, const std::function<void()>& body) {
  succeed(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeThreadLocal));
  body();
  cudaGraph_t graph = nullptr;
  succeed(cudaStreamEndCapture(stream.stream, &graph));
  cudaGraphExec_t executable = nullptr;
  succeed(cudaGraphInstantiate(&executable, graph, 0));
  succeed(cudaGraphDestroy(graph));
  return executable;
}

void graphs() {
  TestStream one;
  const Array<int> x(std::vector<int>{0}), y(std::vector<int>{0});
  int *from = x.data(), *to = y.data();
  cudaGraphExec_t graph = captured(one, [&] {
    succeed(enqueue({"square", 1, 1, 0}, one.stream, [=] { *to = *from * *from; }));
    one.add(to, 1);
  });
  one.sync();
  CHECK(*to == 0);                  // capturing runs nothing
  for (const int value : {3, 7}) {  // replays read memory as it is then
    succeed(cudaMemcpyAsync(from, &value, 4, cudaMemcpyHostToDevice, one.stream));
    succeed(cudaGraphLaunch(graph, one.stream));
    succeed(cudaGraphLaunch(graph, one.stream));
    one.sync();
    CHECK(*to == value * value + 1);
  }
  succeed(cudaGraphExecDestroy(graph));
}

void errors_inside_a_capture() {
  TestStream one;
  const Array<int> x(std::vector<int>{0});
  const auto spoilt_by = [&](const std::function<cudaError_t()>& body) {
    succeed(cudaStreamBeginCapture(one.stream, cudaStreamCaptureModeThreadLocal));
    one.add(x.data(), 1);
    CHECK(body() == cudaErrorStreamCaptureUnsupported);
    cudaGraph_t graph = nullptr;
    CHECK(cudaStreamEndCapture(one.stream, &graph) == cudaErrorStreamCaptureInvalidated);
    CHECK(!graph);
    cudaGetLastError();
  };
  void* data = nullptr;
  spoilt_by([&] { return cudaMalloc(&data, 4); });
  spoilt_by([&] { return cudaStreamSynchronize(one.stream); });
  spoilt_by([&] { return cudaDeviceSynchronize(); });
  int host = 0;
  spoilt_by([&] { return cudaMemcpy(&host, x.data(), 4, cudaMemcpyDeviceToHost); });
  one.sync();
  CHECK(*x.data() == 0);
  cudaGraph_t graph = nullptr;
  CHECK(cudaStreamEndCapture(one.stream, &graph) == cudaErrorIllegalState);
  cudaGetLastError();

  cudaGraphExec_t launched = captured(one, [&] {
    one.add(x.data(), 2);
    CHECK(enqueue({"wide", 1, 2000, 0}, one.stream, [] {}) == cudaErrorInvalidConfiguration);
    check_message(cudaGetErrorString(cudaGetLastError()), {"kernel wide cannot be launched"});
  });
  succeed(cudaGraphLaunch(launched, one.stream));
  one.sync();
  CHECK(*x.data() == 2);
  succeed(cudaGraphExecDestroy(launched));
}

void faults_inside_a_graph_name_the_kernel() {
  TestStream one;
  const Array<int> x(std::vector<int>{0});
  int* const p = x.data();
  cudaGraphExec_t graph = captured(one, [&] {
    succeed(enqueue({"sometimes", 1, 32, 0}, one.stream, [=] {
      if (*p == 3 && threadIdx.x == 8) cuda_emulator::fail("went wrong");
    }));
    one.add(p, 1, "count");
  });
  for (int i = 0; i < 3; ++i) {
    succeed(cudaGraphLaunch(graph, one.stream));
    one.sync();
  }
  succeed(cudaGraphLaunch(graph, one.stream));
  CHECK(cudaStreamSynchronize(one.stream) == cudaErrorLaunchFailure);
  check_message(cudaGetErrorString(cudaGetLastError()),
                {"kernel sometimes, block (0, 0, 0), thread 8: went wrong"});
  succeed(cudaDeviceReset());
  CHECK(x.get()[0] == 3);  // what was queued behind the fault was not done
  succeed(cudaGraphExecDestroy(graph));
}

// A chain of kernels that overlap, each adding 1 to what the one before wrote: 1, 2, 3, 4.
enum class OverlapFault { none, reads_too_early, reads_two_kernels_too_early, never_waits };
template <OverlapFault planted>
std::string overlap_outcome(std::vector<int>* result = nullptr) {
  constexpr unsigned kThreads = 64;
  TestStream one;
  const Array<int> x(std::vector<int>(5, 0));
  int* const p = x.data();
  succeed(enqueue({"first", 1, kThreads, 0}, one.stream, [=] { p[1] = p[0] + 1; }));
  for (int i = 2; i < 5; ++i) {
    succeed(enqueue({"next", 1, kThreads, 0, true}, one.stream, [=] {
      const int early = planted == OverlapFault::reads_too_early ? p[i - 1] : p[i - 2];
      if (planted != OverlapFault::never_waits) cuda_emulator::wait_for_previous_kernel();
      const int late = planted == OverlapFault::reads_two_kernels_too_early ? early + 1 : p[i - 1];
      p[i] = (planted == OverlapFault::reads_too_early ? early : late) + 1;
    }));
  }
  const cudaError_t error = cudaStreamSynchronize(one.stream);
  const std::string message = error == cudaSuccess ? "" : cudaGetErrorString(error);
  if (error != cudaSuccess) cudaDeviceReset();
  cudaGetLastError();
  if (result && message.empty()) *result = x.get();
  return message;
}

void kernels_that_overlap() {
  const std::vector<int> right = {0, 1, 2, 3, 4};
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    const With options(with_seed(seed));
    std::vector<int> result;
    CHECK(overlap_outcome<OverlapFault::none>(&result).empty());
    CHECK(result == right);
    CHECK(overlap_outcome<OverlapFault::reads_too_early>(&result).empty());
    CHECK(result != right);
    CHECK(overlap_outcome<OverlapFault::reads_two_kernels_too_early>(&result).empty());
    CHECK(result != right);
  }
  check_message(overlap_outcome<OverlapFault::never_waits>(),
                {"kernel next, block (0, 0, 0), thread ", "without wait_for_previous_kernel()"});
}

void kernels_that_overlap_inside_a_graph() {
  TestStream one;
  const Array<int> x(std::vector<int>{0, 0});
  int* const p = x.data();
  cudaGraphExec_t right = captured(one, [&] {
    one.add(p, 1);
    succeed(enqueue({"next", 3, 32, 0, true}, one.stream, [=] {
      cuda_emulator::wait_for_previous_kernel();
      p[1] = p[0];
    }));
  });
  for (int i = 1; i < 4; ++i) {
    succeed(cudaGraphLaunch(right, one.stream));
    one.sync();
    CHECK(x.get() == std::vector<int>(2, i));
  }
  succeed(cudaGraphExecDestroy(right));
}

}  // namespace

std::vector<Test> stream_tests() {
  return {
      {"work is done in order", work_is_done_in_order},
      {"events", events},
      {"graphs", graphs},
      {"errors inside a capture", errors_inside_a_capture},
      {"faults inside a graph name the kernel", faults_inside_a_graph_name_the_kernel},
      {"kernels that overlap inside a graph", kernels_that_overlap_inside_a_graph},
      {"planted: kernels that overlap and read too early", kernels_that_overlap},
      {"planted: host memory overwritten too early", host_memory_overwritten_too_early},
      {"planted: host memory read too early", host_memory_read_too_early},
      {"planted: missing wait between streams", missing_wait_between_streams},
  };
}

}  // namespace octavo::tests

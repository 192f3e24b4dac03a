// Mistakes in how a kernel's threads meet: each is planted and must be found. A right kernel gives
// the same bits in every order.

#include <set>

#include "emulated.h"
#include "programs.cuh"

namespace octavo::tests {

namespace {

using namespace cuda::programs;

constexpr int kRows = 5, kWidth = 300, kThreads = 128;
constexpr std::uint64_t kSeeds = 20;

template <bool planted>
std::vector<float> norms(const Array<float>& x) {
  Array<float> out(kRows * kWidth);
  run("rms_norm", kRows, kThreads, kThreads / 32 * sizeof(float),
      [&] { rms_norm<planted>(out.data(), x.data(), kWidth); });
  return out.get();
}

void right_kernels_do_not_depend_on_the_order() {
  const std::vector<float> values = Numbers(1).many(kRows * kWidth);
  const Array<float> x(values);
  std::vector<float> expected;
  for (int row = 0; row < kRows; ++row) {
    double sum = 0.0;
    for (int i = 0; i < kWidth; ++i) sum += std::pow(values[row * kWidth + i], 2);
    for (int i = 0; i < kWidth; ++i)
      expected.push_back(static_cast<float>(values[row * kWidth + i] / std::sqrt(sum / kWidth)));
  }
  std::vector<float> first;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    const With options(with_seed(seed, 0xff, seed % 2));
    const std::vector<float> actual = norms<false>(x);
    if (first.empty()) first = actual;
    CHECK(actual == first);
  }
  for (std::size_t i = 0; i < expected.size(); ++i)
    check_near("a norm", first[i], expected[i], 1e-5);
}

void missing_barrier_changes_the_result() {
  const Array<float> x(Numbers(1).many(kRows * kWidth));
  const std::vector<float> right = norms<false>(x);
  int wrong = 0;
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const With options(with_seed(seed));
    wrong += norms<true>(x) != right;
  }
  CHECK(wrong == kSeeds);
}

void missing_barrier_is_named_when_run_twice() {
  const Array<float> x(Numbers(1).many(kRows * kWidth));
  Array<float> out(kRows * kWidth);
  const With options(with_seed(1, 0xff, true));
  const std::string message = outcome("rms_norm", kRows, kThreads, kThreads / 32 * sizeof(float),
                                      [&] { rms_norm<true>(out.data(), x.data(), kWidth); });
  check_message(message, {"kernel rms_norm, block (", "), thread ", "in another order"});
}

// What scan gives, or the device's message.
template <ScanFault planted>
std::string scan_outcome(int count, std::vector<int>* result = nullptr) {
  std::vector<int> values;
  for (int i = 0; i < count; ++i) values.push_back(7 * i % 11 - 3);
  const Array<int> x(values);
  const Array<int> out(static_cast<std::size_t>(count));
  const std::string message = outcome("scan", 1, static_cast<unsigned>(count),
                                      2 * sizeof(int) * static_cast<std::size_t>(count),
                                      [&] { scan<planted>(out.data(), x.data(), count); });
  if (result && message.empty()) *result = out.get();
  return message;
}

void scan_is_right() {
  for (const int count : {1, 2, 33, 64, 200, 1024}) {
    std::vector<int> actual;
    CHECK(scan_outcome<ScanFault::none>(count, &actual).empty());
    int sum = 0;
    for (int i = 0; i < count; ++i) {
      sum += 7 * i % 11 - 3;
      CHECK(actual[static_cast<std::size_t>(i)] == sum);
    }
  }
}

void barrier_that_part_of_a_block_reaches() {
  check_message(scan_outcome<ScanFault::part_of_the_block>(64),
                {"kernel scan, block (0, 0, 0), thread ", "waits for ever in __syncthreads of ",
                 "programs.cuh:", "of 64 threads have ended"});
}

void two_barriers_at_once() {
  check_message(scan_outcome<ScanFault::two_barriers>(64),
                {"kernel scan, block (0, 0, 0), thread ", "waits at __syncthreads of ",
                 "while others of its block wait at ", "programs.cuh:"});
}

void barrier_missing_inside_a_loop() {
  std::vector<int> right;
  scan_outcome<ScanFault::none>(200, &right);
  int wrong = 0;
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const With options(with_seed(seed));
    std::vector<int> actual;
    scan_outcome<ScanFault::no_second_barrier>(200, &actual);
    wrong += actual != right;
  }
  CHECK(wrong == kSeeds);
}

void shared_memory_that_nobody_wrote() {
  std::vector<int> results[2];
  for (const unsigned char poison : {0x00, 0xff}) {
    const With options(with_seed(1, poison));
    CHECK(scan_outcome<ScanFault::unwritten>(64, &results[poison != 0]).empty());
  }
  CHECK(results[0] != results[1]);
  const With options(with_seed(1, 0xff, true));
  check_message(scan_outcome<ScanFault::unwritten>(64), {"kernel scan, block (0, 0, 0), thread 0: ",
                                                         "something is read that nobody wrote"});
}

template <WarpFault planted>
std::string sum_outcome() {
  const Array<float> x(Numbers(3).many(96)), out(96);
  return outcome("sum_warps", 1, 96, 0, [&] { sum_warps<planted>(out.data(), x.data()); });
}

void warps_that_do_not_meet() {
  CHECK(sum_outcome<WarpFault::none>().empty());
  check_message(
      sum_outcome<WarpFault::part_of_the_warp>(),
      {"kernel sum_warps, block (0, 0, 0), thread ", "waits for ever in __shfl_xor_sync"});
  check_message(sum_outcome<WarpFault::two_collectives>(),
                {"kernel sum_warps, block (0, 0, 0), thread ", "while others of its warp wait in"});
}

void block_that_arrives_last() {
  std::vector<int> values(6 * 64);
  float expected = 0.0f;
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<int>(i % 13) - 4;
    expected += static_cast<float>(values[i]);
  }
  const Array<int> x(values);
  const auto sum_with = [&](bool planted) {
    const Array<int> sum(std::vector<int>{0}), arrived(std::vector<int>{0});
    const Array<float> out(1);
    run("sum_all", 6, 64, sizeof(int), [&] {
      planted ? sum_all<true>(out.data(), sum.data(), arrived.data(), x.data())
              : sum_all<false>(out.data(), sum.data(), arrived.data(), x.data());
    });
    CHECK(arrived.get()[0] == 0);
    return out.get()[0];
  };
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    const With options(with_seed(seed));
    CHECK(sum_with(false) == expected);
    CHECK(sum_with(true) != expected);
  }
}

void launches_that_no_gpu_takes() {
  const auto nothing = [] {};
  check_message(outcome("wide", 1, dim3(33, 32), 0, nothing),
                {"kernel wide cannot be launched: 1056 threads a block; expected 1 to 1024"});
  check_message(
      outcome("greedy", 1, 32, 200 * 1024, nothing),
      {"kernel greedy cannot be launched: 204800 bytes of shared memory; a block can have "
       "166912"});
  check_message(outcome("none", dim3(1, 0), 32, 0, nothing),
                {"kernel none cannot be launched: a grid of 1 x 0 x 1 blocks"});
  check_message(outcome("tall", dim3(1, 70000), 32, 0, nothing), {"a grid of 1 x 70000 x 1"});
  CHECK(outcome("fits", 2, 32, 100 * 1024, nothing).empty());  // the device still works
}

void every_thread_of_every_block_runs_once() {
  constexpr unsigned kCount = 3 * 4 * 2 * 5 * 7 * 2;
  for (const std::uint64_t seed : {0, 1, 2}) {
    const With options(with_seed(seed));
    const Array<int> out(std::vector<int>(kCount, 0));
    run("places", dim3(3, 4, 2), dim3(5, 7, 2), 0, [&] {
      const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      out.data()[block * 70 + thread] += 1;
    });
    CHECK(out.get() == std::vector<int>(kCount, 1));
  }
}

// One seed is one order; another seed is another.
void seeds_are_orders() {
  const auto order_of = [](std::uint64_t seed) {
    const With options(with_seed(seed));
    std::vector<unsigned> order;
    const cuda_emulator::Launch launch{"order", 3, 40, 0};
    cuda_emulator::run_grid(launch, [&] { order.push_back(blockIdx.x * 40 + threadIdx.x); });
    return order;
  };
  const std::vector<unsigned> plain = order_of(0);
  for (unsigned i = 0; i < plain.size(); ++i) CHECK(plain[i] == i);
  std::set<std::vector<unsigned>> orders;
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) orders.insert(order_of(1000 * seed));
  CHECK(orders.size() == kSeeds);
}

}  // namespace

std::vector<Test> fault_tests() {
  return {
      {"right kernels do not depend on the order", right_kernels_do_not_depend_on_the_order},
      {"scan is right", scan_is_right},
      {"every thread of every block runs once", every_thread_of_every_block_runs_once},
      {"seeds are orders", seeds_are_orders},
      {"the block that arrives last, and a sum without atomics", block_that_arrives_last},
      {"planted: missing barrier", missing_barrier_changes_the_result},
      {"planted: missing barrier, named when run twice", missing_barrier_is_named_when_run_twice},
      {"planted: missing barrier inside a loop", barrier_missing_inside_a_loop},
      {"planted: barrier that part of a block reaches", barrier_that_part_of_a_block_reaches},
      {"planted: two barriers at once", two_barriers_at_once},
      {"planted: shared memory that nobody wrote", shared_memory_that_nobody_wrote},
      {"planted: warps that do not meet", warps_that_do_not_meet},
      {"planted: launches that no GPU takes", launches_that_no_gpu_takes},
  };
}

}  // namespace octavo::tests

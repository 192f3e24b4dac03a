// Fragments of ldmatrix and mma.sync, and asynchronous copies, right and planted wrong.

#include "emulated.h"
#include "programs.cuh"

namespace octavo::tests {

namespace {

using namespace cuda;
using namespace cuda::programs;

// 16 x 16 and 16 x 8, every number another one.
template <class T>
struct Operands {
  std::vector<T> a, b;
  std::vector<double> product;

  Operands() {
    Numbers numbers(5);
    for (int i = 0; i < 16 * 16; ++i) a.push_back(from_float<T>(numbers.next()));
    for (int i = 0; i < 16 * 8; ++i) b.push_back(from_float<T>(numbers.next()));
    for (std::size_t m = 0; m < 16; ++m) {
      for (std::size_t n = 0; n < 8; ++n) {
        double sum = 0.0;
        for (std::size_t k = 0; k < 16; ++k)
          sum += static_cast<double>(to_float(a[m * 16 + k])) * to_float(b[k * 8 + n]);
        product.push_back(sum);
      }
    }
  }
};

constexpr std::size_t kShared = (16 * 16 + 16 * 8) * 2;

template <class T, ProductFault planted>
std::string product_outcome(std::vector<float>* result = nullptr) {
  const Operands<T> operands;
  // A little longer, for the copy that starts one number late.
  std::vector<T> longer = operands.a;
  longer.resize(longer.size() + 8, from_float<T>(0.0f));
  const Array<T> a(longer), b(operands.b);
  const Array<float> out(16 * 8);
  const std::string message = outcome("product", 1, 32, kShared,
                                      [&] { product<T, planted>(out.data(), a.data(), b.data()); });
  if (message.empty() && result) *result = out.get();
  return message;
}

bool is_right(const std::vector<float>& actual, const std::vector<double>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (!(std::abs(actual[i] - expected[i]) <= 1e-5)) return false;
  }
  return actual.size() == expected.size();
}

template <class T>
void product_is_right() {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    auto of_seed = with_seed(seed, 0xff, seed % 2);
    of_seed.tensor_cores = seed % 3 == 0 ? 0 : seed % 3 == 1 ? 80 : 90;
    const With options(of_seed);
    std::vector<float> actual;
    const std::string message = product_outcome<T, ProductFault::none>(&actual);
    if (!message.empty()) fail(message);
    CHECK(is_right(actual, Operands<T>().product));
  }
}

// The result is wrong in every order, though nothing but the result tells.
template <ProductFault planted>
void gives_another_product() {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    const With options(with_seed(seed));
    std::vector<float> actual;
    CHECK((product_outcome<Bf16, planted>(&actual).empty()));
    CHECK(!is_right(actual, Operands<Bf16>().product));
  }
}

void shared_memory_read_before_the_copies_are_done() {
  const With options(with_seed(1, 0xff, true));
  check_message(
      product_outcome<Bf16, ProductFault::no_wait>(),
      {"kernel product, block (0, 0, 0), thread ", "something is read that nobody wrote"});
}

void copies_that_nobody_waits_for() {
  check_message(product_outcome<Bf16, ProductFault::never_waits>(),
                {"kernel product, block (0, 0, 0), thread ",
                 "ended without waiting for the asynchronous copies it had begun"});
}

void copies_to_wrong_places() {
  check_message(product_outcome<Bf16, ProductFault::misaligned_copy>(),
                {"kernel product, block (0, 0, 0), thread ", "cp.async from global memory at ",
                 "no multiple of 16"});
  check_message(
      product_outcome<Bf16, ProductFault::copies_past_shared_memory>(),
      {"kernel product, block (0, 0, 0), thread 15: cp.async of 16 bytes at offset 768 of "
       "shared memory, which has 768 bytes"});
}

// What is seen after the first of two groups was waited for, plus 100 times what came in the end.
std::vector<int> copy_in_groups() {
  const Array<int> x(std::vector<int>{1, 2, 3, 4, 5, 6, 7, 8}), out(12);
  run("copies", 1, 1, 48, [&] {
    auto* shared = reinterpret_cast<int*>(shared_memory());
    async_copy_16(shared, x.data());
    async_commit();
    async_copy_16(shared + 4, x.data() + 4);
    async_copy_16(shared + 8, x.data(), false);  // writes zeros
    async_commit();
    async_wait<1>();
    for (int i = 0; i < 12; ++i) out.data()[i] = shared[i];
    async_wait<0>();
    for (int i = 4; i < 12; ++i) out.data()[i] += 100 * shared[i];
  });
  return out.get();
}

// A group that was waited for is there. A copy of one that was not may be, or may not yet be: some
// launches show the one, some the other (in ascending order, seed 0, always the latter).
void groups_of_copies() {
  using Ints = std::vector<int>;
  int late = 0, at_once = 0;
  for (int i = 0; i < 40; ++i) {
    const Ints found = copy_in_groups();
    CHECK((Ints(found.begin(), found.begin() + 4) == Ints{1, 2, 3, 4}));
    const Ints copied(found.begin() + 4, found.begin() + 8), zeros(found.begin() + 8, found.end());
    CHECK((copied == Ints{499, 599, 699, 799} || copied == Ints{505, 606, 707, 808}));
    CHECK((zeros == Ints{-1, -1, -1, -1} || zeros == Ints{0, 0, 0, 0}));
    ++(copied[0] == 499 ? late : at_once);
  }
  CHECK(late > 0 && (at_once > 0) == (cuda_emulator::options().seed != 0));
}

// ldmatrix without transposition, against its definition: lane i gets numbers 2 (i % 4) and + 1 of
// row i / 4 of each matrix.
void loaded_matrices() {
  for (const bool transposed : {false, true}) {
    const Array<int> out(32 * 8);
    run("load_matrices", 1, 32, 4 * 64 * 2, [&] {
      auto* shared = reinterpret_cast<std::uint16_t*>(shared_memory());
      const unsigned lane = lane_index();
      for (unsigned i = 0; i < 8; ++i)
        shared[lane * 8 + i] = static_cast<std::uint16_t>(lane * 8 + i);
      sync_warp();
      std::uint32_t got[4];
      cuda_emulator::load_matrices(got, shared + lane * 8, transposed);
      for (unsigned m = 0; m < 4; ++m) {
        out.data()[lane * 8 + 2 * m] = static_cast<int>(got[m] & 0xffff);
        out.data()[lane * 8 + 2 * m + 1] = static_cast<int>(got[m] >> 16);
      }
    });
    const std::vector<int> got = out.get();
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        for (int i = 0; i < 2; ++i) {
          const int row = lane / 4, col = 2 * (lane % 4) + i;
          const int number = 64 * m + (transposed ? 8 * col + row : 8 * row + col);
          CHECK(got[static_cast<std::size_t>(lane * 8 + 2 * m + i)] == number);
        }
      }
    }
  }
}

// What tensor cores make of 1, -1 (product `far` of 16) and 2^-small.
float left_of(unsigned tensor_cores, std::size_t far, int small) {
  const double half = std::ldexp(1.0, -(small / 2));
  double a[16] = {1.0, std::ldexp(1.0, -small) / half}, b[16] = {1.0, half};
  a[far] = -1.0;
  b[far] = 1.0;
  return cuda_emulator::add_products(a, b, 0.0f, tensor_cores);
}

void tensor_cores_cut_off() {
  for (const unsigned of : {80u, 90u}) {
    const int last = of == 80 ? 24 : 25;  // 2^-last is not cut off
    const float kept = std::ldexp(1.0f, -last);
    CHECK(left_of(of, 7, last) == kept);
    CHECK(left_of(of, 7, last + 1) == 0.0f);
    CHECK(left_of(of, 8, last) == (of == 80 ? 0.0f : kept));  // a group of 8, or all at once
    // The sum is cut off, too: 1 + 0.75 * 2^-23 becomes 1, unless the -2^-25 is gone before.
    const double ones[16] = {1.0, 1.0}, more[16] = {0x1p-23, -0x1p-25}, less[16] = {-0x1p-26};
    CHECK(cuda_emulator::add_products(more, ones, 1.0f, of) == (of == 80 ? 1.0f + 0x1p-23f : 1.0f));
    CHECK(cuda_emulator::add_products(less, ones, 1.0f, of) == 1.0f);
    const double infinite[16] = {INFINITY};
    CHECK(cuda_emulator::add_products(infinite, ones, 1.0f, of) == INFINITY);
  }
}

}  // namespace

std::vector<Test> product_tests() {
  return {
      {"a product of bf16", product_is_right<Bf16>},
      {"a product of f16", product_is_right<F16>},
      {"tensor cores cut off what is small", tensor_cores_cut_off},
      {"loaded matrices", loaded_matrices},
      {"groups of copies", groups_of_copies},
      {"planted: wrong fragment", gives_another_product<ProductFault::wrong_fragment>},
      {"planted: transposed load", gives_another_product<ProductFault::transposed_load>},
      {"planted: no wait for copies", gives_another_product<ProductFault::no_wait>},
      {"planted: shared memory read before copies are done, named when run twice",
       shared_memory_read_before_the_copies_are_done},
      {"planted: copies that nobody waits for", copies_that_nobody_waits_for},
      {"planted: copies to wrong places", copies_to_wrong_places},
  };
}

}  // namespace octavo::tests

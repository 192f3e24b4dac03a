// What the native tests are written with: checks that throw, and numbers to feed the ops.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/text.h"

namespace octavo::tests {

struct Test {
  std::string name;
  std::function<void()> run;
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Failure(text(parts...));
}

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) fail(__FILE__, ":", __LINE__, ": not so: " #condition); \
  } while (false)

// Runs `body`, which must throw an `Error` whose message holds `part`.
template <class Error, class Body>
void check_throws(const std::string& part, Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    if (std::string(error.what()).find(part) == std::string::npos)
      fail("the message is \"", error.what(), "\"; expected \"", part, "\" in it");
    return;
  }
  fail("nothing was thrown; expected an error with \"", part, "\"");
}

inline void check_near(const char* what, double given, double expected, double tolerance) {
  // Written so that a NaN fails.
  if (!(std::abs(given - expected) <= tolerance * (1.0 + std::abs(expected))))
    fail(what, " is ", given, "; expected ", expected, " within ", tolerance);
}

// Numbers between -1 and 1 from a 64-bit linear congruence (Knuth's MMIX constants).
class Numbers {
 public:
  explicit Numbers(std::uint64_t seed) : state_(seed * 2 + 1) {}

  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<std::int32_t>(state_ >> 32)) / 2147483648.0f;
  }
  std::int32_t below(std::int32_t limit) {
    return static_cast<std::int32_t>((next() * 0.5f + 0.5f) * 0.9999f * static_cast<float>(limit));
  }
  std::vector<float> many(std::int64_t count, float scale = 1.0f) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = next() * scale;
    return values;
  }

 private:
  std::uint64_t state_;
};

// The tests, a file each.
std::vector<Test> core_tests();
std::vector<Test> op_tests();
std::vector<Test> quantized_tests();
std::vector<Test> tile_tests();
std::vector<Test> attention_tests();
std::vector<Test> cuda_attention_tests();
std::vector<Test> sampling_tests();
std::vector<Test> rank_tests();
std::vector<Test> runtime_tests();
std::vector<Test> runtime_error_tests();

}  // namespace octavo::tests

#include "cpu/measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <vector>

#include "cpu/intrinsics.h"
#include "cpu/kernels.h"
#include "cpu/kernels/tile_config.h"
#include "cpu/platform.h"
#include "cpu/thread_pool.h"

namespace octavo::cpu {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int threads_or_default(int num_threads) {
  require(num_threads >= 0 && num_threads <= 1024, "num_threads is ", num_threads,
          "; expected 0 (all cores) to 1024");
  return num_threads > 0 ? num_threads : physical_cores();
}

void check_seconds(double seconds) {
  require(seconds >= 0.0 && seconds <= 60.0, "seconds is ", seconds, "; expected 0 to 60");
}

// Every body repeats enough independent operations that no unit waits for a result, for latencies
// up to 6 cycles and up to 3 units. Returns a number that depends on all of them, so that the
// compiler cannot remove any.
using FmaLoop = float (*)(std::int64_t repeats);

constexpr int kOperations = 16;                    // vectors in one repeat
constexpr float kFactor = 0.999f, kTerm = 0.001f;  // near a fixed point: never small or infinite

constexpr int kScalarLanes = 4;

float scalar_loop(std::int64_t repeats) {
  constexpr int kNumbers = kOperations / 2 * kScalarLanes;  // what fits the baseline's registers
  float sums[kNumbers];
  for (int i = 0; i < kNumbers; ++i) sums[i] = 1.0f + static_cast<float>(i);
  for (std::int64_t repeat = 0; repeat < 2 * repeats; ++repeat)
    for (float& sum : sums) sum = sum * kFactor + kTerm;
  float total = 0.0f;
  for (float sum : sums) total += sum;
  return total;
}

#if defined(OCTAVO_HAVE_AVX2)
__attribute__((target("avx2,fma"))) float avx2_loop(std::int64_t repeats) {
  constexpr int kSums = kOperations / 2;  // with factor and term they have to fit 16 registers
  __m256 sums[kSums];
  const __m256 factor = _mm256_set1_ps(kFactor), term = _mm256_set1_ps(kTerm);
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_set1_ps(1.0f + static_cast<float>(i));
  for (std::int64_t repeat = 0; repeat < 2 * repeats; ++repeat)
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, factor, term);
  __m256 total = sums[0];
  for (int i = 1; i < kSums; ++i) total = _mm256_add_ps(total, sums[i]);
  return _mm256_cvtss_f32(total);
}
#endif

#if defined(OCTAVO_HAVE_AVX512)
__attribute__((target("avx512f"))) float avx512_loop(std::int64_t repeats) {
  __m512 sums[kOperations];
  const __m512 factor = _mm512_set1_ps(kFactor), term = _mm512_set1_ps(kTerm);
  for (int i = 0; i < kOperations; ++i) sums[i] = _mm512_set1_ps(1.0f + static_cast<float>(i));
  for (std::int64_t repeat = 0; repeat < repeats; ++repeat)
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, factor, term);
  __m512 total = sums[0];
  for (int i = 1; i < kOperations; ++i) total = _mm512_add_ps(total, sums[i]);
  return _mm512_cvtss_f32(total);
}
#endif

#if defined(OCTAVO_HAVE_NEON)
float neon_loop(std::int64_t repeats) {
  float32x4_t sums[kOperations];
  const float32x4_t factor = vdupq_n_f32(kFactor), term = vdupq_n_f32(kTerm);
  for (int i = 0; i < kOperations; ++i) sums[i] = vdupq_n_f32(1.0f + static_cast<float>(i));
  for (std::int64_t repeat = 0; repeat < repeats; ++repeat)
    for (float32x4_t& sum : sums) sum = vfmaq_f32(sum, factor, term);  // adds onto its first
  float32x4_t total = sums[0];
  for (int i = 1; i < kOperations; ++i) total = vaddq_f32(total, sums[i]);
  return vaddvq_f32(total);
}
#endif

#if defined(OCTAVO_HAVE_AMX)
namespace amx {

#include "cpu/kernels/tile_amx.h"

// Products of bf16 tiles: 16 x 16 outputs of 32 inputs, into four tiles of sums in turn.
float loop(std::int64_t repeats) {
  TileConfig config;
  for (int t = 0; t < kNumTiles; ++t) config.set(t, kTileRows, kTileRowBytes);
  alignas(64) std::uint16_t numbers[kTileBytes / 2];
  std::fill(std::begin(numbers), std::end(numbers), std::uint16_t{0x3a80});  // 2^-10
  tile_configure(config);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  tile_load<4>(numbers, kTileRowBytes);
  tile_load<5>(numbers, kTileRowBytes);
  tile_load<6>(numbers, kTileRowBytes);
  tile_load<7>(numbers, kTileRowBytes);
  static_assert(kOperations % 4 == 0, "four at a time");
  for (std::int64_t i = 0; i < repeats * kOperations / 4; ++i) {
    tile_dot_bf16<0, 4, 6>();
    tile_dot_bf16<1, 4, 7>();
    tile_dot_bf16<2, 5, 6>();
    tile_dot_bf16<3, 5, 7>();
  }
  alignas(64) float sums[kTileBytes / 4];
  tile_store<0>(sums, kTileRowBytes);
  tile_release();
  return sums[0];
}

}  // namespace amx
#endif

struct Loop {
  const char* isa;
  FmaLoop run;
  int lanes;
};

Loop loop_for(const std::string& isa) {
  const std::string name = kernels_for(isa).isa;  // throws with the available ones
  const auto extends = [&](const char* base) { return name.rfind(base, 0) == 0; };
#if defined(OCTAVO_HAVE_AMX)
  if (name == "amx") return {"amx", amx::loop, 16 * 16 * 32};
#endif
#if defined(OCTAVO_HAVE_AVX512)
  if (extends("avx512") || name == "amx_emulated") return {"avx512", avx512_loop, 16};
#endif
#if defined(OCTAVO_HAVE_AVX2)
  if (extends("avx2")) return {"avx2", avx2_loop, 8};
#endif
#if defined(OCTAVO_HAVE_NEON)
  if (extends("neon")) return {"neon", neon_loop, 4};
#endif
  require(extends("scalar"), "isa is \"", name, "\"; its peak cannot be measured yet");
  return {"scalar", scalar_loop, kScalarLanes};
}

// Sums 64-bit words in eight lanes at a time, which any compiler turns into plain vector loads.
std::uint64_t read_all(const std::uint64_t* words, std::int64_t count) {
  constexpr int kLanes = 32;  // four cache lines
  std::uint64_t sums[kLanes] = {};
  for (std::int64_t i = 0; i < count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += words[i + lane];
  std::uint64_t total = 0;
  for (std::uint64_t sum : sums) total += sum;
  return total;
}

// A buffer of `allocate`, freed by its destructor.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : bytes_(bytes), data_(allocate(bytes)) {}
  ~Buffer() { release(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::uint64_t* words() { return static_cast<std::uint64_t*>(data_); }

 private:
  std::size_t bytes_;
  void* data_;
};

}  // namespace

double measure_bandwidth(int num_threads, double seconds, std::size_t num_bytes) {
  check_seconds(seconds);
  ThreadPool pool(threads_or_default(num_threads));
  constexpr std::size_t kPiece = 4096;  // a thread reads whole pages
  if (num_bytes == 0) num_bytes = std::min(std::size_t{1} << 30, available_memory() / 4);
  const std::size_t threads = static_cast<std::size_t>(pool.size());
  const std::size_t part = std::max(num_bytes / threads / kPiece, std::size_t{1}) * kPiece;
  const std::int64_t words = static_cast<std::int64_t>(part / sizeof(std::uint64_t));
  Buffer buffer(part * threads);
  pool.run([&](int thread) {
    std::uint64_t* mine = buffer.words() + thread * words;
    for (std::int64_t i = 0; i < words; ++i) mine[i] = static_cast<std::uint64_t>(i);
  });
  std::vector<std::uint64_t> sums(threads);
  double best = 0.0;
  const Clock::time_point begin = Clock::now();
  for (int pass = 0; pass < 3 || seconds_since(begin) < seconds; ++pass) {
    const Clock::time_point start = Clock::now();
    pool.run([&](int thread) {
      sums[static_cast<std::size_t>(thread)] = read_all(buffer.words() + thread * words, words);
    });
    const double rate = static_cast<double>(part * threads) / seconds_since(start);
    best = std::max(best, rate);
  }
  // The sums are known; comparing them keeps the compiler from removing the reads.
  const std::uint64_t count = static_cast<std::uint64_t>(words);
  for (std::uint64_t sum : sums) {
    if (sum != count * (count - 1) / 2) throw std::runtime_error("memory gave back wrong numbers");
  }
  return best;
}

double measure_flops(int num_threads, const std::string& isa, double seconds) {
  check_seconds(seconds);
  ThreadPool pool(threads_or_default(num_threads));
  const Loop loop = loop_for(isa);
  constexpr std::int64_t kRepeats = 1 << 18;  // a millisecond or so
  const double operations =
      2.0 * loop.lanes * kOperations * static_cast<double>(kRepeats) * pool.size();
  std::vector<float> results(static_cast<std::size_t>(pool.size()));
  double best = 0.0;
  const Clock::time_point begin = Clock::now();
  for (int pass = 0; pass < 3 || seconds_since(begin) < seconds; ++pass) {
    const Clock::time_point start = Clock::now();
    pool.run([&](int thread) { results[static_cast<std::size_t>(thread)] = loop.run(kRepeats); });
    best = std::max(best, operations / seconds_since(start));
  }
  for (float result : results) {
    if (!std::isfinite(result)) throw std::runtime_error("arithmetic gave back no number");
  }
  return best;
}

}  // namespace octavo::cpu

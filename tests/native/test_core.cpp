// Number formats, threads, the job queue, and the choice of backend and instruction set.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <csignal>
#endif

#include "core/runtime.h"
#include "cpu/platform.h"
#include "cpu/thread_pool.h"
#include "host.h"

namespace octavo::tests {

namespace {

// All 65,536 halves, against their definition.
void half_to_float() {
  for (std::int32_t bits = 0; bits < 65536; ++bits) {
    const float given = f16_to_float(static_cast<std::uint16_t>(bits));
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31) {
      CHECK(fraction ? std::isnan(given) : (std::isinf(given) && (given < 0) == (sign < 0)));
    } else {
      const double expected = exponent ? std::ldexp(1024.0 + fraction, exponent - 25)
                                       : std::ldexp(static_cast<double>(fraction), -24);
      CHECK(given == sign * expected && std::signbit(given) == (sign < 0));
    }
  }
}

// Every bfloat16 survives, and between two neighbours the nearer (the even one in the middle) wins.
void bfloat16() {
  for (std::uint32_t high = 0; high < 0x10000u; ++high) {
    const auto bits = static_cast<std::uint16_t>(high);
    const float value = bf16_to_float(bits);
    if (std::isnan(value)) {
      CHECK(std::isnan(bf16_to_float(float_to_bf16(value))));
      CHECK(std::isnan(bf16_to_float(float_to_bf16(bits_float((high << 16) | 1u)))));
      continue;
    }
    CHECK(float_to_bf16(value) == bits);
    if (std::isinf(value)) continue;
    const auto next = static_cast<std::uint16_t>(bits + 1);
    CHECK(float_to_bf16(bits_float((high << 16) | 0x7fffu)) == bits);
    CHECK(float_to_bf16(bits_float((high << 16) | 0x8001u)) == next);
    CHECK(float_to_bf16(bits_float((high << 16) | 0x8000u)) == (bits % 2 ? next : bits));
  }
}

void threads() {
  for (const int size : {1, 2, 5}) {
    cpu::ThreadPool pool(size);
    CHECK(pool.size() == size);
    for (std::int64_t round = 0; round < 300; ++round) {
      const std::int64_t count = round % 17;
      std::vector<std::atomic<int>> seen(17);
      pool.each(count, [&](std::int64_t index, int thread) {
        if (thread < 0 || thread >= size) return;  // then it is missing below
        seen[static_cast<std::size_t>(index)].fetch_add(1);
      });
      for (std::int64_t i = 0; i < 17; ++i)
        CHECK(seen[static_cast<std::size_t>(i)].load() == (i < count ? 1 : 0));
      for (auto& number : seen) number.store(0);
      pool.shares(count, 3, [&](cpu::ThreadPool::Range piece) {
        if (piece.end - piece.begin > 3) return;
        for (std::int64_t i = piece.begin; i < piece.end; ++i)
          seen[static_cast<std::size_t>(i)].fetch_add(1);
      });
      for (std::int64_t i = 0; i < 17; ++i)
        CHECK(seen[static_cast<std::size_t>(i)].load() == (i < count ? 1 : 0));
      std::atomic<int> mask{0};
      pool.run([&](int thread) { mask.fetch_or(1 << thread); });
      CHECK(mask.load() == (1 << size) - 1);
    }
  }
}

// Whoever holds the first piece waits until all others are done: by threads that help with a share
// that is not theirs.
void a_thread_that_is_held_up() {
  cpu::ThreadPool pool(2);
  std::atomic<int> done{0};
  bool was_helped = false;
  pool.shares(20, 2, [&](cpu::ThreadPool::Range piece) {
    if (piece.begin == 0) {
      const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (done.load() < 9 && std::chrono::steady_clock::now() < limit) std::this_thread::yield();
      was_helped = done.load() == 9;
    } else {
      done.fetch_add(1);
    }
  });
  CHECK(was_helped);
}

#if defined(__linux__)

std::atomic<bool> is_held{false}, is_let_go{false};

void hold(int) {
  is_held.store(true);
  while (!is_let_go.load()) usleep(1000);
}

// A worker that does not come to a job, as one whose core another program has: others do it all.
void a_thread_that_does_not_come() {
  cpu::ThreadPool pool(2);
  std::atomic<pthread_t> worker{};
  pool.run([&](int thread) {
    if (thread == 1) worker.store(pthread_self());
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // it sleeps by then
  std::signal(SIGUSR1, hold);
  pthread_kill(worker.load(), SIGUSR1);
  while (!is_held.load()) std::this_thread::yield();
  std::atomic<bool> is_late{false}, is_over{false};
  std::thread watch([&] {  // so that a failure ends
    for (int i = 0; i < 2000 && !is_over.load(); ++i) usleep(5000);
    is_late.store(!is_over.load());
    is_let_go.store(true);
  });
  std::atomic<int> done{0};
  pool.each(20, [&](std::int64_t, int) { done.fetch_add(1); });
  pool.shares(20, 3, [&](cpu::ThreadPool::Range piece) {
    done.fetch_add(static_cast<int>(piece.end - piece.begin));
  });
  is_over.store(true);
  watch.join();
  CHECK(done.load() == 40 && !is_late.load());
  std::signal(SIGUSR1, SIG_DFL);
}

// Threads that sleep, as if their cores were taken: whoever waits for them makes room on its own.
void threads_that_lose_their_cores() {
  const int cores = static_cast<int>(cpu::core_processors().size());
  if (cores < 2) return;
  bool was_taken_in = false, has_come_back = false, has_moved = false;
  std::thread([&] {  // which gets bound
    cpu::ThreadPool pool(cores);
    pool.bind_caller();
    const int own = sched_getcpu();
    // On a machine that others use, too, either may take more than one time.
    for (int i = 0; i < 50 && !(was_taken_in && has_come_back); ++i) {
      has_come_back = false;
      pool.run([&](int thread) {
        if (thread != 1) return;
        const int before = sched_getcpu();
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        was_taken_in = before != own && sched_getcpu() == own;
      });
      for (int j = 0; j < 100 && was_taken_in && !has_come_back; ++j) {
        pool.run([&](int thread) {
          if (thread == 1) has_come_back = sched_getcpu() != own;
        });
      }
    }
    const cpu::ThreadPool::Busy busy(pool);
    for (int i = 0; i < 2000 && !has_moved; ++i) {
      pool.run([](int) {});
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      has_moved = sched_getcpu() != own;
    }
  })
      .join();
  CHECK(was_taken_in && has_come_back);
  CHECK(has_moved);
}

#endif

void job_queue() {
  std::vector<int> order;
  {
    JobQueue queue;
    for (int i = 0; i < 100; ++i) queue.push([&order, i] { order.push_back(i); });
    check_throws<std::invalid_argument>(
        "number 7", [&] { queue.run([] { throw std::invalid_argument("number 7"); }); });
    CHECK(order.size() == 100);
    queue.push([&order] { order.push_back(100); });
  }
  for (int i = 0; i <= 100; ++i) CHECK(order[static_cast<std::size_t>(i)] == i);
}

void buffers() {
  const auto backend = make_backend("cpu", cpu_options(1));
  Buffer first(backend.get(), 1001);
  CHECK(reinterpret_cast<std::uintptr_t>(first.data()) % 64 == 0);
  for (std::size_t i = 0; i < first.bytes(); ++i) CHECK(first.as<unsigned char>()[i] == 0);
  first.as<unsigned char>()[1000] = 7;
  Buffer second(std::move(first));
  CHECK(second.as<unsigned char>()[1000] == 7);
  second = Buffer(backend.get(), 8u << 20);  // large enough for large pages
  CHECK(second.as<unsigned char>()[(8u << 20) - 1] == 0);
  Buffer none(backend.get(), 0);
  CHECK(none.bytes() == 0);
  check_throws<std::bad_alloc>("", [&] { Buffer(backend.get(), SIZE_MAX / 4); });
}

void backends() {
  CHECK(cpu::physical_cores() >= 1);
  CHECK(cpu::available_memory() > (std::size_t{1} << 20));
  const std::vector<std::string> isas = cpu::available_isas();
  CHECK(std::find(isas.begin(), isas.end(), "scalar") != isas.end());
  CHECK(isas.back() != "amx_emulated");
  for (const std::string& isa : cpu::available_isas()) CHECK(cpu::kernels_for(isa).isa == isa);
  CHECK(cpu::kernels_for("auto").isa == cpu::available_isas().back());
  check_throws<std::invalid_argument>("abacus", [] { make_backend("abacus", {}); });
  check_throws<std::invalid_argument>("avx1024",
                                      [] { make_backend("cpu", cpu_options(0, "avx1024")); });
  check_throws<std::invalid_argument>("-1", [] { make_backend("cpu", cpu_options(-1)); });
}

void cosines_and_sines() {
  const RopeSpec rope{{1.0f, 0.03f, 0.0007f}, 1.5f};
  const RopeTables tables = rope_tables(rope, 400);
  CHECK(tables.cosines.size() == 1200 && tables.sines.size() == 1200);
  for (std::size_t i = 0; i < 1200; ++i) {
    const double angle = static_cast<double>(i / 3) * rope.frequencies[i % 3];
    check_near("cosine", tables.cosines[i], 1.5 * std::cos(angle), 2e-5);  // angles are float32
    check_near("sine", tables.sines[i], 1.5 * std::sin(angle), 2e-5);
  }
  CHECK(rope_tables(rope, 0).cosines.empty());

  // Of two sets: the short sequences' rows, then the long ones'.
  RopeSpec both = rope, slow = rope;
  both.long_frequencies = slow.frequencies = {0.5f, 0.02f, 0.0003f};
  for (const RopeSpec& spec : {both, rope}) {
    const RopeTables long_ones = rope_tables(spec.long_frequencies.empty() ? rope : slow, 400);
    const RopeTables found = rope_tables(spec, 400, 70);
    CHECK(found.sines.size() == 470 * 3);
    for (std::size_t i = 0; i < found.sines.size(); ++i) {
      CHECK(found.sines[i] == (i < 210 ? tables.sines[i] : long_ones.sines[i - 210]));
      CHECK(found.cosines[i] == (i < 210 ? tables.cosines[i] : long_ones.cosines[i - 210]));
    }
  }
}

}  // namespace

std::vector<Test> core_tests() {
  return {{"half to float", half_to_float},
          {"bfloat16", bfloat16},
          {"thread pool", threads},
          {"a thread that is held up", a_thread_that_is_held_up},
#if defined(__linux__)
          {"a thread that does not come", a_thread_that_does_not_come},
          {"threads that lose their cores", threads_that_lose_their_cores},
#endif
          {"job queue", job_queue},
          {"buffers", buffers},
          {"backends and instruction sets", backends},
          {"cosines and sines of rope", cosines_and_sines}};
}

}  // namespace octavo::tests

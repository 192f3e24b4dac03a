// Whole steps through a small model: the same bits however a sequence is cut and accompanied.

#include <algorithm>

#include "cpu/kernels.h"
#include "model.h"

namespace octavo::tests {

namespace {

std::vector<float> logits_of(Runtime& runtime, Batch batch) {
  const std::int64_t ticket = runtime.submit(std::move(batch), {});
  std::vector<float> values = runtime.logits(ticket);
  runtime.wait(ticket);
  return values;
}

// The last row of several.
std::vector<float> last_row(const std::vector<float>& logits) {
  return {logits.end() - 53, logits.end()};
}

std::vector<std::int32_t> slice(const std::vector<std::int32_t>& all, std::int64_t begin,
                                std::int64_t end) {
  return {all.begin() + begin, all.begin() + end};
}

void same_bits_in_chunks_and_batches() {
  for (const char* dtype : {"f32", "bf16"}) {
    RuntimeOptions options = small_options();
    options.dtype = options.kv_dtype = dtype;
    const auto runtime = small_runtime(options);
    const std::vector<std::int32_t> prompt = some_tokens(100);
    const std::vector<float> whole =
        logits_of(*runtime, BatchBuilder(*runtime).add(0, prompt, 100).build());
    for (const float value : whole) CHECK(std::isfinite(value));
    CHECK(*std::max_element(whole.begin(), whole.end()) >
          *std::min_element(whole.begin(), whole.end()) + 0.5f);

    for (const std::int64_t chunk : {1, 7, 64}) {
      std::vector<float> logits;
      for (std::int64_t begin = 0; begin < 100; begin += chunk) {
        const std::int64_t end = std::min<std::int64_t>(100, begin + chunk);
        logits = logits_of(*runtime,
                           BatchBuilder(*runtime).add(2, slice(prompt, begin, end), end).build());
      }
      CHECK(logits == whole);
    }

    // The second half beside others, of which two are still at their prompt.
    logits_of(*runtime, BatchBuilder(*runtime).add(5, slice(prompt, 0, 70), 70, 0).build());
    logits_of(*runtime, BatchBuilder(*runtime).add(1, some_tokens(50, 9), 50, 50).build());
    const Batch mixed = BatchBuilder(*runtime)
                            .add(3, some_tokens(20, 7), 20, 3)
                            .add(1, some_tokens(1, 8), 51)
                            .add(4, some_tokens(33, 6), 33, 0)
                            .add(5, slice(prompt, 70, 100), 100)
                            .build();
    CHECK(last_row(logits_of(*runtime, mixed)) == whole);
  }
}

void same_bits_on_every_instruction_set() {
  std::vector<float> firsts[2];  // VDPBF16PS sums up in an order of its own
  for (const std::string& isa : cpu::available_isas()) {
    for (const int num_threads : {1, 3}) {
      RuntimeOptions options = small_options();
      options.isa = isa;
      options.num_threads = num_threads;
      options.dtype = options.kv_dtype = "bf16";
      const auto runtime = small_runtime(options);
      const std::vector<float> logits =
          logits_of(*runtime, BatchBuilder(*runtime).add(0, some_tokens(90), 90, 90).build());
      std::vector<float>& first = firsts[isa == "avx512_bf16"];
      if (first.empty()) first = logits;
      CHECK(logits == first);
    }
  }
}

void tokens_sampled_on_the_device() {
  const auto runtime = small_runtime();
  const std::vector<std::int32_t> prompt = some_tokens(30);
  // Greedy, each token handed over.
  std::vector<std::int32_t> expected;
  std::vector<std::int32_t> next = prompt;
  for (std::int64_t length = 30; length < 40; ++length) {
    const std::int64_t ticket =
        runtime->submit(BatchBuilder(*runtime).add(0, next, length).build(), {});
    expected.push_back(runtime->wait(ticket).token_ids[0]);
    next = {expected.back()};
  }
  // The same with two tickets in flight: a token is what state row 4 sampled last.
  std::vector<std::int32_t> given;
  std::int64_t open = -1;
  for (std::int64_t length = 30; length < 40; ++length) {
    Batch batch = BatchBuilder(*runtime)
                      .add(3, length == 30 ? prompt : std::vector<std::int32_t>{-5}, length)
                      .build();
    batch.sampling[0].state_row = 4;
    const std::int64_t ticket = runtime->submit(batch, {});
    runtime->sample(ticket, {});
    if (open >= 0) given.push_back(runtime->wait(open).token_ids[0]);
    open = ticket;
  }
  given.push_back(runtime->wait(open).token_ids[0]);
  CHECK(given == expected);
}

void taps() {
  const auto runtime = small_runtime();
  Batch batch =
      BatchBuilder(*runtime).add(0, some_tokens(9), 9, 2).add(1, some_tokens(3), 3).build();
  const StepResult all = runtime->wait(runtime->submit(batch, {"*"}));
  CHECK(all.taps.front().name == "embed" && all.taps.back().name == "logits");
  // embed; 14 of a gated layer, 13 of an ungated one; final_norm; logits
  CHECK(all.taps.size() == 1 + 14 + 13 + 2);
  for (const TapResult& tap : all.taps) {
    const bool of_rows = tap.name == "logits" || tap.name == "final_norm";
    CHECK(tap.rows == (of_rows ? 3 : 12));
    CHECK(static_cast<std::int64_t>(tap.values.size()) == tap.rows * tap.cols);
    for (const float value : tap.values) CHECK(std::isfinite(value));
  }
  const StepResult one = runtime->wait(runtime->submit(batch, {"layers.1.out"}));
  CHECK(one.taps.size() == 1 && one.taps[0].cols == 24);
  for (const TapResult& tap : all.taps)
    CHECK(tap.name != "layers.1.out" || tap.values == one.taps[0].values);
  CHECK(runtime->wait(runtime->submit(batch, {})).taps.empty());
}

void warm_steps_allocate_nothing() {
  const auto runtime = small_runtime();
  const auto step = [&](std::int64_t length) {
    Batch batch = BatchBuilder(*runtime)
                      .add(0, some_tokens(length), length, length)
                      .add(1, some_tokens(1), 1)
                      .build();
    for (SamplingRow& row : batch.sampling) row.num_logprobs = 3;
    runtime->wait(runtime->submit(batch, {}));
  };
  for (int i = 0; i < 4; ++i) step(100);  // both in-flight steps
  const std::int64_t before = runtime->allocations();
  for (std::int64_t i = 0; i < 100; ++i) step(1 + i);
  CHECK(runtime->allocations() == before);
}

void copied_blocks_serve_another_sequence() {
  const auto runtime = small_runtime();
  const std::vector<std::int32_t> prompt = some_tokens(48);
  const std::vector<float> expected =
      logits_of(*runtime, BatchBuilder(*runtime).add(0, prompt, 48).build());
  logits_of(*runtime, BatchBuilder(*runtime).add(0, slice(prompt, 0, 32), 32, 0).build());
  runtime->copy_blocks(0, {0, 40, 1, 41});
  runtime->copy_blocks(1, {9, 49, 8, 48});
  CHECK(logits_of(*runtime, BatchBuilder(*runtime).add(4, slice(prompt, 32, 48), 48).build()) ==
        expected);
}

void memory_is_counted() {
  const auto runtime = small_runtime();
  const MemoryUse use = runtime->memory();
  CHECK(use.kv_cache == 60 * runtime->kv_bytes_per_block());
  CHECK(use.weights > 0 && use.workspace > 0 && use.available > 0);
}

}  // namespace

std::vector<Test> runtime_tests() {
  return {{"the same bits in chunks and in batches", same_bits_in_chunks_and_batches},
          {"the same bits on every instruction set", same_bits_on_every_instruction_set},
          {"tokens sampled on the device feed the next step", tokens_sampled_on_the_device},
          {"taps", taps},
          {"warm steps allocate nothing", warm_steps_allocate_nothing},
          {"copied blocks serve another sequence", copied_blocks_serve_another_sequence},
          {"memory is counted", memory_is_counted}};
}

}  // namespace octavo::tests

// What a caller can get wrong: an error that names it, and a runtime that still works.

#include <limits>

#include "model.h"

namespace octavo::tests {

namespace {

void bad_batches() {
  const auto runtime = small_runtime();
  const auto good = [&] {
    return BatchBuilder(*runtime).add(0, some_tokens(5), 20, 2).add(1, some_tokens(1), 17).build();
  };
  struct Wrong {
    const char* part;  // of the message
    void (*change)(Batch& batch);
  };
  constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();
  constexpr std::int32_t kLeast = std::numeric_limits<std::int32_t>::min();
  const std::vector<Wrong> all{
      {"row_starts[0]", [](Batch& b) { b.row_starts[0] = 1; }},
      {"row_starts", [](Batch& b) { b.row_starts.pop_back(); }},
      {"row_starts", [](Batch& b) { b.row_starts.clear(); }},
      {"row_starts", [](Batch& b) { b.row_starts[2] = 7; }},
      {"sequence 0 brings", [](Batch& b) { b.row_starts[1] = 0; }},
      {"sequence", [](Batch& b) { b.row_starts[1] = kLeast; }},
      {"context_lens", [](Batch& b) { b.row_starts[1] = kMost; }},
      {"context_lens[0]", [](Batch& b) { b.context_lens[0] = 4; }},
      {"context_lens[1]", [](Batch& b) { b.context_lens[1] = 301; }},
      {"context_lens[1]", [](Batch& b) { b.context_lens[1] = kMost; }},
      {"sequences", [](Batch& b) { b.context_lens.clear(); }},
      {"sequences", [](Batch& b) { b.context_lens.resize(7, 1); }},
      {"blocks", [](Batch& b) { b.context_lens[0] = 33; }},
      {"KV groups", [](Batch& b) { b.num_kv_groups = 1; }},
      {"block_tables", [](Batch& b) { b.block_tables.pop_back(); }},
      {"block_tables", [](Batch& b) { b.max_blocks = 3; }},
      {"block_tables[0]", [](Batch& b) { b.block_tables[0] = -1; }},
      {"block_tables[5]", [](Batch& b) { b.block_tables[5] = 60; }},
      {"token_ids[2]", [](Batch& b) { b.token_ids[2] = 53; }},
      {"token_ids[0]", [](Batch& b) { b.token_ids[0] = -7; }},
      {"tokens", [](Batch& b) { b.token_ids.resize(129, 0); }},
      {"logit_rows[1]", [](Batch& b) { b.logit_rows[1] = b.logit_rows[0]; }},
      {"logit_rows[2]", [](Batch& b) { b.logit_rows[2] = 6; }},
      {"logit_rows[0]", [](Batch& b) { b.logit_rows[0] = -1; }},
      {"sampling has 2", [](Batch& b) { b.sampling.pop_back(); }},
      {"sampling has 4", [](Batch& b) { b.sampling.resize(4); }},
      {"sampling[1].temperature", [](Batch& b) { b.sampling[1].temperature = -0.1f; }},
      {"sampling[1].temperature", [](Batch& b) { b.sampling[1].temperature = std::nanf(""); }},
      {"sampling[0].top_p", [](Batch& b) { b.sampling[0].top_p = 0.0f; }},
      {"sampling[0].top_p", [](Batch& b) { b.sampling[0].top_p = 1.5f; }},
      {"sampling[2].min_p", [](Batch& b) { b.sampling[2].min_p = std::nanf(""); }},
      {"sampling[0].top_k", [](Batch& b) { b.sampling[0].top_k = -1; }},
      {"sampling[0].num_logprobs", [](Batch& b) { b.sampling[0].num_logprobs = 54; }},
      {"sampling[2].state_row", [](Batch& b) { b.sampling[2].state_row = 6; }},
      {"adapter_ids", [](Batch& b) { b.adapter_ids = {-1, 0, -1}; }},
  };
  for (const Wrong& wrong : all) {
    Batch batch = good();
    wrong.change(batch);
    check_throws<std::invalid_argument>(wrong.part, [&] { runtime->submit(batch, {}); });
    // Nothing stays open or half-done.
    CHECK(runtime->wait(runtime->submit(good(), {})).num_rows == 3);
  }
}

void tickets() {
  const auto runtime = small_runtime();
  const Batch batch = BatchBuilder(*runtime).add(0, some_tokens(5), 5).build();
  check_throws<std::invalid_argument>("ticket 0", [&] { runtime->wait(0); });
  const std::int64_t first = runtime->submit(batch, {}), second = runtime->submit(batch, {});
  check_throws<std::invalid_argument>("in flight", [&] { runtime->submit(batch, {}); });
  runtime->sample(first, {});
  check_throws<std::invalid_argument>("sampled already", [&] { runtime->sample(first, {}); });
  check_throws<std::invalid_argument>("masks", [&] { runtime->sample(second, {1, 2, 3}); });
  runtime->wait(second);
  runtime->wait(first);
  check_throws<std::invalid_argument>("not open", [&] { runtime->wait(first); });
  check_throws<std::invalid_argument>("not open", [&] { runtime->logits(second); });
}

void open_tickets_do_not_hinder_the_end() {
  const auto runtime = small_runtime();
  const Batch batch = BatchBuilder(*runtime).add(0, some_tokens(100), 100, 100).build();
  runtime->sample(runtime->submit(batch, {"*"}), {});
  runtime->submit(batch, {});
}  // destroyed with both at work

void loading() {
  Runtime runtime("cpu", small_spec(), small_options());
  CHECK(runtime.missing_weights().size() == weight_shapes(small_spec()).size());
  const std::vector<float> values(2000, 0.5f);
  check_throws<std::invalid_argument>("layers.2.q.weight", [&] {
    runtime.load("layers.2.q.weight", values.data(), DType::f32, {60, 24});
  });
  for (const std::vector<std::int64_t>& shape :
       {std::vector<std::int64_t>{24, 60}, {60}, {60, 24, 1}, {}, {-60, -24}}) {
    check_throws<std::invalid_argument>(
        "(60, 24)", [&] { runtime.load("layers.0.q.weight", values.data(), DType::f32, shape); });
  }
  check_throws<std::invalid_argument>(
      "(24)", [&] { runtime.load("final_norm.weight", values.data(), DType::f32, {24, 1}); });
  Batch batch = BatchBuilder(runtime).add(0, some_tokens(3), 3).build();
  check_throws<std::invalid_argument>("weights are not loaded", [&] { runtime.submit(batch, {}); });
  load_all(runtime);
  CHECK(runtime.missing_weights().empty());
  check_throws<std::invalid_argument>("alloc_kv", [&] { runtime.submit(batch, {}); });
  check_throws<std::invalid_argument>("alloc_kv", [&] { runtime.copy_blocks(0, {0, 1}); });
  check_throws<std::invalid_argument>("num_blocks", [&] { runtime.alloc_kv(0); });
  check_throws<std::bad_alloc>("", [&] { runtime.alloc_kv(std::int64_t{1} << 50); });
  check_throws<std::invalid_argument>("alloc_kv", [&] { runtime.submit(batch, {}); });
  runtime.alloc_kv(4);
  check_throws<std::invalid_argument>("block 4", [&] { runtime.copy_blocks(0, {0, 4}); });
  check_throws<std::invalid_argument>("pairs", [&] { runtime.copy_blocks(0, {0}); });
  check_throws<std::invalid_argument>("block_tables", [&] { runtime.submit(batch, {}); });
}

void options() {
  const auto make = [](void (*change)(RuntimeOptions& options)) {
    RuntimeOptions options = small_options();
    change(options);
    Runtime("cpu", small_spec(), options);
  };
  check_throws<std::invalid_argument>("fp8", [&] { make([](auto& o) { o.dtype = "fp8"; }); });
  check_throws<std::invalid_argument>("f16", [&] { make([](auto& o) { o.kv_dtype = "f16"; }); });
  check_throws<std::invalid_argument>("block_size",
                                      [&] { make([](auto& o) { o.block_size = 8; }); });
  check_throws<std::invalid_argument>("block_size",
                                      [&] { make([](auto& o) { o.block_size = 0; }); });
  check_throws<std::invalid_argument>("max_model_len",
                                      [&] { make([](auto& o) { o.max_model_len = 0; }); });
  check_throws<std::invalid_argument>("max_num_seqs",
                                      [&] { make([](auto& o) { o.max_num_seqs = 0; }); });
  check_throws<std::invalid_argument>(
      "max_num_batched_tokens", [&] { make([](auto& o) { o.max_num_batched_tokens = -1; }); });
  check_throws<std::invalid_argument>("num_threads",
                                      [&] { make([](auto& o) { o.num_threads = 5000; }); });
  check_throws<std::invalid_argument>("device_index",
                                      [&] { make([](auto& o) { o.device_index = 1; }); });
  check_throws<std::invalid_argument>("world_size",
                                      [&] { make([](auto& o) { o.world_size = 2; }); });
  check_throws<std::invalid_argument>("rank", [&] { make([](auto& o) { o.rank = -1; }); });
  check_throws<std::invalid_argument>("isa", [&] { make([](auto& o) { o.isa = "mmx"; }); });
  ModelSpec spec = small_spec();
  spec.layers[1].attention_scale = 0.0f;
  check_throws<std::invalid_argument>("attention_scale",
                                      [&] { Runtime("cpu", spec, small_options()); });
  check_throws<std::invalid_argument>("tpu", [] { Runtime("tpu", small_spec(), small_options()); });
}

}  // namespace

std::vector<Test> runtime_error_tests() {
  return {{"bad batches", bad_batches},
          {"tickets", tickets},
          {"open tickets do not hinder the end", open_tickets_do_not_hinder_the_end},
          {"loading", loading},
          {"options", options}};
}

}  // namespace octavo::tests

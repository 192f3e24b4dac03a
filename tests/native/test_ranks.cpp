// A model split over ranks, which exchange their results in memory, gives the whole model's
// numbers.

#include <unistd.h>

#include <cstdio>
#include <future>
#include <limits>

#include "core/decoder.h"
#include "core/rank_group.h"
#include "cpu/backend.h"
#include "model.h"

namespace octavo::tests {

namespace {

// Memory that ranks share; here they are threads.
class SharedMemory {
 public:
  explicit SharedMemory(std::int64_t size) : file_(std::tmpfile()), size_(size) {
    CHECK(file_ &&
          ftruncate(fileno(file_), static_cast<off_t>(RankGroup::memory_bytes(size))) == 0);
  }
  ~SharedMemory() { std::fclose(file_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  std::shared_ptr<RankGroup> group(std::int64_t rank) const {
    return std::make_shared<RankGroup>(fileno(file_), rank, size_);
  }

  // Calls body(group) in each rank, all at once; returns what came of it, by rank.
  template <class Body>
  auto in_all(const Body& body) const {
    using Result = decltype(body(*group(0)));
    std::vector<std::future<Result>> running;
    for (std::int64_t rank = 0; rank < size_; ++rank) {
      running.push_back(std::async(std::launch::async, [this, &body, rank] {
        const std::shared_ptr<RankGroup> own = group(rank);
        try {
          return body(*own);
        } catch (const std::exception& error) {
          own->abort(error.what());
          throw;
        }
      }));
    }
    std::vector<Result> results;
    for (auto& each : running) results.push_back(each.get());
    return results;
  }

 private:
  std::FILE* file_;
  std::int64_t size_;
};

ModelSpec whole_spec() {
  ModelSpec spec = small_spec();
  LayerSpec layer = spec.layers[0];
  layer.num_heads = 4;
  layer.num_kv_heads = 2;
  layer.intermediate_size = 64;  // whole panels of gates a rank: one fused product (normed_mlp)
  spec.layers = {layer, layer};
  spec.layers[1].intermediate_size = 42;
  spec.layers[1].gated = false;
  spec.layers[1].activation = Activation::gelu;
  spec.tie_word_embeddings = true;
  return spec;
}

// A rank's part of the model: its heads, and its part of the MLP's width.
ModelSpec part_of(ModelSpec spec, std::int64_t num_ranks) {
  for (LayerSpec& layer : spec.layers) {
    layer.num_heads /= num_ranks;
    layer.num_kv_heads /= num_ranks;
    layer.intermediate_size /= num_ranks;
  }
  return spec;
}

bool has_any(const std::string& name, std::initializer_list<const char*> parts) {
  return std::any_of(parts.begin(), parts.end(),
                     [&](const char* part) { return name.find(part) != std::string::npos; });
}

// Outputs are split where a rank makes its own heads or MLP numbers, inputs where it takes them.
void load_part(Weights& weights, std::int64_t rank, std::int64_t num_ranks) {
  Numbers numbers(77);
  for (auto& [name, shape] : weight_shapes(whole_spec())) {
    const bool is_matrix = shape.size() > 1;
    std::int64_t rows = shape[0], cols = is_matrix ? shape[1] : 1, first_row = 0, first_col = 0;
    const std::vector<float> whole = numbers.many(rows * cols, is_matrix ? 0.4f : 1.0f);
    const std::int64_t stride = cols;
    if (has_any(name, {".q.", ".k.", ".v.", ".gate.", ".up."})) {
      rows /= num_ranks;
      first_row = rank * rows;
    } else if (has_any(name, {".o.weight", ".down.weight"})) {
      cols /= num_ranks;
      first_col = rank * cols;
    }
    std::vector<float> part;
    for (std::int64_t r = first_row; r < first_row + rows; ++r) {
      const auto begin = whole.begin() + r * stride + first_col;
      part.insert(part.end(), begin, begin + cols);
    }
    weights.load(name, part.data(), DType::f32,
                 is_matrix ? std::vector<std::int64_t>{rows, cols} : std::vector{rows});
  }
  CHECK(weights.missing().empty());
}

// Logits of a prompt of one sequence, as a rank computes them. options.rank: which it takes itself
// for.
std::vector<float> logits_of_rank(Backend& backend, std::int64_t rank, std::int64_t num_ranks,
                                  const RuntimeOptions& options) {
  const std::vector<std::int32_t> tokens = some_tokens(20);
  const auto count = static_cast<std::int32_t>(tokens.size());
  const ModelSpec spec = part_of(whole_spec(), num_ranks);
  Weights weights(backend, spec, options);
  load_part(weights, rank, num_ranks);
  std::vector<std::int32_t> positions, row_starts{0, count}, block_table{0, 1};
  for (std::int32_t i = 0; i < count; ++i) positions.push_back(i);
  Step step;
  step.num_tokens = step.num_rows = count;
  step.num_seqs = 1;
  step.max_blocks = 2;
  step.token_ids = tokens.data();
  step.positions = step.rope_rows = step.slots = step.logit_rows = positions.data();
  step.row_starts = row_starts.data();
  step.context_lens = &count;
  step.block_tables = block_table.data();
  std::vector<Buffer> buffers;
  std::vector<KvLayer> kv;
  for (const LayerSpec& layer : spec.layers) {
    const std::int64_t bytes = backend.kv_block_bytes(layer, DType::f32, 16);
    buffers.emplace_back(&backend, static_cast<std::size_t>(2 * bytes));
    kv.push_back(
        {buffers.back().data(), DType::f32, 2, 16, layer.num_kv_heads, layer.head_dim, bytes});
  }
  std::vector<float> logits(static_cast<std::size_t>(count * spec.vocab_size));
  const Adapters adapters(backend, spec, options);
  Decoder decoder(backend, spec, weights, adapters, count);
  backend.run({}, [&] {
    decoder.forward(step, kv, {logits.data(), count, spec.vocab_size, spec.vocab_size}, {},
                    nullptr);
  });
  return logits;
}

// names: which rank each of two takes itself for.
std::vector<float> logits_of_two(std::vector<std::int64_t> names) {
  const SharedMemory memory(2);
  const auto results = memory.in_all([&](const RankGroup& group) {
    RuntimeOptions options = small_options();
    options.world_size = 2;
    options.rank = names[static_cast<std::size_t>(group.rank())];
    cpu::CpuBackend backend(1, "auto", memory.group(group.rank()));
    return logits_of_rank(backend, group.rank(), 2, options);
  });
  CHECK(results[1] == results[0]);
  return results[0];
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = 0.0f;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

void two_ranks_give_the_whole() {
  cpu::CpuBackend alone(1, "auto");
  const std::vector<float> whole = logits_of_rank(alone, 0, 1, small_options());
  // Sums of up to 64 products in another order: a few units of 2^-24 of logits of size 1 to 10.
  CHECK(largest_difference(logits_of_two({0, 1}), whole) < 2e-5f);
  // Planted: both add the biases of o and down.
  CHECK(largest_difference(logits_of_two({0, 0}), whole) > 0.1f);
}

// Of numbers whose sums depend on the order: with few of them, with more than are exchanged at a
// time, and one after another in any sequence, since two parts of the memory are used in turn.
void sums_in_the_order_of_the_ranks() {
  const std::vector<std::int64_t> counts = {1, 7, 4096, 5001, 1, 300001, 3, 262144, 2};
  for (const std::int64_t size : {2, 3, 5}) {
    const auto numbers_of = [&](std::int64_t rank, std::int64_t count) {
      return Numbers(static_cast<std::uint64_t>(31 * rank + count)).many(count, 1e3f);
    };
    const auto of_rank = [&](RankGroup& group) {
      std::vector<std::vector<float>> sums;
      for (const std::int64_t count : counts) {
        sums.push_back(numbers_of(group.rank(), count));
        group.all_reduce(sums.back().data(), count);
      }
      return sums;
    };
    const auto results = SharedMemory(size).in_all(of_rank);
    for (std::size_t i = 0; i < counts.size(); ++i) {
      std::vector<float> expected = numbers_of(0, counts[i]);
      for (std::int64_t rank = 1; rank < size; ++rank) {
        const std::vector<float> more = numbers_of(rank, counts[i]);
        for (std::size_t j = 0; j < more.size(); ++j) expected[j] += more[j];
      }
      for (const auto& sums : results) CHECK(sums[i] == expected);
    }
  }
}

// As a head whose vocabulary is split uses it.
void gathered_columns() {
  constexpr std::int64_t kOutputs = 52, kInputs = 24, kRows = 3;
  const std::vector<float> matrix = Numbers(3).many(kOutputs * kInputs);
  std::vector<float> x = Numbers(4).many(kRows * kInputs);
  const auto multiply = [&](Backend& backend, std::int64_t first, std::int64_t count) {
    std::vector<float> out(kRows * kOutputs, std::numeric_limits<float>::quiet_NaN());
    const View view{out.data(), kRows, kOutputs, kOutputs};
    Linear linear = backend.make_linear(count, kInputs, DType::f32, false);
    backend.pack_rows(linear, 0, {matrix.data() + first * kInputs, DType::f32, count, kInputs});
    backend.run({}, [&] {
      backend.linear(view.columns(first, count), {x.data(), kRows, kInputs, kInputs}, linear);
      backend.all_gather(view);
    });
    return out;
  };
  cpu::CpuBackend alone(1, "auto");
  const std::vector<float> whole = multiply(alone, 0, kOutputs);
  for (const std::int64_t size : {2, 4}) {
    const SharedMemory memory(size);
    const auto results = memory.in_all([&](const RankGroup& group) {
      cpu::CpuBackend backend(1, "auto", memory.group(group.rank()));
      return multiply(backend, group.rank() * kOutputs / size, kOutputs / size);
    });
    for (const auto& result : results) CHECK(result == whole);
  }
}

// Rows that lie apart, and parts of a row that are exchanged in several pieces.
void gathered_rows_apart() {
  constexpr std::size_t kBytes = 3 * ((1 << 20) + 5), kStride = kBytes + 7, kRows = 2;
  const auto results = SharedMemory(3).in_all([&](RankGroup& group) {
    std::vector<unsigned char> rows(kRows * kStride, 200);
    const std::size_t own = kBytes / 3, rank = static_cast<std::size_t>(group.rank());
    for (std::size_t row = 0; row < kRows; ++row) {
      for (std::size_t i = 0; i < own; ++i)
        rows[row * kStride + rank * own + i] = static_cast<unsigned char>(i % 61 + rank + row);
    }
    group.all_gather(rows.data(), kRows, kBytes, kStride);
    return rows;
  });
  for (const auto& rows : results) {
    CHECK(rows == results[0]);
    CHECK(rows[kBytes] == 200 && rows[kStride + 1] == 2);
    CHECK(rows[kStride + 2 * kBytes / 3 + 60] == 63);
  }
  check_throws<std::invalid_argument>("rows of 52 bytes; expected a multiple of 3", [] {
    SharedMemory(3).group(0)->all_gather(nullptr, 1, 52, 52);
  });
}

void a_rank_that_fails_ends_the_others_wait() {
  const SharedMemory memory(3);
  const auto results = memory.in_all([&](RankGroup& group) {
    std::string message;
    int number = group.rank() == 0 ? 77 : 0;
    group.broadcast(&number, sizeof(number));
    CHECK(number == 77);
    if (group.rank() == 1) {
      group.abort("rank 1: no memory");
      group.abort("what comes later is not the cause");
      return message;
    }
    float x = 1.0f;
    try {
      group.all_reduce(&x, 1);
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    return message;
  });
  CHECK(results[0] == "rank 1: no memory" && results[2] == results[0]);
  check_throws<std::runtime_error>("rank 1: no memory", [&] { memory.group(1)->check(); });
}

}  // namespace

std::vector<Test> rank_tests() {
  return {{"two ranks give the whole model's logits", two_ranks_give_the_whole},
          {"ranks add up in their order", sums_in_the_order_of_the_ranks},
          {"ranks gather the columns of a product", gathered_columns},
          {"ranks gather rows that lie apart", gathered_rows_apart},
          {"a rank that fails ends the others' wait", a_rank_that_fails_ends_the_others_wait}};
}

}  // namespace octavo::tests

// A model split over two ranks, which exchange their results in memory, gives the whole model's
// numbers. `Runtime` refuses more than one rank: these are the parts beneath it.

#include <chrono>
#include <condition_variable>
#include <future>
#include <limits>
#include <mutex>

#include "core/decoder.h"
#include "cpu/backend.h"
#include "model.h"

namespace octavo::tests {

namespace {

// Where ranks meet: each brings a matrix, then all see the matrices of all.
class Group {
 public:
  explicit Group(std::size_t size) : views_(size) {}

  std::int64_t size() const { return static_cast<std::int64_t>(views_.size()); }

  // use(views): called in every rank; what it reads stays until all are back from it.
  template <class Use>
  void meet(std::int64_t rank, View view, Use&& use) {
    views_[static_cast<std::size_t>(rank)] = view;
    wait_for_all();
    use(views_);
    wait_for_all();
  }

 private:
  void wait_for_all() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++num_waiting_ == views_.size()) {
      num_waiting_ = 0;
      ++round_;
      changed_.notify_all();
    } else if (!changed_.wait_for(lock, std::chrono::seconds(60),
                                  [&] { return round_ != round; })) {
      fail("a rank did not come to an exchange");
    }
  }

  std::vector<View> views_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t num_waiting_ = 0;
  int round_ = 0;
};

class RankBackend : public cpu::CpuBackend {
 public:
  RankBackend(Group& group, std::int64_t rank)
      : CpuBackend(1, "auto"), group_(group), rank_(rank) {}

  void all_reduce(View x) override {
    std::vector<float> sums(static_cast<std::size_t>(x.rows * x.cols));
    group_.meet(rank_, x, [&](const std::vector<View>& views) {
      for (const View& view : views) {
        for (std::int64_t r = 0; r < x.rows; ++r)
          for (std::int64_t c = 0; c < x.cols; ++c)
            sums[static_cast<std::size_t>(r * x.cols + c)] += view.row(r)[c];
      }
    });
    for (std::int64_t r = 0; r < x.rows; ++r)
      std::copy_n(sums.begin() + r * x.cols, x.cols, x.row(r));
  }

  void all_gather(View x) override {
    const std::int64_t width = x.cols / group_.size();
    group_.meet(rank_, x, [&](const std::vector<View>& views) {
      for (std::int64_t other = 0; other < group_.size(); ++other) {
        if (other == rank_) continue;  // the other ranks are reading these columns
        const View& view = views[static_cast<std::size_t>(other)];
        for (std::int64_t r = 0; r < x.rows; ++r)
          std::copy_n(view.row(r) + other * width, width, x.row(r) + other * width);
      }
    });
  }

 private:
  Group& group_;
  std::int64_t rank_;
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
  Group group(2);
  std::vector<std::future<std::vector<float>>> results;
  for (std::int64_t rank = 0; rank < 2; ++rank) {
    results.push_back(std::async(std::launch::async, [&, rank] {
      RuntimeOptions options = small_options();
      options.world_size = 2;
      options.rank = names[static_cast<std::size_t>(rank)];
      RankBackend backend(group, rank);
      return logits_of_rank(backend, rank, 2, options);
    }));
  }
  const std::vector<float> first = results[0].get();
  CHECK(results[1].get() == first);
  return first;
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

// As a head whose vocabulary is split would use it.
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
  Group group(2);
  const auto part = [&](std::int64_t rank) {
    RankBackend backend(group, rank);
    return multiply(backend, rank * kOutputs / 2, kOutputs / 2);
  };
  auto other = std::async(std::launch::async, [&] { return part(1); });
  CHECK(part(0) == whole);
  CHECK(other.get() == whole);
}

}  // namespace

std::vector<Test> rank_tests() {
  return {{"two ranks give the whole model's logits", two_ranks_give_the_whole},
          {"ranks gather the columns of a product", gathered_columns}};
}

}  // namespace octavo::tests

// Attention of the CUDA backend on the emulator, as the engine's steps come: padded, repeated, with
// caches and tables of exactly the size they need (what is read beyond, the address sanitizer
// sees).

#include <algorithm>

#include "host.h"

namespace octavo::tests {

namespace {

constexpr const char* kDevice = "cuda_emulated";

template <class T>
Buffer on_device(Backend& backend, const std::vector<T>& values) {
  Buffer memory(&backend, std::max<std::size_t>(values.size(), 1) * sizeof(T));
  backend.upload(memory.data(), values.data(), values.size() * sizeof(T));
  return memory;
}

// Numbers on the device in its activations' format, `gap` numbers of nobody behind every row.
struct Activations {
  Buffer memory;
  View view;

  Activations(Backend& backend, std::int64_t rows, std::int64_t cols, Numbers* numbers,
              std::int64_t gap = 8) {
    const DType dtype = backend.activation_dtype();
    std::vector<unsigned char> bytes(
        static_cast<std::size_t>(rows * (cols + gap) * bits_of(dtype) / 8));
    for (std::int64_t i = 0; i < rows * (cols + gap); ++i)
      store_float(bytes.data(), dtype, i, numbers ? numbers->next() * 2.0f : 7.0f);
    memory = on_device(backend, bytes);
    view = {memory.data(), rows, cols, cols + gap, dtype};
  }
  std::vector<float> row(Backend& backend, std::int64_t index) const {
    std::vector<unsigned char> bytes(view.row_size());
    backend.download(bytes.data(), view.row_bytes(index), bytes.size());
    std::vector<float> values;
    for (std::int64_t i = 0; i < view.cols; ++i)
      values.push_back(load_float(bytes.data(), view.dtype, i));
    return values;
  }
};

// A cache of exactly the blocks that the sequences fill, the last of them used to its end.
class Model {
 public:
  Model(Backend& backend, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
        DType kv_dtype, std::int64_t num_blocks)
      : backend_(backend) {
    layer_.num_heads = heads;
    layer_.num_kv_heads = kv_heads;
    layer_.head_dim = head_dim;
    kv_ = make_kv(backend, memory_, layer_, kv_dtype, num_blocks, 16);
    Numbers numbers(11);
    const std::int64_t tokens = num_blocks * 16;
    const Activations qkv(backend, tokens, layer_.q_size() + 2 * layer_.kv_size(), &numbers);
    Ids slots;
    for (std::int32_t t = 0; t < tokens; ++t) slots.push_back(t);
    const Buffer device_slots = on_device(backend, slots);
    Step step;
    step.num_tokens = tokens;
    step.slots = device_slots.as<std::int32_t>();
    backend.rope_and_store(qkv.view, nullptr, layer_, kv_, step);
  }

  // The rows that sequences of so many new tokens and so much context get; each begins at the same
  // block of the cache. A context of 0 is padding.
  std::vector<std::vector<float>> attend(const std::vector<std::pair<int, int>>& sequences,
                                         std::int64_t max_blocks) {
    Ids row_starts{0}, context_lens, tables;
    for (const auto& [tokens, context] : sequences) {
      row_starts.push_back(row_starts.back() + tokens);
      context_lens.push_back(context);
      for (std::int64_t b = 0; b < max_blocks; ++b)
        tables.push_back(16 * b < context ? static_cast<std::int32_t>(kv_.num_blocks - 1 - b) : -1);
    }
    Numbers numbers(5);
    const Activations q(backend_, row_starts.back(), layer_.q_size(), &numbers),
        out(backend_, row_starts.back(), layer_.q_size(), nullptr);
    const Buffer starts = on_device(backend_, row_starts), lens = on_device(backend_, context_lens),
                 blocks = on_device(backend_, tables);
    Step step;
    step.num_tokens = row_starts.back();
    step.num_seqs = static_cast<std::int64_t>(sequences.size());
    step.max_blocks = max_blocks;
    step.row_starts = starts.as<std::int32_t>();
    step.context_lens = lens.as<std::int32_t>();
    step.block_tables = blocks.as<std::int32_t>();
    backend_.attention(out.view, q.view, layer_, 0.2f, kv_, step);
    std::vector<std::vector<float>> rows;
    for (std::int64_t row = 0; row < out.view.rows; ++row) rows.push_back(out.row(backend_, row));
    return rows;
  }

  KvLayer& cache() { return kv_; }

 private:
  Backend& backend_;
  LayerSpec layer_;
  Buffer memory_;
  KvLayer kv_;
};

bool is_zero(const std::vector<float>& row) {
  return std::all_of(row.begin(), row.end(), [](float x) { return x == 0.0f; });
}

std::unique_ptr<Backend> device(DType dtype) {
  BackendOptions options;
  options.dtype = dtype;
  return make_backend(kDevice, options);
}

const DType kCaches[] = {DType::bf16, DType::int8, DType::f32};

// Sequences of no context get zeros, and the others what they get without them, whichever of the
// kernels takes the step: one or three tokens each, or many.
void padding() {
  const auto backend = device(DType::bf16);
  for (const DType kv_dtype : kCaches) {
    for (const std::int64_t head_dim : {64, 128}) {
      Model model(*backend, 6, 2, head_dim, kv_dtype, 20);
      for (const int tokens : {1, 3, 40}) {
        const auto alone = model.attend({{tokens, 64}, {tokens, 320}}, 20);
        const auto padded =
            model.attend({{tokens, 64}, {tokens, 320}, {tokens, 0}, {tokens, 0}}, 32);
        for (std::size_t row = 0; row < padded.size(); ++row)
          CHECK(row < alone.size() ? padded[row] == alone[row] && !is_zero(padded[row])
                                   : is_zero(padded[row]));
      }
    }
  }
}

// The counters by which blocks find out who is last are zero again after every step: steps of other
// shapes in between change nothing.
void repeated() {
  const auto backend = device(DType::f16);
  for (const DType kv_dtype : {DType::f16, DType::int8}) {
    Model model(*backend, 4, 1, 64, kv_dtype, 80);
    const auto first = model.attend({{1, 1280}}, 80);
    for (int i = 0; i < 3; ++i) {
      model.attend({{1, 300 + i}, {2, 700}, {1, 16}}, 64);
      model.attend({{8, 1279}}, 80);
      model.attend({{9, 1000}, {5, 900}}, 64);
      CHECK(model.attend({{1, 1280}}, 80) == first);
    }
  }
}

// What a copy leaves where it went, also where it is the next one's source.
void copies() {
  const auto backend = device(DType::bf16);
  for (const DType kv_dtype : kCaches) {
    Model model(*backend, 4, 2, 20, kv_dtype, 40);
    const KvLayer& kv = model.cache();
    const std::size_t width = static_cast<std::size_t>(16 * kv.num_kv_heads * kv.head_dim);
    std::vector<float> keys, values, keys_after, values_after;
    backend->read_kv(kv, 16 * kv.num_blocks, keys, values);
    Ids pairs{1, 0, 0, 2, 3, 3, 9, 1, 5, 9};  // 1 to 0 to 2; 1 and 9 are read, then written
    Ids source(40);
    for (std::int32_t b = 0; b < 40; ++b) source[static_cast<std::size_t>(b)] = b;
    for (std::int32_t b = 10; b < 39; ++b) pairs.insert(pairs.end(), {b + 1, b});
    for (std::size_t i = 0; i < pairs.size(); i += 2)
      source[static_cast<std::size_t>(pairs[i + 1])] = source[static_cast<std::size_t>(pairs[i])];
    backend->copy_blocks(model.cache(), pairs.data(), static_cast<std::int64_t>(pairs.size() / 2));
    backend->read_kv(kv, 16 * kv.num_blocks, keys_after, values_after);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const auto from = static_cast<std::size_t>(source[i / width]) * width + i % width;
      CHECK(keys_after[i] == keys[from] && values_after[i] == values[from]);
    }
  }
}

}  // namespace

std::vector<Test> cuda_attention_tests() {
  try {
    device(DType::f32);
  } catch (const std::invalid_argument&) {
    return {};  // this build has no emulator
  }
  return {{"CUDA: attention of padded steps", padding},
          {"CUDA: attention, step after step", repeated},
          {"CUDA: copies of blocks, one after the other", copies}};
}

}  // namespace octavo::tests

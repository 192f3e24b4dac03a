// How long single ops take, for benchmarks: on arrays that never leave the device.

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "bindings/bindings.h"
#include "core/backend.h"

namespace octavo::bindings {

namespace {

// Uniform in -1 .. 1, from a 64-bit linear congruence (Knuth's MMIX constants).
std::vector<float> random_numbers(std::int64_t count) {
  std::vector<float> numbers(static_cast<std::size_t>(count));
  std::uint64_t state = 1;
  for (float& number : numbers) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    number = static_cast<float>(static_cast<std::int32_t>(state >> 32)) / 2147483648.0f;
  }
  return numbers;
}

class OpBench {
 public:
  OpBench(const std::string& device, const std::string& dtype, bool deterministic)
      : backend_(make_backend(device, options(dtype, deterministic))) {}

  // Each call multiplies by another of `copies` matrices, so that no cache holds them all.
  double linear(std::int64_t rows, std::int64_t outputs, std::int64_t inputs, nb::object format,
                std::int64_t copies, std::int64_t repeats) {
    const WeightFormat weight_format = format.is_none() ? WeightFormat(backend_->activation_dtype())
                                                        : bindings::weight_format(format);
    check_sizes({rows, outputs, inputs, copies, repeats});
    std::vector<Linear> weights;
    for (std::int64_t i = 0; i < copies; ++i)
      weights.push_back(random_linear(outputs, inputs, weight_format));
    const Matrix x = random_matrix(rows, inputs), out = random_matrix(rows, outputs);
    return seconds(repeats, copies, [&](std::int64_t i) {
      backend_->linear(out.view, x.view, weights[static_cast<std::size_t>(i)]);
    });
  }

  // num_seqs sequences of `context` tokens each, the last tokens_per_seq of which are new.
  double attention(std::int64_t num_seqs, std::int64_t tokens_per_seq, std::int64_t context,
                   std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim,
                   const std::string& kv_dtype, std::int64_t repeats) {
    check_sizes({num_seqs, tokens_per_seq, context, num_heads, num_kv_heads, head_dim, repeats});
    require(context >= tokens_per_seq, "context is ", context, "; expected tokens_per_seq, ",
            tokens_per_seq, ", or more");
    LayerSpec spec;
    spec.num_heads = num_heads;
    spec.num_kv_heads = num_kv_heads;
    spec.head_dim = head_dim;
    KvLayer kv;
    kv.dtype = parse_dtype(kv_dtype, "kv_dtype");
    kv.block_size = 16;
    kv.num_kv_heads = num_kv_heads;
    kv.head_dim = head_dim;
    const std::int64_t blocks = (context + 15) / 16;
    kv.num_blocks = num_seqs * blocks;
    kv.block_bytes = backend_->kv_block_bytes(spec, kv.dtype, kv.block_size);
    const Buffer cache(backend_.get(), static_cast<std::size_t>(kv.num_blocks * kv.block_bytes));
    kv.data = cache.data();
    fill(kv, spec);

    Step step;
    step.num_seqs = num_seqs;
    step.num_tokens = num_seqs * tokens_per_seq;
    step.max_blocks = blocks;
    std::vector<std::int32_t> positions, starts{0}, lens, tables;
    for (std::int64_t s = 0; s < num_seqs; ++s) {
      for (std::int64_t t = 0; t < tokens_per_seq; ++t)
        positions.push_back(static_cast<std::int32_t>(context - tokens_per_seq + t));
      starts.push_back(static_cast<std::int32_t>((s + 1) * tokens_per_seq));
      lens.push_back(static_cast<std::int32_t>(context));
      for (std::int64_t b = 0; b < blocks; ++b)
        tables.push_back(static_cast<std::int32_t>(s + b * num_seqs));  // never neighbours
    }
    const Buffer memory[] = {up(positions), up(starts), up(lens), up(tables)};
    step.positions = memory[0].as<std::int32_t>();
    step.row_starts = memory[1].as<std::int32_t>();
    step.context_lens = memory[2].as<std::int32_t>();
    step.block_tables = memory[3].as<std::int32_t>();
    const Matrix q = random_matrix(step.num_tokens, spec.q_size()),
                 out = random_matrix(step.num_tokens, spec.q_size());
    return seconds(repeats, 1, [&](std::int64_t) {
      backend_->attention(out.view, q.view, spec, 0.125f, kv, step);
    });
  }

  double add_norm(std::int64_t rows, std::int64_t width, std::int64_t repeats) {
    check_sizes({rows, width, repeats});
    const Matrix residual = random_matrix(rows, width, DType::f32), x = random_matrix(rows, width),
                 out = random_matrix(rows, width);
    const Matrix weight = random_matrix(1, width, DType::f32);
    Norm norm;
    norm.weight = weight.memory.as<float>();
    return seconds(repeats, 1, [&](std::int64_t) {
      backend_->add_norm(out.view, residual.view, x.view, norm);
    });
  }

  double gated_activation(std::int64_t rows, std::int64_t width, std::int64_t repeats) {
    check_sizes({rows, width, repeats});
    const Matrix x = random_matrix(rows, 2 * width), out = random_matrix(rows, width);
    return seconds(repeats, 1, [&](std::int64_t) {
      backend_->gated_activation(out.view, x.view, Activation::silu, true);
    });
  }

  double sample(std::int64_t rows, std::int64_t vocab_size, float temperature, std::int32_t top_k,
                float top_p, std::int64_t repeats) {
    check_sizes({rows, vocab_size, repeats});
    const Matrix logits = random_matrix(rows, vocab_size, DType::f32);
    const auto count = static_cast<std::size_t>(rows);
    const std::vector<std::int32_t> none(count, -1);
    const Buffer memory[] = {up(std::vector<float>(count, temperature)),
                             up(std::vector<std::int32_t>(count, top_k)),
                             up(std::vector<float>(count, top_p)),
                             up(std::vector<float>(count, 0.0f)),
                             up(std::vector<std::uint64_t>(count, 7)),
                             up(std::vector<std::int32_t>(count, 0)),
                             up(none)};
    Step step;
    step.num_rows = rows;
    step.temperature = memory[0].as<float>();
    step.top_k = memory[1].as<std::int32_t>();
    step.top_p = memory[2].as<float>();
    step.min_p = memory[3].as<float>();
    step.seed = memory[4].as<std::uint64_t>();
    step.sample_index = step.sample_positions = memory[5].as<std::int32_t>();
    step.num_logprobs = step.state_rows = memory[6].as<std::int32_t>();
    const Buffer ids = up(none), logprobs = up(none), finite = up(none);
    Samples samples;
    samples.token_ids = ids.as<std::int32_t>();
    samples.logprobs = logprobs.as<float>();
    samples.finite = finite.as<std::uint8_t>();
    return seconds(repeats, 1,
                   [&](std::int64_t) { backend_->sample(samples, logits.view, nullptr, step); });
  }

 private:
  struct Matrix {
    Buffer memory;
    View view;
  };

  static BackendOptions options(const std::string& dtype, bool deterministic) {
    BackendOptions result;
    result.dtype = parse_dtype(dtype, "dtype");
    result.deterministic = deterministic;
    return result;
  }

  static void check_sizes(std::initializer_list<std::int64_t> sizes) {
    for (const std::int64_t size : sizes)
      require(size >= 1, "a size is ", size, "; expected 1 or more");
  }

  template <class T>
  Buffer up(const std::vector<T>& values) {
    Buffer memory(backend_.get(), values.size() * sizeof(T));
    backend_->upload(memory.data(), values.data(), memory.bytes());
    return memory;
  }

  Matrix random_matrix(std::int64_t rows, std::int64_t cols) {
    return random_matrix(rows, cols, backend_->activation_dtype());
  }

  Matrix random_matrix(std::int64_t rows, std::int64_t cols, DType dtype) {
    Matrix result;
    result.view = {nullptr, rows, cols, cols, dtype};
    const std::vector<float> numbers = random_numbers(rows * cols);
    std::vector<unsigned char> bytes(static_cast<std::size_t>(rows) * result.view.row_size());
    for (std::int64_t i = 0; i < rows * cols; ++i)
      store_float(bytes.data(), dtype, i, numbers[static_cast<std::size_t>(i)]);
    result.memory = up(bytes);
    result.view.data = result.memory.data();
    return result;
  }

  // Random keys and values in every slot: on zeros a GPU is faster than on real ones.
  void fill(KvLayer& kv, const LayerSpec& spec) {
    constexpr std::int64_t kSlots = 1024;
    const Matrix qkv = random_matrix(kSlots, spec.q_size() + 2 * spec.kv_size());
    for (std::int64_t first = 0; first < kv.num_blocks * kv.block_size; first += kSlots) {
      std::vector<std::int32_t> slots(kSlots, -1);
      for (std::int64_t i = 0; i < kSlots && first + i < kv.num_blocks * kv.block_size; ++i)
        slots[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(first + i);
      const Buffer memory = up(slots);
      Step step;
      step.num_tokens = kSlots;
      step.slots = memory.as<std::int32_t>();
      backend_->rope_and_store(qkv.view, nullptr, spec, kv, step);
      backend_->sync();
    }
  }

  Linear random_linear(std::int64_t outputs, std::int64_t inputs, const WeightFormat& format) {
    Linear linear = backend_->make_linear(outputs, inputs, format, false);
    if (!format.is_quantized()) {
      const std::vector<float> numbers = random_numbers(outputs * inputs);
      backend_->pack_rows(linear, 0, {numbers.data(), DType::f32, outputs, inputs});
      return linear;
    }
    const std::int64_t row_bytes = (inputs * bits_of(format.dtype) + 7) / 8;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(outputs * row_bytes));
    for (std::size_t i = 0; i < codes.size(); ++i)
      codes[i] = static_cast<std::uint8_t>(i * 37 >> 2);
    backend_->pack_rows(linear, 0, {codes.data(), format.dtype, outputs, inputs});
    const std::vector<float> scales(static_cast<std::size_t>(outputs * format.groups(inputs)),
                                    0.01f);
    backend_->pack_scales(linear, 0, outputs, scales.data());
    if (format.has_zeros) backend_->pack_zeros(linear, 0, outputs, scales.data());
    return linear;
  }

  // Seconds of one call of op(0 .. calls - 1), recorded together where the device records: once as
  // it is, once recorded, once replayed; then timed.
  double seconds(std::int64_t repeats, std::int64_t calls,
                 const std::function<void(std::int64_t)>& op) {
    nb::gil_scoped_release unlocked;
    using Clock = std::chrono::steady_clock;
    StepKey key;
    key.num_seqs = ++num_measured_;
    key.tokens_per_seq = 1;
    // Enough calls in a row that starting them does not count.
    const std::int64_t rounds = std::max<std::int64_t>(1, 20 / calls);
    const auto run = [&] {
      backend_->run(key, [&] {
        for (std::int64_t i = 0; i < rounds * calls; ++i) op(i % calls);
      });
    };
    for (int i = 0; i < 3; ++i) run();
    backend_->sync();
    double best = 1e30;
    for (std::int64_t i = 0; i < repeats; ++i) {
      const auto start = Clock::now();
      run();
      backend_->sync();
      best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    }
    backend_->forget_recorded();
    return best / static_cast<double>(rounds * calls);
  }

  std::unique_ptr<Backend> backend_;
  std::int64_t num_measured_ = 0;
};

}  // namespace

void bind_op_bench(nb::module_& module) {
  nb::class_<OpBench>(module, "OpBench")
      .def(nb::init<const std::string&, const std::string&, bool>(), nb::arg("device"),
           nb::arg("dtype"), nb::arg("deterministic") = false)
      .def("linear", &OpBench::linear, nb::arg("rows"), nb::arg("outputs"), nb::arg("inputs"),
           nb::arg("format") = nb::none(), nb::arg("copies") = 1, nb::arg("repeats") = 10)
      .def("attention", &OpBench::attention, nb::arg("num_seqs"), nb::arg("tokens_per_seq"),
           nb::arg("context"), nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
           nb::arg("kv_dtype"), nb::arg("repeats") = 10)
      .def("add_norm", &OpBench::add_norm, nb::arg("rows"), nb::arg("width"),
           nb::arg("repeats") = 10)
      .def("gated_activation", &OpBench::gated_activation, nb::arg("rows"), nb::arg("width"),
           nb::arg("repeats") = 10)
      .def("sample", &OpBench::sample, nb::arg("rows"), nb::arg("vocab_size"),
           nb::arg("temperature") = 0.0f, nb::arg("top_k") = 0, nb::arg("top_p") = 1.0f,
           nb::arg("repeats") = 10);
}

}  // namespace octavo::bindings

// How long single ops take, for benchmarks: on arrays that never leave the device.

#include <algorithm>
#include <functional>
#include <vector>

#include "bindings/ops_device.h"

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

class OpBench : private OpsDevice {
 public:
  OpBench(const std::string& device, const std::string& dtype, bool deterministic,
          std::int64_t launches, std::int64_t repeats, std::int64_t cache_bytes)
      : OpsDevice(device, {0, "auto", parse_dtype(dtype, "dtype"), deterministic}, 0),
        launches_(launches),
        repeats_(repeats),
        cache_bytes_(cache_bytes) {
    check_sizes({launches, repeats, cache_bytes});
  }

  // One time for each number of rows.
  std::vector<double> linear(const std::vector<std::int64_t>& rows_list, std::int64_t outputs,
                             std::int64_t inputs, nb::object format) {
    const WeightFormat weight_format = format.is_none() ? WeightFormat(backend_->activation_dtype())
                                                        : bindings::weight_format(format);
    check_sizes({outputs, inputs});
    std::vector<Linear> weights;
    const std::int64_t copies = copies_of(outputs * inputs * bits_of(weight_format.dtype) / 8);
    for (std::int64_t i = 0; i < copies; ++i)
      weights.push_back(random_linear(outputs, inputs, weight_format));
    std::vector<double> times;
    for (const std::int64_t rows : rows_list) {
      check_sizes({rows});
      const Matrix x = random_matrix(rows, inputs), out = random_matrix(rows, outputs);
      times.push_back(seconds(copies, [&](std::int64_t i) {
        backend_->linear(out.view, x.view, weights[static_cast<std::size_t>(i)]);
      }));
    }
    return times;
  }

  // num_seqs sequences of `context` tokens each, the last tokens_per_seq of which are new. The
  // copies that take turns are so many that what is read of them, in the window, does not stay in a
  // cache.
  double attention(std::int64_t num_seqs, std::int64_t tokens_per_seq, std::int64_t context,
                   std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim,
                   const std::string& kv_dtype, std::int64_t window) {
    check_sizes({num_seqs, tokens_per_seq, context, num_heads, num_kv_heads, head_dim});
    require(window >= 0, "window is ", window, "; expected 0 or more");
    require(context >= tokens_per_seq, "context is ", context, "; expected tokens_per_seq, ",
            tokens_per_seq, ", or more");
    LayerSpec spec;
    spec.num_heads = num_heads;
    spec.num_kv_heads = num_kv_heads;
    spec.head_dim = head_dim;
    spec.window = window;
    const std::int64_t blocks = (context + 15) / 16;
    const std::int64_t seen = window ? std::min(context, window + tokens_per_seq - 1) : context;
    const std::int64_t block_bytes =
        backend_->kv_block_bytes(spec, parse_dtype(kv_dtype, "kv_dtype"), 16);
    const std::int64_t copies = copies_of(num_seqs * ((seen + 15) / 16) * block_bytes);
    Cache kv = cache(spec, copies * num_seqs * blocks * 16, 16, kv_dtype);
    fill(kv.layer, spec);

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
    const Buffer memory[] = {up_vector(positions), up_vector(starts), up_vector(lens),
                             up_vector(tables)};
    step.positions = memory[0].as<std::int32_t>();
    step.row_starts = memory[1].as<std::int32_t>();
    step.context_lens = memory[2].as<std::int32_t>();
    step.block_tables = memory[3].as<std::int32_t>();
    const Matrix q = random_matrix(step.num_tokens, spec.q_size()),
                 out = random_matrix(step.num_tokens, spec.q_size());
    return seconds(copies, [&](std::int64_t i) {
      KvLayer copy = kv.layer;
      copy.num_blocks = num_seqs * blocks;
      copy.data = kv.memory.as<unsigned char>() + i * copy.num_blocks * block_bytes;
      backend_->attention(out.view, q.view, spec, 0.125f, copy, step);
    });
  }

  double add_norm(std::int64_t rows, std::int64_t width) {
    check_sizes({rows, width});
    const std::int64_t copies = copies_of(4 * rows * width);
    const Matrices residual(*this, copies, rows, width, DType::f32), x(*this, copies, rows, width);
    const Matrix out = random_matrix(rows, width);
    const Matrix weight = random_matrix(1, width, DType::f32);
    Norm norm;
    norm.weight = weight.memory.as<float>();
    return seconds(copies,
                   [&](std::int64_t i) { backend_->add_norm(out.view, residual[i], x[i], norm); });
  }

  double gated_activation(std::int64_t rows, std::int64_t width) {
    check_sizes({rows, width});
    const std::int64_t copies = copies_of(4 * rows * width);
    const Matrices x(*this, copies, rows, 2 * width);
    const Matrix out = random_matrix(rows, width);
    return seconds(copies, [&](std::int64_t i) {
      backend_->gated_activation(out.view, x[i], Activation::silu, true);
    });
  }

  double sample(std::int64_t rows, std::int64_t vocab_size, float temperature, std::int32_t top_k,
                float top_p) {
    check_sizes({rows, vocab_size});
    const std::int64_t copies = copies_of(4 * rows * vocab_size);
    const Matrices logits(*this, copies, rows, vocab_size, DType::f32);
    const auto count = static_cast<std::size_t>(rows);
    const std::vector<std::int32_t> none(count, -1);
    SamplingRow row;
    row.temperature = temperature;
    row.top_k = top_k;
    row.top_p = top_p;
    row.seed = 7;
    const Buffer sampling = up_vector(std::vector<SamplingRow>(count, row));
    Step step;
    step.num_rows = rows;
    step.sampling = sampling.as<SamplingRow>();
    const Buffer ids = up_vector(none), logprobs = up_vector(none), finite = up_vector(none);
    Samples samples;
    samples.token_ids = ids.as<std::int32_t>();
    samples.logprobs = logprobs.as<float>();
    samples.finite = finite.as<std::uint8_t>();
    return seconds(copies,
                   [&](std::int64_t i) { backend_->sample(samples, logits[i], nullptr, step); });
  }

 private:
  // Copies of a random matrix, that take turns.
  class Matrices {
   public:
    Matrices(OpBench& bench, std::int64_t copies, std::int64_t rows, std::int64_t cols)
        : Matrices(bench, copies, rows, cols, bench.backend_->activation_dtype()) {}
    Matrices(OpBench& bench, std::int64_t copies, std::int64_t rows, std::int64_t cols, DType dtype)
        : matrix_(bench.random_matrix(copies * rows, cols, dtype)), rows_(rows) {}
    View operator[](std::int64_t copy) const {
      View view = matrix_.view;
      view.data = view.row_bytes(copy * rows_);
      view.rows = rows_;
      return view;
    }

   private:
    Matrix matrix_;
    std::int64_t rows_;
  };

  static void check_sizes(std::initializer_list<std::int64_t> sizes) {
    for (const std::int64_t size : sizes)
      require(size >= 1, "a size is ", size, "; expected 1 or more");
  }

  Matrix random_matrix(std::int64_t rows, std::int64_t cols) {
    return random_matrix(rows, cols, backend_->activation_dtype());
  }

  Matrix random_matrix(std::int64_t rows, std::int64_t cols, DType dtype) {
    Matrix result = matrix(rows, cols, dtype);
    const std::vector<float> numbers = random_numbers(rows * cols);
    std::vector<unsigned char> bytes(result.memory.bytes());
    for (std::int64_t i = 0; i < rows * cols; ++i)
      store_float(bytes.data(), dtype, i, numbers[static_cast<std::size_t>(i)]);
    backend_->upload(result.memory.data(), bytes.data(), bytes.size());
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
      const Buffer memory = up_vector(slots);
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
      // A few rows again and again: drawing numbers takes longer than all that is measured.
      const std::int64_t at_a_time = std::clamp<std::int64_t>((1 << 22) / inputs, 1, outputs);
      const std::vector<float> numbers = random_numbers(at_a_time * inputs);
      for (std::int64_t first = 0; first < outputs; first += at_a_time) {
        const std::int64_t rows = std::min(at_a_time, outputs - first);
        backend_->pack_rows(linear, first, {numbers.data(), DType::f32, rows, inputs});
      }
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

  // Seconds of one call of op(copy), whose copies take turns: the median of repeats_ runs of
  // launches_ calls, fewer where they take more than a tenth of a second, and each copy once at
  // least. Where a device records, the run is recorded and replayed.
  double seconds(std::int64_t copies, const std::function<void(std::int64_t)>& op) {
    nb::gil_scoped_release unlocked;
    const auto calls = [&](std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) op(i % copies);
    };
    calls(copies);  // what a first call prepares is not measured
    const double once = backend_->seconds_of([&] { calls(copies); }) / static_cast<double>(copies);
    const std::int64_t launches = std::clamp(static_cast<std::int64_t>(0.1 / std::max(once, 1e-9)),
                                             copies, std::max(launches_, copies));
    StepKey key;
    key.num_seqs = ++num_measured_;
    key.tokens_per_seq = 1;
    const auto run = [&] { backend_->run(key, [&] { calls(launches); }); };
    for (int i = 0; i < 2; ++i) run();
    std::vector<double> times;
    for (std::int64_t i = 0; i < repeats_; ++i) times.push_back(backend_->seconds_of(run));
    backend_->forget_recorded();
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] / static_cast<double>(launches);
  }

  // How many arrays of so many bytes take turns, so that no cache holds them all.
  std::int64_t copies_of(std::int64_t bytes) const {
    return std::clamp<std::int64_t>((cache_bytes_ + bytes - 1) / bytes, 1, 1024);
  }

  std::int64_t launches_, repeats_, cache_bytes_;
  std::int64_t num_measured_ = 0;
};

}  // namespace

void bind_op_bench(nb::module_& module) {
  nb::class_<OpBench>(module, "OpBench")
      .def(nb::new_(&make_with_threads<OpBench, std::string, std::string, bool, std::int64_t,
                                       std::int64_t, std::int64_t>),
           nb::arg("device"), nb::arg("dtype"), nb::arg("deterministic") = false,
           nb::arg("launches") = 200, nb::arg("repeats") = 5, nb::arg("cache_bytes") = 256 << 20)
      .def("linear", &OpBench::linear, nb::arg("rows"), nb::arg("outputs"), nb::arg("inputs"),
           nb::arg("format") = nb::none())
      .def("attention", &OpBench::attention, nb::arg("num_seqs"), nb::arg("tokens_per_seq"),
           nb::arg("context"), nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
           nb::arg("kv_dtype"), nb::arg("window") = 0)
      .def("add_norm", &OpBench::add_norm, nb::arg("rows"), nb::arg("width"))
      .def("gated_activation", &OpBench::gated_activation, nb::arg("rows"), nb::arg("width"))
      .def("sample", &OpBench::sample, nb::arg("rows"), nb::arg("vocab_size"),
           nb::arg("temperature") = 0.0f, nb::arg("top_k") = 0, nb::arg("top_p") = 1.0f);
}

}  // namespace octavo::bindings

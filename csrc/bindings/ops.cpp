// Each compute op by itself, for tests: arrays go to the device, through one op, and back.

#include <algorithm>

#include "bindings/ops_checks.h"
#include "bindings/ops_device.h"
#include "core/adjustments.h"
#include "cpu/kernels.h"

namespace octavo::bindings {

namespace {

using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using IntArray = Array1<std::int32_t>;

class Ops : private OpsDevice {
 public:
  Ops(const std::string& device, int num_threads, const std::string& isa, const std::string& dtype,
      bool deterministic, std::int64_t row_gap)
      : OpsDevice(device, {num_threads, isa, parse_dtype(dtype, "dtype"), deterministic}, row_gap),
        isa_(isa) {}

  std::string last_kernels() const { return backend_->counts().last_kernels; }

  nb::object embed(Array2<float> table, IntArray token_ids,
                   std::optional<Array2<float>> position_table, std::optional<IntArray> positions,
                   const std::string& dtype) {
    check_embed(table, token_ids, position_table, positions);
    const Linear packed = pack(table, dtype);
    if (!position_table) return embed_rows(packed, token_ids, nullptr, {});
    const Linear packed_positions = pack(*position_table, dtype);
    return embed_rows(packed, token_ids, &packed_positions, up(*positions));
  }

  nb::object norm(Array2<float> x, Array1<float> weight, std::optional<Array1<float>> bias,
                  float eps, const std::string& kind) {
    const Matrix in = up(x), out = activations(in.view.rows, in.view.cols);
    const NormArrays arrays = norm_arrays(weight, bias, eps, kind, in.view.cols);
    backend_->norm(out.view, in.view, arrays.norm);
    return down(out);
  }

  nb::object add_norm(Array2<float> residual, Array2<float> x, Array1<float> weight,
                      std::optional<Array1<float>> bias, float eps, const std::string& kind) {
    check_same_shape("x", x, "residual", residual);
    const Matrix stream = up(residual), in = up_activations(x),
                 out = activations(in.view.rows, in.view.cols);
    const NormArrays arrays = norm_arrays(weight, bias, eps, kind, in.view.cols);
    backend_->add_norm(out.view, stream.view, in.view, arrays.norm);
    return nb::make_tuple(down(stream), down(out));
  }

  nb::object norm_heads(Array2<float> x, Array1<float> weight, std::optional<Array1<float>> bias,
                        float eps, const std::string& kind) {
    const std::int64_t width = size(weight);
    require(width >= 1 && length(x, 1) % width == 0, "x has ", length(x, 1),
            " columns; expected a multiple of the weight's ", width);
    const Matrix in = up_activations(x);
    const NormArrays arrays = norm_arrays(weight, bias, eps, kind, width);
    backend_->norm_heads(in.view, arrays.norm, width);
    return down(in);
  }

  nb::object scale(Array2<float> x, float factor, float cap) {
    const Matrix in = up_activations(x);
    backend_->scale(in.view, factor, cap);
    return down(in);
  }

  nb::object linear(Array2<float> x, Array2<float> weight, std::optional<Array1<float>> bias,
                    const std::string& dtype) {
    require(x.shape(1) == weight.shape(1), "x has ", x.shape(1), " columns; weight has ",
            weight.shape(1));
    return multiply(x, pack(weight, dtype, bias.has_value()), bias);
  }

  nb::object quantized_linear(Array2<float> x, CodeArray codes, Array2<float> scales,
                              nb::handle format, std::optional<Array2<float>> zeros,
                              std::optional<Array1<float>> bias) {
    const auto inputs = static_cast<std::int64_t>(x.shape(1));
    return multiply(x, pack_quantized(inputs, codes, scales, format, zeros, bias.has_value()),
                    bias);
  }

  nb::object quantized_embed(IntArray token_ids, std::int64_t width, CodeArray codes,
                             Array2<float> scales, nb::handle format,
                             std::optional<Array2<float>> zeros) {
    const Linear packed = pack_quantized(width, codes, scales, format, zeros, false);
    check_entries("token_ids", token_ids, 0, packed.outputs - 1);
    return embed_rows(packed, token_ids, nullptr, {});
  }

  // Returns the rotated q, and the cache's keys and values slot by slot.
  nb::object rope_and_store(Array3<float> q, Array3<float> k, Array3<float> v, IntArray positions,
                            IntArray slots, std::optional<Array1<float>> frequencies,
                            std::int64_t num_slots, std::int64_t block_size,
                            const std::string& kv_dtype, float attention_factor) {
    check_rope_and_store(q, k, v, positions, slots, frequencies, num_slots);
    const LayerSpec spec = heads_of(q, k);
    const Matrix fused = fuse(q, k, v, spec);
    Cache kv = cache(spec, num_slots, block_size, kv_dtype);
    const Device position_ids = up(positions), slot_ids = up(slots);
    Step step;
    step.num_tokens = size(positions);
    step.rope_rows = position_ids.as<std::int32_t>();
    step.slots = slot_ids.as<std::int32_t>();

    Rope rope;
    Device cosines, sines;
    if (frequencies) {
      std::int64_t most = 0;
      for (std::size_t i = 0; i < positions.size(); ++i)
        most = std::max<std::int64_t>(most, positions.data()[i]);
      const RopeSpec turns{to_vector<float>(*frequencies), attention_factor};
      const RopeTables tables = rope_tables(turns, most + 1);
      cosines = up_vector(tables.cosines);
      sines = up_vector(tables.sines);
      rope = {cosines.as<float>(), sines.as<float>(), size(*frequencies)};
    }
    backend_->rope_and_store(fused.view, frequencies ? &rope : nullptr, spec, kv.layer, step);

    const auto heads = static_cast<std::size_t>(spec.num_heads);
    const auto kv_heads = static_cast<std::size_t>(spec.num_kv_heads);
    const auto dim = static_cast<std::size_t>(spec.head_dim);
    const auto tokens = static_cast<std::size_t>(step.num_tokens);
    std::vector<float> keys, values;
    backend_->read_kv(kv.layer, num_slots, keys, values);
    const auto total = static_cast<std::size_t>(num_slots);
    return nb::make_tuple(to_numpy(get(fused.view.columns(0, spec.q_size())), {tokens, heads, dim}),
                          to_numpy(std::move(keys), {total, kv_heads, dim}),
                          to_numpy(std::move(values), {total, kv_heads, dim}));
  }

  // k, v: (num_slots, num_kv_heads, head_dim), stored slot by slot first.
  nb::object attention(Array3<float> q, Array3<float> k, Array3<float> v, IntArray row_starts,
                       IntArray context_lens, Array2<std::int32_t> block_tables, float scale,
                       std::int64_t window, std::int64_t block_size, const std::string& kv_dtype,
                       float softcap) {
    LayerSpec spec = heads_of(q, k);
    spec.window = window;
    spec.attention_softcap = softcap;
    const auto num_slots = static_cast<std::int64_t>(k.shape(0));
    Cache kv = cache(spec, num_slots, block_size, kv_dtype);
    check_attention(q, k, v, row_starts, context_lens, block_tables, block_size, window);
    {
      // Stored through the op itself, with as many unused queries.
      std::vector<std::int32_t> slots(static_cast<std::size_t>(num_slots));
      for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int32_t>(i);
      Matrix fused = activations(num_slots, spec.q_size() + 2 * spec.kv_size());
      put(fused.view.columns(spec.q_size(), spec.kv_size()), k.data());
      put(fused.view.columns(spec.q_size() + spec.kv_size(), spec.kv_size()), v.data());
      const Device slot_ids = up_vector(slots);
      Step store;
      store.num_tokens = num_slots;
      store.slots = slot_ids.as<std::int32_t>();
      backend_->rope_and_store(fused.view, nullptr, spec, kv.layer, store);
    }
    Step step;
    step.num_tokens = static_cast<std::int64_t>(q.shape(0));
    step.num_seqs = size(context_lens);
    step.max_blocks = static_cast<std::int64_t>(block_tables.shape(1));
    std::vector<std::int32_t> positions;
    for (std::int64_t seq = 0; seq < step.num_seqs; ++seq) {
      const std::int32_t length = row_starts.data()[seq + 1] - row_starts.data()[seq];
      for (std::int32_t t = 0; t < length; ++t)
        positions.push_back(context_lens.data()[seq] - length + t);
    }
    const Device position_ids = up_vector(positions), starts = up(row_starts),
                 lens = up(context_lens), tables = up_vector(to_vector<std::int32_t>(block_tables));
    step.positions = position_ids.as<std::int32_t>();
    step.row_starts = starts.as<std::int32_t>();
    step.context_lens = lens.as<std::int32_t>();
    step.block_tables = tables.as<std::int32_t>();

    const Matrix queries = up_activations(q), out = activations(step.num_tokens, spec.q_size());
    backend_->attention(out.view, queries.view, spec, scale, kv.layer, step);
    return to_numpy(get(out.view), {static_cast<std::size_t>(step.num_tokens),
                                    static_cast<std::size_t>(spec.num_heads),
                                    static_cast<std::size_t>(spec.head_dim)});
  }

  nb::object gated_activation(std::optional<Array2<float>> gate, Array2<float> up_array,
                              const std::string& name) {
    if (gate) check_same_shape("gate", *gate, "up", up_array);
    const auto rows = static_cast<std::int64_t>(up_array.shape(0));
    const auto width = static_cast<std::int64_t>(up_array.shape(1));
    const Matrix in = activations(rows, gate ? 2 * width : width), out = activations(rows, width);
    if (gate) put(in.view.columns(0, width), gate->data());
    put(in.view.columns(gate ? width : 0, width), up_array.data());
    backend_->gated_activation(out.view, in.view, activation(name), gate.has_value());
    return down(out);
  }

  nb::object moe(Array2<float> x, Array2<float> router_logits, Array3<float> gate,
                 Array3<float> up_array, Array3<float> down_array, std::int64_t experts_per_token,
                 bool normalize, const std::string& name, const std::string& dtype) {
    const MoeSpec spec{length(gate, 0), experts_per_token, normalize};
    const std::int64_t width = length(gate, 1), outputs = length(down_array, 1);
    check_moe(x, router_logits, gate, up_array, down_array, experts_per_token);
    std::vector<Linear> halves;
    halves.push_back(make_experts(2 * width, gate, dtype));
    pack_experts(halves[0], 0, gate);
    pack_experts(halves[0], width, up_array);
    Linear lowered = make_experts(outputs, down_array, dtype);
    pack_experts(lowered, 0, down_array);
    const Matrix in = up_activations(x), logits = up(router_logits),
                 out = activations(in.view.rows, outputs);
    backend_->moe(out.view, in.view, logits.view, {spec, halves, lowered, activation(name)});
    return down(out);
  }

  nb::object take_rows(Array2<float> x, IntArray rows) {
    check_entries("rows", rows, 0, length(x, 0) - 1);
    const Device indices = up(rows);
    const Matrix in = up_activations(x), out = activations(size(rows), in.view.cols);
    backend_->take_rows(out.view, in.view, indices.as<std::int32_t>());
    return down(out);
  }

  nb::object adjust_logits(Array2<float> logits, IntArray row_starts, IntArray token_ids,
                           Array1<float> repetition, Array1<float> bias) {
    const Adjustments adjustments{to_vector<std::int32_t>(row_starts),
                                  to_vector<std::int32_t>(token_ids), to_vector<float>(repetition),
                                  to_vector<float>(bias)};
    const Matrix in = up(logits), out = matrix(in.view.rows, in.view.cols);
    check(adjustments, in.view.rows, in.view.cols);
    std::vector<unsigned char> bytes(bytes_of(adjustments));
    write(adjustments, bytes.data());
    const Device memory = up_vector(bytes);
    backend_->adjust_logits(out.view, in.view, find(adjustments, memory.as<unsigned char>()));
    return down(out);
  }

  // The tokens, their log-probabilities, whether a row is finite, the best tokens and their
  // log-probabilities, what as many state rows keep, and the tokens' ranks.
  nb::tuple sample(Array2<float> logits, nb::object rows,
                   std::optional<Array2<std::int32_t>> masks) {
    const Matrix in = up(logits);
    const std::vector<SamplingRow> sampling = sampling_rows(rows);
    const std::size_t num_rows = sampling.size();
    check_length("sampling", size(sampling), in.view.rows);
    check(sampling, in.view.cols, in.view.rows);
    if (masks) {
      check_length("masks", length(*masks, 0), in.view.rows);
      check_length("a row of masks", length(*masks, 1), (in.view.cols + 31) / 32);
    }
    std::int32_t num_top = 0;
    for (const SamplingRow& row : sampling) num_top = std::max(num_top, row.num_logprobs);
    const Device row_array = up_vector(sampling),
                 sampled = up_vector(std::vector<std::int32_t>(num_rows, -1));
    Step step;
    step.num_rows = in.view.rows;
    step.sampling = row_array.as<SamplingRow>();
    step.sampled = sampled.as<std::int32_t>();

    Device mask_words;
    if (masks) mask_words = up_vector(to_vector<std::int32_t>(*masks));
    const auto top = static_cast<std::size_t>(num_top);
    const Device ids(backend_.get(), num_rows * 4), logprobs(backend_.get(), num_rows * 4),
        finite(backend_.get(), num_rows), top_ids(backend_.get(), num_rows * top * 4),
        top_logprobs(backend_.get(), num_rows * top * 4), ranks(backend_.get(), num_rows * 4);
    backend_->sample(
        {ids.as<std::int32_t>(), logprobs.as<float>(), finite.as<std::uint8_t>(),
         top_ids.as<std::int32_t>(), top_logprobs.as<float>(), num_top, ranks.as<std::int32_t>()},
        in.view, mask_words.as<std::int32_t>(), step);
    return nb::make_tuple(
        to_numpy(down_vector<std::int32_t>(ids)), to_numpy(down_vector<float>(logprobs)),
        to_numpy(down_vector<std::uint8_t>(finite)),
        to_numpy(down_vector<std::int32_t>(top_ids), {num_rows, top}),
        to_numpy(down_vector<float>(top_logprobs), {num_rows, top}),
        to_numpy(down_vector<std::int32_t>(sampled)), to_numpy(down_vector<std::int32_t>(ranks)));
  }

  nb::object log_softmax(Array2<float> logits) {
    const Matrix in = up(logits), out = matrix(in.view.rows, in.view.cols);
    backend_->log_softmax(out.view, in.view);
    return down(out);
  }

  // The noise that `sample` adds to a row of logits, by the CPU's kernels.
  nb::object gumbel(std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position,
                    std::int64_t vocab_size) {
    require(vocab_size >= 0, "vocab_size is ", vocab_size, "; expected 0 or more");
    std::vector<float> noise(static_cast<std::size_t>(vocab_size));
    cpu::kernels_for(isa_).gumbel(noise.data(), seed, sample_index, position, 0, vocab_size);
    return to_numpy(std::move(noise));
  }

 private:
  nb::object embed_rows(const Linear& table, const IntArray& token_ids,
                        const Linear* position_table, const Device& positions) {
    const Device ids = up(token_ids);
    Step step;
    step.num_tokens = size(token_ids);
    step.token_ids = ids.as<std::int32_t>();
    step.positions = positions.as<std::int32_t>();
    const Matrix out = matrix(step.num_tokens, table.inputs);
    backend_->embed(out.view, table, position_table, step);
    return down(out);
  }

  nb::object multiply(const Array2<float>& x, Linear weight,
                      const std::optional<Array1<float>>& bias) {
    if (bias) {
      check_length("bias", size(*bias), weight.outputs);
      backend_->upload(weight.bias.data(), bias->data(), bias->size() * 4);
    }
    const Matrix in = up_activations(x), out = matrix(in.view.rows, weight.outputs);
    backend_->linear(out.view, in.view, weight);
    return down(out);
  }

  std::string isa_;
};

}  // namespace

void bind_ops(nb::module_& module) {
  module.def("default_sampling_row", [] {
    const SamplingRow row;
    return nb::bytes(reinterpret_cast<const char*>(&row), sizeof(row));
  });
  const auto none = nb::none();
  nb::class_<Ops>(module, "Ops")
      .def(nb::new_(&make_with_threads<Ops, std::string, int, std::string, std::string, bool,
                                       std::int64_t>),
           nb::arg("device") = "cpu", nb::arg("num_threads") = 0, nb::arg("isa") = "auto",
           nb::arg("dtype") = "f32", nb::arg("deterministic") = false, nb::arg("row_gap") = 0)
      .def("last_kernels", &Ops::last_kernels)
      .def("embed", &Ops::embed, nb::arg("table"), nb::arg("token_ids"),
           nb::arg("position_table") = none, nb::arg("positions") = none, nb::arg("dtype") = "f32")
      .def("norm", &Ops::norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(),
           nb::arg("eps"), nb::arg("kind") = "rms")
      .def("add_norm", &Ops::add_norm, nb::arg("residual"), nb::arg("x"), nb::arg("weight"),
           nb::arg("bias").none(), nb::arg("eps"), nb::arg("kind") = "rms")
      .def("norm_heads", &Ops::norm_heads, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(),
           nb::arg("eps"), nb::arg("kind") = "rms")
      .def("scale", &Ops::scale, nb::arg("x"), nb::arg("factor"), nb::arg("cap") = 0.0f)
      .def("linear", &Ops::linear, nb::arg("x"), nb::arg("weight"), nb::arg("bias") = none,
           nb::arg("dtype") = "f32")
      .def("quantized_linear", &Ops::quantized_linear, nb::arg("x"), nb::arg("codes"),
           nb::arg("scales"), nb::arg("format"), nb::arg("zeros") = none, nb::arg("bias") = none)
      .def("quantized_embed", &Ops::quantized_embed, nb::arg("token_ids"), nb::arg("width"),
           nb::arg("codes"), nb::arg("scales"), nb::arg("format"), nb::arg("zeros") = none)
      .def("rope_and_store", &Ops::rope_and_store, nb::arg("q"), nb::arg("k"), nb::arg("v"),
           nb::arg("positions"), nb::arg("slots"), nb::arg("frequencies").none(),
           nb::arg("num_slots"), nb::arg("block_size") = 16, nb::arg("kv_dtype") = "f32",
           nb::arg("attention_factor") = 1.0f)
      .def("attention", &Ops::attention, nb::arg("q"), nb::arg("k"), nb::arg("v"),
           nb::arg("row_starts"), nb::arg("context_lens"), nb::arg("block_tables"),
           nb::arg("scale"), nb::arg("window") = 0, nb::arg("block_size") = 16,
           nb::arg("kv_dtype") = "f32", nb::arg("softcap") = 0.0f)
      .def("gated_activation", &Ops::gated_activation, nb::arg("gate").none(), nb::arg("up"),
           nb::arg("activation"))
      .def("moe", &Ops::moe, nb::arg("x"), nb::arg("router_logits"), nb::arg("gate"), nb::arg("up"),
           nb::arg("down"), nb::arg("experts_per_token"), nb::arg("normalize") = true,
           nb::arg("activation") = "silu", nb::arg("dtype") = "f32")
      .def("take_rows", &Ops::take_rows, nb::arg("x"), nb::arg("rows"))
      .def("adjust_logits", &Ops::adjust_logits, nb::arg("logits"), nb::arg("row_starts"),
           nb::arg("token_ids"), nb::arg("repetition"), nb::arg("bias"))
      .def("sample", &Ops::sample, nb::arg("logits"), nb::arg("rows"), nb::arg("masks") = none)
      .def("log_softmax", &Ops::log_softmax, nb::arg("logits"))
      .def("gumbel", &Ops::gumbel, nb::arg("seed"), nb::arg("sample_index"), nb::arg("position"),
           nb::arg("vocab_size"));
}

}  // namespace octavo::bindings

#include "core/runtime.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>

#include "bindings/bindings.h"
#include "core/rank_group.h"

namespace octavo::bindings {

namespace {

void make_batch(Batch* self, Array1<std::int32_t> token_ids, Array1<std::int32_t> row_starts,
                Array1<std::int32_t> context_lens, Array3<std::int32_t> block_tables,
                Array1<std::int32_t> logit_rows, nb::object sampling,
                std::optional<Array1<std::int32_t>> adapter_ids,
                std::optional<Array1<std::int32_t>> rope_sets) {
  Batch batch;
  batch.token_ids = to_vector<std::int32_t>(token_ids);
  batch.row_starts = to_vector<std::int32_t>(row_starts);
  batch.context_lens = to_vector<std::int32_t>(context_lens);
  batch.block_tables = to_vector<std::int32_t>(block_tables);
  batch.logit_rows = to_vector<std::int32_t>(logit_rows);
  batch.num_kv_groups = static_cast<std::int64_t>(block_tables.shape(0));
  require(block_tables.shape(1) == context_lens.size(), "block_tables is for ",
          block_tables.shape(1), " sequences; context_lens has ", context_lens.size());
  batch.max_blocks = static_cast<std::int64_t>(block_tables.shape(2));
  batch.sampling =
      sampling.is_none() ? std::vector<SamplingRow>(logit_rows.size()) : sampling_rows(sampling);
  if (adapter_ids) batch.adapter_ids = to_vector<std::int32_t>(*adapter_ids);
  if (rope_sets) batch.rope_sets = to_vector<std::int32_t>(*rope_sets);
  new (self) Batch(std::move(batch));
}

// What Python sees of a step: NumPy arrays that own their memory.
struct StepOutput {
  nb::object token_ids, logprobs, ranks, top_token_ids, top_logprobs, finite, states;
  nb::dict taps;
};

StepOutput to_output(StepResult result, std::size_t hidden) {
  const auto rows = static_cast<std::size_t>(result.num_rows);
  const auto top = static_cast<std::size_t>(result.num_top);
  StepOutput output;
  output.token_ids = to_numpy(std::move(result.token_ids));
  output.logprobs = to_numpy(std::move(result.logprobs));
  output.ranks = to_numpy(std::move(result.ranks));
  output.top_token_ids = to_numpy(std::move(result.top_token_ids), {rows, top});
  output.top_logprobs = to_numpy(std::move(result.top_logprobs), {rows, top});
  output.finite = to_numpy(std::move(result.finite)).attr("view")("bool");
  const std::size_t num_states = result.states.size() / hidden;
  output.states = to_numpy(std::move(result.states), {num_states, hidden});
  for (TapResult& tap : result.taps) {
    const auto tap_rows = static_cast<std::size_t>(tap.rows);
    const auto tap_cols = static_cast<std::size_t>(tap.cols);
    output.taps[tap.name.c_str()] = to_numpy(std::move(tap.values), {tap_rows, tap_cols});
  }
  return output;
}

States parse_states(const std::optional<std::string>& given) {
  if (!given) return States::none;
  require(*given == "rows" || *given == "tokens", "states is \"", *given,
          "\"; expected rows or tokens");
  return *given == "rows" ? States::rows : States::tokens;
}

std::int64_t submit(Runtime& self, const Batch& batch,
                    const std::optional<std::vector<std::string>>& taps, bool sample,
                    const std::optional<std::string>& states) {
  return self.submit(batch, taps.value_or(std::vector<std::string>{}), sample,
                     parse_states(states));
}

// row_starts, token_ids, repetition, bias
using AdjustmentArrays =
    std::tuple<Array1<std::int32_t>, Array1<std::int32_t>, Array1<float>, Array1<float>>;

void sample(Runtime& self, std::int64_t ticket, std::optional<Array2<std::int32_t>> masks,
            std::optional<AdjustmentArrays> arrays) {
  Adjustments adjustments;
  if (arrays) {
    const auto& [row_starts, token_ids, repetition, bias] = *arrays;
    adjustments = {to_vector<std::int32_t>(row_starts), to_vector<std::int32_t>(token_ids),
                   to_vector<float>(repetition), to_vector<float>(bias)};
  }
  self.sample(ticket, masks ? to_vector<std::int32_t>(*masks) : std::vector<std::int32_t>{},
              std::move(adjustments));
}

// What a function returns that lets other Python threads run meanwhile.
template <class Function>
auto unlocked(const Function& function) {
  nb::gil_scoped_release released;
  return function();
}

StepOutput wait(Runtime& self, std::int64_t ticket) {
  const auto hidden = static_cast<std::size_t>(self.spec().hidden_size);
  return to_output(unlocked([&] { return self.wait(ticket); }), hidden);
}

nb::object logits(Runtime& self, std::int64_t ticket, std::optional<Array1<std::int32_t>> rows) {
  std::optional<std::vector<std::int32_t>> wanted;
  if (rows) wanted = to_vector<std::int32_t>(*rows);
  std::vector<float> values = unlocked([&] { return self.logits(ticket, wanted); });
  const auto vocab = static_cast<std::size_t>(self.spec().vocab_size);
  const std::size_t num_rows = values.size() / vocab;
  return to_numpy(std::move(values), {num_rows, vocab});
}

void set_logits(Runtime& self, std::int64_t ticket, std::int64_t row, Array1<float> values) {
  const std::vector<float> copy = to_vector<float>(values);
  unlocked([&] { self.set_logits(ticket, row, copy); });
}

nb::dlpack::dtype array_dtype(DType format) {
  switch (format) {
    case DType::f32:
      return nb::dtype<float>();
    case DType::f16:
      return {2, 16, 1};  // IEEE half, which C++ has no type for
    case DType::bf16:
      return nb::dtype<std::uint16_t>();
    case DType::int8:
      return nb::dtype<std::int8_t>();
    case DType::int4:
      break;
  }
  return nb::dtype<std::uint8_t>();
}

void load(Runtime& self, const std::string& name,
          nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> array, const std::string& dtype,
          std::optional<std::int64_t> first_row) {
  const DType format = parse_dtype(dtype, "dtype");
  require(array.dtype() == array_dtype(format), "weight ", name, ": the array does not hold ",
          dtype, " (bf16 is passed as its raw bits, uint16; int4 as two codes a byte, uint8)");
  std::vector<std::int64_t> shape;
  for (std::size_t i = 0; i < array.ndim(); ++i)
    shape.push_back(static_cast<std::int64_t>(array.shape(i)));
  if (format == DType::int4 && !shape.empty()) shape.back() *= 2;
  nb::gil_scoped_release released;
  self.load(name, array.data(), format, shape, first_row);
}

// name -> (A, scale * B)
using AdapterMatrices = std::map<std::string, std::tuple<Array2<float>, Array2<float>>>;

void load_adapter(Runtime& self, std::int64_t slot, const AdapterMatrices& matrices) {
  std::vector<HostLowRank> given;
  for (const auto& [name, arrays] : matrices) {
    const auto& [a, b] = arrays;
    require(a.shape(0) == b.shape(1), name, ": A has ", a.shape(0), " rows and B ", b.shape(1),
            " columns; expected the same rank");
    given.push_back({name, a.data(), b.data(), static_cast<std::int64_t>(a.shape(0)),
                     static_cast<std::int64_t>(a.shape(1)), static_cast<std::int64_t>(b.shape(0))});
  }
  nb::gil_scoped_release unlocked;
  self.load_adapter(slot, given);
}

nb::dict memory(const Runtime& self) {
  const MemoryUse use = self.memory();
  nb::dict result;
  result["weights"] = use.weights;
  result["kv_cache"] = use.kv_cache;
  result["workspace"] = use.workspace;
  result["available"] = use.available;
  return result;
}

nb::dict counts(Runtime& self) {
  const WorkCounts counts = unlocked([&] { return self.counts(); });
  nb::dict result;
  result["kernels"] = counts.kernels;
  result["recorded"] = counts.recorded;
  result["replayed"] = counts.replayed;
  result["forgotten"] = counts.forgotten;
  result["uploads"] = counts.uploads;
  result["downloads"] = counts.downloads;
  return result;
}

}  // namespace

void bind_runtime(nb::module_& module) {
  nb::class_<Batch>(module, "Batch")
      .def("__init__", &make_batch, nb::arg("token_ids").noconvert(),
           nb::arg("row_starts").noconvert(), nb::arg("context_lens").noconvert(),
           nb::arg("block_tables").noconvert(), nb::arg("logit_rows").noconvert(),
           nb::arg("sampling") = nb::none(), nb::arg("adapter_ids").noconvert() = nb::none(),
           nb::arg("rope_sets").noconvert() = nb::none());

  nb::class_<StepOutput>(module, "StepOutput")
      .def_ro("token_ids", &StepOutput::token_ids)
      .def_ro("logprobs", &StepOutput::logprobs)
      .def_ro("top_token_ids", &StepOutput::top_token_ids)
      .def_ro("top_logprobs", &StepOutput::top_logprobs)
      .def_ro("ranks", &StepOutput::ranks)
      .def_ro("finite", &StepOutput::finite)
      .def_ro("states", &StepOutput::states)
      .def_ro("taps", &StepOutput::taps);

  nb::class_<RankGroup>(module, "RankGroup")
      .def(nb::new_([](int file, std::int64_t rank, std::int64_t size) {
             return std::make_shared<RankGroup>(file, rank, size);
           }),
           nb::arg("file"), nb::arg("rank"), nb::arg("size"))
      .def_static("memory_bytes", &RankGroup::memory_bytes, nb::arg("size"))
      .def("abort", &RankGroup::abort, nb::arg("why"));

  nb::class_<Runtime>(module, "Runtime")
      .def(nb::new_([](const std::string& device, nb::handle spec, nb::handle options,
                       std::shared_ptr<RankGroup> group) {
             const ModelSpec model = model_spec(spec);
             const RuntimeOptions how = runtime_options(options);
             nb::gil_scoped_release released;  // with several ranks it may wait for the others
             return make_with_threads<Runtime>(device, model, how, group);
           }),
           nb::arg("device"), nb::arg("spec"), nb::arg("options"), nb::arg("group") = nb::none())
      .def("load", &load, nb::arg("name"), nb::arg("array").noconvert(), nb::arg("dtype"),
           nb::arg("first_row") = nb::none())
      .def("load_adapter", &load_adapter, nb::arg("slot"), nb::arg("matrices"))
      .def("unload_adapter", &Runtime::unload_adapter, nb::arg("slot"),
           nb::call_guard<nb::gil_scoped_release>())
      .def("missing_weights", &Runtime::missing_weights)
      .def("kv_bytes_per_block", &Runtime::kv_bytes_per_block)
      .def("alloc_kv", &Runtime::alloc_kv, nb::arg("num_blocks"),
           nb::call_guard<nb::gil_scoped_release>())
      .def(
          "copy_blocks",
          [](Runtime& self, std::int64_t kv_group, Array2<std::int32_t> pairs) {
            require(pairs.shape(1) == 2, "pairs has ", pairs.shape(1), " columns; expected 2");
            const std::vector<std::int32_t> copied = to_vector<std::int32_t>(pairs);
            unlocked([&] { self.copy_blocks(kv_group, copied); });
          },
          nb::arg("kv_group"), nb::arg("pairs").noconvert())
      .def("memory", &memory)
      .def("allocations", &Runtime::allocations)
      .def("counts", &counts)
      .def("submit", &submit, nb::arg("batch"), nb::arg("taps") = nb::none(),
           nb::arg("sample") = false, nb::arg("states") = nb::none())
      .def("sample", &sample, nb::arg("ticket"), nb::arg("masks").noconvert() = nb::none(),
           nb::arg("adjustments").noconvert() = nb::none())
      .def("logits", &logits, nb::arg("ticket"), nb::arg("rows") = nb::none())
      .def("set_logits", &set_logits, nb::arg("ticket"), nb::arg("row"), nb::arg("values"))
      .def("wait", &wait, nb::arg("ticket"))
      .def(
          "step",
          [](Runtime& self, const Batch& batch,
             const std::optional<std::vector<std::string>>& taps) {
            return wait(self, submit(self, batch, taps, true, std::nullopt));
          },
          nb::arg("batch"), nb::arg("taps") = nb::none());
}

}  // namespace octavo::bindings

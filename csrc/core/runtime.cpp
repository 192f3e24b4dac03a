#include "core/runtime.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/rank_group.h"

namespace octavo {

namespace {

// Copies wanted taps to host memory.
class TapRecorder : public TapSink {
 public:
  TapRecorder(Backend& backend, const std::vector<std::string>& names,
              std::vector<TapResult>& results)
      : backend_(backend), names_(names), results_(results) {}

  bool wants(const std::string& name) const override {
    return std::any_of(names_.begin(), names_.end(),
                       [&](const std::string& wanted) { return wanted == "*" || wanted == name; });
  }

  void record(const std::string& name, View view) override {
    TapResult result;
    result.name = name;
    result.rows = view.rows;
    result.cols = view.cols;
    std::vector<unsigned char> row_bytes(view.row_size());
    for (std::int64_t row = 0; row < view.rows; ++row) {
      backend_.download(row_bytes.data(), view.row_bytes(row), row_bytes.size());
      for (std::int64_t col = 0; col < view.cols; ++col)
        result.values.push_back(load_float(row_bytes.data(), view.dtype, col));
    }
    results_.push_back(std::move(result));
  }

 private:
  Backend& backend_;
  const std::vector<std::string>& names_;
  std::vector<TapResult>& results_;
};

void check_factors(std::initializer_list<std::pair<const char*, float>> factors) {
  for (const auto& [name, factor] : factors)
    require(std::isfinite(factor) && factor >= 0.0f, name, " is ", factor,
            "; expected a finite number, 0 or more");
}

void check_options(const RuntimeOptions& options, const ModelSpec& spec) {
  require(!spec.layers.empty(), "the model has no layers");
  require(options.block_size >= 16 && options.block_size % 16 == 0, "block_size is ",
          options.block_size, "; expected a multiple of 16");
  require(options.max_model_len >= 1, "max_model_len is ", options.max_model_len,
          "; expected 1 or more");
  require(!spec.learned_positions || options.max_model_len <= spec.max_position_embeddings,
          "max_model_len is ", options.max_model_len, "; the model has only ",
          spec.max_position_embeddings, " learned positions");
  require(spec.rope_switch >= 0 && spec.rope_switch <= options.max_model_len, "rope_switch is ",
          spec.rope_switch, "; expected 0 to max_model_len = ", options.max_model_len);
  require(options.max_num_seqs >= 1, "max_num_seqs is ", options.max_num_seqs,
          "; expected 1 or more");
  require(options.max_num_batched_tokens >= 1, "max_num_batched_tokens is ",
          options.max_num_batched_tokens, "; expected 1 or more");
  for (const LayerSpec& layer : spec.layers) {
    require(layer.num_kv_heads >= 1 && layer.num_heads % layer.num_kv_heads == 0, "num_heads is ",
            layer.num_heads, "; expected a multiple of num_kv_heads = ", layer.num_kv_heads);
    require(layer.head_dim >= 2 && layer.head_dim % 2 == 0, "head_dim is ", layer.head_dim,
            "; expected an even number");
    const float scale = layer.score_scale();
    require(std::isfinite(scale) && scale > 0.0f, "attention_scale is ", scale,
            "; expected a finite number above 0");
    check_factors({{"attention_softcap", layer.attention_softcap},
                   {"residual_multiplier", layer.residual_multiplier}});
  }
  check_factors({{"embed_multiplier", spec.embed_multiplier},
                 {"logits_multiplier", spec.logits_multiplier},
                 {"logits_softcap", spec.logits_softcap}});
}

// The format of the KV cache.
DType kv_dtype(const std::string& given) {
  const DType dtype = parse_dtype(given, "kv_dtype");
  require(dtype != DType::int4, "kv_dtype is \"", given, "\"; expected f32, bf16, f16 or int8");
  return dtype;
}

std::unique_ptr<Backend> backend_for(const std::string& device, const ModelSpec& spec,
                                     const RuntimeOptions& options,
                                     std::shared_ptr<RankGroup> group) {
  check_options(options, spec);
  check_ranks(spec, options, group.get());
  require(options.dtype == "f32" || options.dtype == "bf16" || options.dtype == "f16",
          "dtype is \"", options.dtype, "\"; expected f32, bf16 or f16");
  BackendOptions how;
  how.device_index = options.device_index;
  how.num_threads = options.num_threads;
  how.isa = options.isa;
  how.dtype = parse_dtype(options.dtype, "dtype");
  how.deterministic = options.deterministic;
  how.graphs = options.graphs;
  how.group = std::move(group);
  std::unique_ptr<Backend> backend = make_backend(device, how);
  std::string problems;
  for (const std::string& problem : backend->unsupported(spec, options))
    problems += "\n  - " + problem;
  require(problems.empty(), "device \"", device, "\" cannot run ", spec.architecture, ":",
          problems);
  return backend;
}

}  // namespace

Runtime::Runtime(const std::string& device, const ModelSpec& spec, const RuntimeOptions& options,
                 std::shared_ptr<RankGroup> group)
    : spec_(spec),
      options_(options),
      kv_dtype_(kv_dtype(options.kv_dtype)),
      backend_(backend_for(device, spec_, options_, std::move(group))),
      weights_(*backend_, spec_, options_),
      adapters_(*backend_, spec_, options_),
      decoder_(*backend_, spec_, weights_, adapters_, options.max_num_batched_tokens),
      sampled_(backend_.get(), static_cast<std::size_t>(options.max_num_seqs) * 4) {
  for (int i = 0; i < kMaxInFlight; ++i) steps_[i].index = i;
  queue_.run([this] {
    backend_->attach_thread();
    backend_->prepare(
        spec_, {options_.max_num_seqs, options_.max_num_batched_tokens, options_.max_model_len});
    take_memory();
  });
}

Runtime::~Runtime() = default;

BatchLimits Runtime::limits() const {
  return {spec_.vocab_size,      options_.max_num_batched_tokens,
          options_.max_num_seqs, options_.max_model_len,
          spec_.kv_windows(),    kv_.empty() ? 0 : kv_[0].num_blocks,
          options_.block_size,   adapters_.num_slots(),
          spec_.rope_switch};
}

// For steps with one logit row a sequence. The first step with more (scoring, checking drafts)
// makes it grow.
void Runtime::take_memory() {
  constexpr std::int64_t kMostTop = 20;  // log-probabilities that a request may ask for
  const std::int64_t num_seqs = options_.max_num_seqs, vocab = spec_.vocab_size;
  const std::int64_t blocks =
      (options_.max_model_len + options_.block_size - 1) / options_.block_size;
  const std::size_t masks = mask_bytes(static_cast<std::size_t>(num_seqs * ((vocab + 31) / 32)));
  for (InFlightStep& step : steps_) {
    make_room(step, num_seqs, kMostTop);
    step.upload.reserve(*backend_, limits(), padded({num_seqs, 1, 1, blocks}).max_blocks);
    reserve(step.inputs, masks);
    reserve(step.inputs_host, masks);
  }
  reserve(scores_, static_cast<std::size_t>(num_seqs * vocab) * 4);
  growths_ = 0;
}

void Runtime::make_room(InFlightStep& step, std::int64_t num_rows, std::int64_t num_top) {
  const std::size_t logits = 4 * static_cast<std::size_t>(num_rows * spec_.vocab_size);
  const std::size_t normed = 4 * static_cast<std::size_t>(num_rows * spec_.hidden_size);
  const std::size_t results = ResultPlaces(num_rows, num_top).end;
  if (step.logits.bytes() < logits || step.normed.bytes() < normed ||
      step.results.bytes() < results)
    backend_->forget_recorded();
  reserve(step.logits, logits);
  reserve(step.normed, normed);
  reserve(step.results, results);
  reserve(step.results_host, results);
}

void Runtime::load(const std::string& name, const void* data, DType dtype,
                   const std::vector<std::int64_t>& shape, std::optional<std::int64_t> first_row) {
  queue_.run([&] { weights_.load(name, data, dtype, shape, first_row); });
}

std::vector<std::string> Runtime::missing_weights() const { return weights_.missing(); }

// A block belongs to one KV group at a time, and holds the numbers of its layers. So layers of
// several groups, one of each, lie in one buffer if their blocks have the same size.
std::vector<Runtime::KvPlace> Runtime::kv_places() const {
  std::vector<KvPlace> places;
  std::vector<std::int64_t> block_bytes;                              // of each buffer
  std::map<std::pair<std::int64_t, std::int64_t>, std::size_t> used;  // by group and bytes
  for (const LayerSpec& layer : spec_.layers) {
    const std::int64_t bytes = backend_->kv_block_bytes(layer, kv_dtype_, options_.block_size);
    std::size_t& next = used[{layer.kv_group, bytes}];
    while (next < block_bytes.size() && block_bytes[next] != bytes) ++next;
    if (next == block_bytes.size()) block_bytes.push_back(bytes);
    places.push_back({next++, bytes});
  }
  return places;
}

std::int64_t Runtime::kv_bytes_per_block() const {
  std::int64_t bytes = 0;
  std::size_t buffers = 0;
  for (const KvPlace& place : kv_places()) {
    if (place.buffer < buffers) continue;
    bytes += place.block_bytes;
    ++buffers;
  }
  return bytes;
}

void Runtime::alloc_kv(std::int64_t num_blocks) {
  require(num_blocks >= 1, "num_blocks is ", num_blocks, "; expected 1 or more");
  queue_.run([&] {
    backend_->forget_recorded();
    kv_.clear();
    kv_buffers_.clear();
    std::vector<KvLayer> layers;
    const std::vector<KvPlace> places = kv_places();
    for (std::size_t i = 0; i < places.size(); ++i) {
      const LayerSpec& spec = spec_.layers[i];
      KvLayer layer;
      layer.dtype = kv_dtype_;
      layer.num_blocks = num_blocks;
      layer.block_size = options_.block_size;
      layer.num_kv_heads = spec.num_kv_heads;
      layer.head_dim = spec.head_dim;
      layer.block_bytes = places[i].block_bytes;
      if (places[i].buffer == kv_buffers_.size())
        kv_buffers_.emplace_back(backend_.get(),
                                 static_cast<std::size_t>(num_blocks * layer.block_bytes));
      layer.data = kv_buffers_[places[i].buffer].data();
      layers.push_back(layer);
    }
    kv_ = std::move(layers);  // only after all of it was allocated
  });
}

void Runtime::load_adapter(std::int64_t slot, const std::vector<HostLowRank>& matrices) {
  require(backend_->takes_adapters(),
          "this device computes no adapters yet: merge the adapter into the model (octavo merge)");
  queue_.run([&] { adapters_.load(slot, matrices); });
}

void Runtime::unload_adapter(std::int64_t slot) {
  queue_.run([&] { adapters_.unload(slot); });
}

void Runtime::copy_blocks(std::int64_t kv_group, const std::vector<std::int32_t>& pairs) {
  require(!kv_.empty(), "copy_blocks was called before alloc_kv");
  require(pairs.size() % 2 == 0, "pairs has ", pairs.size(), " entries; expected pairs");
  for (const std::int32_t block : pairs) {
    require(block >= 0 && block < kv_[0].num_blocks, "pairs names block ", block,
            "; expected 0 to ", kv_[0].num_blocks - 1);
  }
  queue_.run([&] {
    for (std::size_t i = 0; i < kv_.size(); ++i) {
      if (spec_.layers[i].kv_group != kv_group) continue;
      backend_->copy_blocks(kv_[i], pairs.data(), static_cast<std::int64_t>(pairs.size() / 2));
    }
  });
}

MemoryUse Runtime::memory() const {
  MemoryUse use;
  use.weights = weights_.bytes() + adapters_.bytes();
  for (const Buffer& buffer : kv_buffers_)
    use.kv_cache += static_cast<std::int64_t>(buffer.bytes());
  std::size_t workspace = sampled_.bytes() + scores_.bytes();
  for (const InFlightStep& step : steps_) {
    workspace += step.logits.bytes() + step.normed.bytes() + step.results.bytes() +
                 step.states.bytes() + step.inputs.bytes() + step.upload.bytes();
  }
  use.workspace = decoder_.workspace_bytes() + static_cast<std::int64_t>(workspace);
  use.available = static_cast<std::int64_t>(backend_->available_memory());
  return use;
}

WorkCounts Runtime::counts() {
  WorkCounts counts;
  queue_.run([&] { counts = backend_->counts(); });
  return counts;
}

std::int64_t Runtime::submit(Batch batch, std::vector<std::string> taps, bool with_sampling,
                             States states) {
  if (!weights_complete_) {
    const std::vector<std::string> missing = missing_weights();
    require(missing.empty(), missing.size(), " weights are not loaded yet, the first is ",
            missing.empty() ? "" : missing.front());
    weights_complete_ = true;
  }
  queue_.check_process();
  require(!kv_.empty(), "submit was called before alloc_kv");
  check(batch, limits());
  for (const std::int32_t slot : batch.adapter_ids)
    require(slot < 0 || adapters_.is_loaded(slot), "adapter_ids names place ", slot,
            ", where no adapter is");
  InFlightStep* free_step = nullptr;
  for (InFlightStep& step : steps_) {
    if (!step.open) free_step = &step;
  }
  require(free_step, "two tickets are in flight already; wait for one before the next submit");
  InFlightStep& step = *free_step;
  step.open = true;
  step.sampling_queued = with_sampling;
  step.sampling_done = std::promise<void>();
  step.ticket = next_ticket_++;
  step.num_rows = batch.num_rows();
  step.num_top = std::max<std::int64_t>(batch.num_logprobs(), 0);
  step.num_tokens = batch.num_tokens();
  step.row_places.clear();
  step.wanted = states;
  step.batch = std::move(batch);
  step.tap_names = std::move(taps);
  step.taps.clear();
  step.error = nullptr;
  queue_.push([this, &step, with_sampling] {
    try {
      forward(step, with_sampling);
      if (with_sampling) run_sampling(step, {}, {});
    } catch (...) {
      fail(step);
    }
    if (with_sampling) step.sampling_done.set_value();
  });
  return step.ticket;
}

Runtime::InFlightStep& Runtime::step_of(std::int64_t ticket) {
  queue_.check_process();
  for (InFlightStep& step : steps_) {
    if (step.open && step.ticket == ticket) return step;
  }
  throw std::invalid_argument(text("ticket ", ticket, " is not open"));
}

View Runtime::logits_view(const InFlightStep& step) const {
  return {step.logits.data(), step.batch.num_rows(), spec_.vocab_size, spec_.vocab_size};
}

StepKey Runtime::padded(const StepKey& key) const {
  StepKey shape = backend_->padded(key);
  shape.num_seqs = std::min({shape.num_seqs, options_.max_num_seqs,
                             options_.max_num_batched_tokens / key.tokens_per_seq});
  return shape;
}

StepKey Runtime::key_of(const InFlightStep& step, Part part) const {
  StepKey key = step.key;
  key.part = kParts * step.index + part + (step.batch.adapter_ids.empty() ? 0 : kAdapted) +
             kWithStates * static_cast<std::int64_t>(step.wanted);
  return key;
}

void Runtime::forward(InFlightStep& step, bool with_sampling) {
  const bool tapped = !step.tap_names.empty();
  if (with_sampling && !tapped && !step.num_top) even(step);
  step.key = step.batch.key();
  if (!tapped && step.key.tokens_per_seq && step.key.rows_per_seq) {
    const StepKey shape = padded(step.key);
    if (step.key < shape) step.batch.pad(shape);
    step.key = shape;
  } else {
    step.key.tokens_per_seq = 0;
  }
  const std::int64_t growths_before = step.upload.growths();
  step.uploaded = step.upload.upload(*backend_, step.batch, options_.block_size, spec_.rope_switch,
                                     sampled_.as<std::int32_t>());
  growths_ += step.upload.growths() - growths_before;
  const std::int64_t num_rows = step.batch.num_rows();
  make_room(step, num_rows, step.num_top);
  const NormedRows normed = normed_of(step);
  // Log-probabilities are not part of a key, since they are rare.
  step.sampled_with_forward = with_sampling && !tapped && num_rows && step.batch.num_logprobs() < 0;
  if (tapped) {
    TapRecorder recorder(*backend_, step.tap_names, step.taps);
    decoder_.forward(step.uploaded, kv_, logits_view(step), normed, &recorder);
  } else {
    backend_->run(key_of(step, step.sampled_with_forward ? kWhole : kForward), [&] {
      decoder_.forward(step.uploaded, kv_, logits_view(step), normed, nullptr);
      if (step.sampled_with_forward)
        backend_->sample(samples_of(step), logits_view(step), nullptr, step.uploaded);
    });
  }
  fetch_states(step);
}

}  // namespace octavo

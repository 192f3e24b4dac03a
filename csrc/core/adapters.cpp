#include "core/adapters.h"

namespace octavo {

Adapters::Adapters(Backend& backend, const ModelSpec& spec, const RuntimeOptions& options)
    : backend_(backend),
      format_(parse_dtype(options.dtype, "dtype")),
      stacks_(spec.layers.size() * kParts + 2) {
  const std::int64_t hidden = spec.hidden_size;
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    const auto add = [&](const char* name, Part part, std::int64_t first, std::int64_t outputs,
                         std::int64_t inputs) {
      places_[text("layers.", i, ".", name)] = {i * kParts + static_cast<std::size_t>(part), first,
                                                outputs, inputs, false};
    };
    const std::int64_t q = layer.q_size(), kv = layer.kv_size(), mlp = layer.intermediate_size;
    add("q", Part::qkv, 0, q, hidden);
    add("k", Part::qkv, q, kv, hidden);
    add("v", Part::qkv, q + kv, kv, hidden);
    add("o", Part::o, 0, hidden, q);
    if (layer.moe) continue;  // the matrices of experts have no adapters
    if (layer.gated) add("gate", Part::up, 0, mlp, hidden);
    add("up", Part::up, layer.up_size() - mlp, mlp, hidden);
    add("down", Part::down, 0, hidden, mlp);
  }
  places_["embed"] = {stacks_.size() - 2, 0, hidden, spec.vocab_size, true};
  places_["lm_head"] = {stacks_.size() - 1, 0, spec.vocab_size / spec.head_parts, hidden, false};
}

void Adapters::check(const HostLowRank& matrix) const {
  const auto found = places_.find(matrix.name);
  require(found != places_.end(), "this model has no matrix named \"", matrix.name,
          "\" that takes an adapter");
  const Place& place = found->second;
  require(matrix.rank >= 1 && matrix.inputs == place.inputs && matrix.outputs == place.outputs,
          matrix.name, ": A has ", matrix.rank, " rows of ", matrix.inputs, " and B ",
          matrix.outputs, " rows; expected at least 1 row of ", place.inputs, " and ",
          place.outputs, " rows");
}

// The A of an embedding is read by its columns: they are packed as rows.
Linear Adapters::pack_table(const HostLowRank& matrix) {
  std::vector<float> rows(static_cast<std::size_t>(matrix.rank * matrix.inputs));
  for (std::int64_t i = 0; i < matrix.inputs; ++i) {
    for (std::int64_t r = 0; r < matrix.rank; ++r)
      rows[static_cast<std::size_t>(i * matrix.rank + r)] = matrix.a[r * matrix.inputs + i];
  }
  Linear table = backend_.make_linear(matrix.inputs, matrix.rank, format_, false, 1);
  backend_.pack_rows(table, 0, {rows.data(), DType::f32, matrix.inputs, matrix.rank});
  return table;
}

LowRank Adapters::pack_stack(const Given& matrices) {
  LowRank packed;
  std::map<const float*, std::int64_t> places;  // of each A: the parts of a fused matrix share one
  std::int64_t ranks = 0;
  for (const HostLowRank* matrix : matrices) {
    if (places.emplace(matrix->a, ranks).second) ranks += matrix->rank;
    LowRank::Part& part = packed.parts.emplace_back();
    part.first = places_.at(matrix->name).first;
    part.shrunk = places.at(matrix->a);
    part.b = backend_.make_linear(matrix->outputs, matrix->rank, format_, false, 1);
    backend_.pack_rows(part.b, 0, {matrix->b, DType::f32, matrix->outputs, matrix->rank});
  }
  if (places_.at(matrices[0]->name).is_table) {
    packed.a = pack_table(*matrices[0]);
    return packed;
  }
  packed.a = backend_.make_linear(ranks, matrices[0]->inputs, format_, false, 1);
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const HostLowRank& matrix = *matrices[i];
    backend_.pack_rows(packed.a, packed.parts[i].shrunk,
                       {matrix.a, DType::f32, matrix.rank, matrix.inputs});
  }
  return packed;
}

void Adapters::load(std::int64_t slot, const std::vector<HostLowRank>& matrices) {
  require(slot >= 0 && slot < kMaxSlots, "slot is ", slot, "; expected 0 to ", kMaxSlots - 1);
  require(!matrices.empty(), "the adapter has no matrices; expected at least one");
  std::map<std::size_t, Given> by_stack;
  for (const HostLowRank& matrix : matrices) {
    check(matrix);
    by_stack[places_.at(matrix.name).stack].push_back(&matrix);
  }
  Slot loaded;
  for (const auto& [stack, given] : by_stack) loaded[stack] = pack_stack(given);
  backend_.sync();  // steps that were queued may read what is freed now
  if (slot >= num_slots()) slots_.resize(static_cast<std::size_t>(slot) + 1);
  slots_[static_cast<std::size_t>(slot)] = std::move(loaded);
  publish();
}

void Adapters::unload(std::int64_t slot) {
  require(slot >= 0 && slot < kMaxSlots, "slot is ", slot, "; expected 0 to ", kMaxSlots - 1);
  if (slot >= num_slots()) return;
  backend_.sync();
  slots_[static_cast<std::size_t>(slot)].clear();
  publish();
}

// Tells each stack what every place adds to it.
void Adapters::publish() {
  bytes_ = 0;
  for (LowRankStack& stack : stacks_) stack.assign(slots_.size(), nullptr);
  for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
    for (const auto& [stack, added] : slots_[slot]) {
      stacks_[stack][slot] = &added;
      bytes_ += static_cast<std::int64_t>(added.a.weight.bytes());
      for (const LowRank::Part& part : added.parts)
        bytes_ += static_cast<std::int64_t>(part.b.weight.bytes());
    }
  }
  backend_.adapters_changed(stacks_);
}

}  // namespace octavo

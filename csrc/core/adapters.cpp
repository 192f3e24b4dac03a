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
  places_["lm_head"] = {stacks_.size() - 1, 0, spec.vocab_size, hidden, false};
}

Linear Adapters::pack(const float* values, std::int64_t rows, std::int64_t cols) {
  Linear linear = backend_.make_linear(rows, cols, format_, false, 1);
  backend_.pack_rows(linear, 0, {values, DType::f32, rows, cols});
  return linear;
}

void Adapters::load(std::int64_t slot, const std::vector<HostLowRank>& matrices) {
  require(slot >= 0 && slot < kMaxSlots, "slot is ", slot, "; expected 0 to ", kMaxSlots - 1);
  require(!matrices.empty(), "the adapter has no matrices; expected at least one");
  for (const HostLowRank& matrix : matrices) {
    const auto found = places_.find(matrix.name);
    require(found != places_.end(), "this model has no matrix named \"", matrix.name,
            "\" that takes an adapter");
    const Place& place = found->second;
    require(matrix.rank >= 1 && matrix.inputs == place.inputs && matrix.outputs == place.outputs,
            matrix.name, ": A has ", matrix.rank, " rows of ", matrix.inputs, " and B ",
            matrix.outputs, " rows; expected at least 1 row of ", place.inputs, " and ",
            place.outputs, " rows");
  }
  Slot loaded;
  for (const HostLowRank& matrix : matrices) {
    const Place& place = places_.at(matrix.name);
    LowRankPart part;
    part.first = place.first;
    if (place.is_table) {  // A is read by its columns: they are packed as rows
      std::vector<float> rows(static_cast<std::size_t>(matrix.rank * matrix.inputs));
      for (std::int64_t i = 0; i < matrix.inputs; ++i) {
        for (std::int64_t r = 0; r < matrix.rank; ++r)
          rows[static_cast<std::size_t>(i * matrix.rank + r)] = matrix.a[r * matrix.inputs + i];
      }
      part.a = pack(rows.data(), matrix.inputs, matrix.rank);
    } else {
      part.a = pack(matrix.a, matrix.rank, matrix.inputs);
    }
    part.b = pack(matrix.b, matrix.outputs, matrix.rank);
    loaded[place.stack].push_back(std::move(part));
  }
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
    for (const auto& [stack, parts] : slots_[slot]) {
      stacks_[stack][slot] = &parts;
      for (const LowRankPart& part : parts)
        bytes_ += static_cast<std::int64_t>(part.a.weight.bytes() + part.b.weight.bytes());
    }
  }
  backend_.adapters_changed(stacks_);
}

}  // namespace octavo

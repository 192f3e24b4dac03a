// LoRA adapters on the device (Hu et al. 2021): what each adds to which product.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/backend.h"

namespace octavo {

// A matrix of an adapter in host memory: a is (rank, inputs), b (outputs, rank), scaled already.
struct HostLowRank {
  std::string name;  // octavo's, of the matrix that it adds to: "layers.3.q", "embed", "lm_head"
  const float* a = nullptr;
  const float* b = nullptr;
  std::int64_t rank = 0, inputs = 0, outputs = 0;
};

class Adapters {
 public:
  // No adapter is loaded yet.
  Adapters(Backend& backend, const ModelSpec& spec, const RuntimeOptions& options);

  // Throws std::invalid_argument, and leaves the place as it was, for a matrix that the model does
  // not have, or one of another shape.
  void load(std::int64_t slot, const std::vector<HostLowRank>& matrices);
  void unload(std::int64_t slot);
  std::int64_t num_slots() const { return static_cast<std::int64_t>(slots_.size()); }
  bool is_loaded(std::int64_t slot) const {
    return !slots_[static_cast<std::size_t>(slot)].empty();
  }
  std::int64_t bytes() const { return bytes_; }

  // What the adapters add to the products of one stack of matrices, or to the rows of the
  // embedding.
  enum class Part : std::uint8_t { qkv, o, up, down };
  const LowRankStack& of_layer(std::size_t layer, Part part) const {
    return stacks_[layer * kParts + static_cast<std::size_t>(part)];
  }
  const LowRankStack& embed() const { return stacks_[stacks_.size() - 2]; }
  const LowRankStack& head() const { return stacks_[stacks_.size() - 1]; }

 private:
  static constexpr std::size_t kParts = 4;
  static constexpr std::int64_t kMaxSlots = 1024;
  // Where a matrix adds to: columns of a stack's output.
  struct Place {
    std::size_t stack = 0;
    std::int64_t first = 0, outputs = 0, inputs = 0;
    bool is_table = false;
  };
  using Slot = std::map<std::size_t, LowRank>;  // by stack
  using Given = std::vector<const HostLowRank*>;

  void check(const HostLowRank& matrix) const;
  // What the matrices of one stack become.
  LowRank pack_stack(const Given& matrices);
  Linear pack_table(const HostLowRank& matrix);
  void publish();

  Backend& backend_;
  WeightFormat format_;
  std::map<std::string, Place> places_;
  std::vector<Slot> slots_;
  std::vector<LowRankStack> stacks_;
  std::int64_t bytes_ = 0;
};

}  // namespace octavo

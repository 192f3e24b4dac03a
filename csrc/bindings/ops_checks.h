// Checks of the arrays of the ops for tests: an index outside its table is an error that names it,
// not a read out of bounds.
#pragma once

#include <cstdint>
#include <optional>

#include "bindings/bindings.h"
#include "core/step.h"

namespace octavo::bindings {

using Ints = Array1<std::int32_t>;

template <class Array>
std::int64_t length(const Array& array, std::size_t axis) {
  return static_cast<std::int64_t>(array.shape(axis));
}

inline void check_length(const char* what, std::int64_t given, std::int64_t expected) {
  require(given == expected, what, " has ", given, " entries; expected ", expected);
}

template <class Array>
void check_same_shape(const char* what, const Array& array, const char* other_name,
                      const Array& other) {
  for (std::size_t axis = 0; axis < array.ndim(); ++axis) {
    require(array.shape(axis) == other.shape(axis), what, " has ", array.shape(axis),
            " entries along axis ", axis, "; ", other_name, " has ", other.shape(axis));
  }
}

// Every entry from `low` to `high`.
inline void check_entries(const char* what, const Ints& entries, std::int64_t low,
                          std::int64_t high) {
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const std::int64_t entry = entries.data()[i];
    require(low <= entry && entry <= high, what, "[", i, "] is ", entry, "; expected ", low, " to ",
            high);
  }
}

inline void check_embed(const Array2<float>& table, const Ints& token_ids,
                        const std::optional<Array2<float>>& position_table,
                        const std::optional<Ints>& positions) {
  check_entries("token_ids", token_ids, 0, length(table, 0) - 1);
  if (!position_table) return;
  require(positions.has_value(), "position_table needs positions");
  require(position_table->shape(1) == table.shape(1), "position_table has ",
          position_table->shape(1), " columns; table has ", table.shape(1));
  check_length("positions", length(*positions, 0), length(token_ids, 0));
  check_entries("positions", *positions, 0, length(*position_table, 0) - 1);
}

// gate and up: (num_experts, width, inputs); down: (num_experts, outputs, width).
inline void check_moe(const Array2<float>& x, const Array2<float>& router_logits,
                      const Array3<float>& gate, const Array3<float>& up, const Array3<float>& down,
                      std::int64_t experts_per_token) {
  check_same_shape("up", up, "gate", gate);
  require(down.shape(0) == gate.shape(0) && down.shape(2) == gate.shape(1), "down has ",
          down.shape(0), " experts of width ", down.shape(2), "; gate has ", gate.shape(0), " of ",
          gate.shape(1));
  require(x.shape(1) == gate.shape(2), "x has ", x.shape(1), " columns; gate has ", gate.shape(2));
  require(router_logits.shape(0) == x.shape(0) && router_logits.shape(1) == gate.shape(0),
          "router_logits are ", router_logits.shape(0), " x ", router_logits.shape(1),
          "; expected ", x.shape(0), " x ", gate.shape(0));
  require(experts_per_token >= 1 && experts_per_token <= length(gate, 0), "experts_per_token is ",
          experts_per_token, "; expected 1 to ", gate.shape(0));
}

// Of q, k and v, (tokens, heads, head_dim) each.
inline void check_heads(const Array3<float>& q, const Array3<float>& k, const Array3<float>& v) {
  check_same_shape("v", v, "k", k);
  require(q.shape(2) == k.shape(2), "q has head_dim ", q.shape(2), "; k has ", k.shape(2));
}

inline void check_rope_and_store(const Array3<float>& q, const Array3<float>& k,
                                 const Array3<float>& v, const Ints& positions, const Ints& slots,
                                 const std::optional<Array1<float>>& frequencies,
                                 std::int64_t num_slots) {
  check_heads(q, k, v);
  require(q.shape(0) == k.shape(0), "q has ", q.shape(0), " tokens; k has ", k.shape(0));
  check_length("positions", length(positions, 0), length(q, 0));
  check_length("slots", length(slots, 0), length(q, 0));
  require(num_slots >= 0, "num_slots is ", num_slots, "; expected 0 or more");
  check_entries("slots", slots, -1, num_slots - 1);
  if (!frequencies) return;
  require(q.shape(2) % 2 == 0, "head_dim is ", q.shape(2), "; only an even one can be rotated");
  require(2 * length(*frequencies, 0) <= length(q, 2), "there are ", length(*frequencies, 0),
          " frequencies; expected at most half of head_dim, ", q.shape(2));
  constexpr std::int64_t kMost = (1 << 22) - 1;  // a table of cosines is made for all up to it
  check_entries("positions", positions, 0, kMost);
}

// k and v are stored slot by slot; the tables name blocks of block_size slots. Before the window of
// a sequence's first token they may name anything.
inline void check_attention(const Array3<float>& q, const Array3<float>& k, const Array3<float>& v,
                            const Ints& row_starts, const Ints& context_lens,
                            const Array2<std::int32_t>& block_tables, std::int64_t block_size,
                            std::int64_t window) {
  check_heads(q, k, v);
  const std::int64_t num_seqs = length(context_lens, 0), max_blocks = length(block_tables, 1);
  check_length("row_starts", length(row_starts, 0), num_seqs + 1);
  check_length("block_tables", length(block_tables, 0), num_seqs);
  const std::int32_t* starts = row_starts.data();
  require(starts[0] == 0 && starts[num_seqs] == length(q, 0), "row_starts goes from ", starts[0],
          " to ", starts[num_seqs], "; expected 0 to the number of tokens, ", q.shape(0));
  const std::int64_t num_blocks = (length(k, 0) + block_size - 1) / block_size;
  for (std::int64_t seq = 0; seq < num_seqs; ++seq) {
    const std::int64_t tokens = starts[seq + 1] - std::int64_t{starts[seq]};
    const std::int64_t context = context_lens.data()[seq];
    require(tokens >= 0, "row_starts[", seq + 1, "] is ", starts[seq + 1], "; expected ",
            starts[seq], " or more");
    require(context >= tokens && context <= max_blocks * block_size, "context_lens[", seq, "] is ",
            context, "; expected ", tokens, " (its new tokens) to ", max_blocks * block_size,
            " (block_tables)");
    const std::int64_t first = first_seen_block(context - tokens, window, block_size);
    for (std::int64_t b = first; b < (context + block_size - 1) / block_size; ++b) {
      const std::int64_t block = block_tables.data()[seq * max_blocks + b];
      require(0 <= block && block < num_blocks, "block_tables[", seq, ", ", b, "] is ", block,
              "; expected 0 to ", num_blocks - 1);
    }
  }
}

}  // namespace octavo::bindings

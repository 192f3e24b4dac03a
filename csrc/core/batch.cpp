#include "core/batch.h"

#include <algorithm>
#include <cstring>

namespace octavo {

namespace {

constexpr std::size_t kAlignment = 64;  // bytes, of every array of an upload

void check_size(const char* field, std::size_t size, std::int64_t expected) {
  require(static_cast<std::int64_t>(size) == expected, field, " has ", size, " entries; expected ",
          expected);
}

void check_range(const char* field, std::int64_t index, std::int64_t value, std::int64_t low,
                 std::int64_t high) {
  require(low <= value && value <= high, field, "[", index, "] is ", value, "; expected ", low,
          " to ", high);
}

void check_sequences(const Batch& batch, const BatchLimits& limits) {
  const std::int64_t num_seqs = batch.num_seqs();
  require(num_seqs >= 1 && num_seqs <= limits.max_num_seqs, "the batch has ", num_seqs,
          " sequences; expected 1 to max_num_seqs = ", limits.max_num_seqs);
  check_size("row_starts", batch.row_starts.size(), num_seqs + 1);
  require(batch.num_kv_groups == limits.num_kv_groups(), "block_tables has ", batch.num_kv_groups,
          " KV groups; the model has ", limits.num_kv_groups());
  check_size("block_tables", batch.block_tables.size(),
             batch.num_kv_groups * num_seqs * batch.max_blocks);
  require(batch.row_starts.front() == 0, "row_starts[0] is ", batch.row_starts.front(),
          "; expected 0");
  require(batch.row_starts.back() == batch.num_tokens(), "row_starts ends with ",
          batch.row_starts.back(), "; expected the number of tokens, ", batch.num_tokens());
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const auto seq = static_cast<std::size_t>(s);
    const std::int64_t length = batch.row_starts[seq + 1] - batch.row_starts[seq];
    require(length >= 1, "sequence ", s, " brings ", length, " tokens; expected at least 1");
    check_range("context_lens", s, batch.context_lens[seq], length, limits.max_model_len);
    const std::int64_t blocks =
        (batch.context_lens[seq] + limits.block_size - 1) / limits.block_size;
    require(blocks <= batch.max_blocks, "sequence ", s, " needs ", blocks,
            " blocks; block_tables has room for ", batch.max_blocks);
    for (std::int64_t group = 0; group < batch.num_kv_groups; ++group) {
      // Before the window of the first new token a table may name anything.
      const std::int64_t window = limits.kv_windows[static_cast<std::size_t>(group)];
      const std::int64_t position = batch.context_lens[seq] - length;
      for (std::int64_t b = first_seen_block(position, window, limits.block_size); b < blocks;
           ++b) {
        const std::int64_t index = (group * num_seqs + s) * batch.max_blocks + b;
        check_range("block_tables", index, batch.block_tables[static_cast<std::size_t>(index)], 0,
                    limits.num_blocks - 1);
      }
    }
  }
}

void check_rows(const Batch& batch, const BatchLimits& limits) {
  const std::int64_t num_rows = batch.num_rows();
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const std::int64_t low = i ? batch.logit_rows[static_cast<std::size_t>(i - 1)] + 1 : 0;
    check_range("logit_rows", i, batch.logit_rows[static_cast<std::size_t>(i)], low,
                batch.num_tokens() - 1);
  }
  check_size("sampling", batch.sampling.size(), num_rows);
  check(batch.sampling, limits.vocab_size, limits.max_num_seqs);
}

void check_adapters(const Batch& batch, std::int64_t num_adapters) {
  if (batch.adapter_ids.empty()) return;
  check_size("adapter_ids", batch.adapter_ids.size(), batch.num_seqs());
  for (std::int64_t s = 0; s < batch.num_seqs(); ++s)
    check_range("adapter_ids", s, batch.adapter_ids[static_cast<std::size_t>(s)], -1,
                num_adapters - 1);
}

void check_rope_sets(const Batch& batch, const BatchLimits& limits) {
  if (!batch.rope_sets.empty()) check_size("rope_sets", batch.rope_sets.size(), batch.num_seqs());
  for (std::int64_t s = 0; s < batch.num_seqs(); ++s) {
    const auto seq = static_cast<std::size_t>(s);
    const std::int64_t set = batch.rope_sets.empty() ? 0 : batch.rope_sets[seq];
    check_range("rope_sets", s, set, 0, limits.rope_switch > 0 ? 1 : 0);
    require(set == 1 || !limits.rope_switch || batch.context_lens[seq] <= limits.rope_switch,
            "rope_sets[", s, "] is 0 for a sequence of ", batch.context_lens[seq],
            " tokens; expected 1 beyond ", limits.rope_switch);
  }
}

}  // namespace

std::int64_t Batch::num_logprobs() const {
  std::int64_t most = -1;
  for (const SamplingRow& row : sampling) most = std::max<std::int64_t>(most, row.num_logprobs);
  return most;
}

StepKey Batch::key() const {
  StepKey key;
  key.num_seqs = num_seqs();
  key.max_blocks = max_blocks;
  const std::int64_t tokens = num_tokens() / num_seqs();
  for (std::int64_t s = 0; s <= num_seqs(); ++s) {
    if (row_starts[static_cast<std::size_t>(s)] != s * tokens) return key;
  }
  key.tokens_per_seq = tokens;
  // Either all tokens' logits are wanted, or each sequence's last.
  if (num_rows() == num_tokens()) {
    key.rows_per_seq = tokens;
  } else if (num_rows() == num_seqs()) {
    for (std::int64_t s = 0; s < num_seqs(); ++s) {
      if (logit_rows[static_cast<std::size_t>(s)] != (s + 1) * tokens - 1) return key;
    }
    key.rows_per_seq = 1;
  }
  return key;
}

void Batch::pad(const StepKey& shape) {
  const auto seqs = static_cast<std::size_t>(shape.num_seqs);
  const auto rows = seqs * static_cast<std::size_t>(shape.rows_per_seq);
  const std::int64_t old_blocks = max_blocks, old_seqs = num_seqs();
  std::vector<std::int32_t> tables(static_cast<std::size_t>(num_kv_groups) * seqs *
                                   static_cast<std::size_t>(shape.max_blocks));
  for (std::int64_t row = 0; row < num_kv_groups * old_seqs; ++row) {
    const std::int64_t to = row / old_seqs * shape.num_seqs + row % old_seqs;
    std::copy_n(block_tables.begin() + row * old_blocks, old_blocks,
                tables.begin() + to * shape.max_blocks);
  }
  block_tables = std::move(tables);
  max_blocks = shape.max_blocks;
  for (std::int64_t s = old_seqs; s < shape.num_seqs; ++s) {
    for (std::int64_t i = 0; i < shape.tokens_per_seq; ++i) {
      if (i >= shape.tokens_per_seq - shape.rows_per_seq)
        logit_rows.push_back(static_cast<std::int32_t>(token_ids.size()));
      token_ids.push_back(0);
    }
    row_starts.push_back(static_cast<std::int32_t>(token_ids.size()));
    context_lens.push_back(0);
    if (!adapter_ids.empty()) adapter_ids.push_back(-1);
    if (!rope_sets.empty()) rope_sets.push_back(0);
  }
  sampling.resize(rows);
}

void check(const Batch& batch, const BatchLimits& limits) {
  require(batch.num_tokens() <= limits.max_num_batched_tokens, "the batch has ", batch.num_tokens(),
          " tokens; expected at most max_num_batched_tokens = ", limits.max_num_batched_tokens);
  check_sequences(batch, limits);
  for (std::int64_t t = 0; t < batch.num_tokens(); ++t) {
    check_range("token_ids", t, batch.token_ids[static_cast<std::size_t>(t)], -limits.max_num_seqs,
                limits.vocab_size - 1);
  }
  check_rows(batch, limits);
  check_adapters(batch, limits.num_adapters);
  check_rope_sets(batch, limits);
}

void StepUpload::reserve(Backend& backend, const BatchLimits& limits, std::int64_t max_blocks) {
  // The arrays of `upload`, in words of 4 bytes. Any token may have a logit row.
  constexpr std::size_t kArrays = 11;
  constexpr std::int64_t kWordsOfRow = 2 + sizeof(SamplingRow) / 4;
  const std::int64_t of_token = 4 + limits.num_kv_groups() + kWordsOfRow;
  const std::int64_t of_seq = 2 + limits.num_kv_groups() * max_blocks;
  const std::int64_t words =
      limits.max_num_batched_tokens * of_token + limits.max_num_seqs * of_seq + 1;
  grow(backend, 4 * static_cast<std::size_t>(words) + kArrays * kAlignment);
}

void StepUpload::grow(Backend& backend, std::size_t bytes) {
  backend.forget_recorded();
  device_ = Buffer();  // free the old ones first: both may not fit
  staging_ = HostBuffer();
  staging_ = HostBuffer(&backend, bytes);
  device_ = Buffer(&backend, bytes);
  ++growths_;
}

Step StepUpload::upload(Backend& backend, const Batch& batch, std::int64_t block_size,
                        std::int64_t rope_switch, std::int32_t* sampled) {
  Step step;
  step.num_tokens = batch.num_tokens();
  step.num_seqs = batch.num_seqs();
  step.num_rows = batch.num_rows();
  step.max_blocks = batch.max_blocks;
  step.sampled = sampled;

  // Positions, slots and rows of rope follow from the context lengths, tables and sets.
  const auto num_tokens = static_cast<std::size_t>(step.num_tokens);
  std::vector<std::int32_t> positions(num_tokens), rope_rows(num_tokens);
  std::vector<std::int32_t> slots(num_tokens * static_cast<std::size_t>(batch.num_kv_groups), -1);
  for (std::int64_t s = 0; s < step.num_seqs; ++s) {
    const auto seq = static_cast<std::size_t>(s);
    if (batch.context_lens[seq] == 0) continue;  // padding: its slots stay -1
    const std::int32_t first_position =
        batch.context_lens[seq] - (batch.row_starts[seq + 1] - batch.row_starts[seq]);
    const bool is_long = !batch.rope_sets.empty() && batch.rope_sets[seq];
    for (std::int32_t t = batch.row_starts[seq]; t < batch.row_starts[seq + 1]; ++t) {
      const std::int64_t position = first_position + t - batch.row_starts[seq];
      positions[static_cast<std::size_t>(t)] = static_cast<std::int32_t>(position);
      rope_rows[static_cast<std::size_t>(t)] =
          static_cast<std::int32_t>(position + (is_long ? rope_switch : 0));
      const bool is_padding =
          !batch.front_padding.empty() && t - batch.row_starts[seq] < batch.front_padding[seq];
      for (std::int64_t group = 0; group < batch.num_kv_groups && !is_padding; ++group) {
        const std::int64_t entry =
            (group * step.num_seqs + s) * batch.max_blocks + position / block_size;
        const std::int64_t block = batch.block_tables[static_cast<std::size_t>(entry)];
        slots[static_cast<std::size_t>(group * step.num_tokens + t)] =
            static_cast<std::int32_t>(block * block_size + position % block_size);
      }
    }
  }
  std::vector<std::int32_t> adapters, row_adapters;
  if (!batch.adapter_ids.empty()) {
    adapters.resize(num_tokens);
    for (std::size_t s = 0; s < batch.adapter_ids.size(); ++s)
      std::fill(adapters.begin() + batch.row_starts[s], adapters.begin() + batch.row_starts[s + 1],
                batch.adapter_ids[s]);
    for (const std::int32_t row : batch.logit_rows)
      row_adapters.push_back(adapters[static_cast<std::size_t>(row)]);
  }
  std::vector<SamplingRow> sampling = batch.sampling;
  for (std::size_t i = 0; i < sampling.size(); ++i)
    sampling[i].position = positions[static_cast<std::size_t>(batch.logit_rows[i])] + 1;

  // The arrays lie one after the other in one piece of memory. This runs twice: once to add up the
  // size (the device's address is not known yet), once to copy and to set the pointers.
  std::size_t offset = 0;
  bool copying = false;
  const auto place = [&](const auto& values, auto*& pointer) {
    using T =
        std::remove_const_t<std::remove_pointer_t<std::remove_reference_t<decltype(pointer)>>>;
    const std::size_t bytes = values.size() * sizeof(T);
    if (copying && bytes) {
      std::memcpy(staging_.as<unsigned char>() + offset, values.data(), bytes);
      pointer = reinterpret_cast<const T*>(device_.as<unsigned char>() + offset);
    }
    offset += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  };
  const auto place_all = [&] {
    offset = 0;
    place(batch.token_ids, step.token_ids);
    place(positions, step.positions);
    place(rope_rows, step.rope_rows);
    place(slots, step.slots);
    place(batch.row_starts, step.row_starts);
    place(batch.context_lens, step.context_lens);
    place(batch.block_tables, step.block_tables);
    place(batch.logit_rows, step.logit_rows);
    place(sampling, step.sampling);
    place(adapters, step.adapters);
    place(row_adapters, step.row_adapters);
  };
  place_all();
  // Room for twice as much, so that a slowly growing block table does not grow it every step.
  if (offset > device_.bytes()) grow(backend, 2 * offset);
  copying = true;
  place_all();
  backend.upload_async(device_.data(), staging_, offset);
  return step;
}

}  // namespace octavo

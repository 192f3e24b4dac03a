// What steps with drafts need besides: one shape for all sequences, and the hidden states that
// heads continue.

#include <algorithm>

#include "core/runtime.h"

namespace octavo {

std::int64_t Batch::most_tokens() const {
  std::int32_t most = 0;
  for (std::size_t s = 0; s + 1 < row_starts.size(); ++s)
    most = std::max(most, row_starts[s + 1] - row_starts[s]);
  return most;
}

std::vector<std::int32_t> Batch::even(std::int64_t tokens, const std::vector<std::int64_t>& windows,
                                      std::int64_t block_size) {
  const auto seqs = static_cast<std::size_t>(num_seqs());
  Batch made;
  std::vector<std::int32_t> places;
  std::size_t row = 0;
  for (std::size_t s = 0; s < seqs; ++s) {
    const std::int32_t first = row_starts[s], end = row_starts[s + 1];
    const std::int64_t position = context_lens[s] - (end - first);
    const std::int64_t padding = tokens - (end - first);
    if (padding < 0 || padding > position) return {};
    for (const std::int64_t window : windows) {
      if (first_seen_block(position - padding, window, block_size) !=
          first_seen_block(position, window, block_size))
        return {};
    }
    const std::size_t first_row = row;
    while (row < logit_rows.size() && logit_rows[row] < end) ++row;
    const auto num_rows = static_cast<std::int32_t>(row - first_row);
    if (num_rows == 0 || logit_rows[first_row] != end - num_rows) return {};
    made.token_ids.insert(made.token_ids.end(), static_cast<std::size_t>(padding), 0);
    made.token_ids.insert(made.token_ids.end(), token_ids.begin() + first, token_ids.begin() + end);
    made.front_padding.push_back(static_cast<std::int32_t>(padding));
    made.sampling.resize(made.token_ids.size());
    for (std::size_t r = first_row; r < row; ++r) {
      const std::size_t place = made.token_ids.size() - (row - r);
      made.sampling[place] = sampling[r];
      places.push_back(static_cast<std::int32_t>(place));
    }
  }
  token_ids = std::move(made.token_ids);
  front_padding = std::move(made.front_padding);
  sampling = std::move(made.sampling);
  logit_rows.resize(token_ids.size());
  for (std::size_t t = 0; t < logit_rows.size(); ++t) logit_rows[t] = static_cast<std::int32_t>(t);
  for (std::size_t s = 0; s <= seqs; ++s)
    row_starts[s] = static_cast<std::int32_t>(s * static_cast<std::size_t>(tokens));
  return places;
}

// Pads sequences with different numbers of drafts to one shape, where the device records such
// steps, and where this does not make the step much larger.
void Runtime::even(InFlightStep& step) {
  Batch& batch = step.batch;
  std::int64_t tokens = 1;
  while (tokens < batch.most_tokens()) tokens *= 2;
  // A device that records steps of this shape pads them, too: at least the width of the tables.
  const StepKey shape{1, tokens, tokens, 1};
  const std::int64_t padded = tokens * batch.num_seqs();
  constexpr std::int64_t kFreeRows = 16;  // reading the weights takes longer than these
  if (!(shape < backend_->padded(shape)) || padded > options_.max_num_batched_tokens ||
      padded > 2 * batch.num_tokens() + kFreeRows || batch.key().tokens_per_seq)
    return;
  step.row_places = batch.even(tokens, spec_.kv_windows(), options_.block_size);
}

// Where the final norm of a step goes; grows the buffers.
NormedRows Runtime::normed_of(InFlightStep& step) {
  const std::int64_t hidden = spec_.hidden_size, num_tokens = step.batch.num_tokens();
  const DType dtype = backend_->activation_dtype();
  NormedRows normed;
  normed.rows = {step.normed.data(), step.batch.num_rows(), hidden, hidden, dtype};
  normed.keep_rows = step.wanted == States::rows;
  if (step.wanted == States::tokens) {
    const std::size_t bytes = 4 * static_cast<std::size_t>(num_tokens * hidden);
    if (step.states.bytes() < bytes) backend_->forget_recorded();
    reserve(step.states, bytes);
    normed.tokens = {step.states.data(), num_tokens, hidden, hidden, dtype};
  }
  return normed;
}

// Queues the copy of the wanted states to the host.
void Runtime::fetch_states(InFlightStep& step) {
  if (step.wanted == States::none) return;
  const NormedRows normed = normed_of(step);
  const View states = step.wanted == States::tokens ? normed.tokens : normed.rows;
  const std::size_t bytes = static_cast<std::size_t>(states.rows) * states.row_size();
  if (bytes == 0) return;
  reserve(step.states_host, bytes);
  backend_->download_async(step.states_host, states.data, bytes);
}

// The wanted states as float32, of the rows or tokens that were asked for; see `fetch_states`.
std::vector<float> Runtime::states_of(InFlightStep& step) const {
  std::vector<float> values;
  if (step.wanted == States::none) return values;
  const Batch& batch = step.batch;
  std::vector<std::int32_t> places = step.row_places;
  if (step.wanted == States::tokens) {
    places.clear();
    for (std::size_t s = 0; s < batch.front_padding.size(); ++s)
      for (std::int32_t t = batch.row_starts[s] + batch.front_padding[s];
           t < batch.row_starts[s + 1]; ++t)
        places.push_back(t);
  }
  const auto hidden = static_cast<std::size_t>(spec_.hidden_size);
  const bool of_tokens = step.wanted == States::tokens;
  const auto rows = static_cast<std::size_t>(of_tokens ? step.num_tokens : step.num_rows);
  values.reserve(rows * hidden);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::size_t place = places.empty() ? row : static_cast<std::size_t>(places[row]);
    for (std::size_t col = 0; col < hidden; ++col)
      values.push_back(load_float(step.states_host.data(), backend_->activation_dtype(),
                                  static_cast<std::int64_t>(place * hidden + col)));
  }
  return values;
}

}  // namespace octavo

// The second half of a step: drawing from the logits, and what is told of it.

#include <algorithm>
#include <cstring>

#include "core/runtime.h"

namespace octavo {

Runtime::ResultPlaces::ResultPlaces(std::int64_t num_rows, std::int64_t num_top) {
  const auto rows = static_cast<std::size_t>(num_rows);
  const std::size_t tops = rows * static_cast<std::size_t>(num_top);
  logprobs = 4 * rows;
  top_token_ids = logprobs + 4 * rows;
  top_logprobs = top_token_ids + 4 * tops;
  finite = top_logprobs + 4 * tops;
  end = finite + rows;
}

void Runtime::sample(std::int64_t ticket, std::vector<std::int32_t> masks,
                     Adjustments adjustments) {
  Flight& flight = flight_of(ticket);
  require(!flight.sampling_queued, "ticket ", ticket, " is sampled already");
  const std::int64_t words = (spec_.vocab_size + 31) / 32;
  require(masks.empty() || static_cast<std::int64_t>(masks.size()) == flight.num_rows * words,
          "masks has ", masks.size(), " words; expected ", words, " for each of ", flight.num_rows,
          " rows");
  if (!adjustments.row_starts.empty()) check(adjustments, flight.num_rows, spec_.vocab_size);
  flight.sampling_queued = true;
  queue_.push(
      [this, &flight, masks = std::move(masks), adjustments = std::move(adjustments)]() mutable {
        try {
          // Where the forward pass failed there is nothing to sample from.
          if (!flight.error) draw(flight, std::move(masks), adjustments);
        } catch (...) {
          flight.error = std::current_exception();
        }
        flight.drawn.set_value();
      });
}

Samples Runtime::samples_of(Flight& flight) const {
  const ResultPlaces at(flight.batch.num_rows(), flight.num_top);
  auto* first = flight.results.as<unsigned char>();
  Samples samples;
  samples.token_ids = reinterpret_cast<std::int32_t*>(first);
  samples.logprobs = reinterpret_cast<float*>(first + at.logprobs);
  samples.finite = first + at.finite;
  samples.top_token_ids = reinterpret_cast<std::int32_t*>(first + at.top_token_ids);
  samples.top_logprobs = reinterpret_cast<float*>(first + at.top_logprobs);
  samples.num_top = flight.num_top;
  return samples;
}

void Runtime::draw(Flight& flight, std::vector<std::int32_t> masks,
                   const Adjustments& adjustments) {
  const auto num_rows = static_cast<std::size_t>(flight.batch.num_rows());
  if (num_rows == 0) return;
  if (masks.empty() && adjustments.empty()) {
    if (!flight.is_drawn) {
      StepKey key = key_of(flight, kSampling);
      if (flight.num_top) key.tokens_per_seq = 0;
      backend_->run(key, [&] {
        backend_->sample(samples_of(flight), logits_view(flight), nullptr, flight.step);
      });
    }
    fetch_results(flight);
    return;
  }
  // Rows that pad the step may draw anything.
  if (!masks.empty())
    masks.resize(num_rows * static_cast<std::size_t>((spec_.vocab_size + 31) / 32), -1);
  const unsigned char* inputs = send(flight, masks, adjustments);
  View scores = logits_view(flight);
  if (!adjustments.empty()) {
    reserve(scores_, static_cast<std::size_t>(scores.rows * scores.cols) * 4);
    View adjusted{scores_.data(), flight.num_rows, spec_.vocab_size, spec_.vocab_size};
    const View logits{scores.data, flight.num_rows, scores.cols, scores.stride};
    backend_->adjust_logits(adjusted, logits, find(adjustments, inputs + mask_bytes(masks.size())));
    scores.data = adjusted.data;
  }
  backend_->sample(samples_of(flight), scores,
                   masks.empty() ? nullptr : reinterpret_cast<const std::int32_t*>(inputs),
                   flight.step);
  fetch_results(flight);
  if (!adjustments.empty()) take_own_logprobs(flight);
}

std::size_t Runtime::mask_bytes(std::size_t num_words) { return (num_words * 4 + 63) / 64 * 64; }

// Sends masks and adjustments on their way to the device; they lie there one behind the other.
const unsigned char* Runtime::send(Flight& flight, const std::vector<std::int32_t>& masks,
                                   const Adjustments& adjustments) {
  const std::size_t bytes = mask_bytes(masks.size()) + bytes_of(adjustments);
  if (flight.inputs.bytes() < bytes) {
    // Twice as much: penalties come with more tokens every step. No recorded step reads them.
    reserve(flight.inputs_host, 2 * bytes);
    reserve(flight.inputs, 2 * bytes);
  }
  if (!masks.empty()) std::memcpy(flight.inputs_host.data(), masks.data(), masks.size() * 4);
  write(adjustments, flight.inputs_host.data() + mask_bytes(masks.size()));
  backend_->upload_later(flight.inputs.data(), flight.inputs_host, bytes);
  return flight.inputs.as<unsigned char>();
}

// Sends the results on their way to the host, all in one copy; `collect` waits for them.
void Runtime::fetch_results(Flight& flight) {
  const ResultPlaces at(flight.batch.num_rows(), flight.num_top);
  backend_->download_later(flight.results_host.data(), flight.results.data(), at.end);
  backend_->mark(flight.index);
}

// `sample` was given adjusted logits; what is reported is of the model's own. Rare, and slow: it
// waits for the step.
void Runtime::take_own_logprobs(Flight& flight) {
  if (flight.batch.num_logprobs() < 0) return;
  backend_->sync();
  const ResultPlaces at(flight.batch.num_rows(), flight.num_top);
  unsigned char* host = flight.results_host.data();
  const auto* token_ids = reinterpret_cast<const std::int32_t*>(host);
  const View scores{scores_.data(), flight.num_rows, spec_.vocab_size, spec_.vocab_size};
  View logits = logits_view(flight);
  logits.rows = flight.num_rows;
  backend_->log_softmax(scores, logits);
  std::vector<float> values(static_cast<std::size_t>(spec_.vocab_size));
  for (std::size_t row = 0; row < static_cast<std::size_t>(flight.num_rows); ++row) {
    const std::int32_t wanted = flight.batch.sampling[row].num_logprobs;
    if (wanted < 0 || !host[at.finite + row]) continue;
    backend_->download(values.data(), scores.row(static_cast<std::int64_t>(row)),
                       values.size() * 4);
    const RowLogprobs own = list_logprobs(values, token_ids[row], wanted);
    const auto num_top = static_cast<std::size_t>(flight.num_top);
    reinterpret_cast<float*>(host + at.logprobs)[row] = own.logprob;
    std::copy(own.top_token_ids.begin(), own.top_token_ids.end(),
              reinterpret_cast<std::int32_t*>(host + at.top_token_ids) + row * num_top);
    std::copy(own.top_logprobs.begin(), own.top_logprobs.end(),
              reinterpret_cast<float*>(host + at.top_logprobs) + row * num_top);
  }
}

std::vector<float> Runtime::logits(std::int64_t ticket) {
  Flight& flight = flight_of(ticket);
  std::vector<float> values(static_cast<std::size_t>(flight.num_rows * spec_.vocab_size));
  queue_.run([&] {
    if (flight.error) std::rethrow_exception(flight.error);
    if (!values.empty()) backend_->download(values.data(), flight.logits.data(), values.size() * 4);
  });
  return values;
}

StepResult Runtime::collect(Flight& flight) {
  StepResult result;
  result.num_rows = flight.num_rows;
  result.num_top = flight.num_top;
  result.taps = std::move(flight.taps);
  const ResultPlaces at(flight.batch.num_rows(), flight.num_top);
  const auto rows = static_cast<std::size_t>(flight.num_rows);
  const std::size_t tops = rows * static_cast<std::size_t>(flight.num_top);
  if (rows == 0) {
    // Nothing was drawn: the step is over when what was queued is.
    queue_.run([this] { backend_->sync(); });
    return result;
  }
  backend_->wait(flight.index);
  const auto read = [&](auto& values, std::size_t place, std::size_t count) {
    values.resize(count);
    if (count == 0) return;
    std::memcpy(values.data(), flight.results_host.data() + place, count * sizeof(values[0]));
  };
  read(result.token_ids, 0, rows);
  read(result.logprobs, at.logprobs, rows);
  read(result.finite, at.finite, rows);
  read(result.top_token_ids, at.top_token_ids, tops);
  read(result.top_logprobs, at.top_logprobs, tops);
  return result;
}

StepResult Runtime::wait(std::int64_t ticket) {
  Flight& flight = flight_of(ticket);
  if (!flight.sampling_queued) sample(ticket, {}, {});
  // Not through the queue: another step may be in it already, and need not be waited for.
  flight.drawn.get_future().wait();
  flight.open = false;
  if (flight.error) std::rethrow_exception(flight.error);
  return collect(flight);
}

}  // namespace octavo

// The second half of a step: sampling from the logits, and reading the results back.

#include <algorithm>
#include <cstring>

#include "core/runtime.h"

namespace octavo {

Runtime::ResultPlaces::ResultPlaces(std::int64_t num_rows, std::int64_t num_top) {
  const auto rows = static_cast<std::size_t>(num_rows);
  const std::size_t tops = rows * static_cast<std::size_t>(num_top);
  logprobs = 4 * rows;
  ranks = logprobs + 4 * rows;
  top_token_ids = ranks + 4 * rows;
  top_logprobs = top_token_ids + 4 * tops;
  finite = top_logprobs + 4 * tops;
  end = finite + rows;
}

void Runtime::sample(std::int64_t ticket, std::vector<std::int32_t> masks,
                     Adjustments adjustments) {
  InFlightStep& step = step_of(ticket);
  require(!step.sampling_queued, "ticket ", ticket, " is sampled already");
  const std::int64_t words = (spec_.vocab_size + 31) / 32;
  require(masks.empty() || static_cast<std::int64_t>(masks.size()) == step.num_rows * words,
          "masks has ", masks.size(), " words; expected ", words, " for each of ", step.num_rows,
          " rows");
  if (!adjustments.row_starts.empty()) check(adjustments, step.num_rows, spec_.vocab_size);
  step.sampling_queued = true;
  queue_.push(
      [this, &step, masks = std::move(masks), adjustments = std::move(adjustments)]() mutable {
        try {
          // After a failed forward pass there is nothing to sample from.
          if (!step.error) run_sampling(step, std::move(masks), adjustments);
        } catch (...) {
          fail(step);
        }
        step.sampling_done.set_value();
      });
}

void Runtime::fail(InFlightStep& step) {
  step.error = std::current_exception();
  try {
    backend_->sync();  // kernels already queued may still read the step's buffers
  } catch (...) {      // step.error says more
  }
}

Samples Runtime::samples_of(InFlightStep& step) const {
  const ResultPlaces at(step.batch.num_rows(), step.num_top);
  auto* first = step.results.as<unsigned char>();
  Samples samples;
  samples.token_ids = reinterpret_cast<std::int32_t*>(first);
  samples.logprobs = reinterpret_cast<float*>(first + at.logprobs);
  samples.finite = first + at.finite;
  samples.top_token_ids = reinterpret_cast<std::int32_t*>(first + at.top_token_ids);
  samples.top_logprobs = reinterpret_cast<float*>(first + at.top_logprobs);
  samples.num_top = step.num_top;
  if (step.batch.num_logprobs() >= 0)
    samples.ranks = reinterpret_cast<std::int32_t*>(first + at.ranks);
  return samples;
}

void Runtime::run_sampling(InFlightStep& step, std::vector<std::int32_t> masks,
                           const Adjustments& adjustments) {
  const auto num_rows = static_cast<std::size_t>(step.batch.num_rows());
  if (num_rows == 0) return;
  if (masks.empty() && adjustments.empty()) {
    if (!step.sampled_with_forward) {
      StepKey key = key_of(step, kSampling);
      if (step.batch.num_logprobs() >= 0) key.tokens_per_seq = 0;
      backend_->run(key, [&] {
        backend_->sample(samples_of(step), logits_view(step), nullptr, step.uploaded);
      });
    }
    fetch_results(step);
    return;
  }
  // Padding rows may sample anything.
  if (!masks.empty())
    masks.resize(num_rows * static_cast<std::size_t>((spec_.vocab_size + 31) / 32), -1);
  const unsigned char* inputs = send(step, masks, adjustments);
  View scores = logits_view(step);
  if (!adjustments.empty()) {
    reserve(scores_, static_cast<std::size_t>(scores.rows * scores.cols) * 4);
    View adjusted{scores_.data(), step.num_rows, spec_.vocab_size, spec_.vocab_size};
    const View logits{scores.data, step.num_rows, scores.cols, scores.stride};
    backend_->adjust_logits(adjusted, logits, find(adjustments, inputs + mask_bytes(masks.size())));
    scores.data = adjusted.data;
  }
  backend_->sample(samples_of(step), scores,
                   masks.empty() ? nullptr : reinterpret_cast<const std::int32_t*>(inputs),
                   step.uploaded);
  fetch_results(step);
  if (!adjustments.empty()) take_own_logprobs(step);
}

std::size_t Runtime::mask_bytes(std::size_t num_words) { return (num_words * 4 + 63) / 64 * 64; }

// Queues the copy of masks and adjustments to the device, where they lie one after the other.
const unsigned char* Runtime::send(InFlightStep& step, const std::vector<std::int32_t>& masks,
                                   const Adjustments& adjustments) {
  const std::size_t bytes = mask_bytes(masks.size()) + bytes_of(adjustments);
  if (step.inputs.bytes() < bytes) {
    // Twice as much, since penalties have more tokens with every step. No recorded step reads them.
    reserve(step.inputs_host, 2 * bytes);
    reserve(step.inputs, 2 * bytes);
  }
  if (!masks.empty()) std::memcpy(step.inputs_host.data(), masks.data(), masks.size() * 4);
  write(adjustments, step.inputs_host.as<unsigned char>() + mask_bytes(masks.size()));
  backend_->upload_async(step.inputs.data(), step.inputs_host, bytes);
  return step.inputs.as<unsigned char>();
}

// Queues the copy of all results to the host; `collect` waits for it.
void Runtime::fetch_results(InFlightStep& step) {
  const ResultPlaces at(step.batch.num_rows(), step.num_top);
  backend_->download_async(step.results_host, step.results.data(), at.end);
  backend_->record_event(step.index);
}

// `sample` used adjusted logits, but the reported log-probabilities are those of the model's own
// logits. Rare, and slow: it waits for the step.
void Runtime::take_own_logprobs(InFlightStep& step) {
  if (step.batch.num_logprobs() < 0) return;
  backend_->sync();
  const ResultPlaces at(step.batch.num_rows(), step.num_top);
  auto* host = step.results_host.as<unsigned char>();
  const auto* token_ids = reinterpret_cast<const std::int32_t*>(host);
  const View scores{scores_.data(), step.num_rows, spec_.vocab_size, spec_.vocab_size};
  View logits = logits_view(step);
  logits.rows = step.num_rows;
  backend_->log_softmax(scores, logits);
  std::vector<float> values(static_cast<std::size_t>(spec_.vocab_size)), logprobs(values);
  for (std::size_t row = 0; row < static_cast<std::size_t>(step.num_rows); ++row) {
    const std::int32_t wanted = step.batch.sampling[row].num_logprobs;
    if (wanted < 0 || !host[at.finite + row]) continue;
    const auto number = static_cast<std::int64_t>(row);
    backend_->download(values.data(), logits.row(number), values.size() * 4);
    backend_->download(logprobs.data(), scores.row(number), values.size() * 4);
    const RowLogprobs own = list_logprobs(values, logprobs, token_ids[row], wanted);
    const auto num_top = static_cast<std::size_t>(step.num_top);
    reinterpret_cast<float*>(host + at.logprobs)[row] = own.logprob;
    reinterpret_cast<std::int32_t*>(host + at.ranks)[row] = own.rank;
    std::copy(own.top_token_ids.begin(), own.top_token_ids.end(),
              reinterpret_cast<std::int32_t*>(host + at.top_token_ids) + row * num_top);
    std::copy(own.top_logprobs.begin(), own.top_logprobs.end(),
              reinterpret_cast<float*>(host + at.top_logprobs) + row * num_top);
  }
}

// Where a row that the batch asks for lies among a step's logits.
std::int64_t Runtime::place_of(const InFlightStep& step, std::int64_t row) const {
  return step.row_places.empty() ? row : step.row_places[static_cast<std::size_t>(row)];
}

std::vector<float> Runtime::logits(std::int64_t ticket,
                                   const std::optional<std::vector<std::int32_t>>& rows) {
  InFlightStep& step = step_of(ticket);
  const std::size_t num_rows = rows ? rows->size() : static_cast<std::size_t>(step.num_rows);
  const auto vocab = static_cast<std::size_t>(spec_.vocab_size);
  std::vector<float> values(num_rows * vocab);
  for (std::size_t i = 0; rows && i < num_rows; ++i)
    require((*rows)[i] >= 0 && (*rows)[i] < step.num_rows, "rows names row ", (*rows)[i],
            "; expected 0 to ", step.num_rows - 1);
  const auto row = [&](std::size_t i) { return rows ? (*rows)[i] : static_cast<std::int64_t>(i); };
  queue_.run([&] {
    if (step.error) std::rethrow_exception(step.error);
    for (std::size_t i = 0; i < num_rows; ++i)
      backend_->download(&values[i * vocab], logits_view(step).row(place_of(step, row(i))),
                         vocab * 4);
  });
  return values;
}

void Runtime::set_logits(std::int64_t ticket, std::int64_t row, const std::vector<float>& values) {
  InFlightStep& step = step_of(ticket);
  require(!step.sampling_queued, "ticket ", ticket, " is sampled already");
  require(row >= 0 && row < step.num_rows, "row is ", row, "; expected 0 to ", step.num_rows - 1);
  require(static_cast<std::int64_t>(values.size()) == spec_.vocab_size, "values has ",
          values.size(), " numbers; expected ", spec_.vocab_size);
  queue_.run([&] {
    if (step.error) std::rethrow_exception(step.error);
    backend_->upload(logits_view(step).row(place_of(step, row)), values.data(), values.size() * 4);
  });
}

StepResult Runtime::collect(InFlightStep& step) {
  StepResult result;
  result.num_rows = step.num_rows;
  result.num_top = step.num_top;
  result.taps = std::move(step.taps);
  const ResultPlaces at(step.batch.num_rows(), step.num_top);
  const auto rows = static_cast<std::size_t>(step.num_rows);
  const std::size_t tops = rows * static_cast<std::size_t>(step.num_top);
  if (rows == 0) {
    // Nothing was sampled: the step has ended when the queued work has.
    queue_.run([this] { backend_->sync(); });
    result.states = states_of(step);
    return result;
  }
  backend_->wait_event(step.index);
  const auto read = [&](auto& values, std::size_t place, std::size_t count) {
    values.resize(count);
    if (count == 0) return;
    const unsigned char* first = step.results_host.as<unsigned char>() + place;
    if (step.row_places.empty()) {
      std::memcpy(values.data(), first, count * sizeof(values[0]));
      return;
    }
    for (std::size_t row = 0; row < count; ++row)  // of padded steps, which report no tops
      std::memcpy(&values[row], first + step.row_places[row] * sizeof(values[0]),
                  sizeof(values[0]));
  };
  read(result.token_ids, 0, rows);
  read(result.logprobs, at.logprobs, rows);
  read(result.ranks, at.ranks, step.batch.num_logprobs() >= 0 ? rows : 0);
  result.ranks.resize(rows);  // 0 where none was asked for
  read(result.finite, at.finite, rows);
  read(result.top_token_ids, at.top_token_ids, tops);
  read(result.top_logprobs, at.top_logprobs, tops);
  result.states = states_of(step);
  return result;
}

StepResult Runtime::wait(std::int64_t ticket) {
  InFlightStep& step = step_of(ticket);
  if (!step.sampling_queued) sample(ticket, {}, {});
  // Not through the queue: the next step may be in it already, and this must not wait for it.
  step.sampling_done.get_future().wait();
  step.open = false;
  if (step.error) std::rethrow_exception(step.error);
  return collect(step);
}

}  // namespace octavo

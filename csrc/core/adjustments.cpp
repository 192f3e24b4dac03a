#include "core/adjustments.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/text.h"

namespace octavo {

void check(const Adjustments& adjustments, std::int64_t num_rows, std::int64_t vocab_size) {
  const auto& starts = adjustments.row_starts;
  const auto& tokens = adjustments.token_ids;
  const auto count = static_cast<std::int64_t>(tokens.size());
  require(
      adjustments.repetition.size() == tokens.size() && adjustments.bias.size() == tokens.size(),
      "adjustments has ", count, " token_ids, ", adjustments.repetition.size(), " repetition and ",
      adjustments.bias.size(), " bias; expected as many of each");
  require(static_cast<std::int64_t>(starts.size()) == num_rows + 1, "adjustments.row_starts has ",
          starts.size(), " entries; expected ", num_rows + 1);
  require(starts.front() == 0 && starts.back() == count, "adjustments.row_starts goes from ",
          starts.front(), " to ", starts.back(), "; expected 0 to ", count);
  for (std::size_t row = 0; row + 1 < starts.size(); ++row) {
    require(starts[row] <= starts[row + 1], "adjustments.row_starts[", row + 1, "] is ",
            starts[row + 1], "; expected ", starts[row], " or more");
  }
  for (std::size_t row = 0; row + 1 < starts.size(); ++row) {
    // Ascending, so that no token occurs twice: a device changes all of them in parallel.
    std::int64_t lowest = 0;
    for (auto i = static_cast<std::size_t>(starts[row]);
         i < static_cast<std::size_t>(starts[row + 1]); ++i) {
      require(lowest <= tokens[i] && tokens[i] < vocab_size, "adjustments.token_ids[", i, "] is ",
              tokens[i], "; expected ", lowest, " to ", vocab_size - 1,
              ", in ascending order within a row");
      lowest = std::int64_t{tokens[i]} + 1;
      require(std::isfinite(adjustments.repetition[i]) && adjustments.repetition[i] > 0.0f,
              "adjustments.repetition[", i, "] is ", adjustments.repetition[i],
              "; expected a number above 0");
      require(std::isfinite(adjustments.bias[i]), "adjustments.bias[", i, "] is ",
              adjustments.bias[i], "; expected a finite number");
    }
  }
}

namespace {

// One after the other in one piece of memory.
template <class Visit>
std::size_t for_each_piece(const Adjustments& adjustments, Visit&& visit) {
  std::size_t offset = 0;
  const auto place = [&](const auto& values) {
    const std::size_t bytes = values.size() * sizeof(values[0]);
    visit(values.data(), offset, bytes);
    offset += (bytes + 63) / 64 * 64;
  };
  place(adjustments.row_starts);
  place(adjustments.token_ids);
  place(adjustments.repetition);
  place(adjustments.bias);
  return offset;
}

}  // namespace

std::size_t bytes_of(const Adjustments& adjustments) {
  return for_each_piece(adjustments, [](const void*, std::size_t, std::size_t) {});
}

void write(const Adjustments& adjustments, unsigned char* host) {
  for_each_piece(adjustments, [&](const void* values, std::size_t offset, std::size_t bytes) {
    if (bytes) std::memcpy(host + offset, values, bytes);
  });
}

LogitAdjustments find(const Adjustments& adjustments, const unsigned char* copy) {
  const unsigned char* pieces[4] = {};
  int index = 0;
  for_each_piece(adjustments, [&](const void*, std::size_t offset, std::size_t) {
    pieces[index++] = copy + offset;
  });
  LogitAdjustments result;
  result.row_starts = reinterpret_cast<const std::int32_t*>(pieces[0]);
  result.token_ids = reinterpret_cast<const std::int32_t*>(pieces[1]);
  result.repetition = reinterpret_cast<const float*>(pieces[2]);
  result.bias = reinterpret_cast<const float*>(pieces[3]);
  return result;
}

std::int32_t rank_of(const float* values, std::int64_t count, std::int32_t token_id) {
  const float own = values[token_id];
  std::int32_t rank = 1;
  for (std::int64_t i = 0; i < token_id; ++i) rank += values[i] >= own;
  for (std::int64_t i = token_id + 1; i < count; ++i) rank += values[i] > own;
  return rank;
}

RowLogprobs list_logprobs(const std::vector<float>& logits, const std::vector<float>& logprobs,
                          std::int32_t token_id, std::int64_t num_top) {
  const auto at = [&](std::int32_t token) { return logits[static_cast<std::size_t>(token)]; };
  std::vector<std::int32_t> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), 0);
  std::partial_sort(
      tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(num_top), tokens.end(),
      [&](std::int32_t a, std::int32_t b) { return at(a) != at(b) ? at(a) > at(b) : a < b; });
  tokens.resize(static_cast<std::size_t>(num_top));
  RowLogprobs result;
  result.logprob = logprobs[static_cast<std::size_t>(token_id)];
  result.rank = rank_of(logits.data(), static_cast<std::int64_t>(logits.size()), token_id);
  for (const std::int32_t token : tokens)
    result.top_logprobs.push_back(logprobs[static_cast<std::size_t>(token)]);
  result.top_token_ids = std::move(tokens);
  return result;
}

}  // namespace octavo

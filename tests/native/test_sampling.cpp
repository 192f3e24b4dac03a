// Sampling tokens. reference/sampling.py is the definition and Python compares the bits; here are
// the edges: ties, masks, numbers that are none, and what goes where.

#include <limits>

#include "host.h"

namespace octavo::tests {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The arrays of a step for a few rows of logits, and what `sample` gave.
struct Draws {
  std::vector<SamplingRow> rows;
  Ids sampled, token_ids, top_token_ids;
  std::vector<float> logprobs, top_logprobs;
  std::vector<std::uint8_t> finite;

  explicit Draws(std::size_t num_rows, float temperature = 0.0f) : sampled(8, -7) {
    SamplingRow row;
    row.temperature = temperature;
    row.seed = 5;
    row.position = 3;
    rows.assign(num_rows, row);
  }

  void draw(Backend& backend, Matrix& logits, const Ids& masks = {}) {
    std::int64_t num_top = 0;
    for (const SamplingRow& row : rows) num_top = std::max<std::int64_t>(num_top, row.num_logprobs);
    token_ids.assign(rows.size(), -9);
    logprobs.assign(rows.size(), -9.0f);
    finite.assign(rows.size(), 9);
    top_token_ids.assign(rows.size() * static_cast<std::size_t>(num_top), -9);
    top_logprobs.assign(rows.size() * static_cast<std::size_t>(num_top), -9.0f);
    Step step;
    step.num_rows = static_cast<std::int64_t>(rows.size());
    step.sampling = rows.data();
    step.sampled = sampled.data();
    Samples samples;
    samples.token_ids = token_ids.data();
    samples.logprobs = logprobs.data();
    samples.finite = finite.data();
    samples.top_token_ids = top_token_ids.data();
    samples.top_logprobs = top_logprobs.data();
    samples.num_top = num_top;
    backend.sample(samples, logits.view(), masks.empty() ? nullptr : masks.data(), step);
  }
};

void greedy(Backend& backend) {
  Matrix logits(4, 37, Numbers(1).many(4 * 37), 2);
  logits.at(0, 36) = 3.0f;
  logits.at(1, 5) = logits.at(1, 20) = logits.at(1, 36) = 2.0f;  // ties: the lowest id
  for (std::int64_t i = 0; i < 37; ++i) logits.at(2, i) = -kInfinity;
  logits.at(2, 31) = -1e30f;
  for (std::int64_t i = 0; i < 37; ++i) logits.at(3, i) = -5.0f;
  Draws draws(4);
  draws.rows[0].state_row = 7;
  draws.rows[2].state_row = 0;
  draws.rows[3].state_row = 2;
  draws.draw(backend, logits);
  CHECK((draws.token_ids[0] == 36 && draws.token_ids[1] == 5 && draws.token_ids[3] == 0));
  CHECK((draws.sampled == Ids{draws.token_ids[2], -7, 0, -7, -7, -7, -7, 36}));
  CHECK((draws.finite == std::vector<std::uint8_t>{1, 1, 0, 1}));
}

void masks(Backend& backend) {
  // 37 tokens need two words; the second allows token 33 alone.
  Matrix logits(2, 37, Numbers(2).many(2 * 37));
  for (const float temperature : {0.0f, 0.5f, 3.0f}) {
    for (const std::int32_t top_k : {0, 3}) {
      Draws draws(2, temperature);
      for (SamplingRow& row : draws.rows) row.top_k = top_k;
      draws.draw(backend, logits, {0, 2, static_cast<std::int32_t>(0x80000001u), 0});
      CHECK(draws.token_ids[0] == 33);
      CHECK(draws.token_ids[1] == 0 || draws.token_ids[1] == 31);
      // Nothing allowed: any token, but one of the vocabulary.
      draws.draw(backend, logits, {0, 0, 0, 0});
      for (const std::int32_t token : draws.token_ids) CHECK(token >= 0 && token < 37);
    }
  }
}

void not_finite(Backend& backend) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float poison : {nan, kInfinity}) {
    for (const std::int64_t place : {0, 15, 16, 100}) {
      for (const float temperature : {0.0f, 1.0f}) {
        Matrix logits(2, 101, Numbers(3).many(2 * 101));
        logits.at(1, place) = poison;
        Draws draws(2, temperature);
        for (SamplingRow& row : draws.rows) {
          row.top_p = 0.5f;
          row.num_logprobs = 2;
        }
        draws.draw(backend, logits);
        CHECK(draws.finite[0] == 1 && draws.finite[1] == 0);
        CHECK(draws.token_ids[1] >= 0 && draws.token_ids[1] < 101);
        CHECK(std::isfinite(draws.logprobs[0]) && std::isnan(draws.logprobs[1]));
      }
    }
  }
}

// Whatever keeps one token alone must draw the best one.
void narrowest_filters(Backend& backend) {
  const std::int64_t vocab = 1000;
  Matrix logits(3, vocab, Numbers(4).many(3 * vocab, 4.0f));
  logits.at(0, 999) = logits.at(1, 0) = logits.at(2, 500) = 9.0f;
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    Draws draws(3, 50.0f);
    draws.rows[0].seed = seed;
    draws.rows[1].seed = seed << 32;
    draws.rows[2].seed = ~seed;
    draws.rows[0].top_k = 1;
    draws.rows[1].top_p = 1e-6f;
    draws.rows[2].min_p = 1.0f;
    draws.draw(backend, logits);
    CHECK((draws.token_ids == Ids{999, 0, 500}));
  }
}

// Frequencies of 20,000 draws follow the softmax; a planted bias of a few percent would show.
void distribution(Backend& backend) {
  const std::int64_t vocab = 5, rows = 20000;
  const float values[] = {0.0f, 1.0f, 2.0f, 0.5f, -1.0f};
  Matrix logits(rows, vocab);
  Draws draws(static_cast<std::size_t>(rows), 1.5f);
  double total = 0.0;
  for (const float value : values) total += std::exp(value / 1.5);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < vocab; ++i) logits.at(r, i) = values[i];
    draws.rows[static_cast<std::size_t>(r)].position = static_cast<std::int32_t>(r);
  }
  draws.draw(backend, logits);
  std::vector<double> counts(static_cast<std::size_t>(vocab));
  for (const std::int32_t token : draws.token_ids) ++counts[static_cast<std::size_t>(token)];
  for (std::size_t i = 0; i < counts.size(); ++i)
    check_near("frequency", counts[i] / static_cast<double>(rows),
               std::exp(values[i] / 1.5) / total, 0.012);
}

void log_probabilities(Backend& backend) {
  const std::int64_t vocab = 301;
  Matrix logits(2, vocab, Numbers(8).many(2 * vocab, 6.0f), 1), out(2, vocab, 3);
  backend.log_softmax(out.view(), logits.view());
  out.check_gaps();
  Draws draws(2);
  draws.rows[0].num_logprobs = 0;
  draws.rows[1].num_logprobs = 4;
  draws.draw(backend, logits);
  for (std::int64_t r = 0; r < 2; ++r) {
    double total = 0.0;
    for (std::int64_t i = 0; i < vocab; ++i)
      total += std::exp(static_cast<double>(logits.at(r, i)));
    for (std::int64_t i = 0; i < vocab; ++i)
      check_near("log_softmax", out.at(r, i), logits.at(r, i) - std::log(total), 2e-6);
    const auto row = static_cast<std::size_t>(r);
    CHECK(draws.logprobs[row] == out.at(r, draws.token_ids[row]));
  }
  CHECK((Ids(draws.top_token_ids.begin(), draws.top_token_ids.begin() + 4) == Ids(4, -1)));
  for (std::size_t i = 4; i < 8; ++i) {
    CHECK(draws.top_logprobs[i] == out.at(1, draws.top_token_ids[i]));
    CHECK(i == 4 || draws.top_logprobs[i] <= draws.top_logprobs[i - 1]);
  }
  CHECK(draws.top_token_ids[4] == draws.token_ids[1]);
}

}  // namespace

std::vector<Test> sampling_tests() {
  return {on_each_variant("greedy", greedy),
          on_each_variant("masks", masks),
          on_each_variant("logits that are not finite", not_finite),
          on_each_variant("the narrowest filters keep the best token", narrowest_filters),
          on_each_variant("random draws follow the softmax", distribution),
          on_each_variant("log-probabilities", log_probabilities)};
}

}  // namespace octavo::tests

// How one row of logits is sampled. The same bytes as a row of SAMPLING_ROW in
// reference/sampling.py, which documents the fields; a batch has an array of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/text.h"

namespace octavo {

struct SamplingRow {
  float temperature = 0.0f;
  std::int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  std::uint64_t seed = 0;
  std::int32_t sample_index = 0;
  std::int32_t position = 0;
  std::int32_t num_logprobs = -1;
  std::int32_t state_row = -1;
  std::int64_t target = -1;  // 8 bytes: the row has no padding
  float top_n_sigma = 0.0f;
  float typical_p = 1.0f;
  float xtc_probability = 0.0f;
  float xtc_threshold = 0.1f;

  constexpr bool is_greedy() const { return temperature == 0.0f; }
  // Whether a rarely used filter is on.
  constexpr bool is_unusual() const {
    return top_n_sigma > 0.0f || typical_p < 1.0f || xtc_probability > 0.0f;
  }
  constexpr bool keeps_all() const {
    return min_p == 0.0f && top_k == 0 && top_p >= 1.0f && !is_unusual();
  }
};

// The fields as NumPy names them: a batch's dtype is compared with these.
struct SamplingField {
  const char* name;
  const char* type;
  std::size_t offset, size;
};

template <class T>
constexpr const char* numpy_type = nullptr;
template <>
inline constexpr const char* numpy_type<float> = "<f4";
template <>
inline constexpr const char* numpy_type<std::int32_t> = "<i4";
template <>
inline constexpr const char* numpy_type<std::int64_t> = "<i8";
template <>
inline constexpr const char* numpy_type<std::uint64_t> = "<u8";

#define OCTAVO_SAMPLING_FIELD(name)                                             \
  {#name, numpy_type<decltype(SamplingRow::name)>, offsetof(SamplingRow, name), \
   sizeof(SamplingRow::name)}
inline constexpr SamplingField kSamplingFields[] = {
    OCTAVO_SAMPLING_FIELD(temperature),
    OCTAVO_SAMPLING_FIELD(top_k),
    OCTAVO_SAMPLING_FIELD(top_p),
    OCTAVO_SAMPLING_FIELD(min_p),
    OCTAVO_SAMPLING_FIELD(seed),
    OCTAVO_SAMPLING_FIELD(sample_index),
    OCTAVO_SAMPLING_FIELD(position),
    OCTAVO_SAMPLING_FIELD(num_logprobs),
    OCTAVO_SAMPLING_FIELD(state_row),
    OCTAVO_SAMPLING_FIELD(target),
    OCTAVO_SAMPLING_FIELD(top_n_sigma),
    OCTAVO_SAMPLING_FIELD(typical_p),
    OCTAVO_SAMPLING_FIELD(xtc_probability),
    OCTAVO_SAMPLING_FIELD(xtc_threshold),
};
#undef OCTAVO_SAMPLING_FIELD

constexpr bool fields_fill_the_row() {
  std::size_t end = 0;
  for (const SamplingField& field : kSamplingFields) {
    if (!field.type || field.offset != end) return false;
    end += field.size;
  }
  return end == sizeof(SamplingRow);
}
static_assert(
    fields_fill_the_row(),
    "kSamplingFields lacks a field of SamplingRow, or the row has padding: add the field, "
    "or name the padding (NumPy's dtype has it, too)");

// Throws std::invalid_argument naming the first field that is wrong, its value and its range.
inline void check(const std::vector<SamplingRow>& rows, std::int64_t vocab_size,
                  std::int64_t num_states) {
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const SamplingRow& row = rows[i];
    const auto expect = [&](bool right, const char* field, auto value, const auto&... range) {
      require(right, "sampling[", i, "].", field, " is ", value, "; expected ", range...);
    };
    const auto expect_up_to = [&](std::int64_t high, const char* field, std::int64_t value) {
      expect(-1 <= value && value <= high, field, value, "-1 to ", high);
    };
    expect(row.temperature >= 0.0f, "temperature", row.temperature, "0 or more");
    expect(row.top_k >= 0, "top_k", row.top_k, "0 or more");
    expect(row.top_p > 0.0f && row.top_p <= 1.0f, "top_p", row.top_p, "above 0, at most 1");
    expect(row.min_p >= 0.0f && row.min_p <= 1.0f, "min_p", row.min_p, "0 to 1");
    expect(row.top_n_sigma >= 0.0f, "top_n_sigma", row.top_n_sigma, "0 or more");
    expect(row.typical_p > 0.0f && row.typical_p <= 1.0f, "typical_p", row.typical_p,
           "above 0, at most 1");
    expect(row.xtc_probability >= 0.0f && row.xtc_probability <= 1.0f, "xtc_probability",
           row.xtc_probability, "0 to 1");
    expect(row.xtc_threshold >= 0.0f && row.xtc_threshold <= 1.0f, "xtc_threshold",
           row.xtc_threshold, "0 to 1");
    expect_up_to(vocab_size, "num_logprobs", row.num_logprobs);
    expect_up_to(num_states - 1, "state_row", row.state_row);
    expect_up_to(vocab_size - 1, "target", row.target);
  }
}

}  // namespace octavo

#include "core/gguf_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/dtype.h"

namespace octavo {

namespace {

constexpr int kGroup = 32;
constexpr float kLargestZero = 120;

float half_at(const std::uint8_t* bytes) {
  std::uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  return f16_to_float(bits);
}

// Of two, the larger; NaN if one is, unlike std::max.
float larger_of(float a, float b) { return a > b || std::isnan(a) ? a : b; }

// To the nearest whole number, ties to even, between -128 and 127; a NaN becomes 0. Without a call
// of the C library, so that the compiler makes vectors of it.
std::int8_t nearest_code(float value) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: no fraction is left beside it
  value = value > -128.0f ? value : value <= -128.0f ? -128.0f : 0.0f;
  value = value < 127.0f ? value : 127.0f;
  return static_cast<std::int8_t>(static_cast<int>((value + kWhole) - kWhole));
}

// Codes -> the nearest of octavo's. Both lie in arrays of the caller, which nothing else points to,
// or the compiler could not make vectors of this.
void round_codes(const int* codes, int count, float factor, float added, std::uint8_t* to) {
  std::int8_t found[kGroup];
  for (int i = 0; i < count; ++i)
    found[i] = nearest_code(static_cast<float>(codes[i]) * factor + added);
  std::memcpy(to, found, static_cast<std::size_t>(count));
}

// Rounds the scale to float16. What numbers are multiplied by to become codes: 0 for a scale of 0.
float set_scale(const BlockCodes& to, int group, float wanted) {
  const std::uint16_t half = float_to_f16(wanted);
  static_cast<std::uint16_t*>(to.scales)[group] = half;
  const float scale = f16_to_float(half);
  return scale != 0 && std::isfinite(scale) ? 1 / scale : 0.0f;
}

// Steps and offsets of the eight groups of Q4_K and Q5_K: gguf_nibbles.read_q4_k has the layout.
struct Steps {
  float steps[kBlockGroups], offsets[kBlockGroups];

  explicit Steps(const std::uint8_t* block) {
    const float step = half_at(block), minimum = half_at(block + 2);
    const std::uint8_t *first = block + 4, *second = block + 8, *third = block + 12;
    for (int i = 0; i < 4; ++i) {
      const int upper[] = {third[i] & 15, third[i] >> 4};
      steps[i] = step * static_cast<float>(first[i] & 63);
      steps[i + 4] = step * static_cast<float>(upper[0] | (first[i] >> 2 & 48));
      offsets[i] = -(minimum * static_cast<float>(second[i] & 63));
      offsets[i + 4] = -(minimum * static_cast<float>(upper[1] | (second[i] >> 2 & 48)));
    }
  }
};

// A group without 0 between its least and its greatest number, as gguf_nibbles._round_again does.
void round_again(float step, float offset, std::uint8_t* codes, float& scale, float& zero) {
  float low = 0, high = 0, values[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    values[i] = step * static_cast<float>(codes[i]) + offset;
    low = -larger_of(-low, -values[i]);
    high = larger_of(high, values[i]);
  }
  const float wider = (high - low) / 15.0f;
  scale = wider / 16.0f;
  zero = low < 0 ? kLargestZero : -kLargestZero;
  bool usable = true;
  for (float& value : values) value = std::nearbyint((value - low) / wider);
  if (step == 0) {  // all the same: level 8, so that the scale is exact
    std::fill(values, values + kGroup, 8.0f);
    zero = 0;
    scale = offset / 8.0f;
  }
  for (const float value : values) usable = usable && std::isfinite(value);
  usable = usable && std::isfinite(scale);
  if (!usable && std::isfinite(scale)) scale = 0;
  for (int i = 0; i < kGroup; ++i) codes[i] = usable ? static_cast<std::uint8_t>(values[i]) : 0;
}

void convert_q4_k(const std::uint8_t* block, const BlockCodes& to) {
  const Steps of(block);
  auto* scales = static_cast<float*>(to.scales);
  for (int group = 0; group < kBlockGroups; ++group) {
    const std::uint8_t* packed = block + 16 + group / 2 * kGroup;
    std::uint8_t codes[kGroup];
    for (int i = 0; i < kGroup; ++i)
      codes[i] = static_cast<std::uint8_t>(packed[i] >> 4 * (group % 2) & 15);
    const float exact = -16.0f * of.offsets[group] / of.steps[group] - kLargestZero;
    float zero = std::nearbyint(exact), scale = of.steps[group] / 16.0f;
    if (!(std::fabs(exact) <= kLargestZero + 0.5f))
      round_again(of.steps[group], of.offsets[group], codes, scale, zero);
    scales[group] = scale;
    to.zeros[group] = std::clamp(zero, -kLargestZero, kLargestZero);
    for (int i = 0; i < kGroup / 2; ++i)
      to.codes[group * kGroup / 2 + i] =
          static_cast<std::uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}

void convert_q5_k(const std::uint8_t* block, const BlockCodes& to) {
  const Steps of(block);
  const std::uint8_t* fifths = block + 16;
  for (int group = 0; group < kBlockGroups; ++group) {
    const std::uint8_t* packed = block + 48 + group / 2 * kGroup;
    const float step = of.steps[group], offset = of.offsets[group];
    const float farthest =  // NaN where the step is infinite
        larger_of(std::fabs(offset + step * 0.0f), std::fabs(offset + step * 31.0f));
    const float inverse = set_scale(to, group, farthest / 127.0f);
    int codes[kGroup];
    for (int i = 0; i < kGroup; ++i)
      codes[i] = (packed[i] >> 4 * (group % 2) & 15) | (fifths[i] >> group & 1) << 4;
    round_codes(codes, kGroup, step * inverse, offset * inverse, to.codes + group * kGroup);
  }
}

void convert_q6_k(const std::uint8_t* block, const BlockCodes& to) {
  const float step = half_at(block + 208);
  std::int8_t whole[kBlockGroups][2];
  std::memcpy(whole, block + 192, sizeof(whole));
  for (int group = 0; group < kBlockGroups; ++group) {
    // Of 128 weights, two groups have the lower halves of 64 bytes and two the upper ones.
    const int place = group % 4;
    const std::uint8_t* low = block + group / 4 * 64 + place % 2 * kGroup;
    const std::uint8_t* high = block + 128 + group / 4 * kGroup;
    const float steps[] = {step * static_cast<float>(whole[group][0]),
                           step * static_cast<float>(whole[group][1])};
    const bool second = !std::isnan(steps[0]) && !(std::fabs(steps[1]) <= std::fabs(steps[0]));
    const float inverse = set_scale(to, group, steps[second] * 0.25f);
    int codes[kGroup];
    for (int i = 0; i < kGroup; ++i)
      codes[i] = ((low[i] >> place / 2 * 4 & 15) | (high[i] >> 2 * place & 3) << 4) - 32;
    for (int part = 0; part < 2; ++part) {
      constexpr int kHalf = kGroup / 2;
      round_codes(codes + part * kHalf, kHalf, steps[part] * inverse, 0.0f,
                  to.codes + group * kGroup + part * kHalf);
    }
  }
}

}  // namespace

const BlockType* find_block_type(const char* name) {
  static constexpr BlockType kTypes[] = {
      {144, true, convert_q4_k}, {176, false, convert_q5_k}, {210, false, convert_q6_k}};
  constexpr const char* kNames[] = {"Q4_K", "Q5_K", "Q6_K"};
  for (int i = 0; i < 3; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return &kTypes[i];
  return nullptr;
}

void convert_blocks(const BlockType& type, const std::uint8_t* blocks, std::int64_t count,
                    BlockCodes to) {
  const std::int64_t codes = type.is_int4 ? kBlockWeights / 2 : kBlockWeights;
  for (std::int64_t i = 0; i < count; ++i) {
    type.convert(blocks + i * type.bytes, to);
    to.codes += codes;
    to.scales = static_cast<std::uint8_t*>(to.scales) + kBlockGroups * (type.is_int4 ? 4 : 2);
    if (type.is_int4) to.zeros += kBlockGroups;
  }
}

}  // namespace octavo

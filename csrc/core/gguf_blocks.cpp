#include "core/gguf_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/dtype.h"

namespace octavo {

namespace {

constexpr int kGroup = 32, kBlockGroups = 8;
constexpr float kLargestZero = 120;

float half_at(const std::uint8_t* bytes) {
  std::uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  return f16_to_float(bits);
}

// Of two, the larger; NaN if one is, unlike std::max.
float larger_of(float a, float b) { return a > b || std::isnan(a) ? a : b; }

// To the nearest whole number, ties to even, between -128 and 127; a NaN becomes 0.
std::int8_t nearest_code(float value) {
  value = value > -128.0f ? value : value <= -128.0f ? -128.0f : 0.0f;
  return static_cast<std::int8_t>(std::nearbyint(value < 127.0f ? value : 127.0f));
}

// A group's codes, at most 127 of either sign, -> the nearest of octavo's; each half has a factor.
// In steps of one kind each, from local array to local array: the compiler makes vectors of them.
void round_codes(const std::int8_t* codes, const float (&halves)[2], float added,
                 std::uint8_t* to) {
  const auto all_finite = [&](float factor) {
    return std::isfinite(128 * factor + added) && std::isfinite(128 * factor - added);
  };
  std::int32_t whole[kGroup];
  float factors[kGroup];
  std::fill_n(factors, kGroup / 2, halves[0]);
  std::fill_n(factors + kGroup / 2, kGroup / 2, halves[1]);
  for (int i = 0; i < kGroup; ++i) whole[i] = codes[i];
  if (all_finite(halves[0]) && all_finite(halves[1])) {
    constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: its last bits are the whole number
    float values[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      const float value = static_cast<float>(whole[i]) * factors[i] + added;
      const float least = value > -128.0f ? value : -128.0f;
      values[i] = (least < 127.0f ? least : 127.0f) + kWhole;
    }
    std::memcpy(whole, values, sizeof whole);
  } else {
    for (int i = 0; i < kGroup; ++i)
      whole[i] = nearest_code(static_cast<float>(whole[i]) * factors[i] + added);
  }
  for (int i = 0; i < kGroup; ++i) to[i] = static_cast<std::uint8_t>(whole[i]);
}

// From ggml's order of 4-bit codes, of which the lower halves come before the upper ones, to
// octavo's, two neighbours a byte. of: so many bytes.
template <int bytes>
void pair_halves(const std::uint8_t* of, std::uint8_t* to) {
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < bytes / 2; ++i) {
      const int low = of[2 * i] >> 4 * half & 15, high = of[2 * i + 1] >> 4 * half & 15;
      to[half * bytes / 2 + i] = static_cast<std::uint8_t>(low | high << 4);
    }
  }
}

// Rounds the scale to float16. What numbers are multiplied by to become codes: 0 for a scale of 0.
float set_scale(const BlockCodes& to, int group, float wanted) {
  const std::uint16_t half = float_to_f16(wanted);
  std::memcpy(to.scales + group * sizeof half, &half, sizeof half);
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
// packed: its codes, two a byte.
void round_again(float step, float offset, std::uint8_t* packed, float& scale, float& zero) {
  float low = 0, high = 0, values[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    values[i] = step * static_cast<float>(packed[i / 2] >> 4 * (i % 2) & 15) + offset;
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
  for (int i = 0; i < kGroup / 2; ++i) {
    const auto code = [&](int of) { return usable ? static_cast<int>(values[of]) : 0; };
    packed[i] = static_cast<std::uint8_t>(code(2 * i) | code(2 * i + 1) << 4);
  }
}

void copy_scale(const std::uint8_t* block, const BlockCodes& to) {
  std::memcpy(to.scales, block, 2);
}

void convert_q8_0(const std::uint8_t* block, const BlockCodes& to) {
  copy_scale(block, to);
  std::memcpy(to.codes, block + 2, kGroup);
}

void convert_q4_0(const std::uint8_t* block, const BlockCodes& to) {
  copy_scale(block, to);
  pair_halves<kGroup / 2>(block + 2, to.codes);
}

void convert_q4_k(const std::uint8_t* block, const BlockCodes& to) {
  const Steps of(block);
  float scales[kBlockGroups];
  for (int pair = 0; pair < kBlockGroups / 2; ++pair)
    pair_halves<kGroup>(block + 16 + pair * kGroup, to.codes + pair * kGroup);
  for (int group = 0; group < kBlockGroups; ++group) {
    const float exact = -16.0f * of.offsets[group] / of.steps[group] - kLargestZero;
    float zero = std::nearbyint(exact);
    scales[group] = of.steps[group] / 16.0f;
    if (!(std::fabs(exact) <= kLargestZero + 0.5f))
      round_again(of.steps[group], of.offsets[group], to.codes + group * kGroup / 2, scales[group],
                  zero);
    to.zeros[group] = std::clamp(zero, -kLargestZero, kLargestZero);
  }
  std::memcpy(to.scales, scales, sizeof scales);
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
    std::int8_t codes[kGroup];
    for (int i = 0; i < kGroup; ++i)
      codes[i] = static_cast<std::int8_t>((packed[i] >> 4 * (group % 2) & 15) |
                                          (fifths[i] >> group & 1) << 4);
    const float factor = step * inverse;
    round_codes(codes, {factor, factor}, offset * inverse, to.codes + group * kGroup);
  }
}

// 64 bytes of lower halves and 32 of upper two bits -> four groups of codes of 6 bits, less 32.
void read_six_bits(const std::uint8_t* low, const std::uint8_t* high, std::int8_t* codes) {
  for (int place = 0; place < 4; ++place) {
    for (int i = 0; i < kGroup; ++i) {
      const int lower = low[place % 2 * kGroup + i] >> place / 2 * 4 & 15;
      const int upper = high[i] >> 2 * place & 3;
      codes[place * kGroup + i] = static_cast<std::int8_t>((lower | upper << 4) - 32);
    }
  }
}

void convert_q6_k(const std::uint8_t* block, const BlockCodes& to) {
  const float step = half_at(block + 208);
  std::int8_t whole[kBlockGroups][2];
  std::memcpy(whole, block + 192, sizeof(whole));
  std::int8_t codes[kBlockGroups * kGroup];
  for (int half = 0; half < 2; ++half)
    read_six_bits(block + half * 64, block + 128 + half * kGroup, codes + half * 4 * kGroup);
  for (int group = 0; group < kBlockGroups; ++group) {
    const float steps[] = {step * static_cast<float>(whole[group][0]),
                           step * static_cast<float>(whole[group][1])};
    const bool second = !std::isnan(steps[0]) && !(std::fabs(steps[1]) <= std::fabs(steps[0]));
    const float inverse = set_scale(to, group, steps[second] * 0.25f);
    round_codes(codes + group * kGroup, {steps[0] * inverse, steps[1] * inverse}, 0.0f,
                to.codes + group * kGroup);
  }
}

}  // namespace

const BlockType* find_block_type(const char* name) {
  static constexpr BlockType kTypes[] = {
      {"Q4_0", 18, 32, true, false, convert_q4_0},
      {"Q8_0", 34, 32, false, false, convert_q8_0},
      {"Q4_K", 144, 256, true, true, convert_q4_k},
      {"Q5_K", 176, 256, false, false, convert_q5_k},
      {"Q6_K", 210, 256, false, false, convert_q6_k},
  };
  for (const BlockType& type : kTypes)
    if (std::strcmp(name, type.name) == 0) return &type;
  return nullptr;
}

void convert_blocks(const BlockType& type, const std::uint8_t* blocks, std::int64_t count,
                    BlockCodes to) {
  for (std::int64_t i = 0; i < count; ++i) {
    type.convert(blocks + i * type.bytes, to);
    to.codes += type.code_bytes();
    to.scales += type.scale_bytes();
    if (type.has_zeros) to.zeros += type.groups();
  }
}

}  // namespace octavo

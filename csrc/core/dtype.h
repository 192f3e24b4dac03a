// Number formats, and the conversions between them that every backend shares.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "core/text.h"

namespace octavo {

// int8 and int4 are whole numbers with a scale (see WeightFormat in spec.h).
enum class DType : std::uint8_t { f32, f16, bf16, int8, int4 };

inline std::int64_t bits_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 32;
    case DType::f16:
    case DType::bf16:
      return 16;
    case DType::int8:
      return 8;
    case DType::int4:
      return 4;
  }
  return 0;
}

inline const char* name(DType dtype) {
  constexpr const char* kNames[] = {"f32", "f16", "bf16", "int8", "int4"};
  return kNames[static_cast<int>(dtype)];
}

inline DType parse_dtype(const std::string& given, const char* what) {
  if (given == "f32") return DType::f32;
  if (given == "f16") return DType::f16;
  if (given == "bf16") return DType::bf16;
  if (given == "int8") return DType::int8;
  if (given == "int4") return DType::int4;
  throw std::invalid_argument(
      text(what, " is \"", given, "\"; expected f32, f16, bf16, int8 or int4"));
}

inline std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bits_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float bf16_to_float(std::uint16_t bits) {
  return bits_float(static_cast<std::uint32_t>(bits) << 16);
}

// Round to nearest, ties to even; a NaN stays a quiet NaN.
inline std::uint16_t float_to_bf16(float value) {
  const std::uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE half to float, exactly. A subnormal half is its fraction times 2^-24.
inline float f16_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1fu;
  const std::uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * (1.0f / 16777216.0f);
    return bits_float(float_bits(magnitude) | sign);
  }
  const std::uint32_t wide_exponent = exponent == 31 ? 255u : exponent + 112u;
  return bits_float(sign | (wide_exponent << 23) | (fraction << 13));
}

// Round to nearest, ties to even; too large numbers become infinity, a NaN stays one.
inline std::uint16_t float_to_f16(float value) {
  const std::uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const auto with_sign = [&](std::uint32_t half) {
    return static_cast<std::uint16_t>(sign | half);
  };
  if (magnitude > 0x7f800000u) return with_sign(0x7e00u);
  if (magnitude >= 0x477ff000u) return with_sign(0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 1/2 leaves multiples of 2^-24 in the fraction, rounded by the processor.
    return with_sign(float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f));
  }
  const std::uint32_t odd = magnitude >> 13 & 1u;
  return with_sign((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

// Element `index` of an array of floating-point numbers of the given format.
inline float load_float(const void* data, DType dtype, std::int64_t index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[index];
  return dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

inline void store_float(void* data, DType dtype, std::int64_t index, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<std::uint16_t*>(data)[index] =
        dtype == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
}

}  // namespace octavo

// 16 lanes as four NEON registers; needs AArch64 and nothing beyond it.

constexpr int kNumRegisters = 32, kRegistersOfVec = 4;
// Tiles of the matrix products, rows x panels, so that the sums fit the registers: fused
// multiply-adds have even and odd sums. kDotPanels: of sums of whole numbers (dot_*.h). Chosen by
// counting registers, not yet by timing.
constexpr int kRows = 2;
constexpr int kPanels = 1;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 2;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 4;   // query rows x tiles of keys under way at a time
constexpr int kValueRows = 1;     // query rows that share a load of the values
constexpr int kPairSums = 6;      // of even or of odd numbers, in products of bf16 pairs

struct Vec {
  float32x4_t v[4];  // lanes 4i .. 4i + 3
};

// f(0) .. f(3) as one vector.
template <class F>
inline Vec each_quarter(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline Vec load(const float* p) {
  return each_quarter([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, Vec x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline Vec splat(float value) {
  return each_quarter([&](int) { return vdupq_n_f32(value); });
}
inline Vec zero() { return splat(0.0f); }
inline Vec add(Vec x, Vec y) {
  return each_quarter([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
}
inline Vec sub(Vec x, Vec y) {
  return each_quarter([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
}
inline Vec mul(Vec x, Vec y) {
  return each_quarter([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
}
inline Vec div(Vec x, Vec y) {
  return each_quarter([&](int i) { return vdivq_f32(x.v[i], y.v[i]); });
}
// x * y + z, rounded once.
inline Vec fma(Vec x, Vec y, Vec z) {
  return each_quarter([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
// x > y ? x : y; NEON's own maximum differs for NaNs and for zeros of either sign.
inline Vec max(Vec x, Vec y) {
  return each_quarter([&](int i) { return vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline Vec min(Vec x, Vec y) {
  return each_quarter([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline Vec floor(Vec x) {
  return each_quarter([&](int i) { return vrndmq_f32(x.v[i]); });
}
// u < v ? x : y
inline Vec select_less(Vec u, Vec v, Vec x, Vec y) {
  return each_quarter([&](int i) { return vbslq_f32(vcltq_f32(u.v[i], v.v[i]), x.v[i], y.v[i]); });
}
// y * 2^n for whole n, by adding n to the exponent's bits.
inline Vec scale_exponent(Vec y, Vec n) {
  return each_quarter([&](int i) {
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n.v[i]), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y.v[i]), exponent));
  });
}
// 16 bf16 numbers.
inline Vec load(const std::uint16_t* p) {
  return each_quarter(
      [&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
// 16 IEEE halves.
inline Vec load_f16(const std::uint16_t* p) {
  return each_quarter(
      [&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
// 16 signed bytes.
inline Vec load(const std::int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}

// ---- 16 words of packed weights ----

struct Words {
  uint32x4_t v[4];
};

template <class F>
inline Words each_quarter_words(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline Words load_words(const std::uint32_t* p) {
  return each_quarter_words([&](int i) { return vld1q_u32(p + 4 * i); });
}
template <int N>
inline Words shift_left(Words x) {
  return each_quarter_words([&](int i) { return vshlq_n_u32(x.v[i], N); });
}
template <int N>
inline Words shift_right(Words x) {
  if constexpr (N == 0) return x;  // a distance that the instruction does not have
  return each_quarter_words([&](int i) { return vshrq_n_u32(x.v[i], N == 0 ? 1 : N); });
}
inline Words clear_low_half(Words x) {
  const uint32x4_t mask = vdupq_n_u32(0xffff0000u);
  return each_quarter_words([&](int i) { return vandq_u32(x.v[i], mask); });
}
inline Vec as_floats(Words x) {
  return each_quarter([&](int i) { return vreinterpretq_f32_u32(x.v[i]); });
}
inline Words as_words(Vec x) {
  return each_quarter_words([&](int i) { return vreinterpretq_u32_f32(x.v[i]); });
}
// u < v ? 0 : x
inline Vec zero_if_less(Vec u, Vec v, Words x) { return select_less(u, v, zero(), as_floats(x)); }
inline Words and_words(Words x, Words y) {
  return each_quarter_words([&](int i) { return vandq_u32(x.v[i], y.v[i]); });
}
inline Words splat_word(std::uint32_t value) {
  return each_quarter_words([&](int) { return vdupq_n_u32(value); });
}
inline Words add_words(Words x, Words y) {
  return each_quarter_words([&](int i) { return vaddq_u32(x.v[i], y.v[i]); });
}
inline Words sub_words(Words x, Words y) {
  return each_quarter_words([&](int i) { return vsubq_u32(x.v[i], y.v[i]); });
}
// Of signed numbers, to the nearest.
inline Vec to_floats(Words x) {
  return each_quarter([&](int i) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x.v[i])); });
}
// The lower half of each byte.
inline Words low_nibbles(Words x) {
  const uint32x4_t mask = vdupq_n_u32(0x0f0f0f0fu);
  return each_quarter_words([&](int i) { return vandq_u32(x.v[i], mask); });
}
// 16 bytes to choose from.
struct ByteTable {
  uint8x16_t entries;
};
inline ByteTable load_byte_table(const std::uint8_t* p) { return {vld1q_u8(p)}; }
// The entries that the bytes (0 to 15) choose.
inline Words look_up_bytes(const ByteTable& table, Words x) {
  return each_quarter_words([&](int i) {
    return vreinterpretq_u32_u8(vqtbl1q_u8(table.entries, vreinterpretq_u8_u32(x.v[i])));
  });
}
// Rounded to the nearest whole number, ties to even; all within 16 bits.
inline void store_rounded(std::int16_t* p, Vec x) {
  for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vmovn_s32(vcvtnq_s32_f32(x.v[i])));
}

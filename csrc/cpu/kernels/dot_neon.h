// Sums of whole numbers with SMLAL: 16-bit codes times bytes widened to 16 bits, an input at a
// time.

constexpr bool kOneSum = true;
// Rows of a tile, with 16-bit codes and with 8-bit ones.
constexpr int kDotRows = 4;
constexpr int kDotRowsOnePass = 4;
constexpr std::uint32_t kByteOffset = 128;

// The weights of four inputs, of outputs 0 to 7 and 8 to 15.
struct Bytes {
  int16x8_t input[4][2];
};

using Codes = int16x4_t;

inline Words stored_bytes(Words bytes) { return bytes; }
inline Bytes split_bytes(Words bytes) {
  Bytes out;
  for (int half = 0; half < 2; ++half) {
    const uint16x8_t low = vreinterpretq_u16_u32(bytes.v[2 * half]);  // inputs 0, 1 | 2, 3 | ...
    const uint16x8_t high = vreinterpretq_u16_u32(bytes.v[2 * half + 1]);
    const uint16x8_t first = vuzp1q_u16(low, high), last = vuzp2q_u16(low, high);
    const uint16x8_t mask = vdupq_n_u16(0x00ff);
    out.input[0][half] = vreinterpretq_s16_u16(vandq_u16(first, mask));
    out.input[1][half] = vreinterpretq_s16_u16(vshrq_n_u16(first, 8));
    out.input[2][half] = vreinterpretq_s16_u16(vandq_u16(last, mask));
    out.input[3][half] = vreinterpretq_s16_u16(vshrq_n_u16(last, 8));
  }
  return out;
}
inline Bytes split_nibbles(Words bytes) { return split_bytes(low_nibbles(bytes)); }

// The codes of four inputs, in two words.
template <int kPasses>
inline void store_codes(std::uint32_t* words, const std::int16_t* codes, std::int64_t count) {
  std::memcpy(words, codes, static_cast<std::size_t>(count) * sizeof *codes);
}
inline Codes load_codes(const std::uint32_t* words) {
  return vreinterpret_s16_u32(vld1_u32(words));
}
template <int J>
inline Words add_input(Words sums, const Bytes& bytes, Codes codes) {
  for (int half = 0; half < 2; ++half) {
    const int16x8_t weights = bytes.input[J][half];
    const int32x4_t low = vreinterpretq_s32_u32(sums.v[2 * half]);
    const int32x4_t high = vreinterpretq_s32_u32(sums.v[2 * half + 1]);
    sums.v[2 * half] = vreinterpretq_u32_s32(vmlal_lane_s16(low, vget_low_s16(weights), codes, J));
    sums.v[2 * half + 1] = vreinterpretq_u32_s32(vmlal_high_lane_s16(high, weights, codes, J));
  }
  return sums;
}
inline Words dot(Words sums, const Bytes& bytes, Codes codes) {
  sums = add_input<0>(sums, bytes, codes);
  sums = add_input<1>(sums, bytes, codes);
  sums = add_input<2>(sums, bytes, codes);
  return add_input<3>(sums, bytes, codes);
}

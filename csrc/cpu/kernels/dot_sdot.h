// Sums of whole numbers with SDOT: four signed bytes times four signed ones, an output each.
//
// A 16-bit code is 256 * high + low, both signed bytes, and has a sum for each; an 8-bit code has
// only the first.

constexpr bool kOneSum = false;
// Rows of a tile, with 16-bit codes and with 8-bit ones.
constexpr int kDotRows = 3;
constexpr int kDotRowsOnePass = 2 * kDotRows;

using Bytes = Words;
using Codes = int8x16_t;

// SDOT takes signed bytes: the stored ones, level + 128, with the highest bit flipped.
constexpr std::uint32_t kByteOffset = 0;
inline Words stored_bytes(Words bytes) {
  const uint32x4_t highest = vdupq_n_u32(0x80808080u);
  return each_quarter_words([&](int i) { return veorq_u32(bytes.v[i], highest); });
}
inline Bytes split_bytes(Words bytes) { return bytes; }
inline Bytes split_nibbles(Words bytes) { return low_nibbles(bytes); }

// The codes of four inputs, in two words: their high bytes, their low bytes.
template <int kPasses>
inline void store_codes(std::uint32_t* words, const std::int16_t* codes, std::int64_t count) {
  auto* bytes = reinterpret_cast<std::uint8_t*>(words);
  for (std::int64_t i = 0; i < count; i += 4) {
    for (std::int64_t j = 0; j < 4; ++j) {
      const int code = codes[i + j];
      bytes[2 * i + j] = static_cast<std::uint8_t>(kPasses == 1 ? code : (code + 128) >> 8);
      bytes[2 * i + 4 + j] = static_cast<std::uint8_t>(code);
    }
  }
}
// One of the two words.
inline Codes load_codes(const std::uint32_t* word) {
  return vreinterpretq_s8_u32(vdupq_n_u32(*word));
}
inline Words dot(Words sums, Bytes bytes, Codes codes) {
  return each_quarter_words([&](int i) {
    const int32x4_t sum = vreinterpretq_s32_u32(sums.v[i]);
    return vreinterpretq_u32_s32(vdotq_s32(sum, vreinterpretq_s8_u32(bytes.v[i]), codes));
  });
}

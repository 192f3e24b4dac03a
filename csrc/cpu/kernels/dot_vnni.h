// Sums of whole numbers with VPDPBUSD: four unsigned bytes times four signed ones, an output each.
//
// A 16-bit code is 256 * high + low, both signed bytes, and has a sum for each; an 8-bit code has
// only the first.

constexpr bool kOneSum = false;
// Rows of a tile, with 16-bit codes and with 8-bit ones.
constexpr int kDotRows = kNumRegisters == 32 ? 3 : 2;
constexpr int kDotRowsOnePass = 2 * kDotRows;
constexpr std::uint32_t kByteOffset = 128;

using Bytes = Words;
using Codes = Words;

inline Words stored_bytes(Words bytes) { return bytes; }
inline Bytes split_bytes(Words bytes) { return bytes; }
inline Bytes split_nibbles(Words bytes) { return low_nibbles(bytes); }

// The codes of four inputs, in two words: their high bytes, their low bytes.
template <int kPasses>
inline void store_codes(std::uint32_t* words, const std::int16_t* codes, std::int64_t count) {
  // Packs the low bytes of four 16-bit numbers in 64 bits.
  const auto low_bytes = [](std::uint64_t four) {
    four &= 0x00ff00ff00ff00ffu;
    four = (four | four >> 8) & 0x0000ffff0000ffffu;
    return static_cast<std::uint32_t>(four | four >> 16);
  };
  constexpr std::uint64_t kSigns = 0x8000800080008000u;
  for (std::int64_t i = 0; i < count; i += 4) {
    std::uint64_t four;
    std::memcpy(&four, codes + i, sizeof four);
    const std::uint32_t low = low_bytes(four);
    // 128 is added to each number, so that the low byte rounds the high one.
    const std::uint64_t rounded = ((four & ~kSigns) + 0x0080008000800080u) ^ (four & kSigns);
    words[i / 2] = kPasses == 1 ? low : low_bytes(rounded >> 8);
    words[i / 2 + 1] = low;
  }
}
// One of the two words.
inline Codes load_codes(const std::uint32_t* word) { return splat_word(*word); }
inline Words dot(Words sums, Bytes bytes, Codes codes) {
  return add_byte_products(sums, bytes, codes);
}

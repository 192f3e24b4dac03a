// Sums of whole numbers with VPDPBUSD: four unsigned bytes times four signed ones, an output each.
//
// A 16-bit code is 256 * high + low, both signed bytes, and has a sum for each; an 8-bit code has
// only the first.

constexpr bool kOneSum = false;
constexpr std::uint32_t kByteOffset = 128;

using Bytes = Words;
using Codes = Words;

inline Words stored_bytes(Words bytes) { return bytes; }
inline Bytes split_bytes(Words bytes) { return bytes; }

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
inline Codes load_codes(const std::uint32_t* word) { return splat_word(*word); }
inline Words dot(Words sums, Bytes bytes, Codes codes) {
  return add_byte_products(sums, bytes, codes);
}

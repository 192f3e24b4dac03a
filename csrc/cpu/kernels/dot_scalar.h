// Sums of whole numbers in plain C++: 16-bit codes times unsigned bytes.

constexpr bool kOneSum = true;
// Rows of a tile, with 16-bit codes and with 8-bit ones.
constexpr int kDotRows = 1;
constexpr int kDotRowsOnePass = 1;
constexpr std::uint32_t kByteOffset = 128;

using Bytes = Words;

struct Codes {
  std::uint32_t code[4];
};

inline Words stored_bytes(Words bytes) { return bytes; }
inline Bytes split_bytes(Words bytes) { return bytes; }
inline Bytes split_nibbles(Words bytes) { return low_nibbles(bytes); }

// The codes of four inputs, in two words.
template <int kPasses>
inline void store_codes(std::uint32_t* words, const std::int16_t* codes, std::int64_t count) {
  std::memcpy(words, codes, static_cast<std::size_t>(count) * sizeof *codes);
}
inline Codes load_codes(const std::uint32_t* words) {
  std::int16_t codes[4];
  std::memcpy(codes, words, sizeof codes);
  Codes out;
  for (int i = 0; i < 4; ++i)
    out.code[i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(codes[i]));
  return out;
}
inline Words dot(Words sums, const Bytes& bytes, const Codes& codes) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 4; ++j) sums.lane[i] += codes.code[j] * (bytes.lane[i] >> (8 * j) & 255u);
  }
  return sums;
}

// Sums of whole numbers with PMADDWD: pairs of 16-bit codes times pairs of bytes widened to 16
// bits.
//
// The bytes of inputs 0 and 2 of a word are widened by masking the other two, those of 1 and 3 by a
// shift by eight; the codes are stored in that order.

constexpr bool kOneSum = true;
// Rows of a tile, with 16-bit codes and with 8-bit ones.
constexpr int kDotRows = 4;
constexpr int kDotRowsOnePass = 4;
constexpr std::uint32_t kByteOffset = 128;

struct Bytes {
  Words even, odd;
};
struct Codes {
  Words even, odd;
};

inline Words stored_bytes(Words bytes) { return bytes; }
inline Bytes split_bytes(Words bytes) {
  return {even_bytes(bytes), even_bytes(shift_right<8>(bytes))};
}
// Of the lower half of each byte.
inline Bytes split_nibbles(Words bytes) {
  const Words mask = splat_word(0x000f000f);
  return {and_words(bytes, mask), and_words(shift_right<8>(bytes), mask)};
}

// The codes of four inputs, in two words.
template <int kPasses>
inline void store_codes(std::uint32_t* words, const std::int16_t* codes, std::int64_t count) {
  const auto bits = [](std::int16_t code) {
    return static_cast<std::uint32_t>(static_cast<std::uint16_t>(code));
  };
  for (std::int64_t i = 0; i < count; i += 4) {
    words[i / 2] = bits(codes[i]) | bits(codes[i + 2]) << 16;
    words[i / 2 + 1] = bits(codes[i + 1]) | bits(codes[i + 3]) << 16;
  }
}
inline Codes load_codes(const std::uint32_t* words) {
  return {splat_word(words[0]), splat_word(words[1])};
}
inline Words dot(Words sums, Bytes bytes, Codes codes) {
  return add_products(add_products(sums, bytes.even, codes.even), bytes.odd, codes.odd);
}

// Sums of whole numbers with PMADDWD: pairs of 16-bit codes times pairs of bytes widened to 16
// bits.
//
// The bytes of inputs 0 and 2 of a word lie right for that when the other two are masked away,
// those of 1 and 3 after a shift by eight; the codes are stored in that order.

template <int kPasses>
using Sums = Words;  // 16 outputs' sums, modulo 2^32

struct Bytes {
  Words even, odd;
};

template <int kPasses>
struct Codes {
  Words even, odd;
};

template <int kPasses>
inline Words no_sums() {
  return splat_word(0);
}
inline Bytes split_bytes(Words bytes) {
  return {even_bytes(bytes), even_bytes(shift_right<8>(bytes))};
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
template <int kPasses>
inline Codes<kPasses> load_codes(const std::uint32_t* words) {
  return {splat_word(words[0]), splat_word(words[1])};
}
template <int kPasses>
inline void dot(Words& sums, const Bytes& bytes, const Codes<kPasses>& codes) {
  sums = add_products(sums, bytes.even, codes.even);
  sums = add_products(sums, bytes.odd, codes.odd);
}
inline Words total(const Words& sums) { return sums; }

// Sums of whole numbers with VPDPBUSD: four unsigned bytes times four signed ones, an output each.
//
// A 16-bit code is 256 * high + low, both signed bytes, so it takes two sums, which meet at the
// end; an 8-bit code has only the first.

template <int kPasses>
struct Sums {
  Words part[kPasses];  // 16 outputs' sums each, modulo 2^32
};
using Bytes = Words;
template <int kPasses>
struct Codes {
  Words part[kPasses];
};

template <int kPasses>
inline Sums<kPasses> no_sums() {
  Sums<kPasses> sums;
  for (Words& part : sums.part) part = splat_word(0);
  return sums;
}
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
template <int kPasses>
inline Codes<kPasses> load_codes(const std::uint32_t* words) {
  Codes<kPasses> codes;
  for (int i = 0; i < kPasses; ++i) codes.part[i] = splat_word(words[i]);
  return codes;
}
template <int kPasses>
inline void dot(Sums<kPasses>& sums, const Bytes& bytes, const Codes<kPasses>& codes) {
  for (int i = 0; i < kPasses; ++i)
    sums.part[i] = add_byte_products(sums.part[i], bytes, codes.part[i]);
}
template <int kPasses>
inline Words total(const Sums<kPasses>& sums) {
  if constexpr (kPasses == 1) return sums.part[0];
  return add_words(shift_left<8>(sums.part[0]), sums.part[1]);
}

// 16 lanes in plain C++: runs everywhere, and compilers turn most of it into SIMD instructions.

constexpr int kNumRegisters = 16, kRegistersOfVec = 4;
// Tiles of the matrix products, rows x panels, so that the sums fit the registers: fused
// multiply-adds have even and odd sums. kDotPanels: of sums of whole numbers (dot_*.h).
constexpr int kRows = 1;
constexpr int kPanels = 1;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 1;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 2;   // query rows x tiles of keys under way at a time
constexpr int kValueRows = 1;     // query rows that share a load of the values
constexpr int kPairSums = 2;      // of even or of odd numbers, in products of bf16 pairs

struct Vec {
  float lane[16];
};

template <class F>
inline Vec each_lane(F&& f) {
  Vec out;
  for (int i = 0; i < 16; ++i) out.lane[i] = f(i);
  return out;
}

inline Vec load(const float* p) {
  Vec out;
  std::memcpy(out.lane, p, sizeof out.lane);
  return out;
}
inline void store(float* p, Vec a) { std::memcpy(p, a.lane, sizeof a.lane); }
inline Vec splat(float value) {
  return each_lane([&](int) { return value; });
}
inline Vec zero() { return splat(0.0f); }
inline Vec add(Vec a, Vec b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec div(Vec a, Vec b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
// a * b + c, rounded once.
inline Vec fma(Vec a, Vec b, Vec c) {
  return each_lane([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline Vec max(Vec a, Vec b) {
  return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(Vec a, Vec b) {
  return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec floor(Vec a) {
  return each_lane([&](int i) { return std::floor(a.lane[i]); });
}
// a < b ? x : y
inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
}
// y * 2^n for whole n, by adding n to the exponent's bits.
inline Vec scale_exponent(Vec y, Vec n) {
  return each_lane([&](int i) {
    const bool is_number = n.lane[i] == n.lane[i];  // there is no integer for a NaN
    const auto exponent =
        static_cast<std::uint32_t>(is_number ? static_cast<std::int32_t>(n.lane[i]) : 0);
    return bits_float(float_bits(y.lane[i]) + (exponent << 23));
  });
}
// 16 bf16 numbers.
inline Vec load(const std::uint16_t* p) {
  return each_lane([&](int i) { return bf16_to_float(p[i]); });
}
// 16 IEEE halves.
inline Vec load_f16(const std::uint16_t* p) {
  return each_lane([&](int i) { return f16_to_float(p[i]); });
}
// 16 signed bytes.
inline Vec load(const std::int8_t* p) {
  return each_lane([&](int i) { return static_cast<float>(p[i]); });
}

// ---- 16 words of packed weights ----

struct Words {
  std::uint32_t lane[16];
};

inline Words load_words(const std::uint32_t* p) {
  Words out;
  std::memcpy(out.lane, p, sizeof out.lane);
  return out;
}
template <class F>
inline Words each_word(F&& f) {
  Words out;
  for (int i = 0; i < 16; ++i) out.lane[i] = f(i);
  return out;
}
template <int N>
inline Words shift_left(Words a) {
  return each_word([&](int i) { return a.lane[i] << N; });
}
template <int N>
inline Words shift_right(Words a) {
  return each_word([&](int i) { return a.lane[i] >> N; });
}
inline Words clear_low_half(Words a) {
  return each_word([&](int i) { return a.lane[i] & 0xffff0000u; });
}
inline Vec as_floats(Words a) {
  return each_lane([&](int i) { return bits_float(a.lane[i]); });
}
inline Words as_words(Vec a) {
  return each_word([&](int i) { return float_bits(a.lane[i]); });
}
// u < v ? 0 : x
inline Vec zero_if_less(Vec u, Vec v, Words x) { return select_less(u, v, zero(), as_floats(x)); }
inline Words and_words(Words a, Words b) {
  return each_word([&](int i) { return a.lane[i] & b.lane[i]; });
}
inline Words splat_word(std::uint32_t value) {
  return each_word([&](int) { return value; });
}
inline Words add_words(Words a, Words b) {
  return each_word([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Words sub_words(Words a, Words b) {
  return each_word([&](int i) { return a.lane[i] - b.lane[i]; });
}
// Of signed numbers, to the nearest.
inline Vec to_floats(Words a) {
  return each_lane([&](int i) { return static_cast<float>(static_cast<std::int32_t>(a.lane[i])); });
}
// The lower half of each byte.
inline Words low_nibbles(Words a) {
  return each_word([&](int i) { return a.lane[i] & 0x0f0f0f0fu; });
}
// 16 bytes to choose from.
struct ByteTable {
  std::uint8_t entry[16];
};
inline ByteTable load_byte_table(const std::uint8_t* p) {
  ByteTable table;
  std::memcpy(table.entry, p, sizeof table.entry);
  return table;
}
// The entries that the bytes (0 to 15) choose.
inline Words look_up_bytes(const ByteTable& table, Words a) {
  return each_word([&](int i) {
    std::uint32_t chosen = 0;
    for (int shift = 0; shift < 32; shift += 8)
      chosen |= std::uint32_t{table.entry[(a.lane[i] >> shift) & 15u]} << shift;
    return chosen;
  });
}
// Rounded to the nearest whole number, ties to even; all within 16 bits.
inline void store_rounded(std::int16_t* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int16_t>(std::nearbyint(a.lane[i]));
}

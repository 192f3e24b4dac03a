// 16 lanes in plain C++: runs everywhere, and compilers turn most of it into what SIMD there is.

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
// Byte N of each word, a signed number.
template <int N>
inline Vec signed_byte(Words a) {
  return each_lane([&](int i) {
    return static_cast<float>(static_cast<std::int8_t>((a.lane[i] >> (8 * N)) & 0xffu));
  });
}
// 16 numbers to choose from.
struct Table {
  float entry[16];
};
inline Table load_table(const float* p) {
  Table out;
  if (p) std::memcpy(out.entry, p, sizeof out.entry);
  return out;
}
// The entries that the lowest four bits of each word choose.
inline Vec look_up(Table table, Words a) {
  return each_lane([&](int i) { return table.entry[a.lane[i] & 15u]; });
}

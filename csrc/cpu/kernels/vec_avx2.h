// 16 lanes as two AVX registers; needs AVX2, FMA and F16C.

constexpr int kNumRegisters = 16, kRegistersOfVec = 2;
// Tiles of the matrix products, rows x panels, so that the sums fit the registers: fused
// multiply-adds have even and odd sums. kDotPanels: of sums of whole numbers (dot_*.h).
constexpr int kRows = 6;
constexpr int kPanels = 1;
constexpr int kDotPanels = 1;
constexpr int kPanelsOneRow = 3;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 4;   // query rows x tiles of keys under way at a time
constexpr int kValueRows = 1;     // query rows that share a load of the values
constexpr int kPairSums = 6;      // of even or of odd numbers, in products of bf16 pairs

struct Vec {
  __m256 a, b;  // lanes 0-7 and 8-15
};

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Vec splat(float value) {
  const __m256 all = _mm256_set1_ps(value);
  return {all, all};
}
inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec add(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Vec sub(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Vec mul(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Vec div(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
// x * y + z, rounded once.
inline Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Vec floor(Vec x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
// u < v ? x : y
inline Vec select_less(Vec u, Vec v, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(u.a, v.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(u.b, v.b, _CMP_LT_OQ))};
}
// y * 2^n for whole n, by adding n to the exponent's bits.
inline __m256 scale_exponent(__m256 y, __m256 n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvttps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
}
inline Vec scale_exponent(Vec y, Vec n) {
  return {scale_exponent(y.a, n.a), scale_exponent(y.b, n.b)};
}
// 16 bf16 numbers.
inline Vec load(const std::uint16_t* p) {
  const auto widen = [](const std::uint16_t* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  };
  return {widen(p), widen(p + 8)};
}
// 16 IEEE halves.
inline Vec load_f16(const std::uint16_t* p) {
  const auto widen = [](const std::uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  };
  return {widen(p), widen(p + 8)};
}
// 16 signed bytes.
inline Vec load(const std::int8_t* p) {
  const auto widen = [](const std::int8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  };
  return {widen(p), widen(p + 8)};
}

// ---- 16 words of packed weights ----

struct Words {
  __m256i a, b;
};

inline Words load_words(const std::uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
template <int N>
inline Words shift_left(Words x) {
  return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N>
inline Words shift_right(Words x) {
  return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
inline Words clear_low_half(Words x) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Vec as_floats(Words x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline Words as_words(Vec x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
// u < v ? 0 : x
inline Vec zero_if_less(Vec u, Vec v, Words x) { return select_less(u, v, zero(), as_floats(x)); }
inline Words and_words(Words x, Words y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
inline Words splat_word(std::uint32_t value) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(value));
  return {all, all};
}
inline Words add_words(Words x, Words y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline Words sub_words(Words x, Words y) {
  return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
}
// Of signed numbers, to the nearest.
inline Vec to_floats(Words x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
// The lower half of each byte.
inline Words low_nibbles(Words x) {
  const __m256i mask = _mm256_set1_epi32(0x0f0f0f0f);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
// 16 bytes to choose from.
struct ByteTable {
  __m256i entries;
};
inline ByteTable load_byte_table(const std::uint8_t* p) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The entries that the bytes (0 to 15) choose.
inline Words look_up_bytes(const ByteTable& table, Words x) {
  return {_mm256_shuffle_epi8(table.entries, x.a), _mm256_shuffle_epi8(table.entries, x.b)};
}
// Rounded to the nearest whole number, ties to even; all within 16 bits.
inline void store_rounded(std::int16_t* p, Vec x) {
  // The instruction packs each half by itself: the middle quarters change places.
  const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}

// ---- sums of products of whole numbers ----

// Bytes 0 and 2 of each word, widened to 16 bits.
inline Words even_bytes(Words x) {
  const __m256i mask = _mm256_set1_epi32(0x00ff00ff);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
// Two products of 16 bits, added to each word.
inline Words add_products(Words sums, Words x, Words y) {
  return {_mm256_add_epi32(sums.a, _mm256_madd_epi16(x.a, y.a)),
          _mm256_add_epi32(sums.b, _mm256_madd_epi16(x.b, y.b))};
}
#if defined(__AVXVNNI__)
// Four products of an unsigned and a signed byte, added to each word.
inline Words add_byte_products(Words sums, Words bytes, Words signed_bytes) {
  return {_mm256_dpbusd_avx_epi32(sums.a, bytes.a, signed_bytes.a),
          _mm256_dpbusd_avx_epi32(sums.b, bytes.b, signed_bytes.b)};
}
#endif

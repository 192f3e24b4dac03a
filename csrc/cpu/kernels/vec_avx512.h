// 16 lanes as one AVX-512 register; needs AVX-512 F, BW, DQ and VL.

constexpr int kNumRegisters = 32, kRegistersOfVec = 1;
// Tiles of the matrix products, rows x panels, so that the sums fit the registers: fused
// multiply-adds have even and odd sums. kDotPanels: of sums of whole numbers (dot_*.h).
constexpr int kRows = 6;
constexpr int kPanels = 2;
constexpr int kDotPanels = 4;
constexpr int kPanelsOneRow = 4;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
// Query rows x tiles of keys under way at a time.
#if defined(__AVX512VNNI__)
constexpr int kScoreChains = 16;
#else
constexpr int kScoreChains = 8;
#endif
constexpr int kValueRows = 4;  // query rows that share a load of the values
constexpr int kPairSums = 16;  // of even or of odd numbers, in products of bf16 pairs

struct Vec {
  __m512 v;
};

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline Vec splat(float value) { return {_mm512_set1_ps(value)}; }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec add(Vec x, Vec y) { return {_mm512_add_ps(x.v, y.v)}; }
inline Vec sub(Vec x, Vec y) { return {_mm512_sub_ps(x.v, y.v)}; }
inline Vec mul(Vec x, Vec y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline Vec div(Vec x, Vec y) { return {_mm512_div_ps(x.v, y.v)}; }
// x * y + z, rounded once.
inline Vec fma(Vec x, Vec y, Vec z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
inline Vec max(Vec x, Vec y) { return {_mm512_max_ps(x.v, y.v)}; }
inline Vec min(Vec x, Vec y) { return {_mm512_min_ps(x.v, y.v)}; }
inline Vec floor(Vec x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
// u < v ? x : y
inline Vec select_less(Vec u, Vec v, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(u.v, v.v, _CMP_LT_OQ), y.v, x.v)};
}
// y * 2^n for whole n, by adding n to the exponent's bits.
inline Vec scale_exponent(Vec y, Vec n) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_cvttps_epi32(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y.v), exponent))};
}
// Stores a whole cache line to memory past the caches; stream_fence() before other threads read it.
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x.v); }
inline void stream_fence() { _mm_sfence(); }
// 16 bf16 numbers.
inline Vec load(const std::uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
// 16 IEEE halves.
inline Vec load_f16(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// 16 signed bytes.
inline Vec load(const std::int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}

// The greatest lanes of eight vectors, in lanes 0 to 7.
inline Vec max_of_each(const Vec (&x)[8]) {
  __m512 halves[4], quarters[2];
  for (int i = 0; i < 4; ++i)
    halves[i] = _mm512_max_ps(_mm512_shuffle_f32x4(x[i].v, x[i + 4].v, 0x44),
                              _mm512_shuffle_f32x4(x[i].v, x[i + 4].v, 0xee));
  for (int i = 0; i < 2; ++i)  // of vectors i, i + 4, i + 2, i + 6
    quarters[i] = _mm512_max_ps(_mm512_shuffle_f32x4(halves[i], halves[i + 2], 0x88),
                                _mm512_shuffle_f32x4(halves[i], halves[i + 2], 0xdd));
  const __m512 twos = _mm512_max_ps(_mm512_shuffle_ps(quarters[0], quarters[1], 0x44),
                                    _mm512_shuffle_ps(quarters[0], quarters[1], 0xee));
  const __m512 ones = _mm512_max_ps(twos, _mm512_permute_ps(twos, 0xb1));
  const __m512i places = _mm512_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  return {_mm512_permutexvar_ps(places, ones)};
}

// ---- 16 words of packed weights ----

struct Words {
  __m512i v;
};

inline Words load_words(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
// Loads the words from a place so many bytes further.
template <int N>
inline Words load_words_at(const std::uint32_t* p) {
  return {_mm512_loadu_si512(reinterpret_cast<const unsigned char*>(p) + N)};
}
inline void store_words(std::uint32_t* p, Words x) { _mm512_storeu_si512(p, x.v); }
template <int N>
inline Words shift_left(Words x) {
  return {_mm512_slli_epi32(x.v, N)};
}
template <int N>
inline Words shift_right(Words x) {
  return {_mm512_srli_epi32(x.v, N)};
}
inline Words clear_low_half(Words x) {
  return {_mm512_and_si512(x.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))};
}
inline Vec as_floats(Words x) { return {_mm512_castsi512_ps(x.v)}; }
inline Words as_words(Vec x) { return {_mm512_castps_si512(x.v)}; }
// u < v ? 0 : x
inline Vec zero_if_less(Vec u, Vec v, Words x) {
  const __mmask16 is_kept = _mm512_cmp_ps_mask(u.v, v.v, _CMP_NLT_UQ);
  return as_floats({_mm512_maskz_mov_epi32(is_kept, x.v)});
}
inline Words and_words(Words x, Words y) { return {_mm512_and_si512(x.v, y.v)}; }
inline Words splat_word(std::uint32_t value) {
  return {_mm512_set1_epi32(static_cast<int>(value))};
}
inline Words add_words(Words x, Words y) { return {_mm512_add_epi32(x.v, y.v)}; }
inline Words sub_words(Words x, Words y) { return {_mm512_sub_epi32(x.v, y.v)}; }
// Of signed numbers, to the nearest.
inline Vec to_floats(Words x) { return {_mm512_cvtepi32_ps(x.v)}; }
// The lower half of each byte.
inline Words low_nibbles(Words x) { return {_mm512_and_si512(x.v, _mm512_set1_epi32(0x0f0f0f0f))}; }
// 16 bytes to choose from.
struct ByteTable {
  __m512i entries;
};
inline ByteTable load_byte_table(const std::uint8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The entries that the bytes (0 to 15) choose.
inline Words look_up_bytes(const ByteTable& table, Words x) {
  return {_mm512_shuffle_epi8(table.entries, x.v)};
}
// 16 numbers to choose from, or 32 halves of words; the lower four or five bits of an index count.
struct FloatTable {
  __m512 entries;
};
inline FloatTable load_float_table(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec look_up_floats(const FloatTable& table, Words x) {
  return {_mm512_permutexvar_ps(x.v, table.entries)};
}
struct HalfTable {
  __m512i entries;
};
inline HalfTable load_half_table(const std::uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline Words look_up_halves(const HalfTable& table, Words x) {
  return {_mm512_permutexvar_epi16(x.v, table.entries)};
}
template <int N>
inline Words shift_halves_right(Words x) {
  return {_mm512_srli_epi16(x.v, N)};
}
// Half i of the result is half places[i] of x.
inline Vec permute_halves(Vec x, const std::uint16_t* places) {
  return {_mm512_castsi512_ps(
      _mm512_permutexvar_epi16(_mm512_loadu_si512(places), _mm512_castps_si512(x.v)))};
}
// Rounded to the nearest whole number, ties to even; all within 16 bits.
inline void store_rounded(std::int16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
}

// ---- sums of products of whole numbers ----

// Bytes 0 and 2 of each word, widened to 16 bits.
inline Words even_bytes(Words x) { return {_mm512_and_si512(x.v, _mm512_set1_epi32(0x00ff00ff))}; }
// Two products of 16 bits, added to each word.
inline Words add_products(Words sums, Words x, Words y) {
  return {_mm512_add_epi32(sums.v, _mm512_madd_epi16(x.v, y.v))};
}
#if defined(__AVX512VNNI__)
// Four products of an unsigned and a signed byte, added to each word.
inline Words add_byte_products(Words sums, Words bytes, Words signed_bytes) {
  // Not _mm512_dpbusd_epi32: GCC 12 moves and spills its sums, which costs half the speed.
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(bytes.v), "v"(signed_bytes.v));
  return sums;
}
#endif
#if defined(__AVX512BF16__)
// 16 numbers rounded to bf16, ties to even.
inline void store_bf16(std::uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
inline Vec two_as_bf16(Vec x, Vec y) {  // their bits
  return {reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(y.v, x.v))};
}
// Two products of bf16 numbers, the one of the upper halves first.
inline Vec dot_bf16(Vec sum, Words x, Words y) {
  return {
      _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(x.v), reinterpret_cast<__m512bh>(y.v))};
}
#else
// 16 numbers rounded to bf16, ties to even; a NaN stays one.
inline void store_bf16(std::uint16_t* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline Vec two_as_bf16(Vec x, Vec y) {  // their bits
  alignas(64) std::uint16_t both[32];
  store_bf16(both, x);
  store_bf16(both + 16, y);
  return load(reinterpret_cast<const float*>(both));
}
#endif

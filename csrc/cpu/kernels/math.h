// Functions over 16 lanes that are the same to the bit on every instruction set.

// The next loop, over a few rows or vectors, becomes straight code: its sums stay in registers.
#if defined(__clang__)
#define OCTAVO_UNROLL _Pragma("unroll")
#else
#define OCTAVO_UNROLL _Pragma("GCC unroll 16")
#endif

// Calls f with 0, 1, .. N - 1 as compile-time constants: a shift's distance has to be one.
template <class F, int... J>
inline void unroll(F&& f, std::integer_sequence<int, J...>) {
  (f(std::integral_constant<int, J>{}), ...);
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

// The sum of the lanes, halves onto halves: the same order in every instruction set.
inline float sum_lanes(Vec a) {
  float lane[16];
  store(lane, a);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] + lane[i + width];
  }
  return lane[0];
}

inline float max_lanes(Vec a) {
  float lane[16];
  store(lane, a);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

// The greatest lanes of some vectors, each in the lane of its number.
template <int R>
inline Vec max_of_each(const Vec (&x)[R]) {
  float greatest[16] = {};
  for (int r = 0; r < R; ++r) greatest[r] = max_lanes(x[r]);
  return load(greatest);
}

// e^x for x <= 0; 0 below -87. Cephes' expf (Moshier), products not fused: the definition is
// reference/sampling.py, exp32, and attention uses it too.
inline Vec exp_negative(Vec given) {
  const Vec x = max(splat(-88.0f), given);  // in range; a NaN stays one
  const Vec n = floor(add(mul(x, splat(1.44269504088896341f)), splat(0.5f)));
  Vec r = sub(x, mul(n, splat(0.693359375f)));
  r = sub(r, mul(n, splat(-2.12194440e-4f)));
  Vec p = splat(1.9875691500e-4f);
  p = add(mul(p, r), splat(1.3981999507e-3f));
  p = add(mul(p, r), splat(8.3334519073e-3f));
  p = add(mul(p, r), splat(4.1665795894e-2f));
  p = add(mul(p, r), splat(1.6666665459e-1f));
  p = add(mul(p, r), splat(5.0000001201e-1f));
  const Vec y = add(add(mul(p, mul(r, r)), r), splat(1.0f));
  return select_less(given, splat(-87.0f), zero(), scale_exponent(y, n));
}

inline float exp_negative(float x) {
  float lane[16];
  store(lane, exp_negative(splat(x)));
  return lane[0];
}

// Cephes' tanhf (Moshier), products not fused: a polynomial near 0, else from e^(-2 |x|).
inline Vec hyperbolic_tangent(Vec x) {
  const Vec size = max(x, sub(zero(), x)), square = mul(x, x);
  const Vec t = exp_negative(mul(size, splat(-2.0f)));
  const Vec far = div(sub(splat(1.0f), t), add(splat(1.0f), t));
  Vec p = splat(-5.70498872745e-3f);
  p = add(mul(p, square), splat(2.06390887954e-2f));
  p = add(mul(p, square), splat(-5.37397155531e-2f));
  p = add(mul(p, square), splat(1.33314422036e-1f));
  p = add(mul(p, square), splat(-3.33332819422e-1f));
  const Vec near = add(mul(mul(p, square), x), x);
  const Vec signed_far = select_less(x, zero(), sub(zero(), far), far);
  return select_less(size, splat(0.625f), near, signed_far);
}

// 2^x for x <= 0; 0 below -125, a NaN stays one. x is a whole number n and a rest of at most 1/2;
// 2^rest is a polynomial fitted to it at Chebyshev nodes with 1 as its first coefficient, so that
// 2^n is exact.
inline Vec exp2_negative(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a number added to it becomes whole
  const Vec rounded = add(x, splat(kRound));
  const Vec r = sub(x, sub(rounded, splat(kRound)));
  Vec p = splat(0.00132647273f);
  p = fma(p, r, splat(0.00967151299f));
  p = fma(p, r, splat(0.0555073358f));
  p = fma(p, r, splat(0.240222424f));
  p = fma(p, r, splat(0.693147004f));
  p = fma(p, r, splat(1.0f));
  // n, in the lowest bits of `rounded`, is added to the exponent.
  const Words power = add_words(as_words(p), shift_left<23>(as_words(rounded)));
  return zero_if_less(x, splat(-125.0f), power);
}

// Rounded to bf16, ties to even, by adding to the bits; a NaN stays one.
inline Vec round_to_bf16(Vec x) {
  const Words bits = as_words(x);
  const Words last = shift_right<31>(shift_left<15>(bits));  // bit 16: whether to round up a tie
  return as_floats(clear_low_half(add_words(bits, add_words(last, splat_word(0x7fffu)))));
}

// The last, incomplete 16 numbers of an array; missing ones are `fill`.
inline Vec load_tail(const float* p, std::int64_t count, float fill) {
  float lane[16];
  for (std::int64_t i = 0; i < 16; ++i) lane[i] = i < count ? p[i] : fill;
  return load(lane);
}

inline void store_tail(float* p, Vec a, std::int64_t count) {
  float lane[16];
  store(lane, a);
  for (std::int64_t i = 0; i < count; ++i) p[i] = lane[i];
}

// Calls body(offset, load, store) for every 16 numbers of an array of `count`; `load(p, fill)` and
// `store(p, value)` handle the incomplete end.
template <class Body>
inline void for_each_vec(std::int64_t count, Body&& body) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    body(i, [](const float* p, float) { return load(p); }, [](float* p, Vec a) { store(p, a); });
  }
  if (i < count) {
    const std::int64_t rest = count - i;
    body(
        i, [rest](const float* p, float fill) { return load_tail(p, rest, fill); },
        [rest](float* p, Vec a) { store_tail(p, a, rest); });
  }
}

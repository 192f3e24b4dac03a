// The arithmetic of sampling over a row of logits. reference/sampling.py defines every function
// here, and the bits are the same: no fused products, sums in fixed point.

// e^(x - max) in units of 2^-40.
inline std::uint64_t fixed_point(float weight) {
  // Signed numbers are converted faster, and these are small.
  const auto value = static_cast<std::int64_t>(static_cast<double>(weight) * 1099511627776.0);
  return static_cast<std::uint64_t>(value);
}

void exp_weights(std::uint64_t* out, const float* x, float max_value, std::int64_t count) {
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto) {
    float lane[16];
    store(lane, exp_negative(sub(load_at(x + i, max_value), splat(max_value))));
    if (count - i >= 16) {  // a length that the compiler knows
      for (std::int64_t j = 0; j < 16; ++j) out[i + j] = fixed_point(lane[j]);
    } else {
      for (std::int64_t j = 0; j < count - i; ++j) out[i + j] = fixed_point(lane[j]);
    }
  });
}

// The bins, as floats, of numbers that are `below` the largest one.
inline Vec bins_of(Vec below) {
  const Vec bin = mul(below, splat(-kWeightBinsOfOne)), last = splat(kWeightBins - 1.0f);
  return select_less(bin, last, bin, last);  // also of a NaN
}

void bin_weights(std::uint64_t* sums, const float* x, float max_value, std::int64_t count) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto) {
    const Vec below = sub(load_at(x + i, kLowest), splat(max_value));
    float weights[16], bins[16];
    store(weights, exp_negative(below));
    store(bins, bins_of(below));
    for (int j = 0; j < 16; ++j) sums[static_cast<int>(bins[j])] += fixed_point(weights[j]);
  });
}

std::int64_t take_bin(std::int32_t* out, const float* x, float max_value, int bin,
                      std::int64_t count) {
  const auto first = static_cast<float>(bin);
  const Vec begin = splat(first), end = splat(first + 1.0f), no = splat(-1.0f);
  std::int64_t taken = 0;
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto) {
    const Vec place = bins_of(sub(load_at(x + i, max_value), splat(max_value)));
    const Vec inside = select_less(place, begin, no, select_less(place, end, place, no));
    if (max_lanes(inside) < 0.0f) return;  // nearly always
    float lane[16];
    store(lane, inside);
    for (std::int64_t j = 0; j < 16 && i + j < count; ++j) {
      if (lane[j] >= 0.0f) out[taken++] = static_cast<std::int32_t>(i + j);
    }
  });
  return taken;
}

std::uint64_t exp_sum(const float* x, float max_value, std::int64_t count) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  std::uint64_t lanes[16] = {};
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto) {
    float lane[16];
    store(lane, exp_negative(sub(load_at(x + i, kLowest), splat(max_value))));
    for (int j = 0; j < 16; ++j) lanes[j] += fixed_point(lane[j]);
  });
  std::uint64_t total = 0;
  for (const std::uint64_t lane : lanes) total += lane;
  return total;
}

// log(1 + f) + e log(2) for f in [-0.293, 0.415]: Cephes' logf.
inline float log_pieces(float f, float e) {
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float y = (p * f) * z;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  float r = f + y;
  r = r + e * 0.693359375f;
  return r;
}

inline float log_positive(float x) {
  const std::uint32_t bits = float_bits(x);
  const float mantissa = bits_float((bits & 0x007fffffu) | 0x3f000000u);  // in [0.5, 1)
  const float exponent = static_cast<float>(static_cast<std::int32_t>(bits >> 23) - 126);
  const bool low = mantissa < 0.707106781186547524f;
  const float f = low ? (mantissa + mantissa) - 1.0f : mantissa - 1.0f;
  return log_pieces(f, low ? exponent - 1.0f : exponent);
}

float log_one(float x) { return log_positive(x); }

// A number of the standard exponential distribution from 32 random bits, with full relative
// precision at both ends: small results decide which token wins.
inline float exponential_variate(std::uint32_t x) {
  constexpr float kUnit = 2.3283064365386963e-10f;  // 2^-32
  const bool upper = x >= 0x80000000u;
  const std::uint32_t distance = upper ? 0xffffffffu - x : x;  // from the nearer end
  const float w = (static_cast<float>(distance) + 0.5f) * kUnit;
  const float near_one = -log_pieces(-w, 0.0f);
  const float v = upper ? 1.0f - w : w;
  const float elsewhere = -log_positive(v);
  return upper && w <= 0.2929f ? near_one : elsewhere;
}

// Philox4x32-10 (Salmon et al. 2011): four random words from a counter and a key.
struct RandomWords {
  std::uint32_t word[4];
};

inline RandomWords philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                          std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2;
    const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The random words of 64 tokens: of token 4 i + j word j of counter i, and here at [j][i], so that
// a compiler makes vectors of the counters.
constexpr std::int64_t kBatch = 64;
struct BatchWords {
  std::uint32_t word[4][kBatch / 4];
  std::uint32_t of(std::int64_t token) const { return word[token % 4][token / 4]; }
};

inline BatchWords batch_words(std::uint64_t seed, std::uint32_t sample_index,
                              std::uint32_t position, std::uint32_t first_counter) {
  constexpr int kCounters = kBatch / 4;
  auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  BatchWords c;
  for (int i = 0; i < kCounters; ++i) {
    c.word[0][i] = first_counter + static_cast<std::uint32_t>(i);
    c.word[1][i] = position;
    c.word[2][i] = sample_index;
    c.word[3][i] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c.word[0][i];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c.word[2][i];
      c.word[0][i] = static_cast<std::uint32_t>(p1 >> 32) ^ c.word[1][i] ^ k0;
      c.word[2][i] = static_cast<std::uint32_t>(p0 >> 32) ^ c.word[3][i] ^ k1;
      c.word[1][i] = static_cast<std::uint32_t>(p1);
      c.word[3][i] = static_cast<std::uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Gumbel noise of tokens first_token .. first_token + count - 1; first_token a multiple of 4.
void gumbel(float* out, std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position,
            std::int64_t first_token, std::int64_t count) {
  for (std::int64_t start = 0; start < count; start += kBatch) {
    const BatchWords words = batch_words(seed, sample_index, position,
                                         static_cast<std::uint32_t>((first_token + start) / 4));
    float noise[kBatch];
    for (std::int64_t i = 0; i < kBatch; ++i)
      noise[i] = -log_positive(exponential_variate(words.of(i)));
    const std::int64_t left = count - start < kBatch ? count - start : kBatch;
    for (std::int64_t i = 0; i < left; ++i) out[start + i] = noise[i];
  }
}

float max_value(const float* x, std::int64_t count) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Vec most = splat(kLowest);
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto) {
    most = max(load_at(x + i, kLowest), most);
  });
  return max_lanes(most);
}

// Words whose complement is this or more belong to noise of at most `most_noise`.
//
// Noise is -log(E), and E is at least w, the word's distance from its upper end in units of 2^-32,
// plus 1/2. Where w >= 2^-n >= e^-most_noise, noise is at most most_noise.
inline std::uint64_t words_up_to(float most_noise) {
  const float powers = most_noise * 1.44269504f;  // most_noise / ln 2
  if (!(powers >= 1.0f)) return std::uint64_t{1} << 32;
  return powers >= 33.0f ? 0 : (std::uint64_t{1} << 32) >> static_cast<int>(powers);
}

// The token whose score is largest once its noise is added, the first of equals; 0 if every score
// is -inf. The logarithms of a token's noise are computed only where its random word is large
// enough for it to win, which is a few dozen times a row: no other token could have.
std::int64_t noisy_best(const float* scores, std::uint64_t seed, std::uint32_t sample_index,
                        std::uint32_t position, std::int64_t count) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  float best = kLowest;
  std::int64_t token = 0;
  for (std::int64_t start = 0; start < count; start += kBatch) {
    const std::int64_t left = count - start < kBatch ? count - start : kBatch;
    const float most = max_value(scores + start, left);
    if (!(most > kLowest)) continue;
    // The slack is far more than the roundings of noise, of sums and of this difference.
    const float slack = 0.01f + (std::fabs(best) + std::fabs(most)) * 0x1p-20f;
    const std::uint64_t limit = best > kLowest ? words_up_to(best - most - slack) : 1ull << 32;
    if (limit == 0) continue;
    const BatchWords words =
        batch_words(seed, sample_index, position, static_cast<std::uint32_t>(start / 4));
    std::uint32_t largest = 0;
    for (const auto& row : words.word) {
      for (const std::uint32_t word : row) largest = word > largest ? word : largest;
    }
    if (~largest >= limit) continue;
    for (std::int64_t i = 0; i < left; ++i) {
      const std::uint32_t word = words.of(i);
      if (~word >= limit) continue;
      const float score = scores[start + i] - log_positive(exponential_variate(word));
      if (score > best) {
        best = score;
        token = start + i;
      }
    }
  }
  return token;
}

// The random bits by which XTC is on or off for a token: of a counter that no token's noise has.
std::uint32_t xtc_word(std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position) {
  return philox(0, position, sample_index, 1, static_cast<std::uint32_t>(seed),
                static_cast<std::uint32_t>(seed >> 32))
      .word[0];
}

bool all_finite(const float* x, std::int64_t count) {
  // x - x is 0 for a finite number and NaN for every other.
  Vec sum = zero();
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto) {
    const Vec value = load_at(x + i, 0.0f);
    sum = add(sum, sub(value, value));
  });
  return sum_lanes(sum) == 0.0f;
}

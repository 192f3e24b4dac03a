// Norms and activations: ops that read each number once or twice.

void add_to(float* residual, const float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) residual[i] = residual[i] + x[i];
}

void scale_numbers(float* x, float factor, float cap, std::int64_t count) {
  const bool is_capped = cap != 0.0f;
  const Vec by = splat(is_capped ? factor / cap : factor), to = splat(cap);
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto store_at) {
    const Vec y = mul(load_at(x + i, 0.0f), by);
    store_at(x + i, is_capped ? mul(hyperbolic_tangent(y), to) : y);
  });
}

void add_scaled_to(float* sum, const float* x, float factor, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] = sum[i] + factor * x[i];
}

// Sums run in 16 lanes, element i in lane i mod 16, then over the lanes.
void norm(float* out, const float* x, const float* weight, const float* bias, float eps,
          NormKind kind, std::int64_t count) {
  float mean = 0.0f;
  if (kind == NormKind::layer) {
    Vec sum = zero();
    for_each_vec(count,
                 [&](std::int64_t i, auto load_at, auto) { sum = add(sum, load_at(x + i, 0.0f)); });
    mean = sum_lanes(sum) / static_cast<float>(count);
  }
  const Vec center = splat(mean);
  Vec squares = zero();
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto) {
    const Vec d = sub(load_at(x + i, mean), center);
    squares = fma(d, d, squares);
  });
  const float variance = sum_lanes(squares) / static_cast<float>(count);
  const Vec scale = splat(1.0f / std::sqrt(variance + eps));
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto store_at) {
    Vec y = mul(sub(load_at(x + i, mean), center), scale);
    y = mul(y, load_at(weight + i, 0.0f));
    if (bias) y = add(y, load_at(bias + i, 0.0f));
    store_at(out + i, y);
  });
}

// x / (1 + e^-z), with exponents that are never positive, so that nothing overflows.
inline Vec times_sigmoid(Vec x, Vec z) {
  const Vec t = exp_negative(sub(zero(), max(z, sub(zero(), z))));  // e^-|z|
  const Vec numerator = select_less(z, zero(), mul(x, t), x);
  return div(numerator, add(splat(1.0f), t));
}

inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }

// x / 2 * (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): GPT-2's, Gemma's.
inline Vec gelu_tanh(Vec x) {
  const Vec cubic = mul(mul(x, x), splat(0.044715f));
  return times_sigmoid(x, mul(splat(1.5957691216057307f), fma(cubic, x, x)));
}

template <class F>
inline Vec each_number(Vec x, F&& f) {
  float lane[16];
  store(lane, x);
  for (float& value : lane) value = f(value);
  return load(lane);
}

inline Vec activated(Activation activation, Vec x) {
  switch (activation) {
    case Activation::silu:
      return times_sigmoid(x, x);
    case Activation::gelu:
      return each_number(x, gelu);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::relu:
      return select_less(zero(), x, x, zero());
  }
  return x;
}

void activate(float* out, const float* gate, const float* up, Activation activation,
              std::int64_t count) {
  for_each_vec(count, [&](std::int64_t i, auto load_at, auto store_at) {
    // A prompt's numbers lie beyond L2, in streams too short for the processor's own prefetching;
    // rows follow each other.
    constexpr std::int64_t kAhead = 512;
    if (gate) prefetch(gate + i + kAhead);
    prefetch(up + i + kAhead);
    const Vec y = activated(activation, load_at((gate ? gate : up) + i, 0.0f));
    store_at(out + i, gate ? mul(y, load_at(up + i, 0.0f)) : y);
  });
}

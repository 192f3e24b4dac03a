// Every op that touches matrices alone, against plain loops in double, at odd sizes.

#include "host.h"

namespace octavo::tests {

namespace {

constexpr double kTolerance = 2e-6;

void check_linear(Backend& backend, DType format, std::int64_t rows, std::int64_t inputs,
                  std::int64_t outputs, bool bias) {
  Numbers numbers(static_cast<std::uint64_t>(rows * 7919 + inputs * 31 + outputs));
  const std::vector<float> x = numbers.many(rows * inputs), w = numbers.many(outputs * inputs),
                           b = numbers.many(outputs);
  // Packed in three pieces at odd rows, as fused projections are.
  Linear linear = backend.make_linear(outputs, inputs, format, bias);
  const std::int64_t cuts[] = {0, outputs / 3, outputs / 2, outputs};
  for (int piece = 0; piece < 3; ++piece) {
    const std::int64_t first = cuts[piece], count = cuts[piece + 1] - first;
    if (count)
      backend.pack_rows(linear, first, {w.data() + first * inputs, DType::f32, count, inputs});
  }
  if (bias) backend.upload(linear.bias.data(), b.data(), b.size() * 4);
  Matrix in(rows, inputs, x, 3), out(rows, outputs, 5);
  backend.linear(out.view(), in.view(), linear);
  out.check_gaps();
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t o = 0; o < outputs; ++o) {
      double sum = bias ? b[static_cast<std::size_t>(o)] : 0.0, size = 0.0;
      for (std::int64_t i = 0; i < inputs; ++i) {
        const double product =
            static_cast<double>(as_stored(x[static_cast<std::size_t>(r * inputs + i)], format)) *
            as_stored(w[static_cast<std::size_t>(o * inputs + i)], format);
        sum += product;
        size += std::abs(product);
      }
      check_near("linear", out.at(r, o), sum, kTolerance * (1.0 + size));
    }
  }
}

void linear(Backend& backend) {
  for (const DType format : {DType::f32, DType::bf16}) {
    for (const std::int64_t rows : {1, 2, 5, 9, 97, 101}) {
      check_linear(backend, format, rows, 33, 17, true);
      check_linear(backend, format, rows, 64, 48, false);
    }
    for (const std::int64_t inputs : {1, 7, 31, 32, 100})
      for (const std::int64_t outputs : {1, 15, 16, 131})
        check_linear(backend, format, 3, inputs, outputs, outputs % 2 == 0);
    check_linear(backend, format, 300, 65, 37, true);
  }
}

// f16 and bf16 sources become exactly the numbers they hold.
void packing_of_halves(Backend& backend) {
  const std::vector<std::uint16_t> f16{0x3c00, 0xc000, 0x0001, 0x7bff};  // 1, -2, 2^-24, 65504
  const std::vector<std::uint16_t> bf16{0x3f80, 0xc000, 0x4049, 0x3a83};
  const double f16_values[] = {1.0, -2.0, std::ldexp(1.0, -24), 65504.0};
  for (std::int64_t i = 0; i < 4; ++i) {
    Linear from_f16 = backend.make_linear(1, 4, DType::f32, false);
    backend.pack_rows(from_f16, 0, {f16.data(), DType::f16, 1, 4});
    Linear from_bf16 = backend.make_linear(1, 4, DType::bf16, false);
    backend.pack_rows(from_bf16, 0, {bf16.data(), DType::bf16, 1, 4});
    Matrix unit(1, 4, {0, 0, 0, 0}), out(1, 1);
    unit.at(0, i) = 1.0f;
    backend.linear(out.view(), unit.view(), from_f16);
    CHECK(out.at(0, 0) == f16_values[i]);
    backend.linear(out.view(), unit.view(), from_bf16);
    CHECK(out.at(0, 0) == bf16_to_float(bf16[static_cast<std::size_t>(i)]));
  }
  check_throws<std::invalid_argument>("f16", [&] { backend.make_linear(1, 4, DType::f16, false); });
}

double normalized(const std::vector<float>& row, std::size_t i, NormKind kind, double eps) {
  double mean = 0.0, square = 0.0;
  for (const float value : row) mean += value;
  mean = kind == NormKind::layer ? mean / static_cast<double>(row.size()) : 0.0;
  for (const float value : row) square += (value - mean) * (value - mean);
  return (row[i] - mean) / std::sqrt(square / static_cast<double>(row.size()) + eps);
}

void norms(Backend& backend) {
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    for (const std::int64_t width : {1, 5, 16, 33, 576}) {
      Numbers numbers(static_cast<std::uint64_t>(width));
      const std::int64_t rows = 67;
      const std::vector<float> x = numbers.many(rows * width, 3.0f), y = numbers.many(rows * width);
      const std::vector<float> weight = numbers.many(width), bias = numbers.many(width);
      Norm norm;
      norm.spec = {kind, 1e-5f, width % 2 == 1};
      norm.weight = weight.data();
      norm.bias = norm.spec.bias ? bias.data() : nullptr;
      Matrix residual(rows, width, x, 2), in(rows, width, y), out(rows, width, 1);
      Matrix in_place(rows, width, x);
      backend.norm(in_place.view(), in_place.view(), norm);
      backend.add_norm(out.view(), residual.view(), in.view(), norm);
      out.check_gaps();
      residual.check_gaps();
      for (std::int64_t r = 0; r < rows; ++r) {
        const auto begin = static_cast<std::ptrdiff_t>(r * width);
        const std::vector<float> plain(x.begin() + begin, x.begin() + begin + width);
        std::vector<float> sum = plain;
        for (std::size_t i = 0; i < sum.size(); ++i)
          sum[i] += y[static_cast<std::size_t>(begin) + i];
        for (std::size_t i = 0; i < sum.size(); ++i) {
          const auto c = static_cast<std::int64_t>(i);
          const double shift = norm.bias ? bias[i] : 0.0;
          CHECK(residual.at(r, c) == sum[i]);
          check_near("norm", in_place.at(r, c),
                     normalized(plain, i, kind, 1e-5) * weight[i] + shift, 3e-6);
          check_near("add_norm", out.at(r, c), normalized(sum, i, kind, 1e-5) * weight[i] + shift,
                     3e-6);
        }
      }
    }
  }
}

void norms_of_heads(Backend& backend) {
  for (const std::int64_t width : {1, 5, 16, 33}) {
    const std::int64_t rows = 9, heads = 3;
    Numbers numbers(static_cast<std::uint64_t>(width));
    const std::vector<float> x = numbers.many(rows * heads * width, 3.0f);
    const std::vector<float> weight = numbers.many(width);
    Norm norm;
    norm.weight = weight.data();
    Matrix in_place(rows, heads * width, x, 2);
    backend.norm_heads(in_place.view(), norm, width);
    in_place.check_gaps();
    for (std::int64_t i = 0; i < rows * heads; ++i) {
      const auto begin = x.begin() + static_cast<std::ptrdiff_t>(i * width);
      const std::vector<float> head(begin, begin + static_cast<std::ptrdiff_t>(width));
      for (std::int64_t c = 0; c < width; ++c) {
        const auto index = static_cast<std::size_t>(c);
        check_near("norm_heads", in_place.at(i / heads, i % heads * width + c),
                   normalized(head, index, NormKind::rms, norm.spec.eps) * weight[index], 3e-6);
      }
    }
  }
}

void scales(Backend& backend) {
  for (const std::int64_t width : {1, 17, 100}) {
    const std::vector<float> x = Numbers(7).many(5 * width, 40.0f);
    for (const float cap : {0.0f, 9.0f}) {
      Matrix in_place(5, width, x, 3);
      backend.scale(in_place.view(), 0.7f, cap);
      in_place.check_gaps();
      for (std::int64_t i = 0; i < 5 * width; ++i) {
        const double y = 0.7 * static_cast<double>(x[static_cast<std::size_t>(i)]);
        check_near("scale", in_place.at(i / width, i % width),
                   cap == 0.0f ? y : cap * std::tanh(y / cap), 2e-5);
      }
    }
  }
}

double activated(double x, Activation activation) {
  constexpr double kRootTwoOverPi = 0.79788456080286535588;
  switch (activation) {
    case Activation::silu:
      return x / (1.0 + std::exp(-x));
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return 0.5 * x * (1.0 + std::tanh(kRootTwoOverPi * (x + 0.044715 * x * x * x)));
    case Activation::relu:
      return x > 0.0 ? x : 0.0;
  }
  return 0.0;
}

void activations(Backend& backend) {
  for (const Activation activation :
       {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu}) {
    for (const std::int64_t width : {1, 17, 48, 1537}) {
      Numbers numbers(static_cast<std::uint64_t>(width) + 99);
      const std::int64_t rows = 29;
      std::vector<float> x = numbers.many(rows * 2 * width, 8.0f);
      x[0] = -100.0f;  // far out, where an exponential overflows if one is careless
      x.back() = 100.0f;
      Matrix both(rows, 2 * width, x, 1), gated(rows, width, 2), plain(rows, 2 * width);
      backend.gated_activation(gated.view(), both.view(), activation, true);
      backend.gated_activation(plain.view(), both.view(), activation, false);
      gated.check_gaps();
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < 2 * width; ++c) {
          const double expected = activated(both.at(r, c), activation);
          check_near("activation", plain.at(r, c), expected, 4e-6);
          if (c >= width) continue;
          const double up = both.at(r, c + width);
          check_near("gated", gated.at(r, c), expected * up, 4e-6 * (1.0 + std::abs(up)));
        }
      }
    }
  }
}

// Random weights in any format.
Linear random_linear(Backend& backend, std::int64_t outputs, std::int64_t inputs,
                     const WeightFormat& format) {
  Numbers numbers(static_cast<std::uint64_t>(outputs * 31 + inputs));
  Linear linear = backend.make_linear(outputs, inputs, format, true);
  backend.upload(linear.bias.data(), numbers.many(outputs).data(),
                 static_cast<std::size_t>(outputs) * 4);
  if (!format.is_grouped()) {  // int8 rounds them as it packs them
    const std::vector<float> weights = numbers.many(outputs * inputs, 0.3f);
    backend.pack_rows(linear, 0, {weights.data(), DType::f32, outputs, inputs});
    return linear;
  }
  const std::int64_t bits = bits_of(format.dtype);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(outputs * inputs * bits / 8));
  for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(numbers.below(256));
  backend.pack_rows(linear, 0, {codes.data(), format.dtype, outputs, inputs});
  const std::vector<float> scales = numbers.many(outputs * format.groups(inputs), 0.05f);
  backend.pack_scales(linear, 0, outputs, scales.data());
  return linear;
}

std::vector<WeightFormat> all_formats() {
  std::vector<WeightFormat> formats(5);
  formats[0].dtype = DType::f32;
  formats[1].dtype = DType::bf16;
  formats[2].dtype = DType::int8;
  formats[3].dtype = DType::int4;
  formats[3].group_size = 32;
  formats[4].dtype = DType::int8;
  formats[4].group_size = 32;
  formats[4].scale_dtype = DType::f16;
  return formats;
}

void check_same(Matrix& got, Matrix& expected, std::int64_t rows, std::int64_t cols,
                const std::string& what) {
  got.check_gaps();
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < cols; ++c) {
      if (got.at(r, c) != expected.at(r, c))
        fail(what, ", ", rows, " rows: number ", c, " of row ", r, " is ", got.at(r, c),
             "; expected ", expected.at(r, c));
    }
  }
}

// A residual stream, what is added to it, and the norm: twice, for an op and for its parts.
struct NormedRows {
  std::vector<float> weight;
  Norm norm;
  Matrix stream, same_stream, added, normed;

  NormedRows(std::int64_t rows, std::int64_t hidden)
      : NormedRows(rows, hidden, Numbers(static_cast<std::uint64_t>(rows))) {}
  NormedRows(std::int64_t rows, std::int64_t hidden, Numbers numbers)
      : weight(numbers.many(hidden)),
        stream(rows, hidden, numbers.many(rows * hidden), 3),
        same_stream(stream),
        added(rows, hidden, numbers.many(rows * hidden), 2),
        normed(rows, hidden) {
    norm.weight = weight.data();
    norm.spec.eps = 1e-5f;
  }
  NormedInput input(bool adds) { return {stream.view(), adds ? added.view() : View{}, norm}; }
  // By the single ops.
  Matrix& by_parts(Backend& backend, bool adds) {
    if (adds)
      backend.add_norm(normed.view(), same_stream.view(), added.view(), norm);
    else
      backend.norm(normed.view(), same_stream.view(), norm);
    return normed;
  }
};

// A norm and a product as one op have the bits of the two, and so has the residual stream.
void normed_linear(Backend& backend) {
  const std::int64_t hidden = 70, outputs = 45;
  for (const WeightFormat& format : all_formats()) {
    const Linear weight = random_linear(backend, outputs, hidden, format);
    for (const std::int64_t rows : {1, 3, 17, 135}) {
      for (const bool adds : {false, true}) {
        NormedRows x(rows, hidden);
        Matrix out(rows, outputs, 5), expected(rows, outputs);
        CHECK(backend.normed_linear(out.view(), x.input(adds), weight));
        backend.linear(expected.view(), x.by_parts(backend, adds).view(), weight);
        const std::string what = text("norm and product of ", name(format.dtype));
        check_same(out, expected, rows, outputs, what);
        check_same(x.stream, x.same_stream, rows, hidden, what);
      }
    }
  }
}

// The MLP and its norm as one op have the bits of the ops one by one, and the residual stream too;
// or else it says that it was not done.
// Widths of an even number of panels that three threads share as odd ones (160), and one that is
// not taken.
void mlp(Backend& backend) {
  const std::int64_t hidden = 70;
  const std::vector<WeightFormat> formats = all_formats();
  for (const std::int64_t width : {32, 160, 24}) {
    for (const WeightFormat& up_format : formats) {
      for (const WeightFormat& down_format : formats) {
        std::vector<Linear> ups;
        ups.push_back(random_linear(backend, 2 * width, hidden, up_format));
        const Linear down = random_linear(backend, hidden, width, down_format);
        for (const std::int64_t rows : {1, 3, 5, 17, 135}) {
          NormedRows x(rows, hidden);
          Matrix out(rows, hidden, 5);
          const bool is_done =
              backend.normed_mlp(out.view(), x.input(true), ups, down, Activation::silu);
          CHECK(is_done == (width % 32 == 0));
          if (!is_done) continue;
          Matrix both(rows, 2 * width), act(rows, width), expected(rows, hidden);
          backend.linear(both.view(), x.by_parts(backend, true).view(), ups[0]);
          backend.gated_activation(act.view(), both.view(), Activation::silu, true);
          backend.linear(expected.view(), act.view(), down);
          const std::string what = text("mlp of ", name(up_format.dtype), " and ",
                                        name(down_format.dtype), ", width ", width);
          check_same(out, expected, rows, hidden, what);
          check_same(x.stream, x.same_stream, rows, hidden, what);
        }
      }
    }
  }
}

void embed(Backend& backend) {
  const std::int64_t vocab = 37, hidden = 21, places = 11;
  Numbers numbers(5);
  const std::vector<float> table = numbers.many(vocab * hidden),
                           where = numbers.many(places * hidden);
  const Ids ids{36, 0, -2, 17, -1}, positions{10, 0, 3, 3, 9};
  std::int32_t sampled[] = {8, 30};
  for (const DType format : {DType::f32, DType::bf16}) {
    Linear packed = backend.make_linear(vocab, hidden, format, false);
    backend.pack_rows(packed, 0, {table.data(), DType::f32, vocab, hidden});
    Linear packed_where = backend.make_linear(places, hidden, format, false);
    backend.pack_rows(packed_where, 0, {where.data(), DType::f32, places, hidden});
    Step step;
    step.num_tokens = 5;
    step.token_ids = ids.data();
    step.positions = positions.data();
    step.sampled = sampled;
    Matrix out(5, hidden, 4), placed(5, hidden);
    backend.embed(out.view(), packed, nullptr, step);
    backend.embed(placed.view(), packed, &packed_where, step);
    out.check_gaps();
    for (std::size_t t = 0; t < 5; ++t) {
      const std::int64_t id = ids[t] >= 0 ? ids[t] : sampled[-1 - ids[t]];
      for (std::int64_t c = 0; c < hidden; ++c) {
        const float value = as_stored(table[static_cast<std::size_t>(id * hidden + c)], format);
        const float place =
            as_stored(where[static_cast<std::size_t>(positions[t] * hidden + c)], format);
        CHECK(out.at(static_cast<std::int64_t>(t), c) == value);
        CHECK(placed.at(static_cast<std::int64_t>(t), c) == value + place);
      }
    }
  }
}

void take_rows(Backend& backend) {
  Numbers numbers(6);
  Matrix x(9, 13, numbers.many(9 * 13), 2), out(4, 13, 1);
  const Ids rows{8, 0, 3, 3};
  backend.take_rows(out.view(), x.view(), rows.data());
  out.check_gaps();
  for (std::int64_t r = 0; r < 4; ++r) {
    for (std::int64_t c = 0; c < 13; ++c)
      CHECK(out.at(r, c) == x.at(rows[static_cast<std::size_t>(r)], c));
  }
}

}  // namespace

std::vector<Test> op_tests() {
  return {on_each_variant("linear", linear),
          on_each_variant("packing of halves", packing_of_halves),
          on_each_variant("norm and add_norm", norms),
          on_each_variant("norm_heads", norms_of_heads),
          on_each_variant("scale", scales),
          on_each_variant("gated_activation", activations),
          on_each_variant("a norm and a product as one op", normed_linear),
          on_each_variant("an mlp and its norm as one op", mlp),
          on_each_variant("embed", embed),
          on_each_variant("take_rows", take_rows)};
}

}  // namespace octavo::tests

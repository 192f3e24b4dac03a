// Products with int8 and int4 weights: against plain loops in double, and bit for bit on every
// instruction set of the same definition (int4 has two).

#include <algorithm>

#include "host.h"

namespace octavo::tests {

namespace {

struct Case {
  std::string name;
  WeightFormat format;
  std::int64_t rows, inputs, outputs;
  bool bias;
};

// Errors that somebody might make, for the tests to notice.
enum class Planted {
  none,
  clipped_level,
  opposite_zero,
  no_zero,
  next_group,
  forgotten_input,
  next_code,
  not_rounded
};

// What a row of x becomes: whole numbers of 16 bits (or 8) with one scale, or numbers in bf16.
enum class Rounding { whole, bf16 };

// A product: numbers, codes and scales, none of them a constant.
struct Product {
  Case of;
  std::vector<float> x, scales, zeros, bias;
  std::vector<int> levels;           // (outputs, inputs), as codes stand for them
  std::vector<std::uint8_t> stored;  // as `pack_rows` takes them

  std::int64_t groups() const { return of.format.groups(of.inputs); }
  std::int64_t group_of(std::int64_t input) const {
    return of.format.is_grouped() ? input / of.format.group_size : 0;
  }
};

template <class T>
T& at(std::vector<T>& values, std::int64_t index) {
  return values[static_cast<std::size_t>(index)];
}
template <class T>
const T& at(const std::vector<T>& values, std::int64_t index) {
  return values[static_cast<std::size_t>(index)];
}

Product make_product(const Case& of) {
  Numbers numbers(static_cast<std::uint64_t>(of.rows * 7919 + of.inputs * 31 + of.outputs));
  Product product{of, numbers.many(of.rows * of.inputs), {}, {}, {}, {}, {}};
  for (std::int64_t i = 0; i < of.rows * of.inputs; i += 29) at(product.x, i) *= 40.0f;  // outliers
  const bool is_int4 = of.format.dtype == DType::int4;
  const std::int64_t row_bytes = is_int4 ? (of.inputs + 1) / 2 : of.inputs;
  product.stored.resize(static_cast<std::size_t>(of.outputs * row_bytes));
  for (std::int64_t o = 0; o < of.outputs; ++o) {
    for (std::int64_t i = 0; i < of.inputs; ++i) {
      if (is_int4) {
        const int code = numbers.below(16);
        at(product.stored, o * row_bytes + i / 2) |= static_cast<std::uint8_t>(code << i % 2 * 4);
        product.levels.push_back(of.format.levels[static_cast<std::size_t>(code)]);
      } else {
        const int code = (o + i) % 5 == 0 ? -128 : numbers.below(256) - 128;
        at(product.stored, o * row_bytes + i) = static_cast<std::uint8_t>(code);
        product.levels.push_back(code);
      }
    }
  }
  for (std::int64_t i = 0; i < of.outputs * product.groups(); ++i) {
    const float scale = 0.02f + 0.015f * numbers.next();
    const DType stored = of.format.is_grouped() ? of.format.scale_dtype : DType::f32;
    product.scales.push_back(as_stored(scale, stored));
    if (of.format.has_zeros)
      product.zeros.push_back(static_cast<float>(i % 11 == 3 ? -128 : numbers.below(17) - 8));
  }
  if (of.bias) product.bias = numbers.many(of.outputs);
  return product;
}

// out: (count, outputs), of rows first .. first + count - 1 of x.
std::vector<float> multiply(Backend& backend, const Product& product, std::int64_t first,
                            std::int64_t count) {
  const Case& of = product.of;
  Linear linear = backend.make_linear(of.outputs, of.inputs, of.format, of.bias);
  // In two pieces that meet within a panel, as fused projections are packed.
  const std::int64_t row_bytes = static_cast<std::int64_t>(product.stored.size()) / of.outputs;
  const std::int64_t cut = of.outputs / 2;
  for (const auto& [begin, end] : {std::pair{std::int64_t{0}, cut}, std::pair{cut, of.outputs}}) {
    if (begin == end) continue;
    const auto* codes = product.stored.data() + begin * row_bytes;
    backend.pack_rows(linear, begin, {codes, of.format.dtype, end - begin, of.inputs});
    const std::int64_t groups = product.groups();
    backend.pack_scales(linear, begin, end - begin, product.scales.data() + begin * groups);
    if (of.format.has_zeros)
      backend.pack_zeros(linear, begin, end - begin, product.zeros.data() + begin * groups);
  }
  if (of.bias) backend.upload(linear.bias.data(), product.bias.data(), product.bias.size() * 4);
  const auto begin = product.x.begin() + first * of.inputs;
  Matrix in(count, of.inputs, std::vector<float>(begin, begin + count * of.inputs), 3);
  Matrix out(count, of.outputs, 5);
  backend.linear(out.view(), in.view(), linear);
  out.check_gaps();
  std::vector<float> values;
  for (std::int64_t r = 0; r < count; ++r)
    values.insert(values.end(), &out.at(r, 0), &out.at(r, 0) + of.outputs);
  return values;
}

std::vector<float> multiply(Backend& backend, const Product& product) {
  return multiply(backend, product, 0, product.of.rows);
}

Rounding rounding_of(const std::string& isa, const WeightFormat& format) {
  return format.is_grouped() && groups_take_bf16(isa) ? Rounding::bf16 : Rounding::whole;
}

// One output in double, from the numbers that a row of x becomes, and how far float32 may be from
// it.
struct Expected {
  double value, bound;
};

Expected expected_at(const Product& product, std::int64_t row, std::int64_t output,
                     Rounding rounding, Planted error) {
  const Case& of = product.of;
  const std::int64_t groups = product.groups();
  const float* x = product.x.data() + row * of.inputs;
  float largest = 0.0f;
  for (std::int64_t i = 0; i < of.inputs; ++i) largest = std::max(largest, std::abs(x[i]));
  const float limit = of.format.activation_bits == 8 ? 127.0f : 32639.0f;
  const bool is_whole = rounding == Rounding::whole;
  const float step = is_whole ? largest / limit : 1.0f, steps = limit / largest;
  double sum = 0.0, size = 0.0;
  const std::int64_t inputs = of.inputs - (error == Planted::forgotten_input ? 1 : 0);
  for (std::int64_t i = 0; i < inputs; ++i) {
    std::int64_t group = product.group_of(i);
    if (error == Planted::next_group) group = (group + 1) % groups;
    double level = at(product.levels, output * of.inputs + i);
    if (error == Planted::clipped_level) level = std::max(level, -127.0);
    double zero = of.format.has_zeros ? at(product.zeros, output * groups + group) : 0.0;
    if (error == Planted::opposite_zero) zero = -zero;
    if (error == Planted::no_zero) zero = 0.0;
    const double scale = at(product.scales, output * groups + group);
    double code = as_stored(x[i], DType::bf16);
    if (is_whole) {
      code = std::min(limit, std::max(-limit, std::nearbyint(x[i] * steps)));
      CHECK(std::abs(code * step - x[i]) <= 0.51 * step);
    }
    if (error == Planted::next_code && i == 0) code += is_whole ? 1.0 : code * 0x1p-7;
    if (error == Planted::not_rounded) code = static_cast<double>(x[i]) / step;
    sum += code * (level - zero) * scale;
    size += std::abs(code) * (std::abs(level) + std::abs(zero)) * scale;
  }
  const double bias = of.bias ? at(product.bias, output) : 0.0;
  // Whole numbers: each block is rounded as it becomes a float, less its zero point, and added on;
  // then the sum is multiplied by one or two scales, and the bias added. bf16: a product goes
  // through 16 sums at most within its chain of 16 inputs, one with the other chain of these 32
  // inputs, and 16 at most with the others of its block.
  const double blocks = static_cast<double>(groups + of.inputs / 512 + 1);
  const double roundings = blocks + (is_whole ? 6.0 : 16.0 + 1.0 + 16.0 + 1.0);
  return {sum * step + bias, roundings * 0x1p-24 * (size * step + std::abs(bias))};
}

void check_product(const Product& product, const std::vector<float>& out, Rounding rounding,
                   Planted error = Planted::none) {
  for (std::int64_t r = 0; r < product.of.rows; ++r) {
    for (std::int64_t o = 0; o < product.of.outputs; ++o) {
      const Expected expected = expected_at(product, r, o, rounding, error);
      const double given = at(out, r * product.of.outputs + o);
      if (!(std::abs(given - expected.value) <= expected.bound))
        fail(product.of.name, ": output ", o, " of row ", r, " is ", given, "; expected ",
             expected.value, " within ", expected.bound);
    }
  }
}

WeightFormat int8_format(std::int64_t activation_bits) {
  WeightFormat format(DType::int8);
  format.activation_bits = activation_bits;
  return format;
}

WeightFormat int8_groups(std::int64_t group_size, DType scales) {
  WeightFormat format(DType::int8);
  format.group_size = group_size;
  format.scale_dtype = scales;
  return format;
}

WeightFormat int4_format(std::int64_t group_size, bool zeros, bool own_levels = false,
                         DType scales = DType::bf16) {
  WeightFormat format(DType::int4);
  format.group_size = group_size;
  format.has_zeros = zeros;
  format.scale_dtype = scales;
  if (own_levels)
    format.levels = {-127, -90, -66, -48, -35, -24, -15, -7, 0, 8, 17, 28, 40, 57, 81, 127};
  return format;
}

// Every format, and every shape that takes another way: one row to several pieces, depths that are
// no multiple of 32 or take more than one block of 512, groups that end early.
std::vector<Case> cases() {
  const std::vector<std::pair<std::string, WeightFormat>> formats{
      {"int8", int8_format(16)},
      {"w8a8", int8_format(8)},
      {"int4 in groups of 32", int4_format(32, false)},
      {"int4 in groups of 64, zeros", int4_format(64, true)},
      {"int4 in groups of 96, levels", int4_format(96, false, true)},
      {"int4 in groups of 128, zeros, f32", int4_format(128, true, false, DType::f32)},
      {"int4 in groups of 32, levels, zeros", int4_format(32, true, true)},
      {"int4 in groups of 1024, levels", int4_format(1024, false, true, DType::f32)},
      {"int8 in groups of 32, f16", int8_groups(32, DType::f16)},
      {"int8 in groups of 96", int8_groups(96, DType::bf16)},
      {"int8 in groups of 1024, f32", int8_groups(1024, DType::f32)}};
  struct Shape {
    std::int64_t rows, inputs, outputs;
  };
  std::vector<Case> all;
  for (const auto& [name, format] : formats) {
    for (const Shape& shape :
         {Shape{1, 31, 1}, Shape{1, 1100, 131}, Shape{2, 7, 17}, Shape{3, 513, 33},
          Shape{5, 129, 48}, Shape{7, 96, 16}, Shape{9, 200, 37}, Shape{70, 577, 35},
          Shape{33, 1056, 20}, Shape{101, 65, 130}}) {
      all.push_back({text(name, ", ", shape.rows, " x ", shape.inputs, " x ", shape.outputs),
                     format, shape.rows, shape.inputs, shape.outputs, shape.rows % 2 == 1});
    }
  }
  return all;
}

// Calls body(variant) on every variant and says which one failed.
template <class Body>
void on_all(const std::vector<Variant>& all, Body&& body) {
  for (const Variant& variant : all) {
    try {
      body(variant);
    } catch (const Failure& failure) {
      fail(variant.name, ": ", failure.what());
    }
  }
}

void products() {
  const std::vector<Variant> all = variants();
  for (const Case& of : cases()) {
    const Product product = make_product(of);
    struct First {
      std::vector<float> out;
      std::string name;
    } firsts[2];  // of each rounding
    on_all(all, [&](const Variant& variant) {
      const Rounding rounding = rounding_of(variant.isa, of.format);
      First& first = firsts[static_cast<int>(rounding)];
      std::vector<float> out = multiply(*variant.backend, product);
      if (first.out.empty()) {
        check_product(product, out, rounding);
        first = {std::move(out), variant.name};
      } else if (out != first.out) {
        fail(of.name, ": not the bits of ", first.name);
      }
    });
  }
}

void kernels_name_their_rounding() {
  for (const std::string& isa : cpu::available_isas()) {
    if (cpu::kernels_for(isa).groups_take_bf16 != groups_take_bf16(isa))
      fail(isa, " says that it ", groups_take_bf16(isa) ? "does not round" : "rounds",
           " what meets int4 to bf16");
  }
}

void row_alone_or_among_others() {
  const std::vector<Variant> all = variants();
  for (const Case& of : cases()) {
    if (of.rows > 40 || of.rows == 1) continue;
    const Product product = make_product(of);
    on_all(all, [&](const Variant& variant) {
      Backend& backend = *variant.backend;
      const std::vector<float> whole = multiply(backend, product);
      for (std::int64_t row = 0; row < of.rows; row += of.rows / 2) {
        const auto begin = whole.begin() + row * of.outputs;
        CHECK(multiply(backend, product, row, 1) == std::vector<float>(begin, begin + of.outputs));
      }
    });
  }
}

// The largest sums there can be: 512 codes of 32639 times -128, every one of them.
void largest_sums(Backend& backend) {
  for (const std::int64_t bits : {8, 16}) {
    Product product = make_product({"largest", int8_format(bits), 2, 1024, 17, false});
    std::fill(product.levels.begin(), product.levels.end(), -128);
    std::fill(product.stored.begin(), product.stored.end(), std::uint8_t{128});
    std::fill(product.x.begin(), product.x.begin() + 1024, 3.0f);
    std::fill(product.x.begin() + 1024, product.x.end(), -0.7f);
    check_product(product, multiply(backend, product), Rounding::whole);
  }
}

// Rows that have no scale, or too small a one, beside one that has.
void unusual_rows(const Variant& variant) {
  Backend& backend = *variant.backend;
  for (const WeightFormat& format : {int8_format(16), int8_format(8), int4_format(32, true)}) {
    const bool is_whole = rounding_of(variant.isa, format) == Rounding::whole;
    Product product = make_product({"unusual", format, 6, 70, 19, true});
    const std::vector<float> usual = multiply(backend, product, 2, 1);
    std::fill_n(product.x.begin(), 70, 0.0f);
    std::fill_n(product.x.begin() + 70, 70, 0x1p-101f);     // as good as zeros
    std::fill_n(product.x.begin() + 3 * 70, 70, 0x1p-99f);  // small, but numbers
    at(product.x, 4 * 70 + 69) = std::nanf("");
    at(product.x, 5 * 70 + 3) = -INFINITY;
    const std::vector<float> out = multiply(backend, product);
    for (std::int64_t o = 0; o < 19; ++o) {
      CHECK(at(out, o) == at(product.bias, o));
      CHECK(at(out, 19 + o) == at(product.bias, o));
      CHECK(at(out, 2 * 19 + o) == at(usual, o));
      CHECK(at(out, 3 * 19 + o) == at(product.bias, o));  // too little to change it
      CHECK(std::isnan(at(out, 4 * 19 + o)));
      // Without a scale for the row, infinity stays what it is until it meets a zero.
      CHECK(is_whole ? std::isnan(at(out, 5 * 19 + o)) : !std::isfinite(at(out, 5 * 19 + o)));
    }
  }
}

void errors_are_noticed() {
  const auto check_noticed = [](const Case& of, Planted error) {
    on_all(variants(), [&](const Variant& variant) {
      const Product product = make_product(of);
      const Rounding rounding = rounding_of(variant.isa, of.format);
      const std::vector<float> out = multiply(*variant.backend, product);
      check_product(product, out, rounding);
      check_throws<Failure>(of.name, [&] { check_product(product, out, rounding, error); });
    });
  };
  const Case int8{"int8", int8_format(16), 3, 100, 5, true};
  const Case int4{"int4", int4_format(64, true), 3, 200, 5, true};
  for (const Planted error : {Planted::clipped_level, Planted::forgotten_input, Planted::next_code})
    check_noticed(int8, error);
  for (const Planted error : {Planted::opposite_zero, Planted::no_zero, Planted::next_group,
                              Planted::next_code, Planted::not_rounded})
    check_noticed(int4, error);
  // The other rounding, both ways.
  on_all(variants(), [&](const Variant& variant) {
    const bool is_whole = rounding_of(variant.isa, int4.format) == Rounding::whole;
    const Product product = make_product(int4);
    const std::vector<float> out = multiply(*variant.backend, product);
    check_throws<Failure>(int4.name, [&] {
      check_product(product, out, is_whole ? Rounding::bf16 : Rounding::whole);
    });
  });
}

// Groups are whole blocks of 32 inputs.
void odd_groups() {
  for (const std::int64_t size : {16, 48, 0})
    check_throws<std::invalid_argument>("group_size is " + std::to_string(size), [&] {
      variants()[0].backend->make_linear(5, 192, int4_format(size, false), false);
    });
}

// What embeddings read back is what products multiply by.
void quantized_embeddings(Backend& backend) {
  for (const WeightFormat& format :
       {int8_format(16), int8_groups(32, DType::f16), int4_format(32, true, true)}) {
    const Product product = make_product({"embedding", format, 1, 75, 21, false});
    Linear table = backend.make_linear(21, 75, format, false);
    backend.pack_rows(table, 0, {product.stored.data(), format.dtype, 21, 75});
    backend.pack_scales(table, 0, 21, product.scales.data());
    if (format.has_zeros) backend.pack_zeros(table, 0, 21, product.zeros.data());
    const Ids ids{20, 0, 7};
    Step step;
    step.num_tokens = 3;
    step.token_ids = ids.data();
    Matrix out(3, 75, 2);
    backend.embed(out.view(), table, nullptr, step);
    out.check_gaps();
    for (std::int64_t t = 0; t < 3; ++t) {
      const std::int64_t id = at(ids, t);
      for (std::int64_t i = 0; i < 75; ++i) {
        const std::int64_t index = id * product.groups() + product.group_of(i);
        float value = static_cast<float>(at(product.levels, id * 75 + i));
        if (format.has_zeros) value -= at(product.zeros, index);
        CHECK(out.at(t, i) == value * at(product.scales, index));
      }
    }
  }
}

}  // namespace

std::vector<Test> quantized_tests() {
  return {{"quantized products, the same bits wherever they are rounded alike", products},
          {"how activations that meet groups are rounded", kernels_name_their_rounding},
          {"quantized products of a row alone or among others", row_alone_or_among_others},
          on_each_variant("the largest integer sums", largest_sums),
          {"rows of zeros, NaN and infinity", [] { on_all(variants(), unusual_rows); }},
          {"groups of other sizes are refused", odd_groups},
          {"planted errors in quantized products", errors_are_noticed},
          on_each_variant("quantized embeddings", quantized_embeddings)};
}

}  // namespace octavo::tests

// Tile registers: their emulation against plain loops, the processor's own against the emulation
// where there are any, and products on tiles against the plain ones, bit for bit (those of weights
// in groups, which are others there, against plain loops).

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "cpu/kernels/tile_config.h"
#include "host.h"

namespace octavo::tests {

namespace {

using cpu::kNumTiles;
using cpu::kTileBytes;
using cpu::kTileRowBytes;
using cpu::kTileRows;
using cpu::TileConfig;

namespace emulated {
#include "cpu/kernels/tile_emulated.h"
//
#include "tile_programs.h"
}  // namespace emulated

using emulated::Product;

// m rows, n outputs, k words (of two bf16 or four bytes) deep.
struct Shape {
  int m, n, k;
};
const Shape kShapes[] = {{16, 16, 16}, {1, 1, 1}, {3, 16, 16}, {16, 5, 8}, {7, 11, 13}, {2, 16, 1}};

TileConfig configure(const Shape& shape) {
  TileConfig config;
  config.set(0, shape.m, shape.n * 4);
  config.set(1, shape.m, shape.k * 4);
  config.set(2, shape.k, shape.n * 4);
  return config;
}

Product random_product(const Shape& shape, std::uint64_t seed, bool is_bf16) {
  Product product{};
  product.config = configure(shape);
  Numbers numbers(seed);
  for (unsigned char* bytes : {product.sums, product.x, product.w}) {
    for (int i = 0; i < kTileBytes; ++i) bytes[i] = static_cast<unsigned char>(numbers.below(256));
    if (!is_bf16) continue;
    // Normal numbers, 2^-12 to 2^12, that rounding matters for.
    for (int i = 0; i < kTileBytes / 4; ++i) {
      const float spread = std::ldexp(1.0f, numbers.below(24) - 12);
      const float value = numbers.next() * spread, other = numbers.next() * spread;
      const std::uint32_t bits =
          bytes == product.sums ? float_bits(value)
                                : float_to_bf16(value) | std::uint32_t{float_to_bf16(other)} << 16;
      std::memcpy(bytes + 4 * i, &bits, 4);
    }
  }
  return product;
}

std::uint32_t word(const unsigned char* tile, int row, int index) {
  std::uint32_t bits;
  std::memcpy(&bits, tile + row * kTileRowBytes + 4 * index, 4);
  return bits;
}

bool equal_sums(const Product& a, const Product& b) {
  return std::memcmp(a.sums, b.sums, sizeof a.sums) == 0;
}

// What a product of bf16 gives, by plain loops; `in_one_chain` is a wrong order, to be noticed.
Product expected_bf16(const Product& product, const Shape& shape, bool in_one_chain = false) {
  Product result = product;
  for (int m = 0; m < shape.m; ++m) {
    for (int n = 0; n < shape.n; ++n) {
      float part[2] = {0.0f, 0.0f};
      for (int k = 0; k < shape.k; ++k) {
        const std::uint32_t x = word(product.x, m, k), w = word(product.w, k, n);
        for (int j = 0; j < 2; ++j) {
          float& sum = part[in_one_chain ? 0 : j];
          sum = std::fma(bf16_to_float(static_cast<std::uint16_t>(x >> 16 * j)),
                         bf16_to_float(static_cast<std::uint16_t>(w >> 16 * j)), sum);
        }
      }
      const float sum = bits_float(word(product.sums, m, n)) + (part[0] + part[1]);
      std::memcpy(result.sums + m * kTileRowBytes + 4 * n, &sum, 4);
    }
  }
  return result;
}

void bf16_products() {
  bool is_chain_noticed = false;
  for (const Shape& shape : kShapes) {
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      Product product = random_product(shape, seed, true);
      const Product expected = expected_bf16(product, shape);
      const Product chain = expected_bf16(product, shape, true);
      emulated::multiply_bf16(product);
      CHECK(equal_sums(product, expected));  // also that nothing outside the shape was written
      is_chain_noticed = is_chain_noticed || !equal_sums(product, chain);
    }
  }
  CHECK(is_chain_noticed);
}

// A number below the least normal one counts as zero: as input, as a product, and as a sum.
void denormals() {
  const float least = std::numeric_limits<float>::min();
  const auto result = [](float x, float w, float sum) {
    Product product{};
    product.config = configure({1, 1, 1});
    const std::uint32_t x_bits = float_to_bf16(x), w_bits = float_to_bf16(w);
    std::memcpy(product.x, &x_bits, 4);
    std::memcpy(product.w, &w_bits, 4);
    std::memcpy(product.sums, &sum, 4);
    emulated::multiply_bf16(product);
    return bits_float(word(product.sums, 0, 0));
  };
  CHECK(result(least, 1.0f, least) == 2.0f * least);
  CHECK(result(least / 2.0f, 1024.0f, least) == least);   // input
  CHECK(result(least, 0.5f, least) == least);             // product
  CHECK(result(least, 1.0f, least / 2.0f) == least);      // earlier sum
  CHECK(result(-1.5f * least, 1.0f, 2.0f * least) == 0);  // sum
  CHECK(std::isnan(result(std::numeric_limits<float>::infinity(), 0.0f, 1.0f)));
}

Product expected_bytes(const Product& product, const Shape& shape) {
  Product result = product;
  for (int m = 0; m < shape.m; ++m) {
    for (int n = 0; n < shape.n; ++n) {
      std::int64_t sum = word(product.sums, m, n);
      for (int k = 0; k < 4 * shape.k; ++k)
        sum += static_cast<std::int8_t>(product.x[m * kTileRowBytes + k]) *
               std::int64_t{product.w[k / 4 * kTileRowBytes + 4 * n + k % 4]};
      const auto bits = static_cast<std::uint32_t>(sum);
      std::memcpy(result.sums + m * kTileRowBytes + 4 * n, &bits, 4);
    }
  }
  return result;
}

void byte_products() {
  for (const Shape& shape : kShapes) {
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      Product product = random_product(shape, seed, false);
      if (seed == 0) {  // around the end of 32 bits, with the extremes of both kinds of byte
        std::memset(product.x, 0x80, sizeof product.x);
        std::memset(product.w, 0xff, sizeof product.w);
        std::memset(product.sums, 0x80, sizeof product.sums);
      }
      const Product expected = expected_bytes(product, shape);
      emulated::multiply_bytes(product);
      CHECK(equal_sums(product, expected));
    }
  }
}

void misuse() {
  using Error = std::logic_error;
  const auto refuses = [](const char* part, const TileConfig& config, auto&& body) {
    check_throws<Error>(part, [&] {
      emulated::tile_configure(config);
      body();
    });
    emulated::tile_release();
  };
  const auto nothing = [] {};
  const auto multiply = [] { emulated::tile_dot_bytes<0, 1, 2>(); };
  alignas(64) unsigned char memory[kTileBytes] = {};
  const auto load = [&] { emulated::tile_load<3>(memory, kTileRowBytes); };

  check_throws<Error>("before they are configured", multiply);
  check_throws<Error>("before they are configured", load);
  TileConfig config = configure({16, 16, 16});
  refuses("tile 3 has no rows", config, load);
  refuses("after their release", config, [&] {
    emulated::tile_release();
    multiply();
  });
  const auto changed = [&](int tile, int rows, int bytes) {
    TileConfig other = config;
    other.set(tile, rows, bytes);
    return other;
  };
  refuses("16 rows into 15", changed(0, 15, 64), multiply);
  refuses("64 bytes into rows of 60", changed(0, 16, 60), multiply);
  refuses("64 bytes with 8 rows", changed(2, 8, 64), multiply);
  refuses("32 bytes with 16 rows", changed(1, 16, 32), multiply);
  refuses("multiple of 4", changed(0, 16, 62), multiply);
  refuses("17 rows", changed(1, 17, 64), nothing);
  refuses("65 bytes", changed(1, 16, 65), nothing);
  refuses("0 bytes", changed(1, 16, 0), nothing);
  refuses("tile 9", changed(9, 1, 64), nothing);
  config.palette = 2;
  refuses("palette 2", config, nothing);
}

// ---- the processor's own ----

bool has_amx() {
  const std::vector<std::string> isas = cpu::available_isas();
  return std::find(isas.begin(), isas.end(), "amx") != isas.end();
}

#if defined(OCTAVO_HAVE_AMX)
namespace processor {
#include "cpu/kernels/tile_amx.h"
//
#include "tile_programs.h"
}  // namespace processor

void agree(void (*ours)(Product&), void (*theirs)(processor::Product&), bool is_bf16) {
  for (const Shape& shape : kShapes) {
    for (std::uint64_t seed = 0; seed < 50; ++seed) {
      Product product = random_product(shape, seed, is_bf16);
      processor::Product other;
      static_assert(sizeof other == sizeof product, "the same program, the same data");
      std::memcpy(static_cast<void*>(&other), &product, sizeof product);
      ours(product);
      theirs(other);
      CHECK(std::memcmp(product.sums, other.sums, sizeof other.sums) == 0);
      CHECK(std::memcmp(product.w, other.w, sizeof other.w) == 0);
    }
  }
}
#endif

void processors_tiles() {
  if (!has_amx()) {
    std::puts("        (no AMX here, or not compiled in: only its emulation is tested)");
    return;
  }
#if defined(OCTAVO_HAVE_AMX)
  agree(emulated::multiply_bf16, processor::multiply_bf16, true);
  agree(emulated::multiply_bytes, processor::multiply_bytes, false);
  agree(emulated::copy_tile, processor::copy_tile, false);
#endif
}

// ---- whole products ----

struct Case {
  std::int64_t rows, inputs, outputs;
};

// Numbers, or codes with scales and zero points, as a matrix of the format is packed from.
struct Weights {
  Case size;
  WeightFormat format;
  std::vector<float> bias, numbers, scales, zeros;
  std::vector<std::uint8_t> codes;  // bytes; int4: two a byte, the first in the low half

  std::int64_t groups() const { return format.groups(size.inputs); }
};

template <class T>
const T& at(const std::vector<T>& values, std::int64_t index) {
  return values[static_cast<std::size_t>(index)];
}

Weights random_weights(const Case& size, const WeightFormat& format) {
  Numbers numbers(static_cast<std::uint64_t>(size.inputs * 31 + size.outputs));
  Weights weights{size, format, numbers.many(size.outputs), {}, {}, {}, {}};
  if (!format.is_quantized()) {
    weights.numbers = numbers.many(size.outputs * size.inputs);
    return weights;
  }
  weights.codes.resize(static_cast<std::size_t>(size.outputs * size.inputs));
  for (std::uint8_t& code : weights.codes) code = static_cast<std::uint8_t>(numbers.below(256));
  const std::int64_t count = size.outputs * weights.groups();
  weights.scales = numbers.many(count, 0.1f);
  if (format.has_zeros) {
    for (std::int64_t i = 0; i < count; ++i)
      weights.zeros.push_back(static_cast<float>(numbers.below(16) - 8));
  }
  return weights;
}

Linear pack(Backend& backend, const Weights& from) {
  const Case& size = from.size;
  Linear linear = backend.make_linear(size.outputs, size.inputs, from.format, true);
  backend.upload(linear.bias.data(), from.bias.data(), from.bias.size() * 4);
  if (!from.format.is_quantized()) {
    backend.pack_rows(linear, 0, {from.numbers.data(), DType::f32, size.outputs, size.inputs});
    return linear;
  }
  backend.pack_rows(linear, 0, {from.codes.data(), from.format.dtype, size.outputs, size.inputs});
  backend.pack_scales(linear, 0, size.outputs, from.scales.data());
  if (from.format.has_zeros) backend.pack_zeros(linear, 0, size.outputs, from.zeros.data());
  return linear;
}

std::vector<WeightFormat> formats() {
  std::vector<WeightFormat> all(9);
  all[0].dtype = DType::bf16;
  all[1].dtype = all[2].dtype = DType::int8;
  all[2].activation_bits = 8;
  const std::int64_t groups[] = {32, 64, 96, 1024};
  for (std::size_t i = 0; i < 4; ++i) {
    all[3 + i].dtype = DType::int4;
    all[3 + i].group_size = groups[i];
    all[3 + i].has_zeros = i % 2 == 0;
  }
  for (std::size_t i = 7; i < 9; ++i) {
    all[i].dtype = DType::int8;
    all[i].group_size = i == 7 ? 32 : 96;
    all[i].scale_dtype = i == 7 ? DType::f16 : DType::f32;
  }
  for (std::size_t i = 0; i < 16; ++i) all[4].levels[i] = static_cast<std::int8_t>(i * i - 120);
  return all;
}

// How the sums of groups go, and wrong ways, to be noticed: a group summed up however long it is,
// and the two chains of bf16 weights (even and odd inputs).
enum class Order { right, without_blocks, even_and_odd };

// One output of a format in groups on tiles, by plain loops. A block of up to 512 inputs of one
// group is summed up in float32, 32 inputs at a time: of each four the first two and the last two
// apart (codes become numbers two at a time, those of inputs 0 and 2), then both, then onto what
// was there. With the group's scale it is then added on.
float group_output(const Weights& weights, const float* x, std::int64_t output, Order order) {
  const std::int64_t inputs = weights.size.inputs, group_size = weights.format.group_size;
  const std::int64_t longest = order == Order::without_blocks ? group_size : cpu::kIntegerBlock;
  const std::int64_t pair = order == Order::even_and_odd ? 1 : 2;
  const bool is_int4 = weights.format.dtype == DType::int4;
  float out = 0.0f;
  for (std::int64_t begin = 0; begin < inputs;) {
    const std::int64_t group = begin / group_size;
    const std::int64_t end = std::min({inputs, (group + 1) * group_size, begin + longest});
    const std::int64_t index = output * weights.groups() + group;
    const float zero = weights.format.has_zeros ? at(weights.zeros, index) : 0.0f;
    float block = 0.0f;
    for (; begin < end;) {
      float part[2] = {0.0f, 0.0f};
      const std::int64_t stop = std::min(begin + cpu::kDepthBlock, end);
      for (; begin < stop; ++begin) {
        const std::int64_t index_of_code = output * inputs + begin;
        int stored = at(weights.codes, is_int4 ? index_of_code / 2 : index_of_code);
        if (is_int4)
          stored = weights.format.levels[static_cast<std::size_t>(stored >> begin % 2 * 4 & 15)];
        const float level = static_cast<float>(static_cast<std::int8_t>(stored)) - zero;
        float& sum = part[begin / pair % 2];
        sum = std::fma(as_stored(x[begin], DType::bf16), level, sum);
      }
      block += part[0] + part[1];
    }
    out = std::fma(block, as_stored(at(weights.scales, index), weights.format.scale_dtype), out);
  }
  return out + at(weights.bias, output);
}

void groups_by_plain_loops(const Weights& weights, Matrix& x, Matrix& out, Order order) {
  for (std::int64_t r = 0; r < weights.size.rows; ++r) {
    for (std::int64_t o = 0; o < weights.size.outputs; ++o)
      out.at(r, o) = group_output(weights, &x.at(r, 0), o, order);
  }
}

bool same_row(Matrix& a, Matrix& b, std::int64_t row, std::int64_t width) {
  return std::memcmp(&a.at(row, 0), &b.at(row, 0), static_cast<std::size_t>(width) * 4) == 0;
}

// The rows that tiles are not worth it for are among the cases: they have to give the same bits.
const Case kCases[] = {{5, 33, 17},    {16, 64, 32},   {17, 100, 48},  {33, 576, 50},
                       {31, 1056, 15}, {64, 1600, 33}, {257, 97, 290}, {270, 800, 20},
                       {1, 1056, 35},  {4, 1600, 20}};

void same_bits_as_plain_products() {
  const std::unique_ptr<Backend> scalar = make_backend("cpu", cpu_options(1, "scalar"));
  bool is_noticed[2] = {false, false}, has_tiles = false;  // of the wrong orders
  for (const std::string& isa : cpu::available_isas()) {
    if (isa.rfind("amx", 0) != 0) continue;
    has_tiles = true;
    const std::unique_ptr<Backend> backend = make_backend("cpu", cpu_options(1, isa));
    for (const WeightFormat& format : formats()) {
      for (const Case& size : kCases) {
        const std::int64_t inputs = size.inputs + size.inputs % 2;  // int4: whole bytes
        const Weights weights = random_weights({size.rows, inputs, size.outputs}, format);
        Numbers numbers(static_cast<std::uint64_t>(size.rows));
        Matrix x(size.rows, inputs, numbers.many(size.rows * inputs), 3);
        Matrix out(size.rows, size.outputs, 5), expected(size.rows, size.outputs, 5);
        backend->linear(out.view(), x.view(), pack(*backend, weights));
        out.check_gaps();
        const bool is_grouped = format.is_grouped();
        if (is_grouped)
          groups_by_plain_loops(weights, x, expected, Order::right);
        else
          scalar->linear(expected.view(), x.view(), pack(*scalar, weights));
        for (std::int64_t r = 0; r < size.rows; ++r) {
          if (!same_row(out, expected, r, size.outputs))
            fail(isa, ", ", name(format.dtype), ", groups of ", format.group_size, ", ", size.rows,
                 " x ", inputs, " x ", size.outputs, ": row ", r, " differs from ",
                 is_grouped ? "plain loops'" : "scalar's");
        }
        for (const Order order : {Order::without_blocks, Order::even_and_odd}) {
          bool& noticed = is_noticed[order == Order::even_and_odd];
          if (!is_grouped || noticed) continue;
          groups_by_plain_loops(weights, x, expected, order);
          for (std::int64_t r = 0; r < size.rows; ++r)
            noticed = noticed || !same_row(out, expected, r, size.outputs);
        }
      }
    }
  }
  CHECK((is_noticed[0] && is_noticed[1]) || !has_tiles);
}

}  // namespace

std::vector<Test> tile_tests() {
  return {{"tiles: products of bf16", bf16_products},
          {"tiles: denormal numbers", denormals},
          {"tiles: products of bytes", byte_products},
          {"tiles: wrong use is caught", misuse},
          {"tiles: the processor's agree with the emulation", processors_tiles},
          {"tiles: products have the bits of plain ones", same_bits_as_plain_products}};
}

}  // namespace octavo::tests

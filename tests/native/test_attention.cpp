// Rotation, the paged cache and attention over ragged batches, against plain loops in double.

#include <algorithm>
#include <map>
#include <numeric>

#include "host.h"

namespace octavo::tests {

namespace {

// Sequences in a paged cache whose blocks lie in no order, with some blocks of nobody between.
struct Paged {
  Ids row_starts{0}, context_lens, block_tables, positions, slots;
  std::int64_t block_size = 16, max_blocks = 0, num_blocks = 0;

  // new_tokens, context: of each sequence.
  Paged(const std::vector<std::pair<std::int32_t, std::int32_t>>& sequences, std::int64_t size)
      : block_size(size) {
    for (const auto& [new_tokens, context] : sequences) {
      row_starts.push_back(row_starts.back() + new_tokens);
      context_lens.push_back(context);
      max_blocks = std::max(max_blocks, (context + block_size - 1) / block_size);
    }
    const auto num_seqs = static_cast<std::int64_t>(sequences.size());
    num_blocks = num_seqs * max_blocks + 3;
    for (std::int64_t s = 0; s < num_seqs; ++s) {
      const auto seq = static_cast<std::size_t>(s);
      const std::int64_t blocks = (context_lens[seq] + block_size - 1) / block_size;
      // Backwards, and the sequences interleaved.
      for (std::int64_t b = 0; b < max_blocks; ++b)
        block_tables.push_back(
            b < blocks ? static_cast<std::int32_t>(num_blocks - 2 - b * num_seqs - s) : -1);
      const std::int32_t length = row_starts[seq + 1] - row_starts[seq];
      for (std::int32_t t = context_lens[seq] - length; t < context_lens[seq]; ++t) {
        positions.push_back(t);
        slots.push_back(slot(s, t));
      }
    }
  }

  std::int32_t slot(std::int64_t seq, std::int64_t token) const {
    const auto index = static_cast<std::size_t>(seq * max_blocks + token / block_size);
    return static_cast<std::int32_t>(block_tables[index] * block_size + token % block_size);
  }

  Step step() const {
    Step step;
    step.num_tokens = static_cast<std::int64_t>(positions.size());
    step.num_seqs = static_cast<std::int64_t>(context_lens.size());
    step.max_blocks = max_blocks;
    step.positions = positions.data();
    step.slots = slots.data();
    step.row_starts = row_starts.data();
    step.context_lens = context_lens.data();
    step.block_tables = block_tables.data();
    return step;
  }
};

// Keys and values of whole sequences, stored before the step through rope_and_store itself.
struct Stored {
  std::vector<std::vector<float>> keys, values;  // a sequence: (context, kv_size)
};

Stored fill(Backend& backend, KvLayer& kv, const LayerSpec& layer, const Paged& paged,
            Numbers& numbers) {
  Stored stored;
  for (std::size_t s = 0; s < paged.context_lens.size(); ++s) {
    const std::int64_t tokens = paged.context_lens[s];
    stored.keys.push_back(numbers.many(tokens * layer.kv_size(), 2.0f));
    stored.values.push_back(numbers.many(tokens * layer.kv_size()));
    Matrix qkv(tokens, layer.q_size() + 2 * layer.kv_size());
    Ids slots;
    for (std::int64_t t = 0; t < tokens; ++t) {
      slots.push_back(paged.slot(static_cast<std::int64_t>(s), t));
      for (std::int64_t i = 0; i < layer.kv_size(); ++i) {
        const auto index = static_cast<std::size_t>(t * layer.kv_size() + i);
        qkv.at(t, layer.q_size() + i) = stored.keys[s][index];
        qkv.at(t, layer.q_size() + layer.kv_size() + i) = stored.values[s][index];
      }
    }
    Step step;
    step.num_tokens = tokens;
    step.slots = slots.data();
    backend.rope_and_store(qkv.view(), nullptr, layer, kv, step);
  }
  return stored;
}

double rounded_to_bf16(double value) {
  return bf16_to_float(float_to_bf16(static_cast<float>(value)));
}

// One query head of one token: softmax(scale q.k) v over the keys that it may see. in_bf16: q is
// rounded, and so are the weights that meet values, as powers of two over a whole one.
std::vector<double> attend(const float* q, const std::vector<float>& keys,
                           const std::vector<float>& values, const LayerSpec& layer,
                           std::int64_t kv_head, std::int64_t position, double scale,
                           bool in_bf16) {
  const std::int64_t first =
      layer.window ? std::max<std::int64_t>(0, position - layer.window + 1) : 0;
  std::vector<double> scores;
  const auto item = [&](const std::vector<float>& all, std::int64_t token, std::int64_t d) {
    return static_cast<double>(
        all[static_cast<std::size_t>(token * layer.kv_size() + kv_head * layer.head_dim + d)]);
  };
  for (std::int64_t j = first; j <= position; ++j) {
    double score = 0.0;
    for (std::int64_t d = 0; d < layer.head_dim; ++d)
      score += (in_bf16 ? rounded_to_bf16(q[d]) : q[d]) * item(keys, j, d);
    scores.push_back(scale * score * (in_bf16 ? 1.44269504088896341 : 1.0));
  }
  double max = *std::max_element(scores.begin(), scores.end());
  if (in_bf16) max = std::ceil(max);
  double sum = 0.0;
  std::vector<double> out(static_cast<std::size_t>(layer.head_dim));
  for (std::size_t j = 0; j < scores.size(); ++j) {
    double weight = in_bf16 ? std::exp2(scores[j] - max) : std::exp(scores[j] - max);
    sum += weight;
    if (in_bf16) weight = rounded_to_bf16(weight);
    for (std::int64_t d = 0; d < layer.head_dim; ++d)
      out[static_cast<std::size_t>(d)] +=
          weight * item(values, first + static_cast<std::int64_t>(j), d);
  }
  for (double& value : out) value /= sum;
  return out;
}

struct Shape {
  std::int64_t num_heads, num_kv_heads, head_dim, window;
};

// Compares with attention over keys and values rounded as a cache of `rounded_as` keeps them, and
// returns the result.
std::vector<float> check_attention(Backend& backend, const Shape& shape, DType dtype,
                                   const Paged& paged, DType rounded_as) {
  LayerSpec layer;
  layer.num_heads = shape.num_heads;
  layer.num_kv_heads = shape.num_kv_heads;
  layer.head_dim = shape.head_dim;
  layer.window = shape.window;
  Buffer memory;
  KvLayer kv = make_kv(backend, memory, layer, dtype, paged.num_blocks, paged.block_size);
  Numbers numbers(static_cast<std::uint64_t>(shape.num_heads * 100 + shape.head_dim));
  const Stored stored = fill(backend, kv, layer, paged, numbers);
  const Step step = paged.step();
  Matrix q(step.num_tokens, layer.q_size(), numbers.many(step.num_tokens * layer.q_size()), 3);
  Matrix out(step.num_tokens, layer.q_size(), 2);
  const float scale = 0.37f;
  backend.attention(out.view(), q.view(), layer, scale, kv, step);
  out.check_gaps();
  std::vector<float> result;
  for (std::size_t s = 0; s < paged.context_lens.size(); ++s) {
    const std::vector<float> keys = as_cached(stored.keys[s], layer.head_dim, rounded_as);
    const std::vector<float> values = as_cached(stored.values[s], layer.head_dim, rounded_as);
    for (std::int64_t t = paged.row_starts[s]; t < paged.row_starts[s + 1]; ++t) {
      for (std::int64_t head = 0; head < layer.num_heads; ++head) {
        const std::vector<double> expected =
            attend(&q.at(t, head * layer.head_dim), keys, values, layer,
                   head / (layer.num_heads / layer.num_kv_heads),
                   paged.positions[static_cast<std::size_t>(t)], scale, rounded_as == DType::bf16);
        for (std::int64_t d = 0; d < layer.head_dim; ++d) {
          result.push_back(out.at(t, head * layer.head_dim + d));
          check_near("attention", result.back(), expected[static_cast<std::size_t>(d)], 1e-5);
        }
      }
    }
  }
  return result;
}

std::vector<float> check_attention(Backend& backend, const Shape& shape, DType dtype,
                                   const Paged& paged) {
  return check_attention(backend, shape, dtype, paged, dtype);
}

// On every variant, which all have to give the same bits.
void attention() {
  const std::vector<Variant> all = variants();
  const Paged ragged({{1, 1}, {5, 5}, {1, 16}, {17, 40}, {1, 33}, {2, 18}}, 16);
  const Paged wide_blocks({{3, 70}, {1, 49}}, 48);
  for (const DType dtype : {DType::f32, DType::bf16, DType::int8}) {
    for (const Shape& shape : {Shape{1, 1, 32, 0}, Shape{9, 3, 64, 0}, Shape{5, 1, 80, 0},
                               Shape{4, 4, 7, 5}, Shape{6, 2, 33, 20}, Shape{16, 2, 128, 0}}) {
      for (const Paged* paged : {&ragged, &wide_blocks}) {
        std::map<bool, std::vector<float>> firsts;  // of each order of sums
        for (const Variant& variant : all) {
          const std::vector<float> out = check_attention(*variant.backend, shape, dtype, *paged);
          std::vector<float>& first = firsts[dtype == DType::bf16 && variant.isa == "avx512_bf16"];
          if (first.empty()) first = out;
          if (out != first) fail(variant.name, ": not the bits of the others");
        }
      }
    }
  }
}

// What the cache rounds away shows.
void rounding_is_noticed(Backend& backend) {
  const Paged paged({{1, 1}, {5, 5}, {17, 40}}, 16);
  for (const DType dtype : {DType::bf16, DType::int8}) {
    check_throws<Failure>(
        "attention is", [&] { check_attention(backend, {6, 2, 32, 0}, dtype, paged, DType::f32); });
  }
}

// Contexts of several ranges that are summed apart, with windows that leave whole ranges out.
void long_attention(Backend& backend) {
  for (const std::int64_t window : {0, 1, 100, 256, 300}) {
    check_attention(backend, {3, 1, 16, window}, DType::f32, Paged({{1, 700}}, 16));
    check_attention(backend, {2, 2, 16, window}, DType::bf16, Paged({{40, 270}, {1, 513}}, 32));
    check_attention(backend, {2, 1, 24, window}, DType::int8, Paged({{3, 259}, {1, 540}}, 32));
  }
}

// The same bits for one row, whoever shares the batch and wherever the blocks lie.
void check_invariance(Backend& backend, DType dtype) {
  LayerSpec layer;
  layer.num_heads = 6;
  layer.num_kv_heads = 2;
  layer.head_dim = 40;
  const auto run = [&](const Paged& paged, std::int64_t token) {
    Buffer memory;
    KvLayer kv = make_kv(backend, memory, layer, dtype, paged.num_blocks, paged.block_size);
    Numbers numbers(77);  // the first sequence is the same in both
    fill(backend, kv, layer, paged, numbers);
    Numbers queries(78);
    const Step step = paged.step();
    std::vector<float> values = queries.many(step.num_tokens * layer.q_size());
    const std::vector<float> asked = Numbers(79).many(layer.q_size());
    std::copy(asked.begin(), asked.end(), values.begin() + token * layer.q_size());
    Matrix q(step.num_tokens, layer.q_size(), values), out(step.num_tokens, layer.q_size());
    backend.attention(out.view(), q.view(), layer, 0.2f, kv, step);
    std::vector<float> row(static_cast<std::size_t>(layer.q_size()));
    std::copy_n(&out.at(token, 0), layer.q_size(), row.begin());
    return row;
  };
  const std::vector<float> alone = run(Paged({{1, 600}}, 16), 0);
  CHECK(alone == run(Paged({{23, 600}}, 16), 22));
  CHECK(alone == run(Paged({{1, 600}, {1, 300}, {40, 40}, {3, 9}}, 16), 0));
  CHECK(alone == run(Paged({{1, 600}, {1, 1}}, 64), 0));
}

void attention_is_invariant(Backend& backend) {
  for (const DType dtype : {DType::bf16, DType::int8}) check_invariance(backend, dtype);
}

void rope_and_store(Backend& backend) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::int8}) {
    for (const std::int64_t head_dim : {2, 14, 64, 80}) {
      LayerSpec layer;
      layer.num_heads = 5;
      layer.num_kv_heads = 5;
      layer.head_dim = head_dim;
      const std::int64_t half = head_dim / 2, positions_known = 30, width = 15 * head_dim;
      Numbers numbers(static_cast<std::uint64_t>(head_dim));
      const std::vector<float> cosines = numbers.many(positions_known * half),
                               sines = numbers.many(positions_known * half);
      const Rope rope{cosines.data(), sines.data(), half};
      const Ids positions{29, 0, 7, 8}, slots{33, 2, -1, 16};
      const std::vector<float> given = numbers.many(4 * width);
      Matrix qkv(4, width, given, 1);
      Buffer memory;
      KvLayer kv = make_kv(backend, memory, layer, dtype, 3, 16);
      Step step;
      step.num_tokens = 4;
      step.rope_rows = positions.data();
      step.slots = slots.data();
      backend.rope_and_store(qkv.view(), &rope, layer, kv, step);
      qkv.check_gaps();
      std::vector<float> keys, values;
      backend.read_kv(kv, 48, keys, values);
      double stored_sum = 0.0, expected_sum = 0.0;
      for (std::int64_t t = 0; t < 4; ++t) {
        const auto row = static_cast<std::size_t>(t);
        const std::vector<float> rotated(&qkv.at(t, 0), &qkv.at(t, 0) + width);
        const std::vector<float> cached = as_cached(rotated, head_dim, dtype);
        for (std::int64_t c = 0; c < width; ++c) {
          const std::int64_t d = c % head_dim, begin = t * width + c - d;
          double expected = given[static_cast<std::size_t>(begin + d)];
          if (c < 10 * head_dim) {
            const auto angle = static_cast<std::size_t>(positions[row] * half + d % half);
            const double other = given[static_cast<std::size_t>(begin + (d + half) % head_dim)];
            expected = expected * cosines[angle] + (d < half ? -1.0 : 1.0) * other * sines[angle];
          }
          check_near("rotated", qkv.at(t, c), expected, 1e-6);
          if (slots[row] < 0 || c < 5 * head_dim) continue;
          const std::vector<float>& cache = c < 10 * head_dim ? keys : values;
          const float kept =
              cache[static_cast<std::size_t>(slots[row] * 5 * head_dim + c % (5 * head_dim))];
          CHECK(kept == cached[static_cast<std::size_t>(c)]);
          expected_sum += std::abs(kept);
        }
      }
      for (const std::vector<float>* cache : {&keys, &values})
        stored_sum +=
            std::accumulate(cache->begin(), cache->end(), 0.0,
                            [](double sum, float value) { return sum + std::abs(value); });
      check_near("all that is stored", stored_sum, expected_sum, 1e-9);  // and nothing elsewhere
    }
  }
}

void copy_blocks(Backend& backend) {
  LayerSpec layer;
  layer.num_heads = 2;
  layer.num_kv_heads = 2;
  layer.head_dim = 10;
  const Paged paged({{64, 64}}, 16);
  Buffer memory;
  KvLayer kv = make_kv(backend, memory, layer, DType::bf16, paged.num_blocks, 16);
  Numbers numbers(3);
  fill(backend, kv, layer, paged, numbers);
  std::vector<float> keys, values, keys_after, values_after;
  backend.read_kv(kv, 16 * paged.num_blocks, keys, values);
  const std::int32_t pairs[] = {4, 0, 2, 2, 3, 6};
  backend.copy_blocks(kv, pairs, 3);
  backend.read_kv(kv, 16 * paged.num_blocks, keys_after, values_after);
  const auto block = [](const std::vector<float>& all, std::int64_t index) {
    const auto begin = all.begin() + index * 16 * 20;
    return std::vector<float>(begin, begin + 16 * 20);
  };
  for (std::int64_t index = 0; index < paged.num_blocks; ++index) {
    const std::int64_t source = index == 0 ? 4 : index == 6 ? 3 : index;
    CHECK(block(keys_after, index) == block(keys, source));
    CHECK(block(values_after, index) == block(values, source));
  }
}

}  // namespace

std::vector<Test> attention_tests() {
  return {
      on_each_variant("rope_and_store", rope_and_store),
      {"attention over ragged batches, the same bits on every instruction set", attention},
      on_each_variant("rounding in the cache shows", rounding_is_noticed),
      on_each_variant("attention over long contexts", long_attention),
      on_each_variant("attention gives a row the same bits in any batch", attention_is_invariant),
      on_each_variant("copy_blocks", copy_blocks)};
}

}  // namespace octavo::tests

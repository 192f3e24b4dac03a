// Paged attention: rotating and storing, and dividing attention into pieces for the threads.

#include "cpu/backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace octavo::cpu {

namespace {

KvLayout make_layout(DType dtype, std::int64_t block_size, std::int64_t head_dim,
                     std::int64_t num_kv_heads) {
  KvLayout layout;
  layout.dtype = dtype;
  layout.block_size = block_size;
  layout.head_dim = head_dim;
  const auto round_up = [&](std::int64_t to) { return (head_dim + to - 1) / to * to; };
  layout.key_dim = layout.has_pairs() ? round_up(2) : head_dim;
  layout.padded_dim = round_up(kLanes);
  layout.num_kv_heads = num_kv_heads;
  return layout;
}

KvLayout layout_of(const KvLayer& kv) {
  return make_layout(kv.dtype, kv.block_size, kv.head_dim, kv.num_kv_heads);
}

// x[i], x[i + pairs] -> rotated by the angle whose cosine and sine are given.
void rotate(float* x, const float* cosines, const float* sines, std::int64_t pairs) {
  for (std::int64_t i = 0; i < pairs; ++i) {
    const float first = x[i], second = x[i + pairs];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + pairs] = second * cosines[i] + first * sines[i];
  }
}

// Puts one head's vector of a token into a block: item(d) is where element d goes. Returns the
// scale: 1 unless the items are int8, which are 127 steps of the vector's largest magnitude.
template <class Item, class Where>
float store_vector(Item* items, const float* values, std::int64_t head_dim, Where&& where) {
  float scale = 1.0f;
  if constexpr (sizeof(Item) == 1) {
    std::uint32_t most = 0;  // the largest of the numbers' bits without the sign, a NaN's above all
    for (std::int64_t d = 0; d < head_dim; ++d) most = std::max(most, float_bits(values[d]) << 1);
    if (most > 0) scale = bits_float(most >> 1) / 127.0f;
  }
  for (std::int64_t d = 0; d < head_dim; ++d) {
    if constexpr (sizeof(Item) == 1) {
      const float steps = std::nearbyint(values[d] / scale);  // ties to even
      items[where(d)] = static_cast<Item>(std::min(127.0f, std::max(-127.0f, steps)));
    } else {
      items[where(d)] = values[d];
    }
  }
  return scale;
}

template <class Item>
void store_token(unsigned char* block, const KvLayout& layout, std::int64_t within,
                 const float* keys, const float* values) {
  const std::int64_t dim = layout.head_dim;
  for (std::int64_t head = 0; head < layout.num_kv_heads; ++head) {
    unsigned char* bytes = block + head * layout.head_bytes();
    Item* items = reinterpret_cast<Item*>(bytes);
    const float key_scale = store_vector(
        items, keys + head * dim, dim, [&](std::int64_t d) { return layout.key_item(within, d); });
    const float value_scale = store_vector(items, values + head * dim, dim, [&](std::int64_t d) {
      return layout.value_item(within, d);
    });
    if (layout.dtype != DType::int8) continue;
    float* scales = reinterpret_cast<float*>(bytes + layout.scales_at());
    scales[within] = key_scale;
    scales[layout.block_size + within] = value_scale;
  }
}

// The same in bf16, by whole words where two dimensions of a key make one.
void store_token_pairs(unsigned char* block, const KvLayout& layout, std::int64_t within,
                       const float* keys, const float* values) {
  const std::int64_t dim = layout.head_dim;
  for (std::int64_t head = 0; head < layout.num_kv_heads; ++head, keys += dim, values += dim) {
    auto* items = reinterpret_cast<std::uint16_t*>(block + head * layout.head_bytes());
    auto* key_words = reinterpret_cast<std::uint32_t*>(items + layout.key_item(within, 0));
    for (std::int64_t d = 0; d < dim; d += 2, key_words += kLanes) {
      const std::uint32_t next = d + 1 < dim ? float_to_bf16(keys[d + 1]) : 0u;
      *key_words = float_to_bf16(keys[d]) | next << 16;
    }
    std::uint16_t* to = items + layout.value_item(within, 0);
    for (std::int64_t d = 0; d < dim; ++d) to[2 * d] = float_to_bf16(values[d]);
  }
}

// One piece of attention: some query rows of one sequence and KV head. A row is a new token and
// one of the group's query heads; rows are numbered token by token.
struct Piece {
  std::int64_t seq, head, first_row, rows;
  std::int64_t begin, end;  // tokens that any of its rows sees: begin .. end - 1

  std::int64_t first_split() const { return begin / kAttentionSplit; }
  std::int64_t splits() const { return (end - 1) / kAttentionSplit + 1 - first_split(); }
};

std::vector<Piece> cut_pieces(const LayerSpec& layer, const Step& step) {
  std::vector<Piece> pieces;
  const std::int64_t group = layer.num_heads / layer.num_kv_heads;
  for (std::int64_t seq = 0; seq < step.num_seqs; ++seq) {
    const std::int64_t first_token = step.row_starts[seq];
    const std::int64_t rows = (step.row_starts[seq + 1] - first_token) * group;
    for (std::int64_t head = 0; head < layer.num_kv_heads; ++head) {
      for (std::int64_t row = 0; row < rows; row += kMaxAttendRows) {
        const std::int64_t count = std::min<std::int64_t>(kMaxAttendRows, rows - row);
        const std::int64_t first = step.positions[first_token + row / group];
        const std::int64_t last = step.positions[first_token + (row + count - 1) / group];
        const std::int64_t hidden = layer.window > 0 ? first - layer.window + 1 : 0;
        pieces.push_back({seq, head, row, count, std::max<std::int64_t>(hidden, 0), last + 1});
      }
    }
  }
  return pieces;
}

AttendTask make_task(const Piece& piece, View q, const LayerSpec& layer, float scale,
                     const KvLayer& kv, const Step& step) {
  AttendTask task;
  task.layout = layout_of(kv);
  task.kv = static_cast<const unsigned char*>(kv.data) + piece.head * task.layout.head_bytes();
  task.block_table = step.block_table(layer.kv_group, piece.seq);
  task.window = layer.window;
  task.scale = scale;
  task.softcap = layer.attention_softcap;
  task.rows = static_cast<int>(piece.rows);
  const std::int64_t group = layer.num_heads / layer.num_kv_heads;
  for (int r = 0; r < task.rows; ++r) {
    const std::int64_t row = piece.first_row + r;
    const std::int64_t token = step.row_starts[piece.seq] + row / group;
    task.q[r] = q.row(token) + (piece.head * group + row % group) * layer.head_dim;
    task.position[r] = step.positions[token];
  }
  return task;
}

// Split `split` of the piece's, counted from 0. All splits begin at multiples of kAttentionSplit,
// so that a row's sums do not depend on where its piece begins.
void set_range(AttendTask& task, const Piece& piece, std::int64_t split) {
  task.begin = (piece.first_split() + split) * kAttentionSplit;
  task.end = std::min(task.begin + kAttentionSplit, piece.end);
}

// The place of the result of row r of a piece.
float* result_row(View out, const Piece& piece, const LayerSpec& layer, const Step& step,
                  std::int64_t r) {
  const std::int64_t group = layer.num_heads / layer.num_kv_heads;
  const std::int64_t row = piece.first_row + r;
  return out.row(step.row_starts[piece.seq] + row / group) +
         (piece.head * group + row % group) * layer.head_dim;
}

}  // namespace

std::int64_t CpuBackend::kv_block_bytes(const LayerSpec& layer, DType dtype,
                                        std::int64_t block_size) const {
  return make_layout(dtype, block_size, layer.head_dim, layer.num_kv_heads).block_bytes();
}

void CpuBackend::rope_and_store(View qkv, const Rope* rope, const LayerSpec& layer, KvLayer& kv,
                                const Step& step) {
  const KvLayout layout = layout_of(kv);
  const std::int32_t* slots = step.slots_of(layer.kv_group);
  each_row(qkv, [&](std::int64_t t) {
    float* row = qkv.row(t);
    if (rope) {
      const float* cosines = rope->cosines + step.rope_rows[t] * rope->pairs;
      const float* sines = rope->sines + step.rope_rows[t] * rope->pairs;
      for (std::int64_t head = 0; head < layer.num_heads + layer.num_kv_heads; ++head)
        rotate(row + head * layer.head_dim, cosines, sines, rope->pairs);
    }
    if (slots[t] < 0) return;
    const float* keys = row + layer.q_size();
    const float* values = keys + layer.kv_size();
    unsigned char* block =
        static_cast<unsigned char*>(kv.data) + slots[t] / kv.block_size * kv.block_bytes;
    const std::int64_t within = slots[t] % kv.block_size;
    switch (kv.dtype) {
      case DType::f32:
        return store_token<float>(block, layout, within, keys, values);
      case DType::bf16:
        return store_token_pairs(block, layout, within, keys, values);
      case DType::int8:
        return store_token<std::int8_t>(block, layout, within, keys, values);
      default:
        break;  // Runtime admits no other
    }
  });
}

void CpuBackend::attention(View out, View q, const LayerSpec& layer, float scale, const KvLayer& kv,
                           const Step& step) {
  const std::vector<Piece> pieces = cut_pieces(layer, step);
  const KvLayout layout = layout_of(kv);
  const std::int64_t padded = layout.padded_dim;
  std::int64_t most_splits = 1, total_splits = 0, most_rows = 0;
  for (const Piece& piece : pieces) {
    most_splits = std::max(most_splits, piece.splits());
    total_splits += piece.splits();
    most_rows = std::max(most_rows, piece.rows);
  }
  // The states of a piece, in whole tiles.
  const std::int64_t num_states = (most_rows + kLanes - 1) / kLanes * kLanes;
  const auto num_pieces = static_cast<std::int64_t>(pieces.size());
  const auto finish = [&](const Piece& piece, std::int64_t r, const AttendState& state) {
    float* result = result_row(out, piece, layer, step, r);
    const float sum = state.sum;  // so that the loop becomes vector instructions
    // + 0: -0 becomes 0, as it does where tokens that other rows see are added with weights of 0.
    for (std::int64_t d = 0; d < layer.head_dim; ++d) result[d] = state.out[d] / sum + 0.0f;
  };

  // Enough pieces for all threads: each thread goes through a piece's context alone, by ranges.
  const bool spread = pool_.size() > 1 && num_pieces < 4 * pool_.size() && most_splits > 1;
  const auto make_states = [&](std::int64_t pieces) {
    float* memory = scratch(attention_scratch_, pieces * num_states * padded);
    std::vector<AttendState> states(static_cast<std::size_t>(pieces * num_states));
    for (AttendState& state : states) {
      state.out = memory;
      memory += padded;
    }
    return states;
  };
  if (!spread) {
    std::vector<AttendState> states = make_states(2 * pool_.size());
    const auto attend_piece = [&](std::int64_t index, int thread) {
      const Piece& piece = pieces[static_cast<std::size_t>(index)];
      AttendTask task = make_task(piece, q, layer, scale, kv, step);
      AttendState* total = states.data() + 2 * num_states * thread;
      AttendState* part = total + num_states;
      for (std::int64_t split = 0; split < piece.splits(); ++split) {
        set_range(task, piece, split);
        task.goes_on = split > 0;
        kernels_.attend(task, split == 0 ? total : part);
        for (int r = 0; split > 0 && r < task.rows; ++r) kernels_.merge(layout, total[r], part[r]);
      }
      for (int r = 0; r < task.rows; ++r) finish(piece, r, total[r]);
    };
    constexpr std::int64_t kWorthThreads = 1 << 13;  // query rows x stored tokens
    std::int64_t work = 0;
    for (const Piece& piece : pieces) work += piece.rows * (piece.end - piece.begin);
    if (work < kWorthThreads) {
      for (std::int64_t index = 0; index < num_pieces; ++index) attend_piece(index, 0);
    } else {
      // The last pieces of a prompt see the most tokens: they come first.
      pool_.each(num_pieces, [&](std::int64_t index, int thread) {
        attend_piece(num_pieces - 1 - index, thread);
      });
    }
    return;
  }

  // Few pieces, long contexts: the ranges go to the threads, then the results are merged.
  std::vector<AttendState> states = make_states(total_splits);
  std::vector<std::pair<std::int64_t, std::int64_t>> jobs;  // piece, split
  for (std::int64_t index = 0; index < num_pieces; ++index) {
    for (std::int64_t split = 0; split < pieces[static_cast<std::size_t>(index)].splits(); ++split)
      jobs.emplace_back(index, split);
  }
  pool_.each(total_splits, [&](std::int64_t job, int) {
    const auto [index, split] = jobs[static_cast<std::size_t>(job)];
    const Piece& piece = pieces[static_cast<std::size_t>(index)];
    AttendTask task = make_task(piece, q, layer, scale, kv, step);
    set_range(task, piece, split);
    kernels_.attend(task, states.data() + job * num_states);
  });
  std::int64_t job = 0;
  for (const Piece& piece : pieces) {
    AttendState* total = states.data() + job * num_states;
    for (std::int64_t r = 0; r < piece.rows; ++r) {
      for (std::int64_t split = 1; split < piece.splits(); ++split)
        kernels_.merge(layout, total[r],
                       states[static_cast<std::size_t>((job + split) * num_states + r)]);
      finish(piece, r, total[r]);
    }
    job += piece.splits();
  }
}

void CpuBackend::read_kv(const KvLayer& kv, std::int64_t num_slots, std::vector<float>& keys,
                         std::vector<float>& values) {
  const KvLayout layout = layout_of(kv);
  keys.clear();
  values.clear();
  for (std::int64_t slot = 0; slot < num_slots; ++slot) {
    const auto* block =
        static_cast<const unsigned char*>(kv.data) + slot / kv.block_size * kv.block_bytes;
    const std::int64_t within = slot % kv.block_size;
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      const unsigned char* bytes = block + head * layout.head_bytes();
      float key_scale = 1.0f, value_scale = 1.0f;
      if (kv.dtype == DType::int8) {
        const float* scales = reinterpret_cast<const float*>(bytes + layout.scales_at());
        key_scale = scales[within];
        value_scale = scales[layout.block_size + within];
      }
      const auto item = [&](std::int64_t index) {
        return kv.dtype == DType::int8
                   ? static_cast<float>(reinterpret_cast<const std::int8_t*>(bytes)[index])
                   : load_float(bytes, kv.dtype, index);
      };
      for (std::int64_t d = 0; d < kv.head_dim; ++d) {
        keys.push_back(item(layout.key_item(within, d)) * key_scale);
        values.push_back(item(layout.value_item(within, d)) * value_scale);
      }
    }
  }
}

void CpuBackend::copy_blocks(KvLayer& kv, const std::int32_t* pairs, std::int64_t num_pairs) {
  auto* blocks = static_cast<unsigned char*>(kv.data);
  for (std::int64_t i = 0; i < num_pairs; ++i) {
    if (pairs[2 * i] == pairs[2 * i + 1]) continue;
    std::memcpy(blocks + pairs[2 * i + 1] * kv.block_bytes, blocks + pairs[2 * i] * kv.block_bytes,
                static_cast<std::size_t>(kv.block_bytes));
  }
}

}  // namespace octavo::cpu

// Paged attention: which kernel takes which step.

#include <algorithm>

#include "cuda/attention/attention_tile.cuh"

namespace octavo::cuda {

namespace {

AttentionArguments arguments_of(View out, View q, const LayerSpec& layer, float scale,
                                const KvLayer& kv, const Step& step) {
  AttentionArguments a{};
  a.out = out.data;
  a.q = q.data;
  a.out_stride = out.stride;
  a.q_stride = q.stride;
  a.row_starts = step.row_starts;
  a.context_lens = step.context_lens;
  a.block_tables = step.block_table(layer.kv_group, 0);
  a.num_tokens = static_cast<int>(step.num_tokens);
  a.num_seqs = static_cast<int>(step.num_seqs);
  a.max_blocks = static_cast<int>(step.max_blocks);
  a.num_heads = static_cast<int>(layer.num_heads);
  a.group = static_cast<int>(layer.num_heads / layer.num_kv_heads);
  a.head_dim = static_cast<int>(layer.head_dim);
  a.window = static_cast<int>(layer.window);
  const float softcap = layer.attention_softcap;
  a.scale = softcap == 0.0f ? scale * kLog2E : scale / softcap;
  a.cap = softcap * kLog2E;
  a.cache = layout_of(kv);
  return a;
}

// What the kernels with matrix products take; the simple one takes everything.
bool can_use_tensor_cores(View out, View q, const LayerSpec& layer, float scale,
                          const KvLayer& kv) {
  return bits_of(q.dtype) == 16 && (kv.dtype == q.dtype || kv.dtype == DType::int8) &&
         (layer.head_dim == 64 || layer.head_dim == 128) && scale > 0.0f &&
         layer.attention_softcap == 0.0f && is_aligned(q.data, 16) && q.stride % 8 == 0 &&
         is_aligned(out.data, 4) && out.stride % 2 == 0 && is_aligned(kv.data, 16);
}

constexpr std::int64_t kFewTokens = 8;          // of a sequence: the decode kernel's
constexpr std::int64_t kFewRows = 256;          // query rows of the only sequence: the same
constexpr std::int64_t kRowsOfSet = 16;         // query rows of a block there
constexpr std::int64_t kBlocksOfProcessor = 4;  // that share out the splits
constexpr std::size_t kMostPartialBytes = std::size_t{128} << 20;
constexpr std::size_t kCounterBytes = 64 << 10;

// Most splits that so many last tokens of a context see together.
std::int64_t splits_of(std::int64_t max_context, std::int64_t tokens, std::int64_t window) {
  const std::int64_t tiles = ceil_div(std::max<std::int64_t>(max_context, 1), kTileKeys);
  const std::int64_t splits = split_of_tile(static_cast<int>(tiles) - 1) + 1;
  if (window == 0) return splits;
  // n keys reach into one split more than n keys from a split's beginning do.
  return std::min(splits, (window + tokens - 3) / (kSplitTiles * kTileKeys) + 2);
}

struct DecodePlan {
  DecodeWork work{};
  std::size_t bytes = 0;  // of partial results, were there no limit to them
};

// Into how many blocks the work on sequences of so many tokens each is cut. Blocks of one set of
// rows share its splits until there are 4 blocks a processor; from then on memory is busy.
DecodePlan plan_decode(std::int64_t num_seqs, std::int64_t tokens, const LayerSpec& layer,
                       std::int64_t max_context, int num_processors) {
  DecodePlan plan;
  const std::int64_t num_kv_heads = layer.num_kv_heads, group = layer.num_heads / num_kv_heads;
  DecodeWork& work = plan.work;
  const std::int64_t sets = ceil_div(tokens * group, kRowsOfSet);
  const std::int64_t blocks = num_seqs * sets * num_kv_heads;
  const std::int64_t splits = splits_of(max_context, tokens, layer.window);
  plan.bytes = static_cast<std::size_t>(num_seqs * tokens * layer.num_heads * splits *
                                        (layer.head_dim + 4)) *
               sizeof(float);
  // A block loads its second split while it works on the first one: two each where blocks enough
  // are left for the processors.
  const bool are_many = 2 * blocks > num_processors && blocks * splits > 2 * num_processors;
  std::int64_t workers = std::min(ceil_div(kBlocksOfProcessor * num_processors, blocks),
                                  are_many ? ceil_div(splits, 2) : splits);
  if (static_cast<std::size_t>(blocks) * 4 > kCounterBytes) workers = 1;
  work.max_rows = static_cast<int>(tokens * group);
  work.sets = static_cast<int>(sets);
  work.workers = static_cast<int>(workers);
  work.max_splits = static_cast<int>(splits);
  if (workers == 1) plan.bytes = 0;
  return plan;
}

// Most tokens that each of so many sequences may bring where the decode kernel takes them all. A
// single sequence's further rows would leave most processors without work in the prefill kernel,
// which does not split contexts.
std::int64_t few_tokens(std::int64_t num_seqs, std::int64_t group) {
  return num_seqs == 1 ? std::max(kFewTokens, kFewRows / group) : kFewTokens;
}

}  // namespace

// Few sequences have many splits each, many sequences have few: the most bytes are somewhere
// between, so every number of sequences is tried.
std::size_t CudaBackend::attention_workspace_bytes(const ModelSpec& spec,
                                                   const StepLimits& limits) const {
  std::size_t most_bytes = 0;
  // A table may be padded to the next power of two of blocks.
  const std::int64_t max_context = 2 * limits.max_model_len + 4096;
  for (const LayerSpec& layer : spec.layers) {
    const std::int64_t group = layer.num_heads / layer.num_kv_heads;
    for (std::int64_t seqs = 1; seqs <= limits.max_num_seqs; ++seqs) {
      for (std::int64_t tokens = 1; tokens <= few_tokens(seqs, group); ++tokens) {
        const DecodePlan plan =
            plan_decode(seqs, tokens, layer, max_context, stream_.num_processors());
        most_bytes = std::max(most_bytes, std::min(plan.bytes, kMostPartialBytes));
      }
    }
  }
  return kCounterBytes + most_bytes;
}

void CudaBackend::attention(View out, View q, const LayerSpec& layer, float scale,
                            const KvLayer& kv, const Step& step) {
  require(q.cols == layer.q_size() && out.cols == layer.q_size(), "q has ", q.cols,
          " columns and out ", out.cols, "; expected ", layer.q_size());
  require(q.dtype == out.dtype && (q.dtype == DType::f32 || bits_of(q.dtype) == 16), "q is ",
          name(q.dtype), " and out ", name(out.dtype), "; expected one of f32, bf16 and f16");
  require(layer.num_kv_heads >= 1 && layer.num_heads % layer.num_kv_heads == 0, "there are ",
          layer.num_heads, " heads; expected a multiple of ", layer.num_kv_heads);
  if (step.num_tokens == 0) return;
  const AttentionArguments a = arguments_of(out, q, layer, scale, kv, step);
  if (!can_use_tensor_cores(out, q, layer, scale, kv)) return attend_simply(stream_, q.dtype, a);

  // How many tokens each sequence brings is known on the device alone. Where all may bring the same
  // few, the decode kernel takes them all; if they do not, it takes longer. Else each kernel takes
  // the sequences that are its own and leaves the others.
  const std::int64_t tokens = ceil_div(step.num_tokens, step.num_seqs);
  const bool all_few =
      tokens <= few_tokens(step.num_seqs, a.group) &&
      (step.num_tokens % step.num_seqs == 0 || step.num_tokens - step.num_seqs < kFewTokens);
  if (all_few || step.num_seqs > 1) {
    DecodePlan plan = plan_decode(step.num_seqs, all_few ? tokens : 1, layer,
                                  step.max_blocks * kv.block_size, stream_.num_processors());
    if (plan.bytes > kMostPartialBytes) {
      plan.work.workers = 1;
      plan.bytes = 0;
    }
    plan.work.max_tokens = all_few ? 0 : static_cast<int>(kFewTokens);
    auto* memory =
        static_cast<unsigned char*>(attention_workspace_.get(kCounterBytes + plan.bytes));
    plan.work.counters = reinterpret_cast<std::int32_t*>(memory);
    plan.work.partials = reinterpret_cast<float*>(memory + kCounterBytes);
    attend_few(stream_, q.dtype, a, plan.work);
  }
  if (!all_few)
    attend_many(stream_, q.dtype, a, step.num_seqs > 1 ? static_cast<int>(kFewTokens) : 0);
}

}  // namespace octavo::cuda

// Paged attention: which kernel takes which step.

#include "cuda/attention.cuh"

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
  a.scale = scale * kLog2E;
  a.cache = layout_of(kv);
  return a;
}

}  // namespace

std::size_t attention_workspace_bytes(const Stream&, const ModelSpec&, const StepLimits&) {
  return 0;
}

void attention(Stream& stream, View out, View q, const LayerSpec& layer, float scale,
               const KvLayer& kv, const Step& step, Workspace&) {
  require(q.cols == layer.q_size() && out.cols == layer.q_size(), "q has ", q.cols,
          " columns and out ", out.cols, "; expected ", layer.q_size());
  require(q.dtype == out.dtype && (q.dtype == DType::f32 || bits_of(q.dtype) == 16), "q is ",
          name(q.dtype), " and out ", name(out.dtype), "; expected one of f32, bf16 and f16");
  require(layer.num_kv_heads >= 1 && layer.num_heads % layer.num_kv_heads == 0, "there are ",
          layer.num_heads, " heads; expected a multiple of ", layer.num_kv_heads);
  if (step.num_tokens == 0) return;
  attend_simply(stream, q.dtype, arguments_of(out, q, layer, scale, kv, step));
}

}  // namespace octavo::cuda

// A layer for 1 to 8 rows in five kernels: its four products do what the ops between them would
// (few_rows.cuh), with the ops' bits.
//
//   qkv       norm in front; rotates q and k, stores k and v
//   attention
//   o         adds to the residual stream
//   gate, up  norm in front; activates
//   down      adds to the residual stream
//
// Each kernel that goes saves the two microseconds or so between the last block of a kernel and the
// first numbers of the next one. A sixth is needed where 8 pairs in a row of a head's halves are
// not one head's, and where the cache is int8, whose scale is of a whole head. A norm may remain a
// kernel of its own: see should_norm.

#include <cmath>

#include "core/weights.h"
#include "cuda/backend.h"
#include "cuda/device/launch.cuh"
#include "cuda/elementwise/norm.cuh"
#include "cuda/elementwise/rope.cuh"
#include "cuda/products/multiply.h"

namespace octavo::cuda {

namespace {

// Whether a product of so many rows should normalize them. Every block does so anew: it reads 4
// bytes of a row and of the norm's weights for each input, for the most part from the first-level
// cache, and takes ten instructions or so; its own part of the matrix is 2 bytes an input for each
// bit of a weight. At the 21 bytes and 128 instructions that a processor of an H200 reads and does
// in a cycle a row costs 0.08 cycles an input, the weights 0.1 a bit: a fifth of the kernel's time,
// in the shadow of its loads, with a row for every 4 bits. The first blocks, two or three a
// processor, have the rows from the second-level cache: 4 rows of 2048, and their weights, 264
// times are 10 MB, 2 microseconds at 5 TB/s, no more than a kernel takes to start.
bool should_norm(View residual, const Norm& norm, const Linear& weight) {
  constexpr int kBitsOfRow = 4;
  constexpr int kMostShared = 40 << 10;  // bytes: as many blocks a processor as without
  const RowsToNorm rows = rows_to_norm(residual, norm);
  return norm.spec.kind == NormKind::rms && !norm.bias && is_aligned(norm.weight, 16) &&
         is_aligned(residual.data, 16) && norm_shape(rows.width).groups == 1 &&
         residual.stride % 4 == 0 && residual.rows * kBitsOfRow <= bits_of(weight.format.dtype) &&
         rows.shared_bytes() <= kMostShared;
}

bool can_rotate(const LayerSpec& layer, const Rope* rope, const KvLayer& kv) {
  return layer.head_dim % 16 == 0 && kv.dtype != DType::int8 &&
         (!rope || 2 * rope->pairs == layer.head_dim);
}

// Whether there is nothing between the products that the five kernels do not compute.
bool is_plain(const LayerSpec& layer) {
  return layer.gated && !layer.moe && layer.qk_norm == QkNorm::none && !layer.output_norm &&
         layer.residual_multiplier == 1.0f && layer.norm.kind != NormKind::none;
}

}  // namespace

bool CudaBackend::normed_linear(View out, const NormedInput& x, const Linear& weight) {
  const DType dtype = options_.dtype;
  if (x.added.data || out.rows == 0 || out.rows > kFewRows || !is_fast(dtype, weight) ||
      !should_norm(x.residual, x.norm, weight))
    return false;
  multiply_few(stream_, out, {x.residual, &x.norm, dtype}, matrix_of(weight));
  return true;
}

bool CudaBackend::decode_layer(const LayerWork& work) {
  const LayerSpec& layer = work.layer;
  const LayerWeights& weights = work.weights;
  const View residual = work.residual;
  const DType dtype = work.hidden.dtype;
  const bool is_fused = !collectives_ && residual.rows >= 1 && residual.rows <= kFewRows &&
                        is_plain(layer) && weights.qkv.size() == 1 && weights.up.size() == 1 &&
                        is_fast(work.hidden, weights.qkv[0]) && is_fast(work.attn, weights.o) &&
                        is_fast(work.hidden, weights.up[0]) && is_fast(work.act, weights.down);
  if (!is_fused) return false;

  const auto normed = [&](const Norm& norm, const Linear& weight) -> FewInput {
    if (should_norm(residual, norm, weight)) return {residual, &norm, dtype};
    this->norm(work.hidden, residual, norm);
    return {work.hidden, nullptr, dtype};
  };
  const FewInput x = normed(weights.attn_norm, weights.qkv[0]);
  if (can_rotate(layer, weights.rope, work.kv)) {
    multiply_few_rotated(stream_, x, matrix_of(weights.qkv[0]),
                         rope_arguments(work.qkv, weights.rope, layer, work.kv, work.step));
  } else {
    multiply_few(stream_, work.qkv, x, matrix_of(weights.qkv[0]));
    rope_and_store(work.qkv, weights.rope, layer, work.kv, work.step);
  }
  attention(work.attn, work.qkv.columns(0, layer.q_size()), layer, layer.score_scale(), work.kv,
            work.step);
  multiply_few_added(stream_, residual, {work.attn, nullptr, dtype}, matrix_of(weights.o));
  multiply_few_gated(stream_, work.act, normed(weights.mlp_norm, weights.up[0]),
                     matrix_of(weights.up[0]), layer.activation);
  multiply_few_added(stream_, residual, {work.act, nullptr, dtype}, matrix_of(weights.down));
  return true;
}

}  // namespace octavo::cuda

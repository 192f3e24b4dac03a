// Rows of the embedding table, and of a table of positions: octavo.reference.ops.embed.
//
// A block a token, its threads along the row. Moves a row of the table and a float32 row.

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/weights.cuh"

namespace octavo::cuda {

namespace {

constexpr int kThreads = 128;

// ids: -1 - r stands for sampled[r]. positions null: no table of them.
__global__ void embed_rows(void* out, DType out_dtype, long long out_stride, Matrix table,
                           Matrix position_table, const std::int32_t* ids,
                           const std::int32_t* positions, const std::int32_t* sampled) {
  wait_for_previous_kernel();
  const long long token = blockIdx.x;
  int id = ids[token];
  if (id < 0) id = sampled[-1 - id];
  // A padded token's id may be anything.
  if (id < 0 || id >= table.outputs) id = 0;
  int position = positions ? positions[token] : 0;
  if (position < 0 || position >= position_table.outputs) position = 0;
  for (int i = static_cast<int>(threadIdx.x); i < table.inputs; i += kThreads) {
    float value = weight_at(table, id, i);
    if (positions) value = add_rn(value, weight_at(position_table, position, i));
    write_number(out, out_dtype, token * out_stride + i, value);
  }
}

}  // namespace

void embed(Stream& stream, View out, const Linear& table, const Linear* positions,
           const Step& step) {
  require(out.rows == step.num_tokens && out.cols == table.inputs, "embed writes ", out.rows, " x ",
          out.cols, "; expected ", step.num_tokens, " x ", table.inputs);
  require(!positions || positions->inputs == table.inputs, "the position table has ",
          positions ? positions->inputs : 0, " columns; expected ", table.inputs);
  if (out.rows == 0) return;
  LaunchShape shape{dim3(static_cast<unsigned>(out.rows)), dim3(kThreads)};
  shape.overlaps = true;
  launch(stream, "embed", shape, embed_rows, out.data, out.dtype, out.stride, matrix_of(table),
         positions ? matrix_of(*positions) : Matrix{}, step.token_ids,
         positions ? step.positions : nullptr, step.sampled);
}

}  // namespace octavo::cuda

// Rows of the embedding table, and of a table of positions: octavo.reference.ops.embed.
//
// A thread takes 8 numbers of a token's row: they lie side by side in every format, so that a load
// of 16 bytes (f32: two of them, int8: 8 bytes, int4: 4) brings them. A row of 2048 bf16 numbers is
// one load a thread. Moves a row of the table and a float32 row.

#include "cuda/backend.h"
#include "cuda/elementwise/elementwise.cuh"
#include "cuda/layout/weights.cuh"

namespace octavo::cuda {

namespace {

constexpr unsigned kThreads = 128;
constexpr int kEach = 8;  // numbers of a thread

// Weights `first` (a multiple of 8, within the row) and the seven behind it: the bits of
// weight_at. What lies behind the row's end is padding.
OCTAVO_DEVICE void weights_at(float (&out)[kEach], const Matrix& m, int output, int first) {
  const unsigned char* row = m.row(output);
  if (m.codes == Codes::f32) {
    load_eight(out, reinterpret_cast<const float*>(row) + first);
  } else if (m.codes == Codes::f16) {
    unpack_eight<F16>(out, load_16(row + 2 * first));
  } else if (m.codes == Codes::bf16) {
    unpack_eight<Bf16>(out, load_16(row + 2 * first));
  } else if (has_bytes(m.codes)) {
    const uint2 bytes = load_8(row + place_of(m.codes, first));
    const float scale =
        is_grouped(m.codes) ? block_scale_at(m, output, first).scale : m.output_scales[output];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const std::uint32_t byte = (j < 4 ? bytes.x : bytes.y) >> 8 * place_of(m.codes, j % 4);
      out[j] = static_cast<float>(static_cast<std::int8_t>(byte)) * scale;
    }
  } else {
    const std::uint32_t word =
        *reinterpret_cast<const std::uint32_t*>(row + place_of(m.codes, first) / 2);
    const BlockScale scale = block_scale_at(m, output, first);
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      out[j] = weight_of(m, scale, static_cast<int>(word >> 4 * place_of(m.codes, j) & 15));
  }
}

struct EmbedArguments {
  float* out;
  std::int64_t out_stride;
  bool out_aligned;
  Matrix table, position_table;
  const std::int32_t* ids;        // -1 - r stands for sampled[r]
  const std::int32_t* positions;  // null: no table of them
  const std::int32_t* sampled;
};

// blockIdx.x: token; blockIdx.y and threads: 8 columns each. Ids are sampled and uploaded by what
// runs before, so that all there is to do early is to let the next kernel start.
__global__ void __launch_bounds__(kThreads) embed_rows(EmbedArguments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int first = kEach * static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  if (first >= a.table.inputs) return;
  const long long token = blockIdx.x;
  // A padded token's id and position may be anything.
  const auto within = [](int index, int count) { return index < 0 || index >= count ? 0 : index; };
  int id = a.ids[token];
  if (id < 0) id = a.sampled[-1 - id];
  float value[kEach];
  weights_at(value, a.table, within(id, a.table.outputs), first);
  if (a.positions) {
    float more[kEach];
    weights_at(more, a.position_table, within(a.positions[token], a.position_table.outputs), first);
    for (int j = 0; j < kEach; ++j) value[j] = add_rn(value[j], more[j]);
  }
  float* out = a.out + token * a.out_stride + first;
  const int count = a.table.inputs - first;
  store_four(out, {value[0], value[1], value[2], value[3]}, count, a.out_aligned);
  store_four(out + 4, {value[4], value[5], value[6], value[7]}, count - 4, a.out_aligned);
}

}  // namespace

void CudaBackend::embed(View out, const Linear& table, const Linear* positions, const Step& step) {
  require_shape("embed", out, step.num_tokens, table.inputs);
  require_f32("embed", out);
  require(!positions || positions->inputs == table.inputs, "the position table has ",
          positions ? positions->inputs : 0, " columns; expected ", table.inputs);
  if (out.rows == 0 || out.cols == 0) return;
  EmbedArguments a{};
  a.out = static_cast<float*>(out.data);
  a.out_stride = out.stride;
  a.out_aligned = fours_aligned(out);
  a.table = matrix_of(table);
  if (positions) a.position_table = matrix_of(*positions);
  a.ids = step.token_ids;
  a.positions = positions ? step.positions : nullptr;
  a.sampled = step.sampled;
  const dim3 grid = dims(out.rows, ceil_div(out.cols, kEach * kThreads));
  launch(stream_, "embed_rows", {grid, kThreads, 0, true}, embed_rows, a);
}

}  // namespace octavo::cuda

// The kernels behind `linear`, each behind a function of the host. linear.cu chooses among them.
//
// All but multiply_any want x aligned (16 bytes a row) and of a 16-bit type T, the weights of T too
// or quantized, and the inputs a multiple of 8; out may be T or float32. A row comes out with the
// same bits from all of them (fragments.cuh), but for cuBLASLt's.
#pragma once

#include "core/view.h"
#include "cuda/device/stream.h"
#include "cuda/layout/weights.cuh"

namespace octavo::cuda {

struct RopeArguments;  // rope.cuh

// Whether the kernels for tensor cores take it with x of such numbers, and x as it lies.
// (linear.cu)
bool is_fast(DType x_dtype, const Linear& weight);
bool is_fast(View x, const Linear& weight);

// Any types, any widths, any strides; slow. (multiply_any.cu)
void multiply_any(Stream& stream, View out, View x, const Matrix& weight);

// ---- 1 to 8 rows: weights are streamed through registers (multiply_few.cuh) ----

constexpr int kFewRows = 8;

// x: rows as they are multiplied, of `dtype`; or, where there is a norm, of the residual stream,
// which every block normalizes and rounds to dtype for itself.
struct FewInput {
  View view;
  const Norm* norm = nullptr;
  DType dtype = DType::f32;
};
// Each with the bits of the ops that it stands for. out: dtype, or float32.
void multiply_few(Stream& stream, View out, const FewInput& x, const Matrix& weight);
// The same of 9 to 16 rows.
void multiply_few_twice(Stream& stream, View out, View x, const Matrix& weight);
// residual += the product, which is rounded to dtype first.
void multiply_few_added(Stream& stream, View residual, const FewInput& x, const Matrix& weight);
// out = activation(gate x) * (up x), gate above up in the matrix.
void multiply_few_gated(Stream& stream, View out, const FewInput& x, const Matrix& weight,
                        Activation activation);
// linear, then rope_and_store; k and v are not written to qkv. head_dim must be a multiple of 16,
// and the cache not int8.
void multiply_few_rotated(Stream& stream, const FewInput& x, const Matrix& weight,
                          const RopeArguments& rope);

// Where tiles that several blocks share leave their sums, and count who has been there.
struct Partials {
  float* sums = nullptr;
  std::int32_t* counters = nullptr;  // zero, and zero again afterwards
};
constexpr std::size_t kCounterBytes = 64 * sizeof(std::int32_t);  // a multiple of 256
// Bytes of sums for `rows` rows at most.
std::size_t partial_bytes(std::int64_t rows, std::int64_t outputs, std::int64_t inputs);

// Any number of rows, by tiles in shared memory. (multiply_tiles*)
void multiply_tiles(Stream& stream, View out, View x, const Matrix& weight,
                    const Partials& partials);

// ---- rows that are sorted by expert; weight: of all experts (experts.cuh) ----

struct ExpertTiles;

// Tiles of up to 8 rows.
void multiply_experts_few(Stream& stream, View out, View x, const Matrix& weight,
                          const ExpertTiles& tiles);
// The same, gated. rows_of: the rows of x of the sorted ones.
void multiply_experts_gated(Stream& stream, View out, View x, const std::int32_t* rows_of,
                            const Matrix& weight, Activation activation, const ExpertTiles& tiles);
// Tiles of expert_tile_rows(...) rows.
void multiply_experts_tiles(Stream& stream, View out, View x, const Matrix& weight,
                            const ExpertTiles& tiles, int tile_rows);
int expert_tile_rows(const Stream& stream, std::int64_t rows_of_expert);
// Tiles of 16 rows.
constexpr int kAnyRows = 16;
void multiply_experts_any(Stream& stream, View out, View x, const Matrix& weight,
                          const ExpertTiles& tiles);

// The matrix's numbers, scaled and rounded to T, written to `to`: outputs * ceil(inputs / 32) * 64
// bytes. (dequantize.cu)
Matrix dequantize(Stream& stream, void* to, DType dtype, const Matrix& weight);
// Outputs first .. first + count - 1 of a matrix with 16-bit scales.
Matrix outputs_of(const Matrix& weight, int first, int count);

}  // namespace octavo::cuda

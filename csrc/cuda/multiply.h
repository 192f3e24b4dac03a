// The kernels behind `linear`, each behind a function of the host. linear.cu chooses among them.
//
// All but multiply_any want x aligned (16 bytes a row) and of a 16-bit type T, the weights of T too
// or quantized, and the inputs a multiple of 8; out may be T or float32. A row comes out with the
// same bits from all of them (fragments.cuh), but for cuBLASLt's.
#pragma once

#include "core/view.h"
#include "cuda/stream.h"
#include "cuda/weights.cuh"

namespace octavo::cuda {

// Any types, any widths, any strides; slow. (multiply_any.cu)
void multiply_any(Stream& stream, View out, View x, const Matrix& weight);

// 1 to 8 rows: streams the weights through registers. (multiply_few.cu)
constexpr int kFewRows = 8;
void multiply_few(Stream& stream, View out, View x, const Matrix& weight);

// Where tiles that several blocks share leave their sums, and count who has been there.
struct Partials {
  float* sums = nullptr;
  std::int32_t* counters = nullptr;  // zero, and zero again afterwards
};
constexpr std::size_t kCounterBytes = 64 * sizeof(std::int32_t);  // a multiple of 256
// Bytes of sums for `rows` rows at most.
std::size_t partial_bytes(std::int64_t rows, std::int64_t outputs, std::int64_t inputs);

// Any number of rows, by tiles in shared memory, of quantized weights best up to 64 rows.
// (multiply_tiles*)
void multiply_tiles(Stream& stream, View out, View x, const Matrix& weight,
                    const Partials& partials);

// The matrix's numbers in T, written to `to`: outputs * ceil(inputs / 32) * 64 bytes. int8 ones as
// whole numbers whose sums are still to be scaled, unless `scaled`; those of int4 are scaled, and
// rounded, always. (dequantize.cu)
Matrix dequantize(Stream& stream, void* to, DType dtype, const Matrix& weight, bool scaled);
// Outputs first .. first + count - 1 of a matrix with 16-bit scales.
Matrix outputs_of(const Matrix& weight, int first, int count);

}  // namespace octavo::cuda

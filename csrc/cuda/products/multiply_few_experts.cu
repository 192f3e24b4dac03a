// The products of few rows of each expert that are written as they are.
#include "cuda/products/multiply_few_experts.cuh"

namespace octavo::cuda {

void multiply_experts_few(Stream& stream, View out, View x, const Matrix& weight,
                          const ExpertTiles& tiles) {
  run_experts(stream, WriteSums{{}, numbers_of(out), weight.outputs}, x, nullptr, weight, tiles);
}

}  // namespace octavo::cuda

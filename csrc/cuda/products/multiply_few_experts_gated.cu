// The products of few rows of each expert with gate and up, activated.
#include "cuda/products/multiply_few_experts.cuh"

namespace octavo::cuda {

void multiply_experts_gated(Stream& stream, View out, View x, const std::int32_t* rows_of,
                            const Matrix& weight, Activation activation, const ExpertTiles& tiles) {
  run_experts(stream, WriteGated{{}, out.data, out.stride, activation, weight.outputs / 2}, x,
              rows_of, weight, tiles);
}

}  // namespace octavo::cuda

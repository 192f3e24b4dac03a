// The ops by which the ranks of a model, a GPU each, put their results together.
#include "cuda/backend.h"
#include "cuda/device/collectives.h"
#include "cuda/elementwise/elementwise.cuh"

namespace octavo::cuda {

namespace {

// out[i] = the sum of parts[rank][i], in the order of the ranks, rounded once: parts (ranks,
// count). A thread has one number; reads ranks * count numbers, writes count.
constexpr unsigned kSumThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts(void* out, const void* parts, int ranks, int count) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int i = static_cast<int>(blockIdx.x * kSumThreads + threadIdx.x);
  if (i >= count) return;
  const T* part = static_cast<const T*>(parts) + i;
  float sum = to_float(*part);
  for (int rank = 1; rank < ranks; ++rank) sum = add_rn(sum, to_float(*(part += count)));
  static_cast<T*>(out)[i] = from_float<T>(sum);
}

}  // namespace

// The library may add in another order for another number of rows: with --deterministic the parts
// are gathered and added here.
void CudaBackend::all_reduce(View x) {
  if (!collectives_ || x.rows == 0) return;
  require(x.stride == x.cols, "all_reduce got rows ", x.stride, " numbers apart; expected ",
          x.cols);
  const std::int64_t count = x.rows * x.cols;
  if (!options_.deterministic) return collectives_->all_reduce(x.data, count, x.dtype);
  const std::int64_t ranks = options_.group->size();
  const std::size_t bytes = x.row_size() * static_cast<std::size_t>(x.rows);
  auto* parts =
      static_cast<unsigned char*>(ranks_workspace_.get(bytes * static_cast<std::size_t>(ranks)));
  check(cudaMemcpyAsync(parts + bytes * static_cast<std::size_t>(options_.group->rank()), x.data,
                        bytes, cudaMemcpyDeviceToDevice, stream_.handle()),
        "copying a rank's part");
  collectives_->all_gather(parts, 1, bytes, 0);
  for_type("all_reduce", x.dtype, [&](auto zero) {
    launch(stream_, "sum_parts", {dims(ceil_div(count, kSumThreads)), kSumThreads, 0, true},
           sum_parts<decltype(zero)>, x.data, static_cast<const void*>(parts),
           static_cast<int>(ranks), static_cast<int>(count));
  });
}

void CudaBackend::all_gather(View x) {
  if (!collectives_) return;
  const View part = x.columns(0, x.cols / options_.group->size());
  collectives_->all_gather(x.data, x.rows, part.row_size(),
                           static_cast<std::size_t>(x.stride * bits_of(x.dtype) / 8));
}

}  // namespace octavo::cuda

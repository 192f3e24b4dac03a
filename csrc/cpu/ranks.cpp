// What the ranks of a model exchange, by way of memory that they share.

#include "core/rank_group.h"
#include "cpu/backend.h"

namespace octavo::cpu {

void CpuBackend::all_reduce(View x) {
  if (!group_) return;
  require(x.stride == x.cols, "the rows that are summed are ", x.stride,
          " numbers apart; expected ", x.cols);
  group_->all_reduce(x.row(0), x.rows * x.cols);
}

void CpuBackend::all_gather(View x) {
  if (!group_) return;
  group_->all_gather(static_cast<unsigned char*>(x.data), x.rows, x.row_size(),
                     static_cast<std::size_t>(x.stride) * sizeof(float));
}

}  // namespace octavo::cpu

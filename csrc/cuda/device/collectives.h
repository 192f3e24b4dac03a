// What the ranks of a model, a GPU each, send each other in the middle of a step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/dtype.h"
#include "core/rank_group.h"
#include "cuda/device/stream.h"

namespace octavo::cuda {

// Queued in order with the kernels of the stream, and recorded with them.
class Collectives {
 public:
  virtual ~Collectives() = default;

  // Over NCCL, which is opened now; waits for the other ranks. Throws std::invalid_argument where
  // the library is not found.
  static std::unique_ptr<Collectives> open(Stream& stream, std::shared_ptr<RankGroup> group);
  // Of the library; "" where it is not found.
  static std::string version();

  // x = the sum over the ranks, of so many numbers in the given type; the order is the library's.
  virtual void all_reduce(void* x, std::int64_t count, DType dtype) = 0;
  // rows: so many, `stride` bytes apart; each is (ranks, bytes), of which a rank has its own part.
  // Afterwards every rank has all.
  virtual void all_gather(void* rows, std::int64_t num_rows, std::size_t bytes,
                          std::size_t stride) = 0;
  // After waiting: throws a std::runtime_error where a rank has failed, and results are none.
  virtual void check() = 0;
};

}  // namespace octavo::cuda

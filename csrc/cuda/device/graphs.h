// Recorded steps: CUDA graphs, one for each shape of step.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <map>

#include "core/backend.h"
#include "cuda/device/stream.h"

namespace octavo::cuda {

// A graph launches a step's hundreds of kernels at once, with a microsecond between them instead of
// several. It holds the arguments its kernels were recorded with; so whatever differs between two
// steps of one key lies in device memory whose address stays.
//
// A key's first step runs as it is, so that whatever grows has grown; the second is recorded; from
// then on it is replayed.
class Graphs {
 public:
  Graphs() = default;
  ~Graphs() { clear(); }
  Graphs(const Graphs&) = delete;
  Graphs& operator=(const Graphs&) = delete;

  // version: changes when an address has changed that graphs may hold.
  void run(Stream& stream, const StepKey& key, std::int64_t version,
           const std::function<void()>& record);
  void clear();

  // Of steps recorded, replayed and forgotten.
  const WorkCounts& counts() const { return counts_; }

 private:
  struct Entry {
    std::int64_t version = -1;
    cudaGraphExec_t graph = nullptr;
  };

  void drop(Entry& entry);

  std::map<StepKey, Entry> entries_;
  WorkCounts counts_;
};

}  // namespace octavo::cuda

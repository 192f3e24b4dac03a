#include "cuda/device/graphs.h"

namespace octavo::cuda {

void Graphs::run(Stream& stream, const StepKey& key, std::int64_t version,
                 const std::function<void()>& record) {
  Entry& entry = entries_[key];
  if (entry.version != version) {
    drop(entry);
    record();
    entry.version = version;
    return;
  }
  if (!entry.graph) {
    check(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeThreadLocal),
          "beginning to record a step");
    cudaGraph_t graph = nullptr;
    try {
      record();
      check(cudaStreamEndCapture(stream.handle(), &graph), "recording a step");
    } catch (...) {  // ends the recording, so that the stream works again
      cudaStreamEndCapture(stream.handle(), &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    const cudaError_t error = cudaGraphInstantiate(&entry.graph, graph, 0);
    cudaGraphDestroy(graph);
    check(error, "making a graph of a step");
    ++counts_.recorded;
  }
  check(cudaGraphLaunch(entry.graph, stream.handle()), "replaying a step");
  ++counts_.replayed;
}

void Graphs::clear() {
  for (auto& [key, entry] : entries_) drop(entry);
  entries_.clear();
}

void Graphs::drop(Entry& entry) {
  if (!entry.graph) return;
  cudaGraphExecDestroy(entry.graph);
  entry.graph = nullptr;
  ++counts_.forgotten;
}

}  // namespace octavo::cuda

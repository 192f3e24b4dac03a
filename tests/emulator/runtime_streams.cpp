// The CUDA runtime's functions, continued: streams, events and graphs.

#include <cuda_runtime.h>

#include <utility>

#include "device.h"

using cuda_emulator::device;
using cuda_emulator::guarded;
using cuda_emulator::Lock;
using cuda_emulator::note;
using cuda_emulator::Stream;
using cuda_emulator::stream_of;

// ---- streams and events ----

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Lock lock(device().mutex);
  *stream = new CUstream_st;
  device().streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(device().mutex);
  const cudaError_t error = guarded([&] { stream->run(); });
  device().streams.erase(stream);
  delete stream;
  return error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(device().mutex);
  if (stream_of(stream).is_capturing()) {
    stream_of(stream).spoil_capture();
    return note(cudaErrorStreamCaptureUnsupported);
  }
  return guarded([&] { stream_of(stream).run(); });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(device().mutex);
  Stream* const other = event->stream;
  const std::uint64_t position = event->position;
  stream_of(stream).push([=] {
    if (other) other->run_until(position);
  });
  return note(device().sticky);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Lock lock(device().mutex);
  Stream& given = stream_of(stream);
  given.push([event] { event->time = std::chrono::steady_clock::now(); });
  event->stream = &given;
  event->position = given.end();
  return note(device().sticky);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(device().mutex);
  return guarded([&] {
    if (event->stream) event->stream->run_until(event->position);
  });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Lock lock(device().mutex);
  if (!event->stream || event->stream->done() >= event->position) return note(device().sticky);
  const cudaError_t error =
      guarded([&] { event->stream->run_until(event->stream->done() + 1); });  // or it never ends
  return error == cudaSuccess ? cudaErrorNotReady : error;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const Lock lock(device().mutex);
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return note(device().sticky);
}

// ---- graphs ----

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock(device().mutex);
  if (stream_of(stream).is_capturing()) return note(cudaErrorIllegalState);
  stream_of(stream).begin_capture();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(device().mutex);
  if (!stream_of(stream).is_capturing()) return note(cudaErrorIllegalState);
  const bool valid = stream_of(stream).capture_is_valid();
  *graph = nullptr;
  cuda_emulator::Graph operations = stream_of(stream).end_capture();
  if (!valid) return note(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st{std::move(operations)};
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  *executable = new CUgraphExec_st{graph->operations};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const Lock lock(device().mutex);
  for (const auto& operation : executable->operations) stream_of(stream).push(operation);
  return note(device().sticky);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

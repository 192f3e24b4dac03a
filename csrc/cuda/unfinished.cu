// Placeholders while the kernels are being written; to be gone before this is called finished.
#include "cuda/cublas.h"
#include "cuda/kernels.h"

#define TODO __attribute__((weak))
namespace octavo::cuda {
[[noreturn]] static void todo(const char* what) {
  throw std::runtime_error(std::string(what) + " is not written yet");
}
TODO void embed(Stream&, View, const Linear&, const Linear*, const Step&) { todo("embed"); }
TODO void norm(Stream&, View, View, const Norm&) { todo("norm"); }
TODO void add_norm(Stream&, View, View, View, const Norm&) { todo("add_norm"); }
TODO void gated_activation(Stream&, View, View, Activation, bool) { todo("gated_activation"); }
TODO void take_rows(Stream&, View, View, const std::int32_t*) { todo("take_rows"); }
TODO void log_softmax(Stream&, View, View) { todo("log_softmax"); }
TODO std::int64_t kv_block_bytes(const LayerSpec&, DType, std::int64_t) { return 0; }
TODO void rope_and_store(Stream&, View, const Rope*, const LayerSpec&, const KvLayer&,
                         const Step&) {
  todo("rope_and_store");
}
TODO void read_kv(Stream&, const KvLayer&, std::int64_t, std::vector<float>&, std::vector<float>&) {
  todo("read_kv");
}
TODO void copy_blocks(Stream&, const KvLayer&, const std::int32_t*, std::int64_t, Workspace&) {
  todo("copy_blocks");
}
TODO std::size_t attention_workspace_bytes(const Stream&, const ModelSpec&, const StepLimits&) {
  return 0;
}
TODO void attention(Stream&, View, View, const LayerSpec&, float, const KvLayer&, const Step&,
                    Workspace&) {
  todo("attention");
}
TODO Linear make_linear(Backend&, std::int64_t, std::int64_t, const WeightFormat&, bool) {
  todo("make_linear");
}
TODO void pack_rows(Stream&, Linear&, std::int64_t, const HostMatrix&, Workspace&) {
  todo("pack_rows");
}
TODO void pack_scales(Stream&, Linear&, std::int64_t, std::int64_t, const float*) {
  todo("pack_scales");
}
TODO void pack_zeros(Stream&, Linear&, std::int64_t, std::int64_t, const float*) {
  todo("pack_zeros");
}
TODO std::size_t linear_workspace_bytes(const ModelSpec&, const StepLimits&) { return 0; }
TODO void linear(const LinearContext&, View, View, const Linear&) { todo("linear"); }
TODO std::size_t sampling_workspace_bytes(std::int64_t, std::int64_t) { return 0; }
TODO void sample(Stream&, const Samples&, View, const std::int32_t*, const Step&, Workspace&) {
  todo("sample");
}
TODO std::unique_ptr<CublasLt> CublasLt::open(Stream&) { return nullptr; }
}  // namespace octavo::cuda

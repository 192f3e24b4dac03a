// The device seam: what a device must do for decoder.cpp to run a model on it.
//
// Ops of LLM shape, not a tensor library. An op enqueues its work and may return before it is
// done; ops run in the order of the calls; `sync` waits for all of them. Activations are matrices
// (View) in the device's memory, the residual stream and logits always float32, the others of
// `activation_dtype`; weights and the KV cache are packed in the device's own layout.
// octavo.reference.ops defines every compute op under the same name.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/spec.h"
#include "core/step.h"
#include "core/view.h"

namespace octavo {

class Backend;
class RankGroup;      // core/rank_group.h
struct LayerWeights;  // core/weights.h

enum class MemoryKind : std::uint8_t { device, host };

// Memory with one owner.
template <MemoryKind kind>
class OwnedMemory {
 public:
  OwnedMemory() = default;
  OwnedMemory(Backend* backend, std::size_t bytes);
  OwnedMemory(OwnedMemory&& other) noexcept { swap(other); }
  OwnedMemory& operator=(OwnedMemory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~OwnedMemory();

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void swap(OwnedMemory& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Of the device: zero-filled when new, aligned to 64 bytes.
using Buffer = OwnedMemory<MemoryKind::device>;
// Host memory that the device can copy from and to without the host.
using HostBuffer = OwnedMemory<MemoryKind::host>;

// Rows of a weight as they lie in host memory: (rows, cols), contiguous.
struct HostMatrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
};

// A matrix (outputs, inputs) packed for the device, in the format of its products; or one such
// matrix for each expert, one after another.
struct Linear {
  std::int64_t outputs = 0;
  std::int64_t inputs = 0;
  std::int64_t count = 1;  // of matrices
  std::int64_t pitch = 0;  // rows from one of them to the next
  WeightFormat format;
  Buffer weight;         // in the backend's own layout, as the next two
  Buffer scales, zeros;  // of quantized formats
  Buffer bias;           // float32 [outputs], or empty
};

// Weights of a normalization: float32 [width] each; bias may be null. Kind none has no weight.
struct Norm {
  NormSpec spec;
  const float* weight = nullptr;
  const float* bias = nullptr;
};

// Cosines and sines of every position: float32 (max_model_len, pairs) each. Of a head, elements i
// and i + pairs are turned together, for i < pairs; the rest, if any, stays.
struct Rope {
  const float* cosines = nullptr;
  const float* sines = nullptr;
  std::int64_t pairs = 0;
};

// What a LoRA adapter adds to the products of a stack of matrices, which read the same x: of each
// part b (its numbers of a x), in the output's columns first ... All are plain numbers of the
// model's dtype.
struct LowRank {
  struct Part {
    std::int64_t first = 0;
    std::int64_t shrunk = 0;  // the first of its numbers of a x, b.inputs of them
    Linear b;
  };
  Linear a;  // the A of all parts, one after another; of the embedding (tokens, rank)
  std::vector<Part> parts;
};
// By the place of an adapter, what it adds to a stack; null: nothing.
using LowRankStack = std::vector<const LowRank*>;

// The paged keys and values of one layer. The layout within a block is the backend's own.
struct KvLayer {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t num_blocks = 0;
  std::int64_t block_size = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t block_bytes = 0;  // of one block, keys and values
};

// Where `sample` writes its results; device memory, one entry a logit row of the step.
struct Samples {
  std::int32_t* token_ids = nullptr;
  float* logprobs = nullptr;              // of the sampled token; NaN where not asked for
  std::uint8_t* finite = nullptr;         // 0 where the logits hold a NaN or an infinity
  std::int32_t* top_token_ids = nullptr;  // (num_rows, num_top)
  float* top_logprobs = nullptr;          // (num_rows, num_top)
  std::int64_t num_top = 0;
  // Of the sampled token among all, by logit, the lower id first of equals: 1 is the best. 0 where
  // no log-probability is asked for. Null: of no row.
  std::int32_t* ranks = nullptr;
};

// Changes to logits before a token is sampled: device memory. Row r has the entries
// row_starts[r] .. row_starts[r + 1] - 1, each token at most once.
struct LogitAdjustments {
  const std::int32_t* row_starts = nullptr;  // [num_rows + 1]
  const std::int32_t* token_ids = nullptr;
  const float* repetition = nullptr;  // divides a positive logit, multiplies any other; 1: nothing
  const float* bias = nullptr;        // added after that
};

// Names a shape of step, so that a device can record it once and replay it.
struct StepKey {
  std::int64_t num_seqs = 0;
  std::int64_t tokens_per_seq = 0;  // 0: ragged, not to be recorded
  std::int64_t rows_per_seq = 0;    // logit rows
  std::int64_t max_blocks = 0;
  std::int64_t part = 0;  // steps of one shape that use different memory, or do different things

  bool operator<(const StepKey& other) const {
    return std::tie(num_seqs, tokens_per_seq, rows_per_seq, max_blocks, part) <
           std::tie(other.num_seqs, other.tokens_per_seq, other.rows_per_seq, other.max_blocks,
                    other.part);
  }
};

// The largest step that may come.
struct StepLimits {
  std::int64_t max_num_seqs = 0;
  std::int64_t max_num_batched_tokens = 0;
  std::int64_t max_model_len = 0;
};

// The input of a sublayer: the normalized residual stream, to which `added` is added first (where
// that has data).
struct NormedInput {
  View residual, added;
  const Norm& norm;
};

// The experts of a layer: their gates and ups, one matrix for both or two, and their downs.
struct ExpertWork {
  const MoeSpec& moe;
  const std::vector<Linear>& up;
  const Linear& down;
  Activation activation;
};

// Counts of the work queued on a device so far, to be compared before and after a step.
struct WorkCounts {
  std::int64_t kernels = 0;                  // launched, or recorded, one by one
  std::int64_t recorded = 0, forgotten = 0;  // steps recorded; of these, dropped
  std::int64_t replayed = 0;                 // recorded steps launched
  std::int64_t uploads = 0, downloads = 0;
  std::string last_kernels;  // names of those launched last, on a GPU
};

// A layer of a step, and memory for the results of its ops: the views of Decoder.
struct LayerWork {
  View residual;  // float32; attention and the MLP add to it
  View hidden, qkv, attn, act;
  const LayerSpec& layer;
  const LayerWeights& weights;
  KvLayer& kv;
  const Step& step;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Called once on the thread that will call all ops, if there is only one.
  virtual void attach_thread() {}

  // ---- memory ----
  virtual void* allocate(std::size_t bytes) = 0;  // zero-filled; throws std::bad_alloc
  virtual void release(void* data, std::size_t bytes) noexcept = 0;
  virtual void upload(void* device, const void* host, std::size_t bytes) = 0;
  virtual void download(void* host, const void* device, std::size_t bytes) = 0;  // waits
  virtual std::size_t available_memory() const = 0;                              // bytes, now

  // ---- copies that may go on after the call, in order with the ops ----
  virtual void* allocate_host(std::size_t bytes) { return ::operator new(bytes); }
  virtual void release_host(void* data) noexcept { ::operator delete(data); }
  // host: part of a HostBuffer. Do not write or read it before an event that was recorded after the
  // copy has been waited for.
  virtual void upload_async(void* device, const HostBuffer& host, std::size_t bytes) {
    upload(device, host.data(), bytes);
  }
  virtual void download_async(const HostBuffer& host, const void* device, std::size_t bytes) {
    download(host.data(), device, bytes);
  }
  // Records an event after all queued work; `wait_event` waits for that work and for no later one.
  // There are two events, 0 and 1.
  virtual void record_event(int) {}
  virtual void wait_event(int) {}

  // ---- the shape of steps ----
  // The format of activations between ops.
  virtual DType activation_dtype() const { return DType::f32; }
  // The shape to which a step of this shape is padded, so that few shapes have to be recorded. The
  // padding is sequences without context whose tokens have slot -1.
  virtual StepKey padded(const StepKey& key) const { return key; }
  // Allocates all memory that steps within these limits need, so that no step has to.
  virtual void prepare(const ModelSpec&, const StepLimits&) {}

  // ---- packing ----
  // An empty matrix in the device's layout; `pack_rows` fills it piece by piece, so that q, k and
  // v (gate and up) become one matrix without a copy of all of them in host memory. count: so many
  // matrices; row r of matrix i is number i * pitch + r for `pack_rows`, and so on.
  virtual Linear make_linear(std::int64_t outputs, std::int64_t inputs, const WeightFormat& format,
                             bool with_bias, std::int64_t count = 1) = 0;
  // A plain format takes any floating-point rows. A quantized format takes its own codes, two int4
  // codes a byte, the first in the low half; an int8 matrix also takes floating-point rows, which
  // it rounds to 127 steps of each row's largest magnitude.
  virtual void pack_rows(Linear& linear, std::int64_t first_row, const HostMatrix& rows) = 0;
  // float32 (rows, groups) each, a zero point in units of a level.
  virtual void pack_scales(Linear& linear, std::int64_t first_row, std::int64_t rows,
                           const float* scales) = 0;
  virtual void pack_zeros(Linear& linear, std::int64_t first_row, std::int64_t rows,
                          const float* zeros) = 0;
  // The keys and values of slots 0 .. num_slots - 1: (num_slots, num_kv_heads, head_dim) each.
  virtual void read_kv(const KvLayer& kv, std::int64_t num_slots, std::vector<float>& keys,
                       std::vector<float>& values) = 0;
  // Bytes of one block of one layer, keys and values.
  virtual std::int64_t kv_block_bytes(const LayerSpec& layer, DType dtype,
                                      std::int64_t block_size) const = 0;
  // What this device cannot do for a model with these options, a sentence each; empty: it can run
  // the model.
  virtual std::vector<std::string> unsupported(const ModelSpec& spec,
                                               const RuntimeOptions& options) const = 0;

  // ---- compute ----
  // out[t] = table[id of token t] (+ positions[position of t], when given).
  virtual void embed(View out, const Linear& table, const Linear* positions, const Step& step) = 0;
  // out = normalized x, of the residual stream. Of kind none, out = x. out may be x.
  virtual void norm(View out, View x, const Norm& norm) = 0;
  // residual += x; out = normalized residual.
  virtual void add_norm(View out, View residual, View x, const Norm& norm) = 0;
  // Each `width` columns of a row of activations, normalized by themselves, in place.
  virtual void norm_heads(View x, const Norm& norm, std::int64_t width) = 0;
  // x = factor * x, in place; with a cap that is not 0, x = cap * tanh(factor * x / cap).
  virtual void scale(View x, float factor, float cap) = 0;
  // out = x @ weight^T + bias. The order of summation depends on the row alone.
  virtual void linear(View out, View x, const Linear& weight) = 0;
  // Whether the device has the next two ops.
  virtual bool takes_adapters() const { return false; }
  // Adapters have changed: a device may keep a table of these stacks, which stay where they are.
  virtual void adapters_changed(const std::vector<LowRankStack>&) {}
  // out[t] += b (a x[t]) of the adapter in place adapters[t]; -1: nothing. adapters: [x.rows], of
  // the device. The bits depend on the row and its adapter alone.
  virtual void add_low_rank(View, View, const LowRankStack&, const std::int32_t*) {}
  // The same for rows of the embedding, out[t] += b (row of a of token t): a is (tokens, rank).
  virtual void add_low_rank_rows(View, const LowRankStack&, const Step&) {}
  // qkv: (num_tokens, q_size + 2 kv_size). Rotates q and k in place (not if rope is null), then
  // stores k and v at the step's slots.
  virtual void rope_and_store(View qkv, const Rope* rope, const LayerSpec& layer, KvLayer& kv,
                              const Step& step) = 0;
  // out: (num_tokens, q_size), q: the same. Causal attention over the stored keys and values, with
  // scores scale * q.k, capped where the layer says so. Over a bf16 cache q and the weights are
  // rounded to bf16 before they are multiplied (reference/ops.py, attention with dtype "bf16");
  // sums are float32.
  virtual void attention(View out, View q, const LayerSpec& layer, float scale, const KvLayer& kv,
                         const Step& step) = 0;
  // gated: x is (rows, 2 width), gate before up; out = act(gate) * up. Else out = act(x).
  virtual void gated_activation(View out, View x, Activation activation, bool gated) = 0;
  // A sparse mixture of experts: of each row, the sum over the experts that it chooses by its
  // router's logits, float32 (rows, num_experts), of weight * down(activation(gate x) * (up x)), in
  // the order of the experts' numbers. out may be x.
  virtual void moe(View out, View x, View router, const ExpertWork& work) = 0;
  // Several ops as one, with the same bits: add_norm (or norm), then linear. Returns false, and
  // does nothing, where the device has no such op.
  virtual bool normed_linear(View, const NormedInput&, const Linear&) { return false; }
  // The same: add_norm, then out = down(activation(gate x) * (up x)); gate and up are one matrix,
  // `up`, gate first. out may be what is added.
  virtual bool normed_mlp(View, const NormedInput&, const std::vector<Linear>&, const Linear&,
                          Activation) {
    return false;
  }
  // A whole layer, with the bits of the ops in decoder.cpp and in fewer launches. The output of the
  // layer before must have been added to the residual stream; this layer adds its own output. With
  // several ranks always false, since their sums are needed within a layer.
  virtual bool decode_layer(const LayerWork&) { return false; }
  // out[i] = x[rows[i]]
  virtual void take_rows(View out, View x, const std::int32_t* rows) = 0;
  // out = logits, adjusted where a row says so. out may be logits.
  virtual void adjust_logits(View out, View logits, const LogitAdjustments& adjustments) = 0;
  // Samples a token from every row of logits. masks: bit b of word w of a row allows token
  // 32 w + b; null allows all. Also notes each token in step.sampled.
  virtual void sample(const Samples& out, View logits, const std::int32_t* masks,
                      const Step& step) = 0;
  // out = log(softmax(logits)), row by row.
  virtual void log_softmax(View out, View logits) = 0;
  // For a model split over several devices (ranks). With one rank there is nothing to do.
  // x = the sum of all ranks' x.
  virtual void all_reduce(View) {}
  // x: each rank brings its columns, cols / world_size of them, the first rank the first ones;
  // afterwards every rank has all. The logits of a head split by its vocabulary need it.
  virtual void all_gather(View) {}
  // Copies whole blocks of one layer; pairs of source and destination in host memory.
  virtual void copy_blocks(KvLayer& kv, const std::int32_t* pairs, std::int64_t num_pairs) = 0;

  // ---- running ----
  // Runs `record`, which calls ops. A device may record the launches and replay them for the key:
  // the data that differ between two steps of one key lie in the same device memory.
  virtual void run(const StepKey& key, const std::function<void()>& record) = 0;
  // Called before memory that recorded steps use is moved.
  virtual void forget_recorded() {}
  virtual WorkCounts counts() const { return {}; }
  virtual void sync() = 0;

  // ---- measuring ----
  // Seconds that the device needs for the ops that `work` queues.
  virtual double seconds_of(const std::function<void()>& work);
  // The limits of a GPU (csrc/cuda/measure.cu); for the CPU see csrc/cpu/measure.h.
  virtual double measure_bandwidth(double, double) { return 0.0; }
  virtual double measure_flops(double) { return 0.0; }
};

inline double Backend::seconds_of(const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  sync();
  const auto start = Clock::now();
  work();
  sync();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

template <MemoryKind kind>
OwnedMemory<kind>::OwnedMemory(Backend* backend, std::size_t bytes)
    : backend_(backend),
      data_(kind == MemoryKind::device ? backend->allocate(bytes) : backend->allocate_host(bytes)),
      bytes_(bytes) {}

template <MemoryKind kind>
OwnedMemory<kind>::~OwnedMemory() {
  if (!data_) return;
  if constexpr (kind == MemoryKind::device)
    backend_->release(data_, bytes_);
  else
    backend_->release_host(data_);
}

// How a device is to be used.
struct BackendOptions {
  int num_threads = 0;         // CPU; 0: the physical cores this process may use
  std::string isa = "auto";    // CPU: an instruction set
  DType dtype = DType::f32;    // CUDA: of activations
  bool deterministic = false;  // CUDA: products by kernels whose sums do not depend on the batch
  bool graphs = true;          // CUDA: record steps and replay them
  int device_index = 0;        // CUDA: which GPU; the CPU is one device, 0
  std::shared_ptr<RankGroup> group = nullptr;  // the ranks of the model; null: one
};

// The devices that this build can run a model on, on this machine; slowest first.
std::vector<std::string> available_devices();

// device: one of those. If it is not available, throws std::invalid_argument that says what is
// missing.
std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options);

}  // namespace octavo

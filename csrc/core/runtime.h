// One model, or a rank's part of one, on one device: the model-level interface that Python drives.
#pragma once

#include <cstdint>
#include <exception>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/adjustments.h"
#include "core/backend.h"
#include "core/batch.h"
#include "core/decoder.h"
#include "core/job_queue.h"
#include "core/weights.h"

namespace octavo {

// A tapped matrix, copied to host memory.
struct TapResult {
  std::string name;
  std::int64_t rows = 0, cols = 0;
  std::vector<float> values;
};

struct StepResult {
  std::int64_t num_rows = 0, num_top = 0;
  std::vector<std::int32_t> token_ids, ranks, top_token_ids;
  std::vector<float> logprobs, top_logprobs;
  std::vector<std::uint8_t> finite;
  std::vector<float> states;    // (rows, hidden): of the rows or tokens that `submit` named
  std::vector<TapResult> taps;  // in the order of execution
};

// Of which rows a step returns the hidden states behind the final norm.
enum class States { none, rows, tokens };

struct MemoryUse {
  std::int64_t weights = 0, kv_cache = 0, workspace = 0, available = 0;
};

class Runtime {
 public:
  // group: of the ranks of a model of which `spec` is a part; with one rank null.
  Runtime(const std::string& device, const ModelSpec& spec, const RuntimeOptions& options,
          std::shared_ptr<RankGroup> group = nullptr);
  ~Runtime();

  // As Weights::load.
  void load(const std::string& name, const void* data, DType dtype,
            const std::vector<std::int64_t>& shape,
            std::optional<std::int64_t> first_row = std::nullopt);
  std::vector<std::string> missing_weights() const;

  std::int64_t kv_bytes_per_block() const;
  void alloc_kv(std::int64_t num_blocks);
  // A LoRA adapter in a place, after the steps queued so far (core/adapters.h).
  void load_adapter(std::int64_t slot, const std::vector<HostLowRank>& matrices);
  void unload_adapter(std::int64_t slot);
  void copy_blocks(std::int64_t kv_group, const std::vector<std::int32_t>& pairs);
  MemoryUse memory() const;
  std::int64_t allocations() const { return growths_; }
  WorkCounts counts();  // after all steps queued so far
  const ModelSpec& spec() const { return spec_; }

  // Queues the forward pass; the ticket names the step until `wait` closes it. At most two may be
  // open. taps: names, or "*" for all. with_sampling: also samples, without masks and adjustments;
  // then `sample` must not be called, and a recorded step is one graph. states: the hidden states
  // of the logit rows, or of all tokens, come with the result; unlike taps they cost one copy.
  std::int64_t submit(Batch batch, std::vector<std::string> taps, bool with_sampling = false,
                      States states = States::none);
  // masks: (num_rows, ceil(vocab / 32)) words, or empty. Log-probabilities are those of the logits
  // before any adjustment.
  void sample(std::int64_t ticket, std::vector<std::int32_t> masks, Adjustments adjustments = {});
  // Waits for the forward pass; of all rows, or of some: (rows, vocab). The ticket stays open.
  std::vector<float> logits(std::int64_t ticket,
                            const std::optional<std::vector<std::int32_t>>& rows = std::nullopt);
  // Puts other logits, vocab of them, in the place of a row's, before the step is sampled.
  void set_logits(std::int64_t ticket, std::int64_t row, const std::vector<float>& values);
  StepResult wait(std::int64_t ticket);

 private:
  static constexpr std::int64_t kMaxInFlight = 2;

  // Where each result of a step lies in its buffer, in bytes. num_rows: with padding rows.
  struct ResultPlaces {
    ResultPlaces(std::int64_t num_rows, std::int64_t num_top);
    std::size_t logprobs, ranks, top_token_ids, top_logprobs, finite, end;
  };

  // The memory of a submitted step until it is waited for; two of them are used in turn.
  struct InFlightStep {
    int index = 0;
    bool open = false;
    bool sampling_queued = false;
    std::int64_t ticket = -1;
    std::int64_t num_rows = 0, num_top = 0,
                 num_tokens = 0;           // as asked for; the batch may be padded
    std::vector<std::int32_t> row_places;  // of the rows asked for in the batch; empty: as they are
    States wanted = States::none;
    Batch batch;
    StepKey key;
    std::vector<std::string> tap_names;
    std::vector<TapResult> taps;
    std::exception_ptr error;
    StepUpload upload;
    Step uploaded;                      // the batch in device memory
    bool sampled_with_forward = false;  // `run_sampling` has only to fetch the results
    Buffer logits, normed, states;      // the last: of all tokens, where these are wanted
    HostBuffer states_host;
    Buffer results;  // of sampling, laid out as ResultPlaces; copied back in one piece
    HostBuffer results_host;
    Buffer inputs;  // masks and adjustments
    HostBuffer inputs_host;
    std::promise<void> sampling_done;  // set when the copy of the results is queued
  };

  // The parts of a step that can be recorded; each part of each in-flight step and shape is
  // recorded separately.
  enum Part : std::int64_t { kForward, kSampling, kWhole, kParts };
  static constexpr std::int64_t kAdapted = kParts * kMaxInFlight;  // the same, with adapters
  static constexpr std::int64_t kWithStates = 2 * kAdapted;        // times States

  // Where a layer's keys and values lie, and the bytes of a block there.
  struct KvPlace {
    std::size_t buffer;
    std::int64_t block_bytes;
  };
  std::vector<KvPlace> kv_places() const;

  InFlightStep& step_of(std::int64_t ticket);
  BatchLimits limits() const;
  // Allocates memory for the largest steps; `make_room` grows it for an even larger step.
  void take_memory();
  void make_room(InFlightStep& step, std::int64_t num_rows, std::int64_t num_top);
  // The shape to which a step of this shape is padded: there is memory for it.
  StepKey padded(const StepKey& key) const;
  StepKey key_of(const InFlightStep& step, Part part) const;
  void even(InFlightStep& step);
  NormedRows normed_of(InFlightStep& step);
  void fetch_states(InFlightStep& step);
  std::vector<float> states_of(InFlightStep& step) const;
  void forward(InFlightStep& step, bool with_sampling);
  void run_sampling(InFlightStep& step, std::vector<std::int32_t> masks,
                    const Adjustments& adjustments);
  static std::size_t mask_bytes(std::size_t num_words);
  const unsigned char* send(InFlightStep& step, const std::vector<std::int32_t>& masks,
                            const Adjustments& adjustments);
  std::int64_t place_of(const InFlightStep& step, std::int64_t row) const;
  void fetch_results(InFlightStep& step);
  void take_own_logprobs(InFlightStep& step);
  StepResult collect(InFlightStep& step);
  // Keeps the exception that is being handled for wait(), after all queued work has ended.
  void fail(InFlightStep& step);
  // Grows `buffer` when it is too small, and counts that.
  template <class AnyBuffer>
  void reserve(AnyBuffer& buffer, std::size_t bytes) {
    if (buffer.bytes() >= bytes) return;
    buffer = AnyBuffer();  // free the old one first: both may not fit
    buffer = AnyBuffer(backend_.get(), bytes);
    ++growths_;
  }
  View logits_view(const InFlightStep& step) const;
  Samples samples_of(InFlightStep& step) const;

  ModelSpec spec_;
  RuntimeOptions options_;
  DType kv_dtype_;
  std::unique_ptr<Backend> backend_;
  Weights weights_;
  Adapters adapters_;
  Decoder decoder_;
  Buffer sampled_;
  Buffer scores_;  // adjusted logits; the in-flight steps use it in turn
  std::vector<Buffer> kv_buffers_;
  std::vector<KvLayer> kv_;
  InFlightStep steps_[kMaxInFlight];
  std::int64_t next_ticket_ = 0;
  std::int64_t growths_ = 0;
  bool weights_complete_ = false;
  JobQueue queue_;  // last, so that its thread ends before the members it uses are destroyed
};

}  // namespace octavo

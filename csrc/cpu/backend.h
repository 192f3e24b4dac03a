// The CPU backend: every op of core/backend.h over the kernels of one instruction set.
#pragma once

#include "core/backend.h"
#include "cpu/kernels.h"
#include "cpu/sampling_filters.h"
#include "cpu/thread_pool.h"

namespace octavo::cpu {

// Attention sums up ranges of this many tokens, which begin at absolute multiples of it, and
// merges them in ascending order. So threads can share a context without changing a bit.
constexpr std::int64_t kAttentionSplit = 512;

class CpuBackend : public Backend {
 public:
  CpuBackend(int num_threads, const std::string& isa, std::shared_ptr<RankGroup> group = nullptr);

  void attach_thread() override { pool_.bind_caller(); }
  void* allocate(std::size_t bytes) override;
  void release(void* data, std::size_t bytes) noexcept override;
  void upload(void* device, const void* host, std::size_t bytes) override;
  void download(void* host, const void* device, std::size_t bytes) override;
  std::size_t available_memory() const override;

  Linear make_linear(std::int64_t outputs, std::int64_t inputs, const WeightFormat& format,
                     bool with_bias, std::int64_t count) override;
  void pack_rows(Linear& linear, std::int64_t first_row, const HostMatrix& rows) override;
  void pack_scales(Linear& linear, std::int64_t first_row, std::int64_t rows,
                   const float* scales) override;
  void pack_zeros(Linear& linear, std::int64_t first_row, std::int64_t rows,
                  const float* zeros) override;
  void read_kv(const KvLayer& kv, std::int64_t num_slots, std::vector<float>& keys,
               std::vector<float>& values) override;
  std::int64_t kv_block_bytes(const LayerSpec& layer, DType dtype,
                              std::int64_t block_size) const override;
  std::vector<std::string> unsupported(const ModelSpec& spec,
                                       const RuntimeOptions& options) const override;

  void embed(View out, const Linear& table, const Linear* positions, const Step& step) override;
  void norm(View out, View x, const Norm& norm) override;
  void add_norm(View out, View residual, View x, const Norm& norm) override;
  void norm_heads(View x, const Norm& norm, std::int64_t width) override;
  void scale(View x, float factor, float cap) override;
  void linear(View out, View x, const Linear& weight) override;
  bool takes_adapters() const override { return true; }
  void add_low_rank(View out, View x, const LowRankStack& stack,
                    const std::int32_t* adapters) override;
  void add_low_rank_rows(View out, const LowRankStack& stack, const Step& step) override;
  bool normed_linear(View out, const NormedInput& x, const Linear& weight) override;
  bool normed_mlp(View out, const NormedInput& x, const std::vector<Linear>& up, const Linear& down,
                  Activation activation) override;
  void rope_and_store(View qkv, const Rope* rope, const LayerSpec& layer, KvLayer& kv,
                      const Step& step) override;
  void attention(View out, View q, const LayerSpec& layer, float scale, const KvLayer& kv,
                 const Step& step) override;
  void gated_activation(View out, View x, Activation activation, bool gated) override;
  void moe(View out, View x, View router, const ExpertWork& work) override;
  void take_rows(View out, View x, const std::int32_t* rows) override;
  void adjust_logits(View out, View logits, const LogitAdjustments& adjustments) override;
  void sample(const Samples& out, View logits, const std::int32_t* masks,
              const Step& step) override;
  void log_softmax(View out, View logits) override;
  void all_reduce(View x) override;
  void all_gather(View x) override;
  void copy_blocks(KvLayer& kv, const std::int32_t* pairs, std::int64_t num_pairs) override;

  void run(const StepKey&, const std::function<void()>& record) override {
    const ThreadPool::Busy busy(pool_);
    record();
  }
  void sync() override {}

 private:
  // Calls body(row) for every row, on all threads when there is enough to do.
  template <class Body>
  void each_row(View shape, Body&& body) {
    constexpr std::int64_t kWorthThreads = 1 << 15;  // numbers; less takes under 10 microseconds
    if (shape.rows * shape.cols < kWorthThreads) {
      for (std::int64_t row = 0; row < shape.rows; ++row) body(row);
      return;
    }
    const std::int64_t chunk = (shape.rows + 4 * pool_.size() - 1) / (4 * pool_.size());
    pool_.each((shape.rows + chunk - 1) / chunk, [&](std::int64_t index, int) {
      const std::int64_t end = std::min(shape.rows, (index + 1) * chunk);
      for (std::int64_t row = index * chunk; row < end; ++row) body(row);
    });
  }

  // Memory of at least `count` numbers that is valid until the next call with this buffer; in large
  // pages, since a product reads it many times and fewer pages are faster.
  float* scratch(Buffer& buffer, std::int64_t count) {
    constexpr std::size_t kLeast = std::size_t{2} << 20;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
    if (buffer.bytes() < bytes) buffer = Buffer(this, std::max(bytes, kLeast));
    return buffer.as<float>();
  }

  void touch_shares(const Linear& linear, std::int64_t matrix);

  // residual += added, where it has data; writes a row of the normalized residual.
  void add_and_norm(float* out, const NormedInput& x, std::int64_t row) const;

  // Sets the task's x, in the form that the format needs.
  void prepare_input(LinearTask& task, View x);
  void prepare_input(LinearTask& task, const NormedInput& x);
  template <class RowOf>
  void prepare_rows(LinearTask& task, View shape, RowOf&& row_of);
  void multiply(const LinearTask& task);

  // ---- experts (moe.cpp) ----

  // Which experts the rows have chosen, k each, in ascending order; and the same pairs of a row and
  // an expert sorted by expert, those of an expert by row. The memory is kept from step to step.
  struct Routing {
    std::vector<std::int32_t> experts;  // (rows, k)
    std::vector<float> weights;         // (rows, k)
    std::vector<std::int32_t> places;   // (rows, k): of the pair, among the sorted ones
    std::vector<std::int32_t> rows;     // of each sorted pair
    std::vector<std::int32_t> owners;   // its expert
    std::vector<std::int32_t> first;    // of each expert's pairs, and the end
  };
  void route(View router, const MoeSpec& moe);
  // sums += the weighted outputs of some experts.
  void add_experts(View sums, View x, const ExpertWork& work, ThreadPool::Range experts);
  void multiply_all(const std::vector<LinearTask>& tasks);

  // ---- adapters (low_rank.cpp) ----

  // Some rows with the same adapter: rows first .. first + count - 1 of a sorted list.
  struct AdapterRows {
    const LowRank* added;
    std::int64_t first, count;
  };
  struct SortedRows {
    std::vector<std::int64_t> rows;
    std::vector<AdapterRows> groups;

    std::int64_t row(const AdapterRows& group, std::int64_t index) const {
      return rows[static_cast<std::size_t>(group.first + index)];
    }
  };
  struct LowRankPiece {
    const AdapterRows* group;
    const LowRank::Part* part;  // null: of A
    std::int64_t first_panel, last_panel;
  };
  // Calls body for so many rows that what lies between the products is little.
  template <class Body>
  void each_adapter(std::int64_t num_rows, const LowRankStack& stack, const std::int32_t* adapters,
                    Body&& body);
  View shrunk_rows(const SortedRows& sorted);
  void shrink_rows(View shrunk, View x, const SortedRows& sorted);
  void expand_rows(View out, View shrunk, const SortedRows& sorted);
  // Calls body(piece, memory) for each piece, on any thread; memory: of so many numbers.
  template <class Body>
  void each_piece(std::int64_t numbers, Body&& body);

  SortedRows adapter_rows_;
  std::vector<LowRankPiece> low_rank_pieces_;
  Routing routing_;
  std::vector<LinearTask> up_tasks_, down_tasks_;  // of add_experts
  struct ProductPiece {
    const LinearTask* task;
    std::int64_t first_row, last_row, first_panel, last_panel;
  };
  std::vector<ProductPiece> pieces_;  // of multiply_all

  std::shared_ptr<RankGroup> group_;  // null: one rank
  ThreadPool pool_;
  const Kernels& kernels_;
  std::vector<SamplingScratch> sampling_scratch_;  // of each thread
  Buffer linear_scratch_, mlp_scratch_, attention_scratch_, experts_scratch_;
};

}  // namespace octavo::cpu

// Sparse experts (reference/ops.py, moe), without the host's knowing which ones are chosen: every
// grid is made for the most tiles that there may be, so that a step can be recorded.
//
//   choose    the experts of each row and their weights; the pairs of a row and an expert, sorted
//   by
//             expert; the tiles of rows that the products take (one kernel of few rows, else two)
//   gate, up  of the sorted rows: few of each expert straight from x, activated; else x is copied
//   in
//             their order, multiplied by tiles, and then activated
//   down      of the sorted rows, to float32
//   add       each row's results, in the order of the experts' numbers
//
// The order of pairs within an expert may differ from run to run (their places are counted by
// atomics), but a row's bits do not depend on its place: products have one order of sums.
// docs/cuda_products.md has the bytes.

#include "cuda/products/experts.cuh"

#include <algorithm>
#include <cmath>

#include "cuda/backend.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/elementwise/elementwise.cuh"
#include "cuda/products/multiply.h"

namespace octavo::cuda {

namespace {

constexpr int kMostChosen = kWarp;  // experts of a row: a lane for each
constexpr int kRowsPerBlock = 8;    // of `choose_rows`: a warp for each
constexpr int kSortThreads = 512;
constexpr int kMostAtOnce = 64;    // rows that the sorting block chooses for as well
constexpr int kRowsOfFewTile = 4;  // rows of an expert on average, up to which few are faster

// Memory of the device: pairs of a row and one of its experts, `chosen` for each row.
struct Routing {
  const float* logits;
  long long logits_stride;
  int rows, num_experts, chosen;
  bool normalize;
  int tile_rows, most_tiles;
  std::int32_t* experts;  // (rows, chosen), in ascending order
  float* weights;         // (rows, chosen)
  std::int32_t* places;   // (rows, chosen): of the pair among the sorted ones
  std::int32_t* rows_of;  // of each sorted pair
  ExpertTile* tiles;      // [most_tiles]
};

struct Candidate {
  float logit;
  int expert;
};

// Of equal logits the lower number comes first.
OCTAVO_DEVICE bool comes_before(Candidate a, Candidate b) {
  return a.logit > b.logit || (a.logit == b.logit && a.expert < b.expert);
}

// A warp's row: in each round the best of those that come behind the last one. A NaN is the least
// of all, and makes the weights NaN if it is chosen.
OCTAVO_DEVICE void choose_row(const Routing& r, int row) {
  const float* logits = r.logits + row * r.logits_stride;
  const int lane = static_cast<int>(lane_index());
  const auto logit_at = [&](int expert) {
    const float logit = logits[expert];
    return logit == logit ? logit : -INFINITY;
  };
  int mine = 0;
  Candidate last{INFINITY, -1};
  float largest = 0.0f;
  for (int round = 0; round < r.chosen; ++round) {
    Candidate best{-INFINITY, r.num_experts};
    for (int expert = lane; expert < r.num_experts; expert += static_cast<int>(kWarp)) {
      const Candidate other{logit_at(expert), expert};
      if (comes_before(last, other) && comes_before(other, best)) best = other;
    }
    for (unsigned mask = kWarp / 2; mask; mask /= 2) {
      const Candidate other{shuffle_xor(best.logit, mask), shuffle_xor(best.expert, mask)};
      if (comes_before(other, best)) best = other;
    }
    last = best;
    if (round == 0) largest = logits[best.expert];
    if (lane == round) mine = best.expert;
  }
  const float power = lane < r.chosen ? expf(add_rn(logits[mine], -largest)) : 0.0f;
  float part = power;
  if (!r.normalize) {
    part = 0.0f;
    for (int expert = lane; expert < r.num_experts; expert += static_cast<int>(kWarp))
      part = add_rn(part, expf(add_rn(logits[expert], -largest)));
  }
  const float total = warp_sum(part);
  int place = 0;
  for (int i = 0; i < r.chosen; ++i) place += shuffle(mine, static_cast<unsigned>(i)) < mine;
  if (lane >= r.chosen) return;
  r.experts[row * r.chosen + place] = mine;
  r.weights[row * r.chosen + place] = divide_rn(power, total);
}

__global__ void __launch_bounds__(kRowsPerBlock* kWarp) choose_rows(Routing r) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row = static_cast<int>(blockIdx.x * kRowsPerBlock + warp_index());
  if (row < r.rows) choose_row(r, row);
}

// values[i] = the sum of those before it, in place; the first warp alone. Returns the sum of all.
OCTAVO_DEVICE int sum_before(int* values, int count) {
  const unsigned lane = lane_index();
  int before = 0;
  for (int begin = 0; begin < count; begin += static_cast<int>(kWarp)) {
    const int at = begin + static_cast<int>(lane);
    const int own = at < count ? values[at] : 0;
    int sum = own;
    for (unsigned delta = 1; delta < kWarp; delta *= 2) {
      const int other = shuffle_up(sum, delta);
      if (lane >= delta) sum += other;
    }
    if (at < count) values[at] = before + sum - own;
    before += shuffle(sum, kWarp - 1);
  }
  return before;
}

// One block. Shared memory: [num_experts] pairs of each expert, [num_experts] where they begin,
// [num_experts] where their tiles begin.
__global__ void __launch_bounds__(kSortThreads) sort_pairs(Routing r, bool chooses) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  auto* counts = reinterpret_cast<int*>(shared_memory());
  int* begins = counts + r.num_experts;
  int* tile_begins = begins + r.num_experts;
  int* num_tiles = tile_begins + r.num_experts;
  for (int expert = thread; expert < r.num_experts; expert += threads) counts[expert] = 0;
  if (chooses) {
    for (int row = static_cast<int>(warp_index()); row < r.rows; row += threads / 32)
      choose_row(r, row);
  }
  __syncthreads();
  const int pairs = r.rows * r.chosen;
  for (int pair = thread; pair < pairs; pair += threads) atomic_add(counts + r.experts[pair], 1);
  __syncthreads();
  for (int expert = thread; expert < r.num_experts; expert += threads) {
    begins[expert] = counts[expert];
    tile_begins[expert] = ceil_div(counts[expert], r.tile_rows);
  }
  __syncthreads();
  if (warp_index() == 0) {
    sum_before(begins, r.num_experts);
    const int all = sum_before(tile_begins, r.num_experts);
    if (thread == 0) *num_tiles = all;
  }
  __syncthreads();
  for (int expert = thread; expert < r.num_experts; expert += threads) {
    for (int first = 0, tile = tile_begins[expert]; first < counts[expert]; ++tile) {
      const int rows = smaller(r.tile_rows, counts[expert] - first);
      r.tiles[tile] = {expert, begins[expert] + first, rows};
      first += rows;
    }
  }
  for (int tile = *num_tiles + thread; tile < r.most_tiles; tile += threads)
    r.tiles[tile] = {0, 0, 0};
  __syncthreads();
  for (int pair = thread; pair < pairs; pair += threads) {
    const int place = atomic_add(begins + r.experts[pair], 1);
    r.places[pair] = place;
    r.rows_of[place] = pair / r.chosen;
  }
}

void route(Stream& stream, const Routing& r) {
  const bool chooses = r.rows <= kMostAtOnce;
  if (!chooses)
    launch(stream, "choose_rows",
           {dims(ceil_div(r.rows, kRowsPerBlock)), kRowsPerBlock * kWarp, 0, true}, choose_rows, r);
  const std::size_t bytes = (3 * static_cast<std::size_t>(r.num_experts) + 1) * sizeof(int);
  launch(stream, "sort_pairs", {dims(1), kSortThreads, bytes, true}, sort_pairs, r, chooses);
}

// out = the sum of a row's results, float32 (pairs, width), times their weights. blockIdx.x: row;
// blockIdx.y and threads: four columns each.
constexpr unsigned kAddThreads = 256;

template <class T>
__global__ void __launch_bounds__(kAddThreads)
    add_experts(Numbers out, const float* results, int width, const Routing r) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const auto row = static_cast<int>(blockIdx.x);
  const int col = static_cast<int>(4 * (blockIdx.y * kAddThreads + threadIdx.x));
  float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
  for (int i = row * r.chosen; i < (row + 1) * r.chosen; ++i) {
    const float weight = r.weights[i];
    const float* from = results + static_cast<long long>(r.places[i]) * width + col;
    const float4 four = load_four(from, width - col, width % 4 == 0);
    sum = {add_rn(sum.x, multiply_rn(weight, four.x)), add_rn(sum.y, multiply_rn(weight, four.y)),
           add_rn(sum.z, multiply_rn(weight, four.z)), add_rn(sum.w, multiply_rn(weight, four.w))};
  }
  store_four(static_cast<T*>(out.data) + row * out.stride + col, sum, width - col, false);
}

// Which products a step of so many rows takes, and the memory for it: pairs' numbers in whole 256
// bytes each.
struct Plan {
  enum class Way { few, tiles, any };
  Way way;
  std::int64_t pairs;
  int tile_rows, most_tiles;
  bool gathers;  // copies x in the pairs' order, and keeps gates and ups

  Plan(const Stream& stream, std::int64_t rows, const MoeSpec& moe, bool is_fast,
       bool is_one_matrix)
      : pairs(rows * moe.experts_per_token) {
    const std::int64_t of_expert = ceil_div(pairs, std::min(pairs, moe.num_experts));
    way = !is_fast ? Way::any : of_expert <= kRowsOfFewTile ? Way::few : Way::tiles;
    tile_rows = way == Way::few   ? kFewRows
                : way == Way::any ? kAnyRows
                                  : expert_tile_rows(stream, of_expert);
    most_tiles =
        static_cast<int>(std::min(pairs, pairs / tile_rows + std::min(pairs, moe.num_experts)));
    gathers = way != Way::few || !is_one_matrix;
  }
};

std::size_t whole(std::int64_t bytes) {
  return static_cast<std::size_t>((bytes + 255) / 256 * 256);
}

// Parts of the workspace, in order; without memory, `bytes` alone is of use.
struct Parts {
  std::size_t bytes = 0;
  unsigned char* memory;

  explicit Parts(void* memory) : memory(static_cast<unsigned char*>(memory)) {}
  template <class T>
  T* take(std::int64_t count) {
    T* part = memory ? reinterpret_cast<T*>(memory + bytes) : nullptr;
    bytes += whole(count * static_cast<std::int64_t>(sizeof(T)));
    return part;
  }
  View matrix(std::int64_t rows, std::int64_t cols, DType dtype) {
    return {take<unsigned char>(rows * cols * bits_of(dtype) / 8), rows, cols, cols, dtype};
  }
};

struct Work {
  Routing routing{};
  View x, both, act, results;

  Work(Parts& parts, const Plan& plan, DType dtype, std::int64_t inputs, std::int64_t width,
       std::int64_t outputs) {
    routing.experts = parts.take<std::int32_t>(plan.pairs);
    routing.weights = parts.take<float>(plan.pairs);
    routing.places = parts.take<std::int32_t>(plan.pairs);
    routing.rows_of = parts.take<std::int32_t>(plan.pairs);
    routing.tiles = parts.take<ExpertTile>(plan.pairs);
    x = parts.matrix(plan.gathers ? plan.pairs : 0, inputs, dtype);
    both = parts.matrix(plan.gathers ? plan.pairs : 0, 2 * width, dtype);
    act = parts.matrix(plan.pairs, width, dtype);
    results = parts.matrix(plan.pairs, outputs, DType::f32);
  }
};

}  // namespace

void CudaBackend::moe(View out, View x, View router, const ExpertWork& work) {
  const Linear& down = work.down;
  const std::int64_t width = down.inputs;
  require_shape("moe", router, x.rows, work.moe.num_experts);
  require_shape("moe", out, x.rows, down.outputs);
  require_same_dtype("moe", out, x);
  if (x.rows == 0) return;
  bool fast = is_fast(x, down) && is_fast(x, work.up[0]) && is_fast(x, work.up.back());
  const Plan plan(stream_, x.rows, work.moe, fast, work.up.size() == 1);
  Parts sizes(nullptr);
  Work(sizes, plan, x.dtype, x.cols, width, down.outputs);
  Parts parts(experts_workspace_.get(sizes.bytes));
  Work memory(parts, plan, x.dtype, x.cols, width, down.outputs);
  Routing& routing = memory.routing;
  routing.logits = router.row(0);
  routing.logits_stride = router.stride;
  routing.rows = static_cast<int>(x.rows);
  routing.num_experts = static_cast<int>(work.moe.num_experts);
  routing.chosen = static_cast<int>(work.moe.experts_per_token);
  routing.normalize = work.moe.normalize;
  routing.tile_rows = plan.tile_rows;
  routing.most_tiles = plan.most_tiles;
  route(stream_, routing);

  const ExpertTiles tiles{routing.tiles, plan.most_tiles};
  const auto multiply = [&](View to, View from, const Linear& weight) {
    const Matrix matrix = matrix_of(weight);
    if (plan.way == Plan::Way::few)
      multiply_experts_few(stream_, to, from, matrix, tiles);
    else if (plan.way == Plan::Way::tiles)
      multiply_experts_tiles(stream_, to, from, matrix, tiles, plan.tile_rows);
    else
      multiply_experts_any(stream_, to, from, matrix, tiles);
  };
  if (plan.gathers) {
    take_rows(memory.x, x, routing.rows_of);
    std::int64_t first = 0;
    for (const Linear& half : work.up) {
      multiply(memory.both.columns(first, half.outputs), memory.x, half);
      first += half.outputs;
    }
    gated_activation(memory.act, memory.both, work.activation, true);
  } else {
    multiply_experts_gated(stream_, memory.act, x, routing.rows_of, matrix_of(work.up[0]),
                           work.activation, tiles);
  }
  multiply(memory.results, memory.act, down);
  const dim3 grid = dims(out.rows, ceil_div(out.cols, 4 * kAddThreads));
  for_type("moe", out.dtype, [&](auto zero) {
    launch(stream_, "add_experts", {grid, kAddThreads, 0, true}, add_experts<decltype(zero)>,
           numbers_of(out), memory.results.row(0), down.outputs, routing);
  });
}

std::size_t CudaBackend::experts_workspace_bytes(const ModelSpec& spec,
                                                 const StepLimits& limits) const {
  std::size_t most = 0;
  for (const LayerSpec& layer : spec.layers) {
    if (!layer.moe) continue;
    const std::int64_t hidden = spec.hidden_size;
    Parts sizes(nullptr);
    // A plan with all parts.
    const Plan plan(stream_, limits.max_num_batched_tokens, *layer.moe, false, false);
    Work(sizes, plan, options_.dtype, hidden, layer.intermediate_size, hidden);
    most = std::max(most, sizes.bytes);
  }
  return most;
}

void CudaBackend::add_expert_problems(const ModelSpec& spec, std::vector<std::string>& problems) {
  for (const LayerSpec& layer : spec.layers) {
    if (!layer.moe || layer.moe->experts_per_token <= kMostChosen) continue;
    problems.push_back(text("experts_per_token is ", layer.moe->experts_per_token,
                            "; the kernels take up to ", kMostChosen));
    return;
  }
}

}  // namespace octavo::cuda

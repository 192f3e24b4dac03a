// The paged KV cache: how large a block is, reading it back, copying blocks. rope.cu fills it.

#include <algorithm>

#include "cuda/backend.h"
#include "cuda/device/launch.cuh"
#include "cuda/layout/kv_layout.cuh"

namespace octavo::cuda {

namespace {

// As many copies as fit into a kernel's arguments: no list has to travel first.
constexpr int kPairs = 32;
struct BlockPairs {
  std::int32_t from[kPairs], to[kPairs];
  int count = 0;

  // Whether a copy may go on beside these, in any order.
  bool admits(std::int32_t source, std::int32_t destination) const {
    if (count == kPairs) return false;
    for (int i = 0; i < count; ++i) {
      if (to[i] == source || to[i] == destination || from[i] == destination) return false;
    }
    return true;
  }
};

// Block (i, j) copies the j-th stretch of pair i, 16 bytes a thread at a time. Moves 2 x the bytes.
__global__ void copy_blocks_kernel(unsigned char* data, std::int64_t block_bytes,
                                   BlockPairs pairs) {
  wait_for_previous_kernel();
  const unsigned char* from = data + pairs.from[blockIdx.x] * block_bytes;
  unsigned char* to = data + pairs.to[blockIdx.x] * block_bytes;
  const std::int64_t step = std::int64_t{16} * blockDim.x * gridDim.y;
  for (std::int64_t at = std::int64_t{16} * (blockIdx.y * blockDim.x + threadIdx.x);
       at < block_bytes; at += step)
    store_16(to + at, load_16(from + at));
}

}  // namespace

std::int64_t CudaBackend::kv_block_bytes(const LayerSpec& layer, DType dtype,
                                         std::int64_t block_size) const {
  return make_layout(dtype, block_size, layer.num_kv_heads, layer.head_dim).block_bytes;
}

void CudaBackend::read_kv(const KvLayer& kv, std::int64_t num_slots, std::vector<float>& keys,
                          std::vector<float>& values) {
  const KvLayout layout = layout_of(kv);
  const std::int64_t num_blocks = ceil_div(num_slots, kv.block_size);
  std::vector<unsigned char> bytes(static_cast<std::size_t>(num_blocks * layout.block_bytes));
  check(cudaMemcpyAsync(bytes.data(), kv.data, bytes.size(), cudaMemcpyDeviceToHost,
                        stream_.handle()),
        "copying the KV cache from the device");
  stream_.sync();
  keys.clear();
  values.clear();
  for (std::int64_t slot = 0; slot < num_slots; ++slot) {
    const int within = static_cast<int>(slot % kv.block_size);
    for (int head = 0; head < layout.num_kv_heads; ++head) {
      const unsigned char* items =
          bytes.data() + layout.head_at(static_cast<int>(slot / kv.block_size), head);
      const float* scales = reinterpret_cast<const float*>(items + layout.scales_at()) + within;
      const bool scaled = kv.dtype == DType::int8;
      const float key_scale = scaled ? scales[0] : 1.0f;
      const float value_scale = scaled ? scales[layout.block_size] : 1.0f;
      for (int d = 0; d < layout.head_dim; ++d) {
        keys.push_back(load_item(items, kv.dtype, layout.key_item(within, d)) * key_scale);
        values.push_back(load_item(items, kv.dtype, layout.value_item(within, d)) * value_scale);
      }
    }
  }
}

// In the order of the list, as if one after the other: a block may be copied to and then from.
void CudaBackend::copy_blocks(KvLayer& kv, const std::int32_t* pairs, std::int64_t num_pairs) {
  const std::int64_t block_bytes = layout_of(kv).block_bytes;
  constexpr unsigned kThreads = 128;
  const std::int64_t blocks = std::min(ceil_div(block_bytes / 16, kThreads), std::int64_t{64});
  BlockPairs batch;
  const auto flush = [&] {
    if (batch.count == 0) return;
    launch(stream_, "copy_blocks", {dims(batch.count, blocks), kThreads, 0, true},
           copy_blocks_kernel, static_cast<unsigned char*>(kv.data), block_bytes, batch);
    batch.count = 0;
  };
  for (std::int64_t i = 0; i < num_pairs; ++i) {
    const std::int32_t from = pairs[2 * i], to = pairs[2 * i + 1];
    if (from == to) continue;
    if (!batch.admits(from, to)) flush();
    batch.from[batch.count] = from;
    batch.to[batch.count++] = to;
  }
  flush();
}

}  // namespace octavo::cuda

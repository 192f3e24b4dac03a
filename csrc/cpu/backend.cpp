// Memory, and the ops that read each number once.

#include "cpu/backend.h"

#include <algorithm>
#include <cstring>

#include "cpu/platform.h"

namespace octavo::cpu {

CpuBackend::CpuBackend(int num_threads, const std::string& isa, std::shared_ptr<RankGroup> group)
    : group_(std::move(group)),
      pool_(num_threads > 0 ? num_threads : physical_cores()),
      kernels_(kernels_for(isa)),
      sampling_scratch_(static_cast<std::size_t>(pool_.size())) {}

void* CpuBackend::allocate(std::size_t bytes) { return cpu::allocate(bytes); }

void CpuBackend::release(void* data, std::size_t bytes) noexcept { cpu::release(data, bytes); }

// No bytes may come from no memory, which memcpy does not allow.
void CpuBackend::upload(void* device, const void* host, std::size_t bytes) {
  if (bytes != 0) std::memcpy(device, host, bytes);
}

void CpuBackend::download(void* host, const void* device, std::size_t bytes) {
  if (bytes != 0) std::memcpy(host, device, bytes);
}

std::size_t CpuBackend::available_memory() const { return cpu::available_memory(); }

std::vector<std::string> CpuBackend::unsupported(const ModelSpec&,
                                                 const RuntimeOptions& options) const {
  std::vector<std::string> problems;
  if (options.dtype == "f16")
    problems.push_back("dtype f16 is for GPUs: use f32, which holds f16 exactly, or bf16");
  if (options.kv_dtype == "f16") problems.push_back("kv_dtype f16 is for GPUs: use f32 or bf16");
  return problems;
}

void CpuBackend::add_and_norm(float* out, const NormedInput& x, std::int64_t row) const {
  float* residual = x.residual.row(row);
  if (x.added.data) kernels_.add(residual, x.added.row(row), x.residual.cols);
  if (x.norm.spec.kind == NormKind::none) {
    std::memmove(out, residual, x.residual.row_size());  // out may be residual
    return;
  }
  kernels_.norm(out, residual, x.norm.weight, x.norm.bias, x.norm.spec.eps, x.norm.spec.kind,
                x.residual.cols);
}

void CpuBackend::norm(View out, View x, const Norm& norm) {
  each_row(out, [&](std::int64_t row) { add_and_norm(out.row(row), {x, {}, norm}, row); });
}

void CpuBackend::add_norm(View out, View residual, View x, const Norm& norm) {
  each_row(out, [&](std::int64_t row) { add_and_norm(out.row(row), {residual, x, norm}, row); });
}

void CpuBackend::norm_heads(View x, const Norm& norm, std::int64_t width) {
  each_row(x, [&](std::int64_t row) {
    for (std::int64_t first = 0; first < x.cols; first += width) {
      float* head = x.row(row) + first;
      kernels_.norm(head, head, norm.weight, norm.bias, norm.spec.eps, norm.spec.kind, width);
    }
  });
}

void CpuBackend::scale(View x, float factor, float cap) {
  each_row(x, [&](std::int64_t row) { kernels_.scale(x.row(row), factor, cap, x.cols); });
}

void CpuBackend::gated_activation(View out, View x, Activation activation, bool gated) {
  each_row(out, [&](std::int64_t row) {
    const float* first = x.row(row);
    kernels_.activate(out.row(row), gated ? first : nullptr, gated ? first + out.cols : first,
                      activation, out.cols);
  });
}

void CpuBackend::take_rows(View out, View x, const std::int32_t* rows) {
  for (std::int64_t i = 0; i < out.rows; ++i) std::copy_n(x.row(rows[i]), out.cols, out.row(i));
}

}  // namespace octavo::cpu

namespace octavo {

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options) {
  return std::make_unique<cpu::CpuBackend>(options.num_threads, options.isa, options.group);
}

}  // namespace octavo

// The modules octavo._native and octavo._native_ops, in one library, since they share the core:
// python/octavo/_native_ops.py says how Python finds the second. Their .pyi say what they hold.

#include <pthread.h>

#include <system_error>

#include "bindings/bindings.h"
#include "core/backend.h"
#include "core/gguf_blocks.h"
#include "cpu/kernels.h"
#include "cpu/measure.h"
#include "cpu/platform.h"
#include "cuda/devices.h"

namespace octavo::bindings {

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return text("gcc ", __GNUC__, ".", __GNUC_MINOR__, ".", __GNUC_PATCHLEVEL__);
#else
  return "unknown";
#endif
}

// A GPU, without the library for products, which takes its time to open.
std::unique_ptr<Backend> measured(const std::string& device) {
  BackendOptions options;
  options.deterministic = true;
  return make_backend(device, options);
}

double measure_bandwidth(int num_threads, double seconds, double num_bytes,
                         const std::string& device) {
  return device == "cpu"
             ? cpu::measure_bandwidth(num_threads, seconds, static_cast<std::size_t>(num_bytes))
             : measured(device)->measure_bandwidth(seconds, num_bytes);
}

double measure_flops(int num_threads, const std::string& isa, double seconds,
                     const std::string& device) {
  return device == "cpu" ? cpu::measure_flops(num_threads, isa, seconds)
                         : measured(device)->measure_flops(seconds);
}

// As octavo.reference.quantization names the two.
std::string grouped_activations(const std::string& isa) {
  return cpu::kernels_for(isa).groups_take_bf16 ? "bf16" : "whole";
}

// Writes codes and scales (both as bytes) and zero points of blocks: a row of each for every block.
void convert_gguf_blocks(const std::string& kind, const Array2<std::uint8_t>& blocks,
                         const OutArray2<std::uint8_t>& codes,
                         const OutArray2<std::uint8_t>& scales,
                         const std::optional<OutArray2<float>>& zeros) {
  const BlockType* type = find_block_type(kind.c_str());
  require(type, "kind is \"", kind, "\"; expected Q4_0, Q8_0, Q4_K, Q5_K or Q6_K");
  const std::size_t count = blocks.shape(0);
  const auto check = [&](const char* what, const auto& array, std::int64_t width) {
    require(array.shape(0) == count && static_cast<std::int64_t>(array.shape(1)) == width, what,
            " is (", array.shape(0), ", ", array.shape(1), "); expected (", count, ", ", width,
            ") of ", kind);
  };
  check("blocks", blocks, type->bytes);
  check("codes", codes, type->code_bytes());
  check("scales", scales, type->scale_bytes());
  require(zeros.has_value() == type->has_zeros, "zeros go with Q4_K");
  if (zeros) check("zeros", *zeros, type->groups());
  const nb::gil_scoped_release unlocked;
  convert_blocks(*type, blocks.data(), static_cast<std::int64_t>(count),
                 {codes.data(), scales.data(), zeros ? zeros->data() : nullptr});
}

// Scales, and zero points or None.
nb::object search_scales(const Array2<float>& x, const std::vector<float>& candidates,
                         const std::vector<float>& levels, bool has_zeros,
                         const std::optional<Array2<float>>& shares, const std::string& isa) {
  const std::size_t members = x.shape(0), groups = x.shape(1);
  require(members >= 1, "x has no members");
  require(levels.empty() || levels.size() == 16, "there are ", levels.size(),
          " levels; expected 16, or none");
  require(!shares || (shares->shape(0) == members && shares->shape(1) == groups),
          "shares have another shape than x");
  std::vector<float> scales(groups), zeros(has_zeros ? groups : 0);
  {
    const nb::gil_scoped_release unlocked;
    cpu::ScaleTask task;
    task.x = x.data();
    task.shares = shares ? shares->data() : nullptr;
    task.members = static_cast<std::int64_t>(members);
    task.groups = static_cast<std::int64_t>(groups);
    task.levels = levels.empty() ? nullptr : levels.data();
    task.candidates = candidates.data();
    task.num_candidates = static_cast<std::int64_t>(candidates.size());
    task.scales = scales.data();
    task.zeros = has_zeros ? zeros.data() : nullptr;
    cpu::kernels_for(isa).search_scales(task);
  }
  const nb::object found = has_zeros ? to_numpy(std::move(zeros)) : nb::none();
  return nb::make_tuple(to_numpy(std::move(scales)), found);
}

// What the process may use, as the system's folders say; others than the real ones are for tests.
void bind_limits(nb::module_& module) {
  const auto define = [&](const char* name, auto&& ask) {
    module.def(
        name,
        [=](const std::string& proc, const std::string& cgroup) {
          return ask(cpu::SystemFolders{proc, cgroup});
        },
        nb::arg("proc") = "/proc", nb::arg("cgroup") = "/sys/fs/cgroup");
  };
  define("physical_cores", [](const auto& folders) { return cpu::physical_cores(folders); });
  define("cpu_quota", [](const auto& folders) { return cpu::cpu_quota(folders); });
  module.def(
      "available_memory",
      [](const std::string& proc, const std::string& cgroup, std::int64_t reserved) {
        return cpu::available_memory(cpu::SystemFolders{proc, cgroup}, reserved);
      },
      nb::arg("proc") = "/proc", nb::arg("cgroup") = "/sys/fs/cgroup", nb::arg("reserved") = 0);
}

// A thread that cannot be started lacks memory for its stack, or there are too many of them.
void translate_thread_error(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const std::system_error& error) {
    if (error.code() != std::errc::resource_unavailable_try_again) throw;
    PyErr_SetString(PyExc_MemoryError,
                    "a thread could not be started: there is no memory for its stack, or the user "
                    "has too many threads (see `ulimit -v` and `ulimit -u`)");
  }
}

nb::dict build_info() {
  nb::dict info;
  info["compiler"] = compiler();
  info["cuda"] = cuda::is_built();
#ifdef OCTAVO_EMULATE_CUDA
  info["cuda_emulated"] = true;
#else
  info["cuda_emulated"] = false;
#endif
  info["num_devices"] = cuda::num_devices();
  const cuda::DeviceInfo device = cuda::device_info();
  info["device_name"] = device.name;
  info["cuda_runtime"] = device.runtime;
  info["cuda_driver"] = device.driver;
  info["products"] = device.products;
  info["collectives"] = device.collectives;
  info["isas"] = cpu::compiled_isas();
  info["isa"] = cpu::available_isas().back();
  info["physical_cores"] = cpu::physical_cores();
  return info;
}

}  // namespace

}  // namespace octavo::bindings

NB_MODULE(_native, module) {
  using namespace octavo::bindings;
  // A forked process keeps what the parent's other threads held: that is not a leak to warn of.
  pthread_atfork(nullptr, nullptr, [] { nb::set_leak_warnings(false); });
  nb::register_exception_translator(translate_thread_error);
  module.def("build_info", &build_info);
  module.def("available_devices", &octavo::available_devices);
  module.def("available_isas", &octavo::cpu::available_isas);
  module.def("grouped_activations", &grouped_activations, nb::arg("isa") = "auto");
  module.def("measure_bandwidth", &measure_bandwidth, nb::arg("num_threads") = 0,
             nb::arg("seconds") = 1.0, nb::arg("num_bytes") = 0, nb::arg("device") = "cpu",
             nb::call_guard<nb::gil_scoped_release>());
  module.def("measure_flops", &measure_flops, nb::arg("num_threads") = 0, nb::arg("isa") = "auto",
             nb::arg("seconds") = 0.5, nb::arg("device") = "cpu",
             nb::call_guard<nb::gil_scoped_release>());
  module.def("convert_gguf_blocks", &convert_gguf_blocks, nb::arg("kind"), nb::arg("blocks"),
             nb::arg("codes"), nb::arg("scales"), nb::arg("zeros").none());
  module.def("search_scales", &search_scales, nb::arg("x"), nb::arg("candidates"),
             nb::arg("levels"), nb::arg("has_zeros"), nb::arg("shares").none(),
             nb::arg("isa") = "auto");
  bind_limits(module);
  bind_runtime(module);
}

NB_MODULE(_native_ops, module) {
  using namespace octavo::bindings;
  bind_ops(module);
  bind_op_bench(module);
}

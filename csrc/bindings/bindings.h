// What the binding files share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/sampling_row.h"
#include "core/spec.h"
#include "core/text.h"

namespace octavo::bindings {

namespace nb = nanobind;

// Arrays come in as C-contiguous host memory of exactly the right type; nothing is converted
// silently, since the copy may be a gigabyte.
template <class T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using OutArray2 = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // to be written
template <class T>
using Array3 = nb::ndarray<const T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

template <class T, class Array>
std::vector<T> to_vector(const Array& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

// Hands a vector over to NumPy without copying it.
template <class T>
nb::object to_numpy(std::vector<T> values, std::vector<std::size_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(owned->data(), shape.size(), shape.data(), owner));
}

template <class T>
nb::object to_numpy(std::vector<T> values) {
  const std::size_t size = values.size();
  return to_numpy(std::move(values), {size});
}

// Makes an object that has threads. In a forked process it is never destroyed: the destructor would
// wait for threads that do not exist there.
template <class T, class... Arguments>
std::shared_ptr<T> make_with_threads(Arguments... arguments) {
  return {new T(arguments...), [process = getpid()](T* made) {
            if (getpid() != process) return;
            // Its threads may wait for another rank, of which a Python thread has yet to hear.
            nb::gil_scoped_release released;
            delete made;
          }};
}

ModelSpec model_spec(nb::handle spec);                     // from octavo.models.spec.ModelSpec
RuntimeOptions runtime_options(nb::handle options);        // from octavo.config.RuntimeOptions
WeightFormat weight_format(nb::handle format);             // from octavo.models.spec.WeightFormat
std::vector<SamplingRow> sampling_rows(nb::handle array);  // of SAMPLING_ROW
NormKind norm_kind(const std::string& name);
Activation activation(const std::string& name);

void bind_runtime(nb::module_& module);
void bind_op_bench(nb::module_& module);
void bind_ops(nb::module_& module);

}  // namespace octavo::bindings

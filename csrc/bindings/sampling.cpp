// Rows of sampling options, as NumPy has them: arrays of octavo.reference.sampling.SAMPLING_ROW.

#include "core/sampling_row.h"

#include <cstring>

#include "bindings/bindings.h"

namespace octavo::bindings {

namespace {

constexpr const char* kExpected = "an array of octavo.reference.sampling.SAMPLING_ROW";

std::string layout_here() {
  std::string layout;
  for (const SamplingField& field : kSamplingFields)
    append(layout, text(field.name, " ", field.type, " at ", field.offset, ", "));
  return layout + text(sizeof(SamplingRow), " bytes in all");
}

std::string layout_of(nb::handle dtype) {
  const nb::object names = dtype.attr("names");
  if (names.is_none()) return nb::str(dtype).c_str();
  std::string layout;
  for (const nb::handle name : names) {
    const nb::object field = dtype.attr("fields")[name];
    const auto offset = nb::cast<std::int64_t>(field[1]);
    append(layout, text(nb::str(name).c_str(), " ", nb::str(field[0].attr("str")).c_str(), " at ",
                        offset, ", "));
  }
  return layout + text(nb::cast<std::int64_t>(dtype.attr("itemsize")), " bytes in all");
}

// The two definitions of a row, there and here, must agree to the byte.
void check_dtype(nb::handle dtype) {
  static PyObject* right = nullptr;  // kept: NumPy hands the same object out again and again
  if (dtype.ptr() == right) return;
  const std::string given = layout_of(dtype), expected = layout_here();
  require(given == expected, "sampling is an array of (", given, "); expected ", kExpected, ", (",
          expected, ")");
  Py_XDECREF(right);
  right = dtype.inc_ref().ptr();
}

}  // namespace

std::vector<SamplingRow> sampling_rows(nb::handle array) {
  require(nb::hasattr(array, "dtype"), "sampling is ", nb::str(array.type()).c_str(), "; expected ",
          kExpected);
  check_dtype(array.attr("dtype"));
  Py_buffer buffer;
  if (PyObject_GetBuffer(array.ptr(), &buffer, PyBUF_STRIDES) != 0) nb::raise_python_error();
  const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> released(&buffer, &PyBuffer_Release);
  require(buffer.ndim == 1 && (buffer.shape[0] <= 1 || buffer.strides[0] == buffer.itemsize),
          "sampling has ", buffer.ndim,
          " axes, or gaps between its rows; expected one axis and none");
  std::vector<SamplingRow> rows(static_cast<std::size_t>(buffer.shape[0]));
  if (!rows.empty()) std::memcpy(rows.data(), buffer.buf, rows.size() * sizeof(SamplingRow));
  return rows;
}

}  // namespace octavo::bindings

// Arrays on their way to a device and back: what the ops for tests and benchmarks are made with.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "core/backend.h"

namespace octavo::bindings {

class OpsDevice {
 protected:
  // row_gap: numbers behind every row of every matrix. No op may write them, nor depend on them.
  OpsDevice(const std::string& device, const BackendOptions& options, std::int64_t row_gap)
      : backend_(make_backend(device, options)), row_gap_(row_gap) {
    require(row_gap >= 0, "row_gap is ", row_gap, "; expected 0 or more");
  }

  using Device = Buffer;
  struct Matrix {
    Buffer memory;
    View view;
  };
  using CodeArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  struct NormArrays {
    Buffer weight, bias;
    Norm norm;
  };

  template <class Array>
  static std::int64_t size(const Array& array) {
    return static_cast<std::int64_t>(array.size());
  }

  template <class T>
  Device up_vector(const std::vector<T>& values) {
    Device memory(backend_.get(), values.size() * sizeof(T));
    backend_->upload(memory.data(), values.data(), values.size() * sizeof(T));
    return memory;
  }
  template <class T>
  Device up(const Array1<T>& array) {
    return up_vector(to_vector<T>(array));
  }

  template <class T>
  std::vector<T> down_vector(const Device& memory) {
    std::vector<T> values(memory.bytes() / sizeof(T));
    backend_->sync();
    backend_->download(values.data(), memory.data(), memory.bytes());
    return values;
  }

  Matrix matrix(std::int64_t rows, std::int64_t cols, DType dtype = DType::f32) {
    Matrix result;
    result.view = {nullptr, rows, cols, cols + row_gap_, dtype};
    const auto bytes = static_cast<std::size_t>(rows * result.view.stride * bits_of(dtype) / 8);
    result.memory = Buffer(backend_.get(), bytes);
    result.view.data = result.memory.data();
    if (row_gap_ == 0) return result;
    const std::vector<unsigned char> gaps(bytes, kGap);  // every number a NaN
    backend_->upload(result.memory.data(), gaps.data(), bytes);
    return result;
  }
  // What the ops keep in the device's own format.
  Matrix activations(std::int64_t rows, std::int64_t cols) {
    return matrix(rows, cols, backend_->activation_dtype());
  }

  // Any array as a matrix: the first axis stays, the others become columns.
  template <class Array>
  Matrix up_matrix(const Array& array, DType dtype = DType::f32) {
    const auto rows = static_cast<std::int64_t>(array.shape(0));
    Matrix result = matrix(rows, rows ? size(array) / rows : 0, dtype);
    put(result.view, array.data());
    return result;
  }
  Matrix up(const Array2<float>& array) { return up_matrix(array); }
  template <class Array>
  Matrix up_activations(const Array& array) {
    return up_matrix(array, backend_->activation_dtype());
  }

  void put(View view, const float* values) {
    std::vector<unsigned char> row_bytes(view.row_size());
    for (std::int64_t row = 0; row < view.rows; ++row) {
      for (std::int64_t col = 0; col < view.cols; ++col)
        store_float(row_bytes.data(), view.dtype, col, values[row * view.cols + col]);
      backend_->upload(view.row_bytes(row), row_bytes.data(), row_bytes.size());
    }
  }

  std::vector<float> get(View view) {
    std::vector<float> values;
    std::vector<unsigned char> row_bytes(view.row_size());
    backend_->sync();
    for (std::int64_t row = 0; row < view.rows; ++row) {
      backend_->download(row_bytes.data(), view.row_bytes(row), row_bytes.size());
      for (std::int64_t col = 0; col < view.cols; ++col)
        values.push_back(load_float(row_bytes.data(), view.dtype, col));
    }
    return values;
  }

  nb::object down(const Matrix& matrix) {
    check_gaps(matrix);
    return to_numpy(get(matrix.view), {static_cast<std::size_t>(matrix.view.rows),
                                       static_cast<std::size_t>(matrix.view.cols)});
  }

  Linear pack(const Array2<float>& weight, const std::string& dtype, bool with_bias = false) {
    const auto outputs = static_cast<std::int64_t>(weight.shape(0));
    const auto inputs = static_cast<std::int64_t>(weight.shape(1));
    Linear linear = backend_->make_linear(outputs, inputs, parse_dtype(dtype, "dtype"), with_bias);
    backend_->pack_rows(linear, 0, {weight.data(), DType::f32, outputs, inputs});
    return linear;
  }

  // For each expert a matrix (outputs, inputs of `like`), to be filled by pack_experts.
  Linear make_experts(std::int64_t outputs, const Array3<float>& like, const std::string& dtype) {
    return backend_->make_linear(outputs, static_cast<std::int64_t>(like.shape(2)),
                                 parse_dtype(dtype, "dtype"), false,
                                 static_cast<std::int64_t>(like.shape(0)));
  }
  // Rows of every expert's matrix, from first_row on.
  void pack_experts(Linear& linear, std::int64_t first_row, const Array3<float>& rows) {
    const auto count = static_cast<std::int64_t>(rows.shape(1));
    for (std::int64_t expert = 0; expert < linear.count; ++expert)
      backend_->pack_rows(
          linear, expert * linear.pitch + first_row,
          {rows.data() + expert * count * linear.inputs, DType::f32, count, linear.inputs});
  }

  // codes: int8 (outputs, inputs), or int4 as uint8 (outputs, inputs / 2); scales, zeros: (outputs,
  // groups).
  Linear pack_quantized(std::int64_t inputs, const CodeArray& codes, const Array2<float>& scales,
                        nb::handle format_spec, const std::optional<Array2<float>>& zeros,
                        bool with_bias) {
    const WeightFormat format = weight_format(format_spec);
    require(format.is_quantized(), "format is ", name(format.dtype), "; expected int8 or int4");
    const auto outputs = static_cast<std::int64_t>(codes.shape(0));
    const std::int64_t row_bytes = format.dtype == DType::int4 ? (inputs + 1) / 2 : inputs;
    require(codes.itemsize() == 1 && static_cast<std::int64_t>(codes.shape(1)) == row_bytes,
            "codes has ", codes.shape(1), " columns; expected ", row_bytes, " of one byte");
    const std::int64_t groups = format.groups(inputs);
    const auto check_groups = [&](const Array2<float>& array, const char* what) {
      require(size(array) == outputs * groups, what, " has ", size(array), " entries; expected ",
              outputs, " x ", groups);
    };
    check_groups(scales, "scales");
    require(zeros.has_value() == format.has_zeros, "zeros go with has_zeros");
    Linear packed = backend_->make_linear(outputs, inputs, format, with_bias);
    backend_->pack_rows(packed, 0, {codes.data(), format.dtype, outputs, inputs});
    backend_->pack_scales(packed, 0, outputs, scales.data());
    if (zeros) {
      check_groups(*zeros, "zeros");
      backend_->pack_zeros(packed, 0, outputs, zeros->data());
    }
    return packed;
  }

  NormArrays norm_arrays(const Array1<float>& weight, const std::optional<Array1<float>>& bias,
                         float eps, const std::string& kind, std::int64_t width) {
    require(size(weight) == width && (!bias || size(*bias) == width),
            "weight and bias need one entry a column, ", width);
    NormArrays arrays;
    arrays.weight = up(weight);
    if (bias) arrays.bias = up(*bias);
    arrays.norm.spec = {norm_kind(kind), eps, bias.has_value()};
    arrays.norm.weight = arrays.weight.as<float>();
    arrays.norm.bias = arrays.bias.as<float>();
    return arrays;
  }

  // A KV layer with room for num_slots tokens.
  struct Cache {
    Buffer memory;
    KvLayer layer;
  };
  Cache cache(const LayerSpec& spec, std::int64_t num_slots, std::int64_t block_size,
              const std::string& kv_dtype) {
    require(block_size >= 16 && block_size % 16 == 0, "block_size is ", block_size,
            "; expected a multiple of 16");
    Cache result;
    KvLayer& layer = result.layer;
    layer.dtype = parse_dtype(kv_dtype, "kv_dtype");
    require(layer.dtype != DType::int4, "kv_dtype is \"", kv_dtype,
            "\"; expected f32, bf16, f16 or int8");
    layer.num_blocks = (num_slots + block_size - 1) / block_size;
    layer.block_size = block_size;
    layer.num_kv_heads = spec.num_kv_heads;
    layer.head_dim = spec.head_dim;
    layer.block_bytes = backend_->kv_block_bytes(spec, layer.dtype, block_size);
    result.memory =
        Buffer(backend_.get(), static_cast<std::size_t>(layer.num_blocks * layer.block_bytes));
    layer.data = result.memory.data();
    return result;
  }

  static LayerSpec heads_of(const Array3<float>& q, const Array3<float>& k) {
    LayerSpec spec;
    spec.num_heads = static_cast<std::int64_t>(q.shape(1));
    spec.num_kv_heads = static_cast<std::int64_t>(k.shape(1));
    spec.head_dim = static_cast<std::int64_t>(q.shape(2));
    require(spec.num_kv_heads >= 1 && spec.num_heads % spec.num_kv_heads == 0, "q has ",
            spec.num_heads, " heads; expected a multiple of k's ", spec.num_kv_heads);
    return spec;
  }

  // q, k and v side by side in one matrix, as a fused projection leaves them.
  Matrix fuse(const Array3<float>& q, const Array3<float>& k, const Array3<float>& v,
              const LayerSpec& spec) {
    Matrix fused = activations(static_cast<std::int64_t>(q.shape(0)), spec.qkv_size());
    put(fused.view.columns(0, spec.q_size()), q.data());
    put(fused.view.columns(spec.q_size(), spec.kv_size()), k.data());
    put(fused.view.columns(spec.q_size() + spec.kv_size(), spec.kv_size()), v.data());
    return fused;
  }

  static constexpr unsigned char kGap = 0xff;

  void check_gaps(const Matrix& matrix) {
    std::vector<unsigned char> bytes(matrix.memory.bytes());
    backend_->sync();
    backend_->download(bytes.data(), matrix.memory.data(), row_gap_ ? bytes.size() : 0);
    const std::size_t row_bytes = matrix.view.row_size();
    const std::size_t stride =
        matrix.view.rows ? bytes.size() / static_cast<std::size_t>(matrix.view.rows) : 0;
    for (std::size_t at = 0; row_gap_ && at < bytes.size(); ++at) {
      if (at % stride >= row_bytes && bytes[at] != kGap)
        throw std::runtime_error(text("an op wrote behind row ", at / stride, " of a matrix"));
    }
  }

  std::unique_ptr<Backend> backend_;
  std::int64_t row_gap_;
};

}  // namespace octavo::bindings

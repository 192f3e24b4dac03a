// Packing weights: rows as they lie in host memory -> the layout of weights.cuh.
//
// The rows are copied to the device as they are, a piece at a time, and rearranged there. Each
// thread makes 16 bytes of the packed matrix (32 of float32): it reads what they are made of and
// writes them at once. The padding of a row was zeroed with the buffer.

#include <algorithm>

#include "cuda/backend.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/layout/weights.cuh"

namespace octavo::cuda {

namespace {

constexpr std::size_t kPieceBytes = std::size_t{32} << 20;
constexpr int kThreads = 256;

// Rows that were copied: plain numbers, int8 codes, or two int4 codes a byte.
struct Source {
  const void* data;
  DType dtype;
  int rows, cols;
};

// For a loop over `items`, all threads together: enough blocks to fill any device.
LaunchShape shape_for(const Stream& stream, long long items) {
  return {dims(std::min(ceil_div(items, kThreads), 16LL * stream.num_processors())), kThreads};
}
// Calls body(item) for those of a thread.
template <class Body>
OCTAVO_DEVICE void for_each_item(long long items, Body&& body) {
  const long long step = static_cast<long long>(gridDim.x) * kThreads;
  for (long long item = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x; item < items;
       item += step)
    body(item);
}

OCTAVO_DEVICE int source_code(const Source& source, long long row, int input) {
  if (input >= source.cols) return 0;
  const auto* bytes = static_cast<const unsigned char*>(source.data);
  if (source.dtype == DType::int8) return bytes[row * source.cols + input];
  const long long row_bytes = (source.cols + 1) / 2;
  return bytes[row * row_bytes + input / 2] >> input % 2 * 4 & 15;
}

// to: the first packed row. A thread takes 8 numbers.
__global__ void pack_numbers(unsigned char* to, long long row_bytes, DType to_dtype,
                             Source source) {
  const int pieces = ceil_div(source.cols, 8);
  for_each_item(static_cast<long long>(source.rows) * pieces, [&](long long item) {
    const long long row = item / pieces;
    const int first = static_cast<int>(item % pieces) * 8;
    for (int i = first; i < first + 8 && i < source.cols; ++i) {
      const float value = read_number(source.data, source.dtype, row * source.cols + i);
      write_number(to + row * row_bytes, to_dtype, i, value);
    }
  });
}

// A thread takes 16 bytes: lane t's part of a unit of a row.
__global__ void pack_codes(unsigned char* to, long long row_bytes, Codes codes, int units,
                           Source source) {
  const int bits = has_bytes(codes) ? 8 : 4;
  const int per_block = bits;  // bytes a lane and block
  for_each_item(static_cast<long long>(source.rows) * units * 4, [&](long long item) {
    const int t = static_cast<int>(item % 4), unit = static_cast<int>(item / 4 % units);
    const long long row = item / 4 / units;
    std::uint32_t words[4] = {};
    for (int block = 0; block < 16 / per_block; ++block) {
      const int first = (unit * (16 / per_block) + block) * kBlock + 8 * t;
      for (int j = 0; j < 8; ++j) {
        const int place = place_of(codes, first + j) % (128 / bits);  // in the 16 bytes
        const auto code = static_cast<std::uint32_t>(source_code(source, row, first + j));
        words[place * bits / 32] |= code << place * bits % 32;
      }
    }
    store_16(to + row * row_bytes + unit * kUnitBytes + 16 * t,
             uint4{words[0], words[1], words[2], words[3]});
  });
}

// Rounds rows of numbers to int8: 127 steps of the row's largest magnitude, the scale in bf16. A
// block a row. octavo.reference.quantization.round_to_int8; a NaN becomes -127.
__global__ void round_to_int8(unsigned char* to, long long row_bytes, float* scales,
                              Source source) {
  auto* largest_of_warp = reinterpret_cast<float*>(shared_memory());
  const long long row = blockIdx.x;
  float largest = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < source.cols; i += kThreads)
    largest = fmaxf(largest, fabsf(read_number(source.data, source.dtype, row * source.cols + i)));
  largest = block_max(largest, largest_of_warp);
  float scale = to_float(from_float<Bf16>(divide_rn(largest, 127.0f)));
  if (!(scale > 0.0f)) scale = 1.0f;
  if (threadIdx.x == 0) scales[row] = scale;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it becomes a whole number
  for (int i = static_cast<int>(threadIdx.x); i < source.cols; i += kThreads) {
    const float value = read_number(source.data, source.dtype, row * source.cols + i);
    const float steps = add_rn(add_rn(divide_rn(value, scale), kRound), -kRound);
    const float kept = steps > 127.0f ? 127.0f : steps >= -127.0f ? steps : -127.0f;
    const auto code = static_cast<std::int8_t>(static_cast<int>(kept));
    to[row * row_bytes + place_of(Codes::int8, i)] = static_cast<unsigned char>(code);
  }
}

Codes codes_of(const WeightFormat& format) {
  switch (format.dtype) {
    case DType::f32:
      return Codes::f32;
    case DType::f16:
      return Codes::f16;
    case DType::bf16:
      return Codes::bf16;
    case DType::int8:
      return format.is_grouped() ? Codes::int8_grouped : Codes::int8;
    case DType::int4:
      break;
  }
  return format.has_own_levels() ? Codes::int4_levels : Codes::int4;
}

int row_units(const WeightFormat& format, std::int64_t inputs) {
  const std::int64_t bits = bits_of(format.dtype);
  return static_cast<int>((inputs * bits + 8 * kUnitBytes - 1) / (8 * kUnitBytes));
}

// Log2 of the blocks that share a scale. Groups that are no power of two are kept as groups of one
// block.
int scale_shift(const WeightFormat& format) {
  int shift = 0;
  while ((std::int64_t{kBlock} << shift) < format.group_size) ++shift;
  return std::int64_t{kBlock} << shift == format.group_size ? shift : 0;
}

int scales_per_row(const WeightFormat& format, int units) {
  const int blocks = blocks_per_unit(codes_of(format)) * units;
  return round_up(ceil_div(blocks, 1 << scale_shift(format)), 8);  // whole 16 bytes
}

void pack_piece(Stream& stream, const Matrix& matrix, std::int64_t first_row,
                const Source& source) {
  auto* to = const_cast<unsigned char*>(matrix.row(static_cast<int>(first_row)));
  const bool is_float = source.dtype != DType::int8 && source.dtype != DType::int4;
  if (is_float && matrix.codes == Codes::int8) {
    auto* scales = const_cast<float*>(matrix.output_scales) + first_row;
    const LaunchShape shape{dims(source.rows), kThreads, kThreads / kWarp * sizeof(float)};
    launch(stream, "round_to_int8", shape, round_to_int8, to, matrix.row_bytes, scales, source);
  } else if (is_float) {
    const DType dtype = matrix.codes == Codes::f32   ? DType::f32
                        : matrix.codes == Codes::f16 ? DType::f16
                                                     : DType::bf16;
    const long long items = static_cast<long long>(source.rows) * ceil_div(source.cols, 8);
    launch(stream, "pack_numbers", shape_for(stream, items), pack_numbers, to, matrix.row_bytes,
           dtype, source);
  } else {
    const long long items = static_cast<long long>(source.rows) * matrix.units * 4;
    launch(stream, "pack_codes", shape_for(stream, items), pack_codes, to, matrix.row_bytes,
           matrix.codes, matrix.units, source);
  }
}

// values: (rows, groups) of the host -> one 16- or 32-bit number each, in the order of the kernels,
// after `change`.
template <class Change>
void pack_grouped(Stream& stream, Linear& linear, const Buffer& to, DType dtype,
                  std::int64_t first_row, std::int64_t rows, const float* values, Change&& change) {
  const WeightFormat& format = linear.format;
  const std::int64_t groups = format.groups(linear.inputs);
  const std::int64_t per_row = scales_per_row(format, row_units(format, linear.inputs));
  const std::int64_t bytes = bits_of(dtype) / 8;
  std::vector<unsigned char> packed(static_cast<std::size_t>(rows * per_row * bytes));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < per_row; ++i) {
      const std::int64_t group = (i << scale_shift(format)) * kBlock / format.group_size;
      if (group >= groups) break;
      store_float(packed.data(), dtype, row * per_row + i, change(values[row * groups + group]));
    }
  }
  check(cudaMemcpyAsync(to.as<unsigned char>() + first_row * per_row * bytes, packed.data(),
                        packed.size(), cudaMemcpyHostToDevice, stream.handle()),
        "copying scales to the device");
  stream.sync();
}

}  // namespace

Matrix matrix_of(const Linear& linear) {
  const WeightFormat& format = linear.format;
  Matrix matrix;
  matrix.data = linear.weight.as<unsigned char>();
  if (format.is_grouped())
    matrix.scales = linear.scales.data();
  else
    matrix.output_scales = linear.scales.as<float>();
  matrix.zeros = linear.zeros.data();
  matrix.bias = linear.bias.as<float>();
  matrix.units = row_units(format, linear.inputs);
  matrix.row_bytes = static_cast<long long>(matrix.units) * kUnitBytes;
  matrix.outputs = static_cast<int>(linear.outputs);
  matrix.inputs = static_cast<int>(linear.inputs);
  matrix.codes = codes_of(format);
  matrix.scale_dtype = format.scale_dtype;
  if (format.is_grouped()) {
    matrix.scale_shift = scale_shift(format);
    matrix.scales_per_row = scales_per_row(format, matrix.units);
  }
  for (std::size_t i = 0; i < 16; ++i) {
    const auto level = static_cast<std::uint8_t>(format.levels[i]);
    matrix.levels.words[i / 4] |= static_cast<std::uint32_t>(level) << i % 4 * 8;
  }
  return matrix;
}

Linear CudaBackend::make_linear(std::int64_t outputs, std::int64_t inputs,
                                const WeightFormat& format, bool with_bias, std::int64_t count) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  require(outputs < kMost && inputs < kMost, "a matrix is ", outputs, " x ", inputs,
          "; expected less than 2^31 either way");
  require(format.group_size % kBlock == 0 && (format.is_grouped() || format.dtype != DType::int4),
          "group_size is ", format.group_size, "; expected a multiple of ", kBlock);
  Linear linear;
  linear.outputs = outputs;
  linear.inputs = inputs;
  linear.count = count;
  linear.pitch = outputs;
  linear.format = format;
  // How they are kept from here on.
  if (options_.dtype == DType::f32)
    linear.format.scale_dtype = DType::f32;
  else if (format.scale_dtype != DType::bf16)
    linear.format.scale_dtype = DType::f16;
  const Matrix matrix = matrix_of(linear);
  require(128 * matrix.row_bytes < kMost, "a matrix of ", outputs, " x ", inputs, " is too large");
  const auto buffer = [&](std::int64_t bytes) {
    return Buffer(this, static_cast<std::size_t>(bytes));
  };
  const std::int64_t rows = count * outputs;
  linear.weight = buffer(rows * matrix.row_bytes);
  const std::int64_t per_scale = bits_of(linear.format.scale_dtype) / 8;
  if (format.is_grouped())
    linear.scales = buffer(rows * matrix.scales_per_row * per_scale);
  else if (format.is_quantized())
    linear.scales = buffer(rows * 4);
  if (format.has_zeros) linear.zeros = buffer(rows * matrix.scales_per_row * 2);
  if (with_bias) linear.bias = buffer(rows * 4);
  return linear;
}

void CudaBackend::pack_rows(Linear& linear, std::int64_t first_row, const HostMatrix& rows) {
  const DType format = linear.format.dtype;
  const bool is_float = rows.dtype != DType::int8 && rows.dtype != DType::int4;
  require(rows.dtype == format || (is_float && !linear.format.is_grouped()), "a matrix of format ",
          name(format), linear.format.is_grouped() ? " in groups" : "", " does not take ",
          name(rows.dtype), " rows");
  require(rows.cols == linear.inputs && first_row >= 0 &&
              first_row + rows.rows <= linear.count * linear.outputs,
          "rows ", first_row, " to ", first_row + rows.rows, " of ", rows.cols,
          " inputs do not fit ", linear.count, " of ", linear.outputs, " x ", linear.inputs);
  const Matrix matrix = matrix_of(linear);
  const auto row_bytes = static_cast<std::size_t>((rows.cols * bits_of(rows.dtype) + 7) / 8);
  const std::size_t most = row_bytes ? kPieceBytes / row_bytes : kPieceBytes;
  const auto piece_rows = static_cast<std::int64_t>(most ? most : 1);
  for (std::int64_t begin = 0; begin < rows.rows; begin += piece_rows) {
    const std::int64_t count = rows.rows - begin < piece_rows ? rows.rows - begin : piece_rows;
    const std::size_t bytes = static_cast<std::size_t>(count) * row_bytes;
    void* raw = pack_workspace_.get(bytes);
    const auto* from =
        static_cast<const unsigned char*>(rows.data) + static_cast<std::size_t>(begin) * row_bytes;
    check(cudaMemcpyAsync(raw, from, bytes, cudaMemcpyHostToDevice, stream_.handle()),
          "copying weights to the device");
    pack_piece(stream_, matrix, first_row + begin,
               {raw, rows.dtype, static_cast<int>(count), matrix.inputs});
  }
  stream_.sync();  // the caller's memory may go
}

void CudaBackend::pack_scales(Linear& linear, std::int64_t first_row, std::int64_t rows,
                              const float* scales) {
  if (linear.format.is_grouped()) {
    pack_grouped(stream_, linear, linear.scales, linear.format.scale_dtype, first_row, rows, scales,
                 [](float scale) { return scale; });
    return;
  }
  check(cudaMemcpyAsync(linear.scales.as<float>() + first_row, scales,
                        static_cast<std::size_t>(rows) * sizeof(float), cudaMemcpyHostToDevice,
                        stream_.handle()),
        "copying scales to the device");
  stream_.sync();
}

void CudaBackend::pack_zeros(Linear& linear, std::int64_t first_row, std::int64_t rows,
                             const float* zeros) {
  constexpr float kMost = 120.0f;  // 128 + 8 + zero must be a bf16
  const float less = linear.format.has_own_levels() ? 0.0f : 8.0f;
  pack_grouped(stream_, linear, linear.zeros, DType::bf16, first_row, rows, zeros, [&](float zero) {
    require(zero >= -kMost && zero <= kMost && zero == static_cast<float>(static_cast<int>(zero)),
            "a zero point is ", zero, "; expected a whole number from -120 to 120");
    return less + zero;
  });
}

}  // namespace octavo::cuda

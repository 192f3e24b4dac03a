// cuBLASLt through dlopen: the few of its types, numbers and functions that a product needs, after
// NVIDIA's "cuBLAS library" documentation (chapter "Using the cuBLASLt API"), whose application
// binary interface is the same in versions 12 and 13.

#include "cuda/products/cublas.h"

#include <dlfcn.h>
#include <library_types.h>

#include <array>
#include <map>

#include "cuda/products/multiply.h"

namespace octavo::cuda {

#ifdef OCTAVO_EMULATED

namespace {

// In the library's place, for tests of what calls it: a slow kernel of our own, that knows no
// algorithm for an odd number of outputs.
class Emulated : public CublasLt {
 public:
  bool multiply(Stream& stream, View out, View x, const void* weight, std::int64_t weight_stride,
                void*) override {
    if (out.cols % 2) return false;
    Matrix matrix;
    matrix.data = static_cast<const unsigned char*>(weight);
    matrix.row_bytes = 2 * weight_stride;
    matrix.outputs = static_cast<int>(out.cols);
    matrix.inputs = static_cast<int>(x.cols);
    matrix.codes = x.dtype == DType::bf16 ? Codes::bf16 : Codes::f16;
    multiply_any(stream, out, x, matrix);
    return true;
  }
};

}  // namespace

std::unique_ptr<CublasLt> CublasLt::open(Stream&) { return std::make_unique<Emulated>(); }

std::string CublasLt::version() { return "emulated"; }

#else

namespace {

using Status = int;  // cublasStatus_t; 0: well
using Handle = void*;
constexpr int kCompute32F = 68;   // CUBLAS_COMPUTE_32F
constexpr int kTransposeA = 3;    // CUBLASLT_MATMUL_DESC_TRANSA
constexpr int kMaxWorkspace = 1;  // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
constexpr std::array<int, 4> kMinAlignments = {5, 6, 7, 8};  // ..._PREF_MIN_ALIGNMENT_A_BYTES to D
constexpr std::size_t kOldestVersion = 120000;

struct Algorithm {  // cublasLtMatmulAlgo_t
  std::uint64_t data[8];
};
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  std::size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

struct Functions {
  std::size_t (*version)();
  Status (*create)(Handle*);
  Status (*destroy)(Handle);
  Status (*create_product)(Handle*, int compute_type, cudaDataType_t scale_type);
  Status (*set_product)(Handle, int attribute, const void*, std::size_t);
  Status (*destroy_product)(Handle);
  Status (*create_layout)(Handle*, cudaDataType_t, std::uint64_t rows, std::uint64_t cols,
                          std::int64_t stride);
  Status (*destroy_layout)(Handle);
  Status (*create_preference)(Handle*);
  Status (*set_preference)(Handle, int attribute, const void*, std::size_t);
  Status (*destroy_preference)(Handle);
  Status (*find)(Handle, Handle product, Handle a, Handle b, Handle c, Handle d, Handle preference,
                 int wanted, Heuristic*, int* found);
  Status (*multiply)(Handle, Handle product, const void* alpha, const void* a, Handle a_layout,
                     const void* b, Handle b_layout, const void* beta, const void* c,
                     Handle c_layout, void* d, Handle d_layout, const Algorithm*, void* workspace,
                     std::size_t workspace_bytes, cudaStream_t);
};

// One of cuBLASLt's objects; null until `make` went well.
class Object {
 public:
  explicit Object(Status (*destroy)(Handle)) : destroy_(destroy) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() {
    if (handle_) destroy_(handle_);
  }
  Handle* out() { return &handle_; }
  operator Handle() const { return handle_; }

 private:
  Handle handle_ = nullptr;
  Status (*destroy_)(Handle);
};

cudaDataType_t data_type(DType dtype) {
  return dtype == DType::f32 ? CUDA_R_32F : dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_16F;
}

// The largest power of two up to 256 that divides the address.
std::uint32_t alignment_of(const void* address) {
  const auto bits = reinterpret_cast<std::uintptr_t>(address) | 256;
  return static_cast<std::uint32_t>(bits & (~bits + 1));
}

// All that the choice of an algorithm depends on.
using Shape = std::array<std::int64_t, 11>;

class Opened : public CublasLt {
 public:
  Opened(void* library, const Functions& functions, Handle handle)
      : library_(library), functions_(functions), handle_(handle) {}
  ~Opened() override {
    functions_.destroy(handle_);
    dlclose(library_);
  }

  bool multiply(Stream& stream, View out, View x, const void* weight, std::int64_t weight_stride,
                void* workspace) override {
    // In the library's terms, whose matrices are column-major: d (outputs, rows) = a transposed,
    // a (inputs, outputs) being the weights, times b (inputs, rows), x.
    Object product(functions_.destroy_product);
    Object a(functions_.destroy_layout), b(functions_.destroy_layout), d(functions_.destroy_layout);
    constexpr std::int32_t kTranspose = 1;  // CUBLAS_OP_T
    const auto layout = [&](Object& object, DType dtype, std::int64_t rows, std::int64_t cols,
                            std::int64_t stride) {
      return functions_.create_layout(object.out(), data_type(dtype),
                                      static_cast<std::uint64_t>(rows),
                                      static_cast<std::uint64_t>(cols), stride) == 0;
    };
    if (functions_.create_product(product.out(), kCompute32F, CUDA_R_32F) != 0 ||
        functions_.set_product(product, kTransposeA, &kTranspose, sizeof(kTranspose)) != 0 ||
        !layout(a, x.dtype, x.cols, out.cols, weight_stride) ||
        !layout(b, x.dtype, x.cols, x.rows, x.stride) ||
        !layout(d, out.dtype, out.cols, out.rows, out.stride))
      return false;
    const std::array<std::uint32_t, 4> alignments = {
        alignment_of(weight), alignment_of(x.data), alignment_of(out.data), alignment_of(out.data)};
    const Shape shape = {x.rows,
                         x.cols,
                         out.cols,
                         x.stride,
                         out.stride,
                         weight_stride,
                         static_cast<std::int64_t>(x.dtype),
                         static_cast<std::int64_t>(out.dtype),
                         alignments[0],
                         alignments[1],
                         alignments[2]};
    auto known = algorithms_.find(shape);
    if (known == algorithms_.end())
      known = algorithms_.emplace(shape, find(product, a, b, d, alignments)).first;
    if (!known->second) return false;
    const float one = 1.0f, zero = 0.0f;
    const Status status = functions_.multiply(
        handle_, product, &one, weight, a, x.data, b, &zero, out.data, d, out.data, d,
        &known->second->algorithm, workspace, known->second->workspace_bytes, stream.handle());
    if (status != 0) known->second.reset();  // not to be tried again
    if (status == 0) stream.note_launch("cublasLtMatmul");
    return status == 0;
  }

 private:
  // What the library thinks fastest; null where it knows nothing.
  std::unique_ptr<Heuristic> find(Handle product, Handle a, Handle b, Handle d,
                                  const std::array<std::uint32_t, 4>& alignments) {
    Object preference(functions_.destroy_preference);
    constexpr std::uint64_t kMostBytes = kCublasBytes;
    if (functions_.create_preference(preference.out()) != 0 ||
        functions_.set_preference(preference, kMaxWorkspace, &kMostBytes, sizeof(kMostBytes)) != 0)
      return nullptr;
    for (std::size_t i = 0; i < alignments.size(); ++i) {
      if (functions_.set_preference(preference, kMinAlignments[i], &alignments[i],
                                    sizeof(alignments[i])) != 0)
        return nullptr;
    }
    auto best = std::make_unique<Heuristic>();
    int found = 0;
    const Status status =
        functions_.find(handle_, product, a, b, d, d, preference, 1, best.get(), &found);
    return status == 0 && found > 0 && best->state == 0 ? std::move(best) : nullptr;
  }

  void* library_;
  Functions functions_;
  Handle handle_;
  std::map<Shape, std::unique_ptr<Heuristic>> algorithms_;
};

template <class Function>
bool load(void* library, const char* name, Function& to) {
  to = reinterpret_cast<Function>(dlsym(library, name));
  return to != nullptr;
}

bool load_all(void* library, Functions& f) {
  return load(library, "cublasLtGetVersion", f.version) &&
         load(library, "cublasLtCreate", f.create) && load(library, "cublasLtDestroy", f.destroy) &&
         load(library, "cublasLtMatmulDescCreate", f.create_product) &&
         load(library, "cublasLtMatmulDescSetAttribute", f.set_product) &&
         load(library, "cublasLtMatmulDescDestroy", f.destroy_product) &&
         load(library, "cublasLtMatrixLayoutCreate", f.create_layout) &&
         load(library, "cublasLtMatrixLayoutDestroy", f.destroy_layout) &&
         load(library, "cublasLtMatmulPreferenceCreate", f.create_preference) &&
         load(library, "cublasLtMatmulPreferenceSetAttribute", f.set_preference) &&
         load(library, "cublasLtMatmulPreferenceDestroy", f.destroy_preference) &&
         load(library, "cublasLtMatmulAlgoGetHeuristic", f.find) &&
         load(library, "cublasLtMatmul", f.multiply);
}

// The first library that is there and has all that is needed; null where there is none.
void* open_library(Functions& functions) {
  for (const char* name :
       {"libcublasLt.so.13", "libcublasLt.so.12", "/usr/local/cuda/lib64/libcublasLt.so.13",
        "/usr/local/cuda/lib64/libcublasLt.so.12"}) {
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) continue;
    if (load_all(library, functions) && functions.version() >= kOldestVersion) return library;
    dlclose(library);
  }
  return nullptr;
}

}  // namespace

std::unique_ptr<CublasLt> CublasLt::open(Stream& stream) {
  stream.attach_thread();
  Functions functions{};
  void* library = open_library(functions);
  if (!library) return nullptr;
  Handle handle = nullptr;
  if (functions.create(&handle) == 0) return std::make_unique<Opened>(library, functions, handle);
  dlclose(library);
  return nullptr;
}

std::string CublasLt::version() {
  Functions functions{};
  void* library = open_library(functions);
  if (!library) return "";
  const std::size_t number = functions.version();
  dlclose(library);
  return text(number / 10000, ".", number / 100 % 100, ".", number % 100);
}

#endif

}  // namespace octavo::cuda

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

// The library and its functions, each found by its name where it is declared.
class Library {
 private:  // first, since what is below begins with it
  struct Found {
    void* address;
    template <class Function>
    operator Function*() const {
      return reinterpret_cast<Function*>(address);
    }
  };
  Found find_function(const char* name) {
    void* address = dlsym(handle_, name);
    is_complete_ = is_complete_ && address;
    return {address};
  }

  void* handle_;
  bool is_complete_ = true;

 public:
  explicit Library(void* handle) : handle_(handle) {}
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  ~Library() { dlclose(handle_); }

  // The first that is there and has all that is needed; null where there is none.
  static std::unique_ptr<Library> open() {
    for (const char* name :
         {"libcublasLt.so.13", "libcublasLt.so.12", "/usr/local/cuda/lib64/libcublasLt.so.13",
          "/usr/local/cuda/lib64/libcublasLt.so.12"}) {
      void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (!handle) continue;
      auto library = std::make_unique<Library>(handle);
      if (library->is_complete_ && library->version() >= kOldestVersion) return library;
    }
    return nullptr;
  }

  std::size_t (*version)() = find_function("cublasLtGetVersion");
  Status (*create)(Handle*) = find_function("cublasLtCreate");
  Status (*destroy)(Handle) = find_function("cublasLtDestroy");
  Status (*create_product)(Handle*, int compute_type,
                           cudaDataType_t scale_type) = find_function("cublasLtMatmulDescCreate");
  Status (*set_product)(Handle, int attribute, const void*,
                        std::size_t) = find_function("cublasLtMatmulDescSetAttribute");
  Status (*destroy_product)(Handle) = find_function("cublasLtMatmulDescDestroy");
  Status (*create_layout)(Handle*, cudaDataType_t, std::uint64_t rows, std::uint64_t cols,
                          std::int64_t stride) = find_function("cublasLtMatrixLayoutCreate");
  Status (*destroy_layout)(Handle) = find_function("cublasLtMatrixLayoutDestroy");
  Status (*create_preference)(Handle*) = find_function("cublasLtMatmulPreferenceCreate");
  Status (*set_preference)(Handle, int attribute, const void*,
                           std::size_t) = find_function("cublasLtMatmulPreferenceSetAttribute");
  Status (*destroy_preference)(Handle) = find_function("cublasLtMatmulPreferenceDestroy");
  Status (*find)(Handle, Handle product, Handle a, Handle b, Handle c, Handle d, Handle preference,
                 int wanted, Heuristic*,
                 int* found) = find_function("cublasLtMatmulAlgoGetHeuristic");
  Status (*multiply)(Handle, Handle product, const void* alpha, const void* a, Handle a_layout,
                     const void* b, Handle b_layout, const void* beta, const void* c,
                     Handle c_layout, void* d, Handle d_layout, const Algorithm*, void* workspace,
                     std::size_t workspace_bytes, cudaStream_t) = find_function("cublasLtMatmul");
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
  Opened(std::unique_ptr<Library> library, Handle handle)
      : library_(std::move(library)), handle_(handle) {}
  ~Opened() override { library_->destroy(handle_); }

  bool multiply(Stream& stream, View out, View x, const void* weight, std::int64_t weight_stride,
                void* workspace) override {
    // In the library's terms, whose matrices are column-major: d (outputs, rows) = a transposed,
    // a (inputs, outputs) being the weights, times b (inputs, rows), x.
    Object product(library_->destroy_product);
    Object a(library_->destroy_layout), b(library_->destroy_layout), d(library_->destroy_layout);
    constexpr std::int32_t kTranspose = 1;  // CUBLAS_OP_T
    const auto layout = [&](Object& object, DType dtype, std::int64_t rows, std::int64_t cols,
                            std::int64_t stride) {
      return library_->create_layout(object.out(), data_type(dtype),
                                     static_cast<std::uint64_t>(rows),
                                     static_cast<std::uint64_t>(cols), stride) == 0;
    };
    if (library_->create_product(product.out(), kCompute32F, CUDA_R_32F) != 0 ||
        library_->set_product(product, kTransposeA, &kTranspose, sizeof(kTranspose)) != 0 ||
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
    const Status status = library_->multiply(
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
    Object preference(library_->destroy_preference);
    constexpr std::uint64_t kMostBytes = kCublasBytes;
    if (library_->create_preference(preference.out()) != 0 ||
        library_->set_preference(preference, kMaxWorkspace, &kMostBytes, sizeof(kMostBytes)) != 0)
      return nullptr;
    for (std::size_t i = 0; i < alignments.size(); ++i) {
      if (library_->set_preference(preference, kMinAlignments[i], &alignments[i],
                                   sizeof(alignments[i])) != 0)
        return nullptr;
    }
    auto best = std::make_unique<Heuristic>();
    int found = 0;
    const Status status =
        library_->find(handle_, product, a, b, d, d, preference, 1, best.get(), &found);
    return status == 0 && found > 0 && best->state == 0 ? std::move(best) : nullptr;
  }

  std::unique_ptr<Library> library_;
  Handle handle_;
  std::map<Shape, std::unique_ptr<Heuristic>> algorithms_;
};

}  // namespace

std::unique_ptr<CublasLt> CublasLt::open(Stream& stream) {
  stream.attach_thread();
  auto library = Library::open();
  Handle handle = nullptr;
  if (!library || library->create(&handle) != 0) return nullptr;
  return std::make_unique<Opened>(std::move(library), handle);
}

std::string CublasLt::version() {
  const auto library = Library::open();
  if (!library) return "";
  const std::size_t number = library->version();
  return text(number / 10000, ".", number / 100 % 100, ".", number % 100);
}

#endif

}  // namespace octavo::cuda

// NCCL through dlopen: the few of its types, numbers and functions that are needed, after NVIDIA's
// "NCCL documentation" (chapter "NCCL API"), whose application binary interface is that of all
// versions 2.

#include "cuda/device/collectives.h"

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/device/launch.cuh"

namespace octavo::cuda {

#ifdef OCTAVO_EMULATED

namespace {

// In the library's place, for tests: a kernel of one thread that exchanges numbers by way of the
// processes' shared memory.
class Emulated : public Collectives {
 public:
  Emulated(Stream& stream, std::shared_ptr<RankGroup> group)
      : stream_(stream), group_(std::move(group)) {}

  void all_reduce(void* x, std::int64_t count, DType dtype) override {
    queue("emulated_all_reduce", [group = group_, x, count, dtype] {
      for_type("all_reduce", dtype, [&](auto number) {
        using Number = decltype(number);
        auto* numbers = static_cast<Number*>(x);
        std::vector<float> values;
        for (std::int64_t i = 0; i < count; ++i) values.push_back(to_float(numbers[i]));
        group->all_reduce(values.data(), count);
        for (std::int64_t i = 0; i < count; ++i)
          numbers[i] = from_float<Number>(values[static_cast<std::size_t>(i)]);
      });
    });
  }

  void all_gather(void* rows, std::int64_t num_rows, std::size_t bytes,
                  std::size_t stride) override {
    queue("emulated_all_gather", [group = group_, rows, num_rows, bytes, stride] {
      const std::size_t row_bytes = static_cast<std::size_t>(group->size()) * bytes;
      group->all_gather(static_cast<unsigned char*>(rows), num_rows, row_bytes, stride);
    });
  }

  void check() override { group_->check(); }

 private:
  // After a rank has failed there are no results, as with the library; `check` tells.
  template <class Body>
  void queue(const char* name, const Body& body) {
    const auto guarded = [group = group_, body] {
      try {
        body();
      } catch (const std::runtime_error&) {
        if (!group->is_aborted()) throw;
      }
    };
    cuda::check(cuda_emulator::enqueue({name, 1, 1, 0, false}, stream_.handle(), guarded), name);
    stream_.note_launch(name);
  }

  Stream& stream_;
  std::shared_ptr<RankGroup> group_;
};

}  // namespace

std::unique_ptr<Collectives> Collectives::open(Stream& stream, std::shared_ptr<RankGroup> group) {
  return std::make_unique<Emulated>(stream, std::move(group));
}

std::string Collectives::version() { return "emulated"; }

#else

namespace {

using Status = int;  // ncclResult_t; 0: well
using Handle = void*;
struct UniqueId {
  char internal[128];
};
constexpr int kInt8 = 0, kFloat16 = 6, kFloat32 = 7, kBfloat16 = 9;  // ncclDataType_t
constexpr int kSum = 0;                                              // ncclRedOp_t

// Its functions; never closed, since its threads may outlive a model.
class Library {
 public:
  // Null where it is not found, or lacks a function: it may be there the next time.
  static const Library* get() {
    static std::mutex mutex;
    static std::unique_ptr<Library> library;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!library) library = open();
    return library.get();
  }

  Status (*version)(int*) = nullptr;
  Status (*make_id)(UniqueId*) = nullptr;
  Status (*join)(Handle*, int size, UniqueId, int rank) = nullptr;
  Status (*abort)(Handle) = nullptr;
  const char* (*error_text)(Status) = nullptr;
  Status (*all_reduce)(const void* from, void* to, std::size_t count, int type, int op, Handle,
                       cudaStream_t) = nullptr;
  Status (*all_gather)(const void* from, void* to, std::size_t count, int type, Handle,
                       cudaStream_t) = nullptr;
  Status (*begin_group)() = nullptr;
  Status (*end_group)() = nullptr;

 private:
  static std::unique_ptr<Library> open() {
    void* handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!handle) return nullptr;
    auto library = std::make_unique<Library>();
    bool is_complete = true;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
      is_complete = is_complete && function;
    };
    find(library->version, "ncclGetVersion");
    find(library->make_id, "ncclGetUniqueId");
    find(library->join, "ncclCommInitRank");
    find(library->abort, "ncclCommAbort");
    find(library->error_text, "ncclGetErrorString");
    find(library->all_reduce, "ncclAllReduce");
    find(library->all_gather, "ncclAllGather");
    find(library->begin_group, "ncclGroupStart");
    find(library->end_group, "ncclGroupEnd");
    return is_complete ? std::move(library) : nullptr;
  }
};

class Opened : public Collectives {
 public:
  Opened(const Library& library, Stream& stream, std::shared_ptr<RankGroup> group)
      : library_(library), stream_(stream), group_(std::move(group)) {
    UniqueId id{};
    if (group_->rank() == 0) succeed(library_.make_id(&id), "making NCCL's id");
    group_->broadcast(&id, sizeof(id));
    succeed(library_.join(&handle_, static_cast<int>(group_->size()), id,
                          static_cast<int>(group_->rank())),
            "joining the ranks");
    connect();
    watcher_ = std::thread([this] { watch(); });
  }

  ~Opened() override {
    stopping_ = true;
    watcher_.join();
    // Not ncclCommDestroy, which may wait for ranks that have ended before.
    if (!aborted_) library_.abort(handle_);
  }

  void all_reduce(void* x, std::int64_t count, DType dtype) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    group_->check();
    const int type = dtype == DType::f32 ? kFloat32 : dtype == DType::bf16 ? kBfloat16 : kFloat16;
    succeed(library_.all_reduce(x, x, static_cast<std::size_t>(count), type, kSum, handle_,
                                stream_.handle()),
            "adding the ranks' results");
    stream_.note_launch("ncclAllReduce");
  }

  // Each row in place: what a rank sends lies where it belongs among what it receives.
  void all_gather(void* rows, std::int64_t num_rows, std::size_t bytes,
                  std::size_t stride) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    group_->check();
    if (num_rows > 1) succeed(library_.begin_group(), "beginning a group of NCCL");
    Status status = 0;
    for (std::int64_t row = 0; row < num_rows && status == 0; ++row) {
      auto* all = static_cast<unsigned char*>(rows) + static_cast<std::size_t>(row) * stride;
      const unsigned char* own = all + static_cast<std::size_t>(group_->rank()) * bytes;
      status = library_.all_gather(own, all, bytes, kInt8, handle_, stream_.handle());
    }
    const Status ended = num_rows > 1 ? library_.end_group() : 0;
    succeed(status != 0 ? status : ended, "gathering the ranks' results");
    stream_.note_launch("ncclAllGather");
  }

  void check() override { group_->check(); }

 private:
  void succeed(Status status, const char* what) const {
    if (status == 0) return;
    throw DeviceError(text(what, " on ", stream_.device_name(), ", rank ", group_->rank(), " of ",
                           group_->size(), ": NCCL says ", library_.error_text(status)));
  }

  // NCCL may connect the ranks when they first call it, and a call that waits for a rank that has
  // ended would hold the lock: that is done here, once they all have joined.
  void connect() {
    void* memory = nullptr;
    const std::size_t bytes = 1024, own = bytes * static_cast<std::size_t>(group_->rank());
    cuda::check(cudaMalloc(&memory, bytes * static_cast<std::size_t>(group_->size())),
                "allocating what the ranks exchange first");
    Status status =
        library_.all_reduce(memory, memory, bytes / 4, kFloat32, kSum, handle_, stream_.handle());
    if (status == 0)
      status = library_.all_gather(static_cast<unsigned char*>(memory) + own, memory, bytes, kInt8,
                                   handle_, stream_.handle());
    cudaStreamSynchronize(stream_.handle());
    cudaFree(memory);
    succeed(status, "connecting the ranks");
  }

  // A kernel of NCCL waits on the device for the other ranks, and no longer once it is aborted.
  void watch() {
    while (!stopping_) {
      if (group_->is_aborted()) {
        {
          const std::lock_guard<std::mutex> lock(mutex_);
          aborted_ = true;
        }
        // Without the lock: it waits until the recorded steps are destroyed that use it.
        library_.abort(handle_);
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
  }

  const Library& library_;
  Stream& stream_;
  std::shared_ptr<RankGroup> group_;
  Handle handle_ = nullptr;
  std::mutex mutex_;  // held while the handle is used, which the watcher frees
  std::atomic<bool> stopping_{false}, aborted_{false};
  std::thread watcher_;
};

}  // namespace

std::unique_ptr<Collectives> Collectives::open(Stream& stream, std::shared_ptr<RankGroup> group) {
  const Library* library = Library::get();
  require(library,
          "the ranks of a model send each other results by NCCL, and libnccl.so.2 was not found: "
          "pip install nvidia-nccl-cu13 (cu12 with CUDA 12), or load the cluster's module of NCCL");
  return std::make_unique<Opened>(*library, stream, std::move(group));
}

std::string Collectives::version() {
  const Library* library = Library::get();
  int number = 0;
  if (!library || library->version(&number) != 0) return "";
  return text(number / 10000, ".", number / 100 % 100, ".", number % 100);
}

#endif

}  // namespace octavo::cuda

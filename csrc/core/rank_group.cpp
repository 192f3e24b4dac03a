#include "core/rank_group.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "core/text.h"

namespace octavo {

namespace {

constexpr std::size_t kLine = 64;           // bytes that processors pass to each other at a time
constexpr std::size_t kPart = 1 << 20;      // bytes of a rank that are exchanged at a time
constexpr std::size_t kParts = 2;           // of a rank; used in turn
constexpr std::int64_t kFewNumbers = 4096;  // of which every rank computes all sums by itself
// A wait spins for a tenth of a millisecond or so, then it sleeps between looks. (To yield would
// give another program that wants the core a whole time slice; who wakes up is preferred.)
constexpr int kSpins = 1 << 16;
constexpr std::chrono::microseconds kSleep{20};

}  // namespace

struct RankGroup::Header {
  alignas(kLine) std::atomic<std::int64_t> aborted_by;  // 1 + a rank, whose place says why
};

struct RankGroup::Place {
  alignas(kLine) std::atomic<std::uint64_t> rounds;  // whose parts the rank has filled
  char why[1024];
};

std::size_t RankGroup::memory_bytes(std::int64_t size) {
  return sizeof(Header) + static_cast<std::size_t>(size) * (sizeof(Place) + kParts * kPart);
}

RankGroup::RankGroup(int file, std::int64_t rank, std::int64_t size) : rank_(rank), size_(size) {
  require(size >= 1 && 0 <= rank && rank < size, "rank is ", rank, " of ", size,
          "; expected 0 to their number - 1");
  void* memory = mmap(nullptr, memory_bytes(size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED)
    throw std::runtime_error(
        text("the memory that the ranks share could not be mapped: ", std::strerror(errno)));
  memory_ = static_cast<unsigned char*>(memory);
}

RankGroup::~RankGroup() { munmap(memory_, memory_bytes(size_)); }

RankGroup::Header& RankGroup::header() const { return *reinterpret_cast<Header*>(memory_); }

RankGroup::Place& RankGroup::place(std::int64_t rank) const {
  return reinterpret_cast<Place*>(memory_ + sizeof(Header))[rank];
}

unsigned char* RankGroup::part(std::int64_t rank, std::uint64_t round) const {
  const std::size_t places = sizeof(Header) + static_cast<std::size_t>(size_) * sizeof(Place);
  return memory_ + places + (static_cast<std::size_t>(rank) * kParts + round % kParts) * kPart;
}

std::uint64_t RankGroup::exchange() {
  place(rank_).rounds.store(round_, std::memory_order_release);
  for (std::int64_t rank = 0; rank < size_; ++rank) {
    for (int i = 0; place(rank).rounds.load(std::memory_order_acquire) < round_; ++i) {
      check();
      if (i >= kSpins) std::this_thread::sleep_for(kSleep);
    }
  }
  return round_++;
}

void RankGroup::all_reduce(float* x, std::int64_t count) {
  constexpr auto kMost = static_cast<std::int64_t>(kPart / sizeof(float));
  for (std::int64_t first = 0; first < count; first += kMost)
    reduce(x + first, std::min(kMost, count - first));
}

// Few numbers: one exchange, and every rank computes all sums. Many: each rank computes its share
// of the sums, which are exchanged, too.
void RankGroup::reduce(float* x, std::int64_t count) {
  const auto bytes_of = [](std::int64_t n) { return static_cast<std::size_t>(n) * sizeof(float); };
  std::memcpy(part(rank_, round_), x, bytes_of(count));
  const std::uint64_t given = exchange();
  const auto numbers = [&](std::int64_t rank, std::uint64_t round) {
    return reinterpret_cast<float*>(part(rank, round));
  };
  const auto sum = [&](float* sums, std::int64_t begin, std::int64_t end) {
    std::memcpy(sums + begin, numbers(0, given) + begin, bytes_of(end - begin));
    for (std::int64_t rank = 1; rank < size_; ++rank) {
      const float* theirs = numbers(rank, given);
      for (std::int64_t i = begin; i < end; ++i) sums[i] += theirs[i];
    }
  };
  if (size_ == 2 || count <= kFewNumbers) return sum(x, 0, count);

  const auto share = [&](std::int64_t rank) { return count * rank / size_; };
  sum(numbers(rank_, round_), share(rank_), share(rank_ + 1));
  const std::uint64_t summed = exchange();
  for (std::int64_t rank = 0; rank < size_; ++rank)
    std::memcpy(x + share(rank), numbers(rank, summed) + share(rank),
                bytes_of(share(rank + 1) - share(rank)));
}

void RankGroup::all_gather(unsigned char* rows, std::int64_t num_rows, std::size_t bytes,
                           std::size_t stride) {
  const std::size_t own = bytes / static_cast<std::size_t>(size_);
  require(own * static_cast<std::size_t>(size_) == bytes, "rows of ", bytes,
          " bytes; expected a multiple of ", size_, ", the number of ranks");
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::size_t first = 0; first < own; first += kPart) {
      unsigned char* at = rows + static_cast<std::size_t>(row) * stride + first;
      gather(at, std::min(kPart, own - first), own);
    }
  }
}

// first: of the first rank's part, of which `bytes` bytes are exchanged. pitch: to the next one's.
void RankGroup::gather(unsigned char* first, std::size_t bytes, std::size_t pitch) {
  std::memcpy(part(rank_, round_), first + static_cast<std::size_t>(rank_) * pitch, bytes);
  const std::uint64_t given = exchange();
  for (std::int64_t rank = 0; rank < size_; ++rank) {
    if (rank != rank_)
      std::memcpy(first + static_cast<std::size_t>(rank) * pitch, part(rank, given), bytes);
  }
}

void RankGroup::broadcast(void* data, std::size_t bytes) {
  if (rank_ == 0) std::memcpy(part(0, round_), data, bytes);
  std::memcpy(data, part(0, exchange()), bytes);
}

// The text is there before it is named, so that a rank may be killed anywhere in between.
void RankGroup::abort(const std::string& why) {
  const std::lock_guard<std::mutex> lock(abort_mutex_);
  if (is_aborted()) return;
  char* text = place(rank_).why;
  text[why.copy(text, sizeof(Place::why) - 1)] = '\0';
  std::int64_t nobody = 0;
  header().aborted_by.compare_exchange_strong(nobody, rank_ + 1);
}

void RankGroup::check() const {
  const std::int64_t by = header().aborted_by.load();
  if (by != 0) throw std::runtime_error(place(by - 1).why);
}

bool RankGroup::is_aborted() const { return header().aborted_by.load() != 0; }

void check_ranks(const ModelSpec& spec, const RuntimeOptions& options, const RankGroup* group) {
  const std::int64_t size = group ? group->size() : 1, rank = group ? group->rank() : 0;
  require(options.world_size == size && options.rank == rank, "world_size is ", options.world_size,
          " and rank ", options.rank, "; expected ", size, " and ", rank, ", those of the group");
  require((spec.head_parts == 1 || spec.head_parts == size) &&
              spec.vocab_size % spec.head_parts == 0 && spec.head_part == rank % spec.head_parts,
          "the head is part ", spec.head_part, " of ", spec.head_parts,
          "; expected that of the rank, or the whole");
}

}  // namespace octavo

// The ranks of one model: processes of one machine that exchange results through shared memory.
//
// Each rank has a part of every matrix (python/octavo/models/shards.py). All ranks make the same
// calls in the same order. A rank that ends, or fails, is no reason to wait for ever: see `abort`.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

#include "core/spec.h"

namespace octavo {

class RankGroup {
 public:
  // The bytes of shared memory that a group needs; zeros at first.
  static std::size_t memory_bytes(std::int64_t size);

  // file: a descriptor of that memory, the same in all ranks; it may be closed afterwards.
  RankGroup(int file, std::int64_t rank, std::int64_t size);
  ~RankGroup();
  RankGroup(const RankGroup&) = delete;
  RankGroup& operator=(const RankGroup&) = delete;

  std::int64_t rank() const { return rank_; }
  std::int64_t size() const { return size_; }

  // x = the sum of all ranks' x, `count` numbers. The order of a sum is that of the ranks, whatever
  // the count: the bits of a row do not depend on the rows beside it.
  void all_reduce(float* x, std::int64_t count);
  // Rows of `bytes` bytes, `stride` bytes apart: each rank brings a part of every row, bytes / size
  // of them, the first rank the first ones; afterwards every rank has all.
  void all_gather(unsigned char* rows, std::int64_t num_rows, std::size_t bytes,
                  std::size_t stride);
  // Of rank 0, to all; a few bytes.
  void broadcast(void* data, std::size_t bytes);

  // From any thread of any rank: every rank that waits for another, or will, throws a
  // std::runtime_error with this text, the first one given.
  void abort(const std::string& why);
  bool is_aborted() const;
  void check() const;  // throws it

 private:
  struct Header;
  struct Place;
  Header& header() const;
  Place& place(std::int64_t rank) const;
  unsigned char* part(std::int64_t rank, std::uint64_t round) const;
  // Every rank has filled its part of this round: they may be read until the next exchange, while
  // the parts of the next round, which are others, are filled.
  std::uint64_t exchange();
  void reduce(float* x, std::int64_t count);
  void gather(unsigned char* first, std::size_t bytes, std::size_t pitch);

  std::int64_t rank_, size_;
  std::mutex abort_mutex_;
  std::uint64_t round_ = 1;
  unsigned char* memory_ = nullptr;
};

// Throws std::invalid_argument unless spec and options are those of a rank of the group; null: of
// the only one.
void check_ranks(const ModelSpec& spec, const RuntimeOptions& options, const RankGroup* group);

}  // namespace octavo

// Whose turn it is: the order in which the threads of a block run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_emulator {

// splitmix64 (Steele et al. 2014): enough to shuffle with.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::size_t below(std::size_t bound) {  // bound: below 2^32
    state_ += 0x9e3779b97f4a7c15ull;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<std::size_t>(((z ^ (z >> 31)) >> 32) * bound >> 32);
  }

 private:
  std::uint64_t state_;
};

// The threads that can run, and which of them does.
//
// Drawing any of them each time is not enough: all would advance at about one pace, and a warp that
// is a whole phase ahead of another, which a GPU sees every day, would never be seen. So each block
// draws one of three manners: any thread, any time; warps in an order of priority, which lets one
// run as far ahead as barriers allow; or such an order that changes now and then. (Priorities and a
// few changes of them: Burckhardt et al. 2010, "A randomized scheduler with probabilistic
// guarantees of finding bugs".) Lanes of a warp are treated the same way.
class Turns {
 public:
  // random: null for ascending order.
  void start_block(std::size_t num_threads, Random* random);
  void add(unsigned thread) { add(thread / kWarp, 1u << thread % kWarp); }
  void add(unsigned warp, std::uint32_t lanes);  // a bit a lane; none of them is ready already
  bool empty() const { return ready_warps_ == 0; }
  unsigned take();

 private:
  static constexpr unsigned kWarp = 32;
  enum class Manner { ascending, any, priorities, changing_priorities };

  // Which warp (or lane) stands at a place, and at which place one stands. The first goes first.
  struct Order {
    std::vector<unsigned> at, place;
    void start(unsigned count);  // ascending
    void draw(Random& random);
  };

  void draw_priorities();
  unsigned any_bit(std::uint32_t bits);  // bits: not 0
  unsigned take_first();
  unsigned take(unsigned warp, unsigned lane);  // by their places

  Random* random_ = nullptr;
  Manner manner_ = Manner::ascending;
  std::uint32_t ready_warps_ = 0;     // a bit a warp of which a lane is ready, by their places
  std::vector<std::uint32_t> ready_;  // a bit a lane, a word a warp, by their places
  Order warps_, lanes_;
};

}  // namespace cuda_emulator

#include "turns.h"

#include <utility>

namespace cuda_emulator {

void Turns::start_block(std::size_t num_threads, Random* random) {
  random_ = random;
  num_ready_ = 0;
  ready_.assign((num_threads + kWarp - 1) / kWarp, 0);
  warps_.resize(ready_.size());
  lanes_.resize(kWarp);
  for (unsigned i = 0; i < warps_.size(); ++i) warps_[i] = i;
  for (unsigned i = 0; i < kWarp; ++i) lanes_[i] = i;
  manner_ = Manner::ascending;
  if (!random_) return;
  constexpr Manner kManners[] = {Manner::any, Manner::priorities, Manner::changing_priorities};
  manner_ = kManners[random_->below(3)];
  draw_priorities();
}

void Turns::draw_priorities() {
  for (std::vector<unsigned>* order : {&warps_, &lanes_}) {
    for (std::size_t i = order->size(); i > 1; --i)
      std::swap((*order)[i - 1], (*order)[random_->below(i)]);
  }
}

void Turns::add(unsigned thread) {
  ready_[thread / kWarp] |= 1u << thread % kWarp;
  ++num_ready_;
}

unsigned Turns::any_bit(std::uint32_t bits) {
  unsigned skip =
      static_cast<unsigned>(random_->below(static_cast<std::size_t>(__builtin_popcount(bits))));
  for (; skip; --skip) bits &= bits - 1;
  return static_cast<unsigned>(__builtin_ctz(bits));
}

unsigned Turns::take() {
  unsigned warp = 0, lane = 0;
  if (manner_ == Manner::any) {
    do {
      warp = static_cast<unsigned>(random_->below(ready_.size()));
    } while (!ready_[warp]);
    lane = any_bit(ready_[warp]);
  } else {
    constexpr std::size_t kPicksBetweenChanges = 40;
    if (manner_ == Manner::changing_priorities && random_->below(kPicksBetweenChanges) == 0)
      draw_priorities();
    std::size_t i = 0;
    while (!ready_[warps_[i]]) ++i;
    warp = warps_[i];
    for (i = 0; !(ready_[warp] >> lanes_[i] & 1u);) ++i;
    lane = lanes_[i];
  }
  ready_[warp] &= ~(1u << lane);
  --num_ready_;
  return warp * kWarp + lane;
}

}  // namespace cuda_emulator

#include "turns.h"

#include <utility>

namespace cuda_emulator {

void Turns::start_block(std::size_t num_threads, Random* random) {
  random_ = random;
  num_ready_ = 0;
  ready_.assign((num_threads + kWarp - 1) / kWarp, 0);
  warps_.start(static_cast<unsigned>(ready_.size()));
  lanes_.start(kWarp);
  manner_ = Manner::ascending;
  if (!random_) return;
  constexpr Manner kManners[] = {Manner::any, Manner::priorities, Manner::changing_priorities};
  manner_ = kManners[random_->below(3)];
  if (manner_ != Manner::any) draw_priorities();
}

void Turns::Order::start(unsigned count) {
  at.resize(count);
  for (unsigned i = 0; i < count; ++i) at[i] = i;
  place = at;
}

void Turns::Order::draw(Random& random) {
  for (std::size_t i = at.size(); i > 1; --i) std::swap(at[i - 1], at[random.below(i)]);
  for (unsigned i = 0; i < at.size(); ++i) place[at[i]] = i;
}

void Turns::draw_priorities() {
  std::vector<unsigned> threads;
  while (!empty()) threads.push_back(take_first());
  warps_.draw(*random_);
  lanes_.draw(*random_);
  for (const unsigned thread : threads) add(thread);
}

void Turns::add(unsigned thread) {
  ready_[warps_.place[thread / kWarp]] |= 1u << lanes_.place[thread % kWarp];
  ++num_ready_;
}

unsigned Turns::any_bit(std::uint32_t bits) {
  unsigned skip =
      static_cast<unsigned>(random_->below(static_cast<std::size_t>(__builtin_popcount(bits))));
  for (; skip; --skip) bits &= bits - 1;
  return static_cast<unsigned>(__builtin_ctz(bits));
}

unsigned Turns::take() {
  if (manner_ == Manner::any) {
    std::size_t warp = 0;
    do {
      warp = random_->below(ready_.size());
    } while (!ready_[warp]);
    return take(warp, any_bit(ready_[warp]));
  }
  constexpr std::size_t kPicksBetweenChanges = 40;
  if (manner_ == Manner::changing_priorities && random_->below(kPicksBetweenChanges) == 0)
    draw_priorities();
  return take_first();
}

unsigned Turns::take_first() {
  std::size_t warp = 0;
  while (!ready_[warp]) ++warp;
  return take(warp, static_cast<unsigned>(__builtin_ctz(ready_[warp])));
}

unsigned Turns::take(std::size_t warp, unsigned lane) {
  ready_[warp] &= ~(1u << lane);
  --num_ready_;
  return warps_.at[warp] * kWarp + lanes_.at[lane];
}

}  // namespace cuda_emulator

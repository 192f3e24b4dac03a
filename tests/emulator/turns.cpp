#include "turns.h"

#include <utility>

namespace cuda_emulator {

void Turns::start_block(std::size_t num_threads, Random* random) {
  random_ = random;
  ready_warps_ = 0;
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

void Turns::add(unsigned warp, std::uint32_t lanes) {
  const unsigned place = warps_.place[warp];
  ready_warps_ |= 1u << place;
  if (~lanes == 0) ready_[place] = lanes;
  for (; ~lanes != 0 && lanes != 0; lanes &= lanes - 1)
    ready_[place] |= 1u << lanes_.place[static_cast<unsigned>(__builtin_ctz(lanes))];
}

// Any of them; not each as often as another.
unsigned Turns::any_bit(std::uint32_t bits) {
  const auto from = static_cast<unsigned>(random_->below(32));
  const std::uint32_t turned = bits >> from | bits << (32 - from) % 32;
  return (static_cast<unsigned>(__builtin_ctz(turned)) + from) % 32;
}

unsigned Turns::take() {
  if (manner_ == Manner::any) {
    const unsigned warp = any_bit(ready_warps_);
    return take(warp, any_bit(ready_[warp]));
  }
  constexpr std::size_t kPicksBetweenChanges = 40;
  if (manner_ == Manner::changing_priorities && random_->below(kPicksBetweenChanges) == 0)
    draw_priorities();
  return take_first();
}

unsigned Turns::take_first() {
  const auto warp = static_cast<unsigned>(__builtin_ctz(ready_warps_));
  return take(warp, static_cast<unsigned>(__builtin_ctz(ready_[warp])));
}

unsigned Turns::take(unsigned warp, unsigned lane) {
  ready_[warp] &= ~(1u << lane);
  if (!ready_[warp]) ready_warps_ &= ~(1u << warp);
  return warps_.at[warp] * kWarp + lanes_.at[lane];
}

}  // namespace cuda_emulator

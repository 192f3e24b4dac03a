// Scales of groups of weights for int4, by search: what `Grid.search` in
// octavo/quantization/grid.py does in NumPy, for 16 groups at a time, a lane each. Sums over a
// group run in ascending order, multiplied and added by one instruction each.

class ScaleSearch {
 public:
  ScaleSearch(const ScaleTask& task, std::int64_t first)
      : task_(task), first_(first), width_(smaller(kLanes, task.groups - first)) {
    static thread_local std::vector<float> memory;
    memory.resize(2 * static_cast<std::size_t>(task.members) * kLanes);
    x_ = memory.data();
    shares_ = task.shares ? x_ + task.members * kLanes : nullptr;
    for (std::int64_t m = 0; m < task.members; ++m) {
      store(x_ + m * kLanes, lanes_of(task.x, m));
      if (shares_) store(shares_ + m * kLanes, lanes_of(task.shares, m));
    }
  }

  void run() {
    Vec low = load(x_), high = low;
    for (std::int64_t m = 1; m < task_.members; ++m) {
      low = min(low, load(x_ + m * kLanes));
      high = max(high, load(x_ + m * kLanes));
    }
    if (task_.zeros) {
      low = min(low, zero());
      high = max(high, zero());
    }
    // A negative scale turns the group around: its longer side gets the longer levels.
    const Vec extreme = select_less(high, negative(low), low, high);
    for (std::int64_t i = 0; i < task_.num_candidates; ++i) {
      const Vec candidate = splat(task_.candidates[i]);
      if (!task_.zeros) {
        offer(to_scale(div(extreme, candidate)), zero());
        continue;
      }
      const Vec scale = to_scale(mul(sub(high, low), candidate));
      const Vec middle =
          mul(div(add(high, low), scale), splat(0.5f));  // the range shrinks around it
      const Vec at = sub(splat(-0.5f), middle);
      offer(scale, in_levels(floor(at)));
      offer(scale, in_levels(negative(floor(negative(at)))));
    }
    for (int i = 0; i < 2; ++i) refine();
    store_lanes(task_.scales, scale_);
    if (task_.zeros) store_lanes(task_.zeros, zero_);
  }

 private:
  static Vec negative(Vec x) { return sub(zero(), x); }
  static Vec in_levels(Vec x) { return max(splat(-8.0f), min(splat(7.0f), x)); }
  // To the nearest whole number, ties to even. (Greater ones than 2^22 stay what they are, nearly.)
  static Vec nearest(Vec x) {
    const Vec big = splat(12582912.0f);  // 1.5 * 2^23
    return sub(add(x, big), big);
  }
  // A bfloat16 number; 1 in place of one near zero.
  static Vec to_scale(Vec x) {
    const Vec y = round_to_bf16(x);
    return select_less(max(y, negative(y)), splat(1e-30f), splat(1.0f), y);
  }

  Vec lanes_of(const float* rows, std::int64_t member) const {
    const float* p = rows + member * task_.groups + first_;
    return width_ == kLanes ? load(p) : load_tail(p, width_, 0.0f);
  }
  void store_lanes(float* to, Vec x) const {
    width_ == kLanes ? store(to + first_, x) : store_tail(to + first_, x, width_);
  }

  // Calls body(m, step) with the nearest level to each member, less the zero point.
  template <class Body>
  void each_step(Vec scale, Vec zero_point, Body&& body) const {
    if (!task_.levels) {
      const Vec inverse = div(splat(1.0f), scale);
      for (std::int64_t m = 0; m < task_.members; ++m) {
        const Vec level = add(nearest(mul(load(x_ + m * kLanes), inverse)), zero_point);
        body(m, sub(in_levels(level), zero_point));
      }
      return;
    }
    // In halves, of which the middles between levels are multiples.
    const Vec inverse = div(splat(2.0f), scale);
    for (std::int64_t m = 0; m < task_.members; ++m) {
      const Vec halves = mul(load(x_ + m * kLanes), inverse);
      Vec level = splat(task_.levels[0]);
      for (int i = 1; i < 16; ++i)
        level = select_less(halves, splat(task_.levels[i - 1] + task_.levels[i]), level,
                            splat(task_.levels[i]));
      body(m, level);
    }
  }

  // Takes them for the groups in which they cost less.
  void offer(Vec scale, Vec zero_point) {
    Vec cost = zero();
    each_step(scale, zero_point, [&](std::int64_t m, Vec step) {
      const Vec error = sub(mul(step, scale), load(x_ + m * kLanes));
      cost = add(cost, mul(counted(m, error), error));
    });
    scale_ = select_less(cost, cost_, scale, scale_);
    zero_ = select_less(cost, cost_, zero_point, zero_);
    cost_ = select_less(cost, cost_, cost, cost_);
  }

  // Offers the scale that fits the present steps best, by least squares.
  void refine() {
    Vec squares = zero(), product = zero();
    each_step(scale_, zero_, [&](std::int64_t m, Vec step) {
      const Vec weighted = counted(m, step);
      squares = add(squares, mul(weighted, step));
      product = add(product, mul(weighted, load(x_ + m * kLanes)));
    });
    const Vec fitted = div(product, select_less(zero(), squares, squares, splat(1.0f)));
    offer(to_scale(select_less(zero(), squares, fitted, scale_)), zero_);
  }

  Vec counted(std::int64_t member, Vec x) const {
    return shares_ ? mul(x, load(shares_ + member * kLanes)) : x;
  }

  const ScaleTask& task_;
  const std::int64_t first_, width_;
  float *x_, *shares_;  // (members, 16)
  Vec scale_ = splat(1.0f), zero_ = zero();
  Vec cost_ = splat(std::numeric_limits<float>::infinity());
};

void search_scales(const ScaleTask& task) {
  for (std::int64_t first = 0; first < task.groups; first += kLanes) ScaleSearch(task, first).run();
}

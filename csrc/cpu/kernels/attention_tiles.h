// Attention over a bf16 cache on tile registers: the arithmetic of attention_bf16.h, bit for bit,
// 16 query rows by 16 tokens (scores) or 16 dimensions (values) at a time.
//
//   scores (rows x tokens)     = Q (rows x dims) K^T: a tile of keys has the layout of the cache
//   values (rows x dims)      += P (rows x tokens) V: 32 tokens' values are copied together;
//                                those that no row sees are 0; rows of the task share the copy
//
// Two row tiles by two others are four products for four loads. Of 30 cycles for 16 scores of 64
// dimensions (a Xeon; 4 are the products themselves) 13 go into weights, 14 into the products with
// their tiles' loads and stores, 3 into the copies. Products between the weights, a step at a time,
// gain nothing: even in a loop of these two alone they slow each other down. A few rows fill so
// little of a tile that vectors, which are as fast as memory, are faster.

inline void do_nothing(std::int64_t) {}

constexpr int kFewQueries = 4;  // up to here vectors are faster, with the same bits
constexpr int kStretchSteps = static_cast<int>(kStretch / kDepthBlock);  // of 32 tokens
constexpr int kBandTiles = 2, kBandRows = kBandTiles * kTileRows;        // rows taken at a time

// Dimensions of a query in tiles, with padding.
inline std::int64_t query_dim(const KvLayout& layout) {
  return (layout.head_dim + kDepthBlock - 1) / kDepthBlock * kDepthBlock;
}

class AttendScratch {
 public:
  // bf16: [row tile][32 dims][16][32]; of the dimensions that are not a multiple of 32, [token
  // tile][16 pairs][16 tokens][2]; and [32 tokens][16 dims][16 pairs][16 dims][2].
  std::uint16_t *queries, *last_keys, *values;
  // Of two bands in turn.
  alignas(64) float scores[2][kBandTiles * kStretchTiles * kTileSums];
  alignas(64) std::uint16_t weights[2][kBandTiles * kStretchSteps * kTileBytes / 2];

  void make_room(const KvLayout& layout) {
    const auto query_items = static_cast<std::size_t>(kMaxAttendRows * query_dim(layout));
    const auto value_items = static_cast<std::size_t>(kStretch * layout.padded_dim);
    constexpr std::size_t kLine = 64 / sizeof(std::uint16_t);
    constexpr auto kLastKeys = static_cast<std::size_t>(kStretch * kDepthBlock);
    memory_.resize(std::max(memory_.size(), query_items + kLastKeys + value_items + kLine));
    queries = memory_.data();
    while (reinterpret_cast<std::uintptr_t>(queries) % 64) ++queries;
    last_keys = queries + query_items;
    values = last_keys + kLastKeys;
  }

 private:
  std::vector<std::uint16_t> memory_;
};

inline AttendScratch& attend_scratch() {
  static thread_local const std::unique_ptr<AttendScratch> scratch(new AttendScratch);
  return *scratch;
}

// The queries, rounded, as tiles; rows that there are not are 0.
inline void prepare_query_tiles(const AttendTask& task, std::uint16_t* to) {
  const std::int64_t dims = task.layout.head_dim, key_dim = query_dim(task.layout);
  const std::int64_t rows = (task.rows + kTileRows - 1) / kTileRows * kTileRows;
  for (std::int64_t r = 0; r < rows; ++r) {
    std::uint16_t* row = to + r / kTileRows * kTileRows * key_dim + r % kTileRows * kDepthBlock;
    for (std::int64_t d = 0; d < key_dim; d += kLanes) {
      const std::int64_t left = dims - d;
      Vec x = zero();
      if (r < task.rows && left > 0)
        x = left >= kLanes ? load(task.q[r] + d) : load_tail(task.q[r] + d, left, 0.0f);
      store_bf16(row + d / kDepthBlock * kTileRows * kDepthBlock + d % kDepthBlock, x);
    }
  }
}

// Copies the last dimensions of a stretch's keys, where they do not fill a tile. The memory after
// them may hold NaNs, which must not be multiplied, not even by 0.
inline void copy_last_keys(const KvLayout& layout, const PairTile* tiles, int first, int last,
                           std::uint16_t* to) {
  const std::int64_t whole = layout.head_dim / kDepthBlock * kDepthBlock;
  const std::int64_t words = (layout.key_dim - whole) / 2;
  for (int t = first; t < last; ++t) {
    auto* tile = reinterpret_cast<std::uint32_t*>(to) + t * kTileBytes / 4;
    const std::uint32_t* from = as_words(tiles[t].keys) + whole / 2 * kLanes;
    for (std::int64_t i = 0; i < kPairWords; ++i)
      store_words(tile + i * kLanes, i < words ? load_words(from + i * kLanes) : splat_word(0));
  }
}

// A stretch's values as tiles, 32 tokens a step; those of tokens that no row sees are 0.
inline void copy_value_tiles(const PairTile* tiles, std::int64_t padded_dim, const Visible& seen,
                             std::uint16_t* to) {
  constexpr std::int64_t kTileWords = kLanes / 2;
  const SeenWords words(seen);
  const std::int64_t first = words.first / kPairWords * kPairWords;
  const std::int64_t last = (words.last + kPairWords - 1) / kPairWords * kPairWords;
  for (std::int64_t i = first; i < last; ++i) {
    auto* row = reinterpret_cast<std::uint32_t*>(to) + i / kPairWords * kPairWords * padded_dim +
                i % kPairWords * kLanes;
    const bool is_seen = words.first <= i && i < words.last;
    const std::uint32_t* from =
        is_seen ? as_words(tiles[i / kTileWords].values) + i % kTileWords * padded_dim : nullptr;
    if (words.is_whole(i, i + 1)) {
      for (std::int64_t d = 0; d < padded_dim; d += kLanes)
        store_words(row + d * kPairWords, load_words(from + d));
      continue;
    }
    const Words mask = splat_word(is_seen ? words.mask(i) : 0u);
    for (std::int64_t d = 0; d < padded_dim; d += kLanes)
      store_words(row + d * kPairWords, is_seen ? and_words(load_words(from + d), mask) : mask);
  }
}

// Up to two row tiles over one stretch. While vectors compute a band's weights, tiles compute the
// scores of the next band.
class Band {
 public:
  // states: of the task's rows, and as many as fill its tiles.
  Band(const AttendTask& task, AttendScratch& scratch, int turn, int first_row, AttendState* states,
       RowSums& sums, const PairTile* tiles, std::int64_t stretch)
      : task_(task),
        scratch_(scratch),
        scores_(scratch.scores[turn]),
        weights_(scratch.weights[turn]),
        first_row_(first_row),
        rows_(std::min(kBandRows, task.rows - first_row)),
        states_(states + first_row),
        sums_(sums),
        tiles_(tiles),
        stretch_(stretch) {
    const Visible seen = rows(0, rows_).seen_by_any();
    if (seen.low >= seen.high) return;
    first_tile_ = next_tile_ = static_cast<int>(seen.low / kLanes);
    last_tile_ = static_cast<int>((seen.high + kLanes - 1) / kLanes);
  }

  // Computes scores of one or two more tiles of tokens; false when all are done.
  bool score_some() {
    if (next_tile_ == last_tile_) return false;
    const bool is_pair = next_tile_ + 2 <= last_tile_;
    if (has_two())
      is_pair ? add_scores<2, 2>(next_tile_) : add_scores<2, 1>(next_tile_);
    else
      is_pair ? add_scores<1, 2>(next_tile_) : add_scores<1, 1>(next_tile_);
    next_tile_ += is_pair ? 2 : 1;
    return true;
  }

  // Computes the rest of the band, and meanwhile some of the next band's scores.
  void attend(Band* next) {
    while (score_some()) {
    }
    if (first_tile_ == last_tile_) return;
    constexpr int kRowsAtOnce = 8;
    int r = 0;
    for (; r + kRowsAtOnce <= rows_; r += kRowsAtOnce) {
      weigh<kRowsAtOnce>(r);
      if (next) next->score_some();
    }
    for (; r < rows_; r += kRowsAtOnce / 2) weigh<kRowsAtOnce / 2>(r);
    std::int64_t dim = 0;
    for (; dim + 2 * kLanes <= task_.layout.padded_dim; dim += 2 * kLanes)
      has_two() ? add_values<2, 2>(dim) : add_values<1, 2>(dim);
    if (dim < task_.layout.padded_dim) has_two() ? add_values<2, 1>(dim) : add_values<1, 1>(dim);
  }

 private:
  bool has_two() const { return rows_ > kTileRows; }

  StretchRows rows(int first, int count) const {
    return {task_, first_row_ + first, std::min(count, rows_ - first), stretch_};
  }

  template <int MT, int NT>
  void add_scores(int tile) const {
    const std::int64_t dims = query_dim(task_.layout);
    const std::int64_t whole_steps = task_.layout.head_dim / kDepthBlock;
    const unsigned char *x[MT], *w[NT];
    for (int m = 0; m < MT; ++m)
      x[m] = reinterpret_cast<const unsigned char*>(scratch_.queries +
                                                    (first_row_ + m * kTileRows) * dims);
    for (int n = 0; n < NT; ++n)
      w[n] = reinterpret_cast<const unsigned char*>(tiles_[tile + n].keys);
    each_sum<MT, NT>([](auto t, int, int) { tile_zero<t>(); });
    multiply_tiles<DotBf16, MT, NT>(x, w, whole_steps, kTileRowBytes, do_nothing);
    if (dims > whole_steps * kDepthBlock) {
      for (int m = 0; m < MT; ++m) x[m] += whole_steps * kTileBytes;
      for (int n = 0; n < NT; ++n)
        w[n] = reinterpret_cast<const unsigned char*>(scratch_.last_keys) + (tile + n) * kTileBytes;
      multiply_tiles<DotBf16, MT, NT>(x, w, 1, kTileRowBytes, do_nothing);
    }
    each_sum<MT, NT>([&](auto t, int m, int n) {
      tile_store<t>(scores_ + (m * kStretchTiles + tile + n) * kTileSums, kTileRowBytes);
    });
  }

  // Rows first .. first + R - 1 of the band, of which some may be missing.
  template <int R>
  void weigh(int first) const {
    const int band_tile = first / kTileRows, row = first % kTileRows;
    const Scores scores{scores_ + band_tile * kStretchTiles * kTileSums + row * kLanes, kLanes,
                        kTileSums};
    std::uint16_t* weights =
        weights_ + band_tile * kStretchSteps * kTileBytes / 2 + row * kDepthBlock;
    const auto keep = [&](int r, int t, Vec weight) {
      store_bf16(weights + t / 2 * kTileBytes / 2 + r * kDepthBlock + t % 2 * kLanes, weight);
    };
    for (int r = 0; r < R; ++r) {  // the other halves of the first and the last 32 tokens
      if (first_tile_ % 2) keep(r, first_tile_ - 1, zero());
      if (last_tile_ % 2) keep(r, last_tile_, zero());
    }
    float corrections[kLanes];
    const int task_row = first_row_ + first;
    stretch_weights<R>(rows(first, R), sums_.greatest + task_row, sums_.lanes + task_row, scores,
                       PowersOfTwo{power_scale(task_), keep}, first_tile_, last_tile_, corrections);
    for (int r = 0; r < R; ++r) correct_values(task_, states_[first + r], corrections[r]);
  }

  template <int MT, int NT>
  void add_values(std::int64_t dim) const {
    const int first_step = first_tile_ / 2, last_step = (last_tile_ + 1) / 2;
    const std::int64_t padded_dim = task_.layout.padded_dim;
    const unsigned char *x[MT], *w[NT];
    for (int m = 0; m < MT; ++m)
      x[m] = reinterpret_cast<const unsigned char*>(weights_) +
             (m * kStretchSteps + first_step) * kTileBytes;
    for (int n = 0; n < NT; ++n)
      w[n] = reinterpret_cast<const unsigned char*>(scratch_.values) +
             (first_step * padded_dim / kLanes + dim / kLanes + n) * kTileBytes;
    const auto sums = [&](int m, int n) { return states_[m * kTileRows].out + dim + n * kLanes; };
    each_sum<MT, NT>([&](auto t, int m, int n) { tile_load<t>(sums(m, n), 4 * padded_dim); });
    for (int step = first_step; step < last_step; ++step) {
      multiply_tiles<DotBf16, MT, NT>(x, w, 1, kTileRowBytes, do_nothing);
      for (int m = 0; m < MT; ++m) x[m] += kTileBytes;
      for (int n = 0; n < NT; ++n) w[n] += padded_dim / kLanes * kTileBytes;
    }
    each_sum<MT, NT>([&](auto t, int m, int n) { tile_store<t>(sums(m, n), 4 * padded_dim); });
  }

  const AttendTask& task_;
  AttendScratch& scratch_;
  float* scores_;
  std::uint16_t* weights_;
  int first_row_, rows_;  // of the task
  AttendState* states_;
  RowSums& sums_;
  const PairTile* tiles_;
  std::int64_t stretch_;
  int first_tile_ = 0, last_tile_ = 0, next_tile_ = 0;
};

void attend_on_tiles(const AttendTask& task, AttendState* states) {
  if (!task.layout.has_pairs() || task.rows <= kFewQueries) return attend(task, states);
  const TileSession session(kTileRowBytes);
  AttendScratch& scratch = attend_scratch();
  scratch.make_room(task.layout);
  if (!task.goes_on) prepare_query_tiles(task, scratch.queries);
  const int padded_rows = (task.rows + kTileRows - 1) / kTileRows * kTileRows;
  RowSums sums(task, states, padded_rows);
  for (std::int64_t stretch = task.begin; stretch < task.end; stretch += kStretch) {
    const Visible seen = StretchRows{task, 0, task.rows, stretch}.seen_by_any();
    if (seen.low >= seen.high) continue;
    const SeenTiles<std::uint16_t> in(task, stretch, seen);
    if (task.layout.head_dim % kDepthBlock)
      copy_last_keys(task.layout, in.tiles, in.first, in.last, scratch.last_keys);
    copy_value_tiles(in.tiles, task.layout.padded_dim, seen, scratch.values);
    std::optional<Band> bands[2];
    const auto prepare = [&](int row, int turn) {
      bands[turn].emplace(task, scratch, turn, row, states, sums, in.tiles, stretch);
      return &*bands[turn];
    };
    Band* band = prepare(0, 0);
    for (int row = kBandRows, turn = 1; band; row += kBandRows, turn = 1 - turn) {
      Band* next = row < task.rows ? prepare(row, turn) : nullptr;
      band->attend(next);
      band = next;
    }
  }
  sums.finish(task, states);
}

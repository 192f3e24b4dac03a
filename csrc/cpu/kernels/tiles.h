// Shared by products and attention on tile registers: scratch memory, the registers' shapes, and
// the loop that multiplies.

constexpr std::int64_t kRowTile = kTileRows;
// The most that one call sums up at a time: the size of the memory for sums.
constexpr std::int64_t kMaxRowTiles = 16, kMaxPanels = 32;
constexpr std::int64_t kTileSums = kRowTile * kLanes;
constexpr std::int64_t kMaxStretch = 1024;  // inputs, with the padding of steps

struct TileScratch {
  // While the sums of some rows and panels are finished, those of the next grow.
  alignas(64) float sums[2][kMaxRowTiles * kMaxPanels * kTileSums];
  alignas(64) unsigned char weights[2][kMaxStretch * kLanes * 2];
};
constexpr std::size_t kTileScratchBytes = std::max(sizeof(TileScratch), std::size_t{2} << 20);

// In large pages, as the operands.
inline TileScratch& tile_scratch() {
  struct Free {
    void operator()(TileScratch* scratch) const { release(scratch, kTileScratchBytes); }
  };
  static thread_local const std::unique_ptr<TileScratch, Free> scratch(
      static_cast<TileScratch*>(allocate(kTileScratchBytes)));
  return *scratch;
}

// Tiles 0 to 3 are sums, 4 and 5 of X, 6 and 7 of W. Configured anew in each call, which costs some
// hundred cycles: another library may have used the registers of this thread in between. Released
// after it, since the system saves registers in use whenever it switches threads.
class TileSession {
 public:
  // rows: of x. Fewer than a tile has take less time. streams: tile 5 is of W as well.
  explicit TileSession(std::int64_t step_bytes, std::int64_t rows = kRowTile,
                       bool streams = false) {
    TileConfig config;
    const int bytes = static_cast<int>(step_bytes);
    const int of_tile = static_cast<int>(std::min(kRowTile, rows));
    for (int t = 0; t < 4; ++t) config.set(t, of_tile, kTileRowBytes);
    for (int t = 4; t < 6; ++t) config.set(t, of_tile, bytes);
    for (int t = streams ? 5 : 6; t < 8; ++t) config.set(t, bytes / 4, kTileRowBytes);
    tile_configure(config);
  }
  ~TileSession() { tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

struct DotBf16 {
  template <int Sum, int X, int W>
  static void add() {
    tile_dot_bf16<Sum, X, W>();
  }
};
struct DotBytes {
  template <int Sum, int X, int W>
  static void add() {
    tile_dot_bytes<Sum, X, W>();
  }
};

// Adds `steps` steps to the sums of MX tiles of x and NW panels. A tile of either is 16 *
// step_bytes long, and the next step's follows it. beside(step) is called in each step: its work
// overlaps with the tiles' products.
template <class Dot, int MX, int NW, class Beside>
inline void multiply_tiles(const unsigned char* const* x, const unsigned char* const* w,
                           std::int64_t steps, std::int64_t step_bytes, Beside&& beside) {
  std::int64_t at = 0;
  for (std::int64_t step = 0; step < steps; ++step, at += kRowTile * step_bytes) {
    tile_load_once<4>(x[0] + at, step_bytes);
    tile_load<6>(w[0] + at, kTileRowBytes);
    Dot::template add<0, 4, 6>();
    if constexpr (NW == 2) {
      tile_load<7>(w[1] + at, kTileRowBytes);
      Dot::template add<1, 4, 7>();
    }
    if constexpr (MX == 2) {
      tile_load_once<5>(x[1] + at, step_bytes);
      Dot::template add<2, 5, 6>();
      if constexpr (NW == 2) Dot::template add<3, 5, 7>();
    }
    beside(step);
  }
}

// Calls f(tile number, m, n), as constants, for each tile of sums.
template <int MX, int NW, class F>
inline void each_sum(F&& f) {
  const auto one = [&](auto i) {
    if constexpr (i / 2 < MX && i % 2 < NW) f(i, int{i} / 2, int{i} % 2);
  };
  unroll(one, std::make_integer_sequence<int, 4>{});
}

// Two arrays of so many bytes to prefetch.
struct AheadOf {
  const unsigned char *first, *second;
  std::int64_t bytes;
};

// Prefetches them, a little in each step: all at once would delay other loads.
class AskAhead {
 public:
  AskAhead() = default;
  // Their part `index` of `parts` equal ones, within so many steps.
  AskAhead(const AheadOf& of, std::int64_t steps, std::int64_t index = 0, std::int64_t parts = 1)
      : left_(of.bytes / parts), a_step_((left_ / 64 + steps - 1) / steps * 64) {
    at_[0] = of.first + index * left_;
    at_[1] = of.second + index * left_;
  }

  void operator()() {
    if (left_ <= 0) return;
    left_ -= a_step_;
    for (std::int64_t i = 0; i < a_step_; i += 64) {
      prefetch_second(at_[0] + i);
      prefetch_second(at_[1] + i);
    }
    at_[0] += a_step_;
    at_[1] += a_step_;
  }

 private:
  const unsigned char* at_[2] = {};
  std::int64_t left_ = 0, a_step_ = 0;
};

// Two panels that are taken together: neighbours, or a gate's and its up's.
struct PanelPair {
  std::int64_t panel[2];
};

// Rows of x that are taken together.
struct RowTiles {
  std::int64_t tile;   // the first
  std::int64_t count;  // of rows, to the end of the block
  bool are_first;      // of the block
};

// Tile registers in plain C++ for machines without them: bit for bit the results of tile_amx.h's
// instructions (NaNs may have other bits). Where the processor would raise an invalid-opcode or
// protection fault, these throw std::logic_error.

struct EmulatedTiles {
  TileConfig config;
  bool is_configured = false;
  alignas(64) unsigned char data[kNumTiles][kTileRows][kTileRowBytes] = {};
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;  // a thread's own, as registers are
  return tiles;
}

template <class... Parts>
inline void check_tiles(bool is_right, const Parts&... parts) {
  if (!is_right) throw std::logic_error(text("tile registers: ", parts...));
}

inline void tile_configure(const TileConfig& config) {
  check_tiles(config.palette == 1, "palette ", int{config.palette}, ", expected 1");
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], bytes = config.row_bytes[t];
    check_tiles(rows <= (t < kNumTiles ? kTileRows : 0), "tile ", t, " with ", rows, " rows");
    check_tiles(bytes <= kTileRowBytes && (bytes == 0) == (rows == 0), "tile ", t, " with ", rows,
                " rows of ", bytes, " bytes");
  }
  EmulatedTiles& tiles = emulated_tiles();
  tiles = EmulatedTiles();
  tiles.config = config;
  tiles.is_configured = true;
}

inline void tile_release() { emulated_tiles() = EmulatedTiles(); }

// The registers, after checking that tile `t` may be used.
inline EmulatedTiles& use_tile(int t) {
  EmulatedTiles& tiles = emulated_tiles();
  check_tiles(tiles.is_configured, "used before they are configured, or after their release");
  check_tiles(t >= 0 && t < kNumTiles && tiles.config.rows[t] > 0, "tile ", t, " has no rows");
  check_tiles(tiles.config.row_bytes[t] % 4 == 0, "tile ", t, " has rows of ",
              tiles.config.row_bytes[t], " bytes, expected a multiple of 4");
  return tiles;
}

template <int T>
inline void tile_zero() {
  std::memset(use_tile(T).data[T], 0, kTileBytes);
}
template <int T>
inline void tile_load(const void* from, std::int64_t stride) {
  EmulatedTiles& tiles = use_tile(T);
  std::memset(tiles.data[T], 0, kTileBytes);
  for (int row = 0; row < tiles.config.rows[T]; ++row)
    std::memcpy(tiles.data[T][row], static_cast<const unsigned char*>(from) + row * stride,
                tiles.config.row_bytes[T]);
}
template <int T>
inline void tile_load_once(const void* from, std::int64_t stride) {
  tile_load<T>(from, stride);
}
template <int T>
inline void tile_store(void* to, std::int64_t stride) {
  const EmulatedTiles& tiles = use_tile(T);
  for (int row = 0; row < tiles.config.rows[T]; ++row)
    std::memcpy(static_cast<unsigned char*>(to) + row * stride, tiles.data[T][row],
                tiles.config.row_bytes[T]);
}

// The registers, after checking that Sum (m x n), X (m x k) and W (k x n) fit together.
template <int Sum, int X, int W>
inline EmulatedTiles& use_product() {
  static_assert(Sum != X && X != W && Sum != W, "a product takes three different tiles");
  for (const int t : {Sum, X, W}) use_tile(t);
  EmulatedTiles& tiles = emulated_tiles();
  const TileConfig& config = tiles.config;
  check_tiles(config.rows[Sum] == config.rows[X], "a product of ", int{config.rows[X]},
              " rows into ", int{config.rows[Sum]});
  check_tiles(config.row_bytes[Sum] == config.row_bytes[W], "a product of rows of ",
              config.row_bytes[W], " bytes into rows of ", config.row_bytes[Sum]);
  check_tiles(config.row_bytes[X] == 4 * config.rows[W], "a product of rows of ",
              config.row_bytes[X], " bytes with ", int{config.rows[W]}, " rows");
  return tiles;
}

// Numbers too small for a normal float32 count as zero, going in and coming out.
inline float flush_denormal(float value) {
  const float none = std::copysign(0.0f, value);
  return std::fabs(value) < std::numeric_limits<float>::min() ? none : value;
}
inline float emulated_fma(float x, float y, float z) {
  return flush_denormal(std::fma(flush_denormal(x), flush_denormal(y), z));
}
inline float emulated_add(float x, float y) {
  return flush_denormal(flush_denormal(x) + flush_denormal(y));
}

// TDPBF16PS: the even and the odd elements' products are summed apart, each by fused multiply-adds
// in order from zero; the two sums are added, and the result is added to the tile.
template <int Sum, int X, int W>
inline void tile_dot_bf16() {
  EmulatedTiles& tiles = use_product<Sum, X, W>();
  constexpr int kCols = kTileRowBytes / 4;
  for (int m = 0; m < tiles.config.rows[Sum]; ++m) {
    float part[2][kCols] = {}, sum[kCols];
    for (int k = 0; k < tiles.config.rows[W]; ++k) {
      std::uint32_t x, w[kCols];
      std::memcpy(&x, tiles.data[X][m] + 4 * k, sizeof x);
      std::memcpy(w, tiles.data[W][k], sizeof w);
      for (int n = 0; n < kCols; ++n) {
        part[0][n] = emulated_fma(bits_float(x << 16), bits_float(w[n] << 16), part[0][n]);
        part[1][n] =
            emulated_fma(bits_float(x & 0xffff0000u), bits_float(w[n] & 0xffff0000u), part[1][n]);
      }
    }
    std::memcpy(sum, tiles.data[Sum][m], sizeof sum);
    for (int n = 0; n < kCols; ++n)
      sum[n] = emulated_add(sum[n], emulated_add(part[0][n], part[1][n]));
    std::memcpy(tiles.data[Sum][m], sum, tiles.config.row_bytes[Sum]);
  }
}

// TDPBSUD.
template <int Sum, int X, int W>
inline void tile_dot_bytes() {
  EmulatedTiles& tiles = use_product<Sum, X, W>();
  constexpr int kCols = kTileRowBytes / 4;
  for (int m = 0; m < tiles.config.rows[Sum]; ++m) {
    std::uint32_t sum[kCols];
    std::memcpy(sum, tiles.data[Sum][m], sizeof sum);
    for (int k = 0; k < tiles.config.rows[W]; ++k) {
      for (int n = 0; n < kCols; ++n) {
        for (int j = 0; j < 4; ++j) {
          const int x = static_cast<std::int8_t>(tiles.data[X][m][4 * k + j]);
          sum[n] += static_cast<std::uint32_t>(x * int{tiles.data[W][k][4 * n + j]});
        }
      }
    }
    std::memcpy(tiles.data[Sum][m], sum, tiles.config.row_bytes[Sum]);
  }
}

// Tile registers: the AMX instructions themselves. tile_emulated.h has the same functions.
//
// Written as asm, since the intrinsics of GCC before 13 do not declare that they read memory, and
// the compiler then drops or delays stores that fill a configuration or a tile. It also lets a
// template argument be a register's number.

inline void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
// After this the system has no tiles to save when it switches threads.
inline void tile_release() { asm volatile("tilerelease"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// As many rows and bytes as the tile is configured for, the rows `stride` bytes apart.
template <int T>
inline void tile_load(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
// For data that need not stay in L1.
template <int T>
inline void tile_load_once(const void* from, std::int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// Sum += X times W, of bf16 pairs: float32.
template <int Sum, int X, int W>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(X), "i"(W));
}
// Sum += X times W, four signed bytes times four unsigned ones: 32 bits, wrapping around.
template <int Sum, int X, int W>
inline void tile_dot_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(X), "i"(W));
}

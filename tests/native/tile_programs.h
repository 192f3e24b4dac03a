// Small programs over tile registers: included once over the emulation and once over the
// processor's own instructions, inside a namespace of its own.

// What a product reads and writes; all rows 64 bytes apart, whatever the tiles' shapes.
struct Product {
  TileConfig config;
  alignas(64) unsigned char sums[kTileBytes], x[kTileBytes], w[kTileBytes];
};

template <class Dot>
inline void multiply(Product& product, Dot&& dot) {
  tile_configure(product.config);
  tile_load<0>(product.sums, kTileRowBytes);
  tile_load<1>(product.x, kTileRowBytes);
  tile_load<2>(product.w, kTileRowBytes);
  dot();
  tile_store<0>(product.sums, kTileRowBytes);
  tile_release();
}
inline void multiply_bf16(Product& product) {
  multiply(product, [] { tile_dot_bf16<0, 1, 2>(); });
}
inline void multiply_bytes(Product& product) {
  multiply(product, [] { tile_dot_bytes<0, 1, 2>(); });
}
// x through a register into the sums, and zeros into w: as much as the register's shape covers.
inline void copy_tile(Product& product) {
  tile_configure(product.config);
  tile_load<0>(product.x, kTileRowBytes);
  tile_store<0>(product.sums, kTileRowBytes);
  tile_zero<0>();
  tile_store<0>(product.w, kTileRowBytes);
  tile_release();
}

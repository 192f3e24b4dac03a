// The shapes of the eight tile registers, as LDTILECFG reads them (Intel's Software Developer's
// Manual, volume 1, chapter on programming with AMX). Registers that are not set have no rows.
#pragma once

#include <cstdint>

namespace octavo::cpu {

constexpr int kNumTiles = 8, kTileRows = 16, kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) {
    rows[tile] = static_cast<std::uint8_t>(num_rows);
    row_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

}  // namespace octavo::cpu

// Products of bfloat16 pairs by tiles of 16 rows (AMX); included only by kernels.cpp, behind vec.hpp.
#pragma once

#if defined(__AMX_BF16__)

#include <cstdint>

namespace fave_fast {
namespace {

constexpr int kTile = 16;  // rows of a tile, and units or floats of one of its rows

// The shapes of the eight tiles for products of `height` rows and `width` columns whose last `left` units fill no tile:
// 0 to 3 are sums, 4 and 5 rows and columns of 16 units, 6 and 7 those of the last.
//
// No tile reads beyond a row's units: what lies there may be NaN, and NaN times the columns' zeros is NaN.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t unused[15] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  TileShapes(int height, int width, int left) {
    for (int tile = 0; tile < 4; ++tile) shape(tile, height, width);
    shape(4, height, kTile);
    shape(5, kTile, width);
    if (left == 0) return;
    shape(6, height, left);
    shape(7, left, width);
  }

  void use() const { asm volatile("ldtilecfg %0" : : "m"(*this)); }

 private:
  void shape(int tile, int tall, int wide) {
    rows[tile] = static_cast<std::uint8_t>(tall);
    row_bytes[tile] = static_cast<std::uint16_t>(wide * 4);
  }
};

// The tile instructions touch memory that the compiler does not see them touch.
FAVE_FAST_INLINE void memory_fence() { asm volatile("" : : : "memory"); }

// sums [height, panel] of a [height, units] and w [units, panel] with the shapes in use, height being up to 16.
//
// The even and the odd halves of 16 units' pairs are summed apart and then together: other bits than those of
// `add_pair_products`.
FAVE_FAST_INLINE void tile_product(const float* a, std::int64_t a_stride, const float* w, int units, float* sums) {
  constexpr int kPanel = 4 * kTile, kPanelBytes = kPanel * 4;
  const std::int64_t a_bytes = a_stride * 4;
  memory_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int k = 0;
  for (; k + kTile <= units; k += kTile, w += kTile * kPanel) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, w, kPanelBytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, w + kTile, kPanelBytes);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(5, w + 2 * kTile, kPanelBytes);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(5, w + 3 * kTile, kPanelBytes);
    _tile_dpbf16ps(3, 4, 5);
  }
  if (k < units) {
    _tile_loadd(6, a + k, a_bytes);
    _tile_loadd(7, w, kPanelBytes);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(7, w + kTile, kPanelBytes);
    _tile_dpbf16ps(1, 6, 7);
    _tile_loadd(7, w + 2 * kTile, kPanelBytes);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(7, w + 3 * kTile, kPanelBytes);
    _tile_dpbf16ps(3, 6, 7);
  }
  _tile_stored(0, sums, kPanelBytes);
  _tile_stored(1, sums + kTile, kPanelBytes);
  _tile_stored(2, sums + 2 * kTile, kPanelBytes);
  _tile_stored(3, sums + 3 * kTile, kPanelBytes);
  memory_fence();
}

constexpr int kTileRows = 4 * kTile;  // of the rows below

// 64 rows of bfloat16, 16 to a tile: where each tile's first one is, and bytes from one to the next.
struct RowTiles {
  const std::uint16_t* first[4];
  std::int64_t bytes[4];
};

// sums [64, width] of rows of `steps` times 32 elements and columns [16 * steps, width] of pairs, with the shapes in
// use, of 16 rows and `width` columns. Each sum's bits depend on its row and its column alone.
FAVE_FAST_INLINE void tile_dots(const RowTiles& rows, const float* columns, int width, int steps, float* sums) {
  const std::int64_t column_bytes = width * 4;
  memory_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; ++step, columns += kTile * width) {
    const int at = 2 * kTile * step;
    _tile_loadd(5, columns, column_bytes);
    _tile_loadd(4, rows.first[0] + at, rows.bytes[0]);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(4, rows.first[1] + at, rows.bytes[1]);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(4, rows.first[2] + at, rows.bytes[2]);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(4, rows.first[3] + at, rows.bytes[3]);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, sums, column_bytes);
  _tile_stored(1, sums + kTile * width, column_bytes);
  _tile_stored(2, sums + 2 * kTile * width, column_bytes);
  _tile_stored(3, sums + 3 * kTile * width, column_bytes);
  memory_fence();
}

}  // namespace
}  // namespace fave_fast

#endif

#pragma once

// The kernels of gpu_score_topk.cu: the exact lists of up to eight queries over a catalogue of which each multiprocessor
// holds a tile.
//
// `scan_tile`: a block loads its tile's rows while the kernel before it still runs, multiplies them by the queries, and
// gives each item its place among the tile's by counting who comes before it: the first K of a tile are written in order.
// `merge_tiles`, one block a query, orders the tiles' first entries likewise. Of the tile that comes r-th only the first
// K - r entries can be among the K best, and none that the K-th tile's first entry precedes: some K are left, and they
// are counted once more. No score is computed twice, nothing is searched for step by step, and no group has to be taken
// out for an excluded id: what a list takes is two launches that wait for what precedes them, of few dependent loads
// each. Of one query of 12,101 items alone, with 50 ids excluded, 12.4 us from a cold L2 where kernels/score_topk.py takes
// 18.6 (H200, 8d1ac1c; an empty kernel reads 4); a captured request of one history takes 34.8 for 41.7 (65d3909).
//
// An entry is a score's key in the upper and 2^31 - 1 - id in the lower half: larger entries come first. A tile's keys lie
// in the order of ids, so that keys and positions are enough to order them.

#include <cstdint>

#include "gpu_score_topk.hpp"
#include "hopper.cuh"
#include "numbers.cuh"

namespace fave_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kQueries = 8;     // columns of a product
constexpr int kItems = 16;      // rows of a product
constexpr int kMostChosen = 32; // K
constexpr int kMostTiles = kThreads;
constexpr int kMostTile = 256;
constexpr int kNone = -2139095041;  // the key of -inf: what is above it is a candidate
constexpr std::int64_t kLastId = 0x7fffffff;
constexpr std::int64_t kNoEntry = INT64_MIN;

// float32 -> int32 in the same order, NaN as -inf and -0 as 0.
__device__ __forceinline__ int key_of(float score) {
  if (score != score) return kNone;
  const int bits = __float_as_int(score == 0.0f ? 0.0f : score);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

__device__ __forceinline__ float score_of(int key) { return __int_as_float(key ^ (key >> 31 & 0x7fffffff)); }

__device__ __forceinline__ std::int64_t entry_of(int key, int id) {
  return key == kNone ? kNoEntry : static_cast<std::int64_t>(key) << 32 | (kLastId - id);
}

// How many of `count` keys, a multiple of four, come before the one at `at`: larger ones, and equal ones before it.
__device__ __forceinline__ int place_of(const int* keys, int count, int at) {
  const int key = keys[at], own = at & ~3;
  int before = 0;
  for (int j = 0; j < count; j += 4) {
    const int4 four = *reinterpret_cast<const int4*>(keys + j);
    const int level = j < own ? key - 1 : key;
    before += (four.x > level) + (four.y > level) + (four.z > level) + (four.w > level);
  }
  for (int j = own; j < at; ++j) before += keys[j] == key;
  return before;
}

// Bytes of a row in shared memory, so that ldmatrix meets in no bank.
__host__ __device__ constexpr int row_bytes(int d) { return 2 * d + 16; }

__host__ __device__ constexpr int scan_bytes(int d, int tile) {
  return tile * row_bytes(d) + kQueries * tile * static_cast<int>(sizeof(int)) + tile;
}

struct Tile {
  unsigned char* rows;  // [tile, row_bytes]
  int* keys;            // [queries, tile]
  bool* absent;         // [tile]: behind the last item, or denied
  int first;            // id of its first item
};

template <int kD>
__device__ __forceinline__ void load(const ListsCall& call, const Tile& tile) {
  constexpr int kUnits = kD / 8;  // of 16 bytes
  const auto* table = static_cast<const uint4*>(call.table);
#pragma unroll 4
  for (int i = threadIdx.x; i < call.tile * kUnits; i += kThreads) {
    const int row = i / kUnits, unit = i % kUnits;
    const std::int64_t id = min(tile.first + row, call.items);
    *reinterpret_cast<uint4*>(tile.rows + row * row_bytes(kD) + 16 * unit) = __ldg(table + id * kUnits + unit);
  }
  for (int i = threadIdx.x; i < call.tile; i += kThreads) {
    const int id = tile.first + i;
    tile.absent[i] = id > call.items || (call.deny != nullptr && call.deny[id] != 0);
  }
}

// The keys of all queries and items. Lane 4 i + j has what the product's right operand holds of query i, and gets rows i
// and i + 8 of columns 2 j and 2 j + 1.
template <int kD>
__device__ __forceinline__ void score(const ListsCall& call, const Tile& tile) {
  constexpr int kSteps = kD / 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const auto* query = static_cast<const std::uint32_t*>(call.queries) + min(group, call.rows - 1) * (kD / 2) + quad;
  std::uint32_t right[kSteps][2];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) right[k][0] = query[8 * k], right[k][1] = query[8 * k + 4];
  for (int first = kItems * warp; first < call.tile; first += kItems * kWarps) {
    const unsigned char* row = tile.rows + (first + lane % 16) * row_bytes(kD) + lane / 16 * 16;
    float c[4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) multiply(c, load_matrices(row + 32 * k), right[k][0], right[k][1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int item = first + group + 8 * (e / 2), column = 2 * quad + e % 2;
      if (column < call.rows) tile.keys[column * call.tile + item] = tile.absent[item] ? kNone : key_of(c[e]);
    }
  }
}

// Which ids a query leaves out; a warp each. The first ones are on their way while the products run.
struct LeftOut {
  std::int64_t at, end;
  std::int64_t ids[2];
};

__device__ __forceinline__ LeftOut left_out_of(const ListsCall& call) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  LeftOut out{0, 0, {0, 0}};
  if (call.excluded == nullptr || warp >= call.rows) return out;
  out.at = whole_number(call.excluded_offsets, call.wide_offsets, warp) + lane;
  out.end = whole_number(call.excluded_offsets, call.wide_offsets, warp + 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (out.at < out.end) out.ids[i] = whole_number(call.excluded, call.wide_excluded, out.at);
    out.at += 32;
  }
  return out;
}

__device__ __forceinline__ void leave_out(const ListsCall& call, const Tile& tile, LeftOut& out) {
  int* keys = tile.keys + threadIdx.x / 32 * call.tile;
  const auto leave = [&](std::int64_t id) {
    if (id >= tile.first && id < tile.first + call.tile) keys[id - tile.first] = kNone;
  };
  leave(out.ids[0]);
  leave(out.ids[1]);
  for (; out.at < out.end; out.at += 32) leave(whole_number(call.excluded, call.wide_excluded, out.at));
}

template <int kD>
__device__ __forceinline__ void scan(const ListsCall& call) {
  unsigned char* memory = shared_memory();
  int* keys = reinterpret_cast<int*>(memory + call.tile * row_bytes(kD));
  const Tile tile{memory, keys, reinterpret_cast<bool*>(keys + kQueries * call.tile),
                  1 + static_cast<int>(blockIdx.x) * call.tile};
  load<kD>(call, tile);
  await_previous();
  LeftOut out = left_out_of(call);
  __syncthreads();
  score<kD>(call, tile);
  __syncthreads();
  leave_out(call, tile, out);
  __syncthreads();
  const int blocks = gridDim.x;
  for (int i = threadIdx.x; i < call.rows * call.tile; i += kThreads) {
    const int query = i / call.tile, item = i % call.tile;
    const int* of_query = tile.keys + query * call.tile;
    const int place = place_of(of_query, call.tile, item);
    if (place >= call.k) continue;
    call.entries[(query * blocks + static_cast<int>(blockIdx.x)) * call.k + place] =
        entry_of(of_query[item], tile.first + item);
  }
}

struct Merged {
  int heads[kMostTiles];   // keys of the tiles' first entries
  int chosen[kMostChosen]; // tiles, by their first entries
  std::int64_t least;      // entries below it are not among the K best
  std::int64_t entries[kMostChosen * (kMostChosen + 1) / 2];
  std::uint32_t count;
};

__device__ __forceinline__ void merge(const ListsCall& call) {
  Merged& s = *reinterpret_cast<Merged*>(shared_memory());
  const int query = blockIdx.x, thread = threadIdx.x, k = call.k;
  const int tiles = (call.items + call.tile - 1) / call.tile, chosen = min(k, tiles);
  const std::int64_t* entries = call.entries + query * tiles * k;
  await_previous();
  const std::int64_t head = thread < tiles ? entries[thread * k] : kNoEntry;
  s.heads[thread] = max(static_cast<int>(head >> 32), kNone);
  if (thread == 0) s.least = kNoEntry + 1, s.count = 0;
  __syncthreads();
  if (thread < tiles) {
    const int place = place_of(s.heads, (tiles + 3) & ~3, thread);
    if (place < k) s.chosen[place] = thread;
    if (place == k - 1 && head > kNoEntry) s.least = head;
  }
  __syncthreads();
  for (int i = thread; i < chosen * k; i += kThreads) {
    const int tile = i / k, at = i % k;
    if (tile + at >= k) continue;
    const std::int64_t entry = entries[s.chosen[tile] * k + at];
    if (entry >= s.least) s.entries[count_up(&s.count) - 1] = entry;
  }
  __syncthreads();
  const int count = static_cast<int>(s.count);
  for (int i = thread; i < count; i += kThreads) {
    const std::int64_t entry = s.entries[i];
    int place = 0;
    for (int j = 0; j < count; ++j) place += s.entries[j] > entry;
    if (place >= k) continue;
    call.scores[query * k + place] = score_of(static_cast<int>(entry >> 32));
    call.ids[query * k + place] = kLastId - (entry & kLastId);
  }
  for (int i = count + thread; i < k; i += kThreads) {
    call.scores[query * k + i] = score_of(kNone);
    call.ids[query * k + i] = 0;
  }
}

template <int kD>
__global__ void __launch_bounds__(kThreads) scan_tile(const __grid_constant__ ListsCall call) {
  next_may_start();
  scan<kD>(call);
}

__global__ void __launch_bounds__(kThreads) merge_tiles(const __grid_constant__ ListsCall call) {
  next_may_start();
  merge(call);
}

}  // namespace
}  // namespace fave_fast

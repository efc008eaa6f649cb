#pragma once

#include <cstdint>

namespace fave_fast {

// The lists of a few queries; pointers are of device memory. What the tensors mean: fave_fast/ops/score_topk.py.
struct ListsCall {
  const void* queries;           // bf16 [rows, d]
  const void* table;             // bf16 [items + 1, d]
  const std::uint8_t* deny;      // [items + 1], or null
  const void* excluded;          // ids, or null
  const void* excluded_offsets;  // [rows + 1]
  std::int64_t* entries;         // [rows, blocks, k]: the lists of the blocks, each of which has `tile` items
  float* scores;                 // [rows, k]
  std::int64_t* ids;             // [rows, k]
  std::int32_t rows;             // at most 8
  std::int32_t d;                // 64, 128 or 256
  std::int32_t items;            // at most 256 tiles
  std::int32_t k;                // at most 32
  std::int32_t tile;             // a multiple of 16, at least k and at most 256
  bool wide_excluded;            // int64
  bool wide_offsets;             // int64
};

// Launches both kernels on `stream` (cudaStream_t) of `device` and returns. With `overlap` the launch before it, which is
// a kernel's, need not have ended; it may write neither the table nor `deny`. Throws std::runtime_error with the
// runtime's error.
void launch_score_topk(const ListsCall& call, bool overlap, int device, std::uint64_t stream);

}  // namespace fave_fast

#pragma once

#include <cstdint>

namespace fave_fast {

// One launch of an encoder's kernel; pointers are of device memory. What the tensors mean: fave_fast/ops/encoder.py.
struct EncoderCall {
  const void* rows;         // E [total, 128], bf16 or float32; with `table`, ids [total]
  const void* bounds;       // offsets [users + 1], or lengths [users] with `padded_length`; null: padded ids tell
  const void* table;        // bf16 [items + 1, 128], or null
  const float* input_norm;  // [2, 128]
  const float* shift;       // [longest, 128]
  const float* scale;       // [longest, 128], or null
  const void* weights;      // bf16, as fave_fast/ops/encoder_cluster.py, encoder_pair.py or encoder_tile.py packs them
  const float* norms;       // [2 blocks + 1, 2, 128]
  const float* cos;         // [longest, 16]
  const float* sin;         // [longest, 16]
  void* out;                // bf16 [users, 128]
  const std::int32_t* order;     // [users], and
  const std::int32_t* programs;  // [program_count, 3]: a Plan of 64 rows for the tile encoder, or null
  std::int32_t users;
  std::int32_t padded_length;  // 0: packed
  std::int32_t longest;
  std::int32_t blocks;
  std::int32_t program_count;
  float anchor;
  float eps;
  float input_eps;
  bool wide_rows;    // ids are int64, E is float32
  bool wide_bounds;  // int64
  bool layer_norm;
  bool rotary;
  bool causal;
};

// All launch on `stream` (cudaStream_t) of `device` and return. With `overlap` the launch before it, which is a
// kernel's, need not have ended. They throw std::runtime_error with the runtime's error.

// Of clusters of 2 * tiles blocks; no history has more than 16 * tiles items. `tiles` is 1, 2 or 4.
void launch_cluster_encoder(const EncoderCall& call, int tiles, bool overlap, int device, std::uint64_t stream);

// Of clusters of two blocks; no history has more than 64 items.
void launch_pair_encoder(const EncoderCall& call, bool overlap, int device, std::uint64_t stream);

// Of blocks of `tiles` tiles: 1, 2 or 4; a tile is a history or a plan's program. No history has more than 64 items.
void launch_tile_encoder(const EncoderCall& call, int tiles, bool overlap, int device, std::uint64_t stream);

}  // namespace fave_fast

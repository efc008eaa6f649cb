#pragma once

#include <cstdint>

namespace fave_fast {

// One launch of the cluster encoder; pointers are of device memory. What the tensors mean: fave_fast/ops/encoder.py.
struct ClusterEncoderCall {
  const void* rows;         // E [total, 128], bf16 or float32; with `table`, ids [total]
  const void* bounds;       // offsets [users + 1], or lengths [users] with `padded_length`; null: padded ids tell
  const void* table;        // bf16 [items + 1, 128], or null
  const float* input_norm;  // [2, 128]
  const float* shift;       // [longest, 128]
  const float* scale;       // [longest, 128], or null
  const void* weights;      // bf16 [blocks, 2, 384, 32, 8]: fragments, fave_fast/ops/encoder_cluster.py
  const float* norms;       // [2 blocks + 1, 2, 128]
  const float* cos;         // [longest, 16]
  const float* sin;         // [longest, 16]
  void* out;                // bf16 [users, 128]
  std::int32_t users;
  std::int32_t padded_length;  // 0: packed
  std::int32_t longest;
  std::int32_t blocks;
  float anchor;
  float eps;
  float input_eps;
  bool wide_rows;    // ids are int64, E is float32
  bool wide_bounds;  // int64
  bool layer_norm;
  bool rotary;
  bool causal;
};

// Launches on `stream` (cudaStream_t) of `device` and returns. No history has more than 16 * tiles items; `tiles` is 1,
// 2 or 4. A cluster has 2 tiles / own blocks; `own`, the tiles of a block, is 1, or 4 with 4 tiles, to the same bits.
// With `overlap` the launch before it, which is a kernel's, need not have ended. Throws std::runtime_error with
// the runtime's error.
void launch_cluster_encoder(const ClusterEncoderCall& call, int tiles, int own, bool overlap, int device,
                            std::uint64_t stream);

}  // namespace fave_fast

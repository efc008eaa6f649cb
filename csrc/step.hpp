// The one step, histories to lists, by one call: the encoder, and the exact top K behind it.
#pragma once

#include <cstdint>

#include "encoder.hpp"

namespace fave_fast {

struct StepCall {
  const Histories& histories;
  const std::int32_t* ids;      // [count], histories end to end: from 0 to the path's items
  const std::int64_t* offsets;  // [B + 1], where each begins and the last ends
  std::int64_t count;
  bool exclude;      // a history's own items are no candidates
  const bool* deny;  // [items + 1], or null
  std::int64_t k;
  float* scores;       // [B, k]
  std::int64_t* best;  // [B, k]; minus infinity and 0 where fewer candidates remain
};

struct StepSeconds {
  double encoder;
  double topk;
};

// The lists that `score_topk` gives for the endpoints of `Encoder::encode_ids` in the table's format: the same bits.
// Returns how long each took. Throws std::invalid_argument for an id outside the table.
StepSeconds run_step(const Encoder& encoder, const InputPath& path, const StepCall& call, int threads);

}  // namespace fave_fast

#pragma once

#include <cstdint>

namespace fave_fast {

// One tile of scores, row-major: scores[b * row_stride + j] belongs to the catalogue id first_id + j.
struct ScoreTile {
  const float* scores;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t row_stride;  // in elements
  std::int64_t first_id;
};

// counts[b] += the number of columns that come before row b's target: a higher score, or an equal one with a lower id.
// A NaN marks a column that is no candidate: it is never counted, nor is the column whose id is target_ids[b].
void rank_count(const ScoreTile& tile, const float* target_scores, const std::int64_t* target_ids,
                std::int64_t* counts, int threads);

}  // namespace fave_fast

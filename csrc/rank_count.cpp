#include "rank_count.hpp"

#include <algorithm>
#include <thread>
#include <vector>

namespace fave_fast {
namespace {

// A 32-bit partial sum keeps as many lanes busy as there are floats in a vector register.
constexpr std::int64_t kBlock = std::int64_t{1} << 20;

// Elements a thread must have before starting it (about 20 us) pays.
constexpr std::int64_t kElementsPerThread = std::int64_t{1} << 17;

template <typename Before>
std::int64_t count_if(const float* begin, const float* end, Before before) {
  std::int64_t total = 0;
  while (begin < end) {
    const float* stop = begin + std::min<std::int64_t>(kBlock, end - begin);
    std::int32_t part = 0;
    for (; begin < stop; ++begin) part += before(*begin);
    total += part;
  }
  return total;
}

std::int64_t count_row(const float* row, std::int64_t columns, std::int64_t target_column, float target) {
  const std::int64_t below = std::clamp<std::int64_t>(target_column, 0, columns);
  const std::int64_t above = std::clamp<std::int64_t>(target_column + 1, 0, columns);
  return count_if(row, row + below, [target](float x) { return x >= target; }) +
         count_if(row + above, row + columns, [target](float x) { return x > target; });
}

}  // namespace

void rank_count(const ScoreTile& tile, const float* target_scores, const std::int64_t* target_ids,
                std::int64_t* counts, int threads) {
  const auto count_rows = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      counts[b] += count_row(tile.scores + b * tile.row_stride, tile.columns, target_ids[b] - tile.first_id,
                             target_scores[b]);
    }
  };
  const std::int64_t useful = std::min(tile.rows, tile.rows * tile.columns / kElementsPerThread);
  const std::int64_t parts = std::clamp<std::int64_t>(useful, 1, std::max(threads, 1));
  std::vector<std::thread> workers;
  workers.reserve(parts - 1);
  for (std::int64_t p = 1; p < parts; ++p) {
    workers.emplace_back(count_rows, tile.rows * p / parts, tile.rows * (p + 1) / parts);
  }
  count_rows(0, tile.rows / parts);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace fave_fast

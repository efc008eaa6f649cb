// The exact top K of a catalogue by inner product.
#pragma once

#include <atomic>
#include <cstdint>

#include "buffer.hpp"
#include "kernels.hpp"

namespace fave_fast {

// The K best of the items 1 to N for each of B queries: higher score first, of equal ones the lower id. An item that is
// excluded or denied, or whose score is minus infinity or NaN, is no candidate.
struct TopkCall {
  const void* queries;  // [B, d]
  std::int64_t query_stride;
  std::int64_t batch;
  const void* table;  // [N + 1, d]
  std::int64_t row_stride;
  std::int64_t items;  // N, below 2^31
  int d;
  Format format;
  std::int64_t k;
  const std::int64_t* excluded;  // ids in any order, or null
  const std::int64_t* offsets;   // [B + 1] into `excluded`
  const bool* deny;              // [N + 1], or null
  float* scores;                 // [B, k]
  std::int64_t* ids;             // [B, k]; minus infinity and 0 where fewer candidates remain
};

// By one pass over the table.
void score_topk(const Kernels& kernels, const TopkCall& call, int threads);

// A table in 8 bits an element, with a scale for each item.
//
// With x the item's embedding, s its scale, X = round(x / s) and likewise q, t, Q for the query, a = s t Q.X is
// computed (the sum exactly), and
//     |a - q.x| = |q.(sX - x) + (tQ - q).sX| <= |q| |sX - x| + |tQ - q| |sX|.
// The score that is asked for, c, is q.x computed in floats: |c - q.x| <= 2.02 d 2^-24 |q| |x| whatever the order and
// even if each product is rounded before it is added (d up to 2^16), and a few more such roundings fall on a itself and
// on the comparison. So with g = (2.02 d + 32) 2^-24, each item has
//     |a - c| <= m = |q| |sX - x| + (|tQ - q| + g |q|) max(|x|, |sX|).
// The K-th largest a - m is a bound that K scores reach; only an item with a + m not below it can be among the K best.
// Those items' scores are then computed as `score_topk` does, to the same bits. Items and queries with infinities, or
// with a scale beyond 2^+-40 (where products would be rounded as subnormal numbers, or overflow), have no such bound:
// the items are always looked at, the queries take the whole scan, as those with a NaN do. Items with a NaN are never
// looked at: their scale is NaN.
class ByteTable {
 public:
  // Of rows 1 to N of a table. Throws std::invalid_argument where d is too large for sums in 32 bits.
  ByteTable(const Kernels& kernels, const void* table, std::int64_t row_stride, std::int64_t items, int d,
            Format format, int threads);

  // The same as score_topk for a call with the table that this was made of. Queries for which more than `most(k)` items
  // remain are answered by score_topk.
  void score_topk(const TopkCall& call, int threads);

  static std::int64_t most(std::int64_t k) { return 16 * k + 4096; }

  const Kernels& kernels() const { return kernels_; }
  std::int64_t items() const { return items_; }
  int d() const { return d_; }
  std::int64_t bytes() const;
  std::int64_t asked() const { return asked_; }          // queries so far
  std::int64_t fallen_back() const { return fallen_; }  // those of them that took the whole scan

 private:
  void quantise(const void* table, std::int64_t row_stride, Format format, std::int64_t panel);

  const Kernels& kernels_;
  const std::int64_t items_;
  const int d_, units_;
  Buffer<float> bytes_;           // [panels, units, panel]: 128 + X as unsigned bytes
  Buffer<float> scales_;          // [panels * panel]
  Buffer<float> errors_, norms_;  // [panels * panel / W]: the largest |sX - x| and max(|x|, |sX|) of W items
  std::atomic<std::int64_t> asked_{0}, fallen_{0};
};

}  // namespace fave_fast

#include "score_topk.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "formats.hpp"
#include "pool.hpp"

namespace fave_fast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kBlockItems = 64;    // whose rows stay in the first cache while query after query meets them
constexpr int kBlockQueries = 16;
constexpr std::int64_t kSpanBytes = std::int64_t{1} << 19;  // of rows that stay in the second cache, likewise
constexpr std::int64_t kMostSpan = 2048;
constexpr std::int64_t kWorkPerMember = std::int64_t{1} << 18;  // products worth a second thread, some 10 us
constexpr std::int64_t kMostListBytes = std::int64_t{256} << 20;
constexpr float kWidestScale = 1099511627776.0f;  // 2^40

const char* row_at(const void* rows, std::int64_t stride, std::int64_t row, Format format) {
  return static_cast<const char*>(rows) + row * stride * (format == Format::fp32 ? 4 : 2);
}

int members_for(std::int64_t work, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(work / kWorkPerMember, 1, std::max(threads, 1)));
}

// What a query may not be answered with.
class LeftOut {
 public:
  LeftOut(const TopkCall& call, std::int64_t b) : deny_(call.deny) {
    if (call.excluded == nullptr) return;
    ids_.assign(call.excluded + call.offsets[b], call.excluded + call.offsets[b + 1]);
    std::sort(ids_.begin(), ids_.end());
  }
  bool has(std::int64_t id) const {
    return (deny_ != nullptr && deny_[id]) || (!ids_.empty() && std::binary_search(ids_.begin(), ids_.end(), id));
  }
  // Of the items from `first` on, makes the scores of those left out minus infinity.
  void strike(std::int64_t first, int count, float* scores) const {
    for (auto id = std::lower_bound(ids_.begin(), ids_.end(), first); id != ids_.end() && *id < first + count; ++id) {
      scores[*id - first] = -kInfinity;
    }
    if (deny_ == nullptr) return;
    for (int i = 0; i < count; ++i) scores[i] = deny_[first + i] ? -kInfinity : scores[i];
  }

 private:
  const bool* deny_;
  std::vector<std::int64_t> ids_;
};

struct Entry {
  float score;
  std::int32_t id;
};

// An object and no function: the sorts take it in line.
constexpr auto before = [](const Entry& a, const Entry& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
};

// The K best so far of items that come in the order of their ids.
class List {
 public:
  void start(std::int64_t k) {
    k_ = static_cast<std::size_t>(k);
    entries_.clear();
    entries_.reserve(capacity(k));
    level = -kInfinity;
  }
  static std::size_t capacity(std::int64_t k) { return 2 * static_cast<std::size_t>(k) + 24; }

  // Sets the level before the first items are added, by the scores of `count` of them. Dealt out to kBlockItems groups,
  // K of them reach the K-th largest of the groups' maxima; the level is the largest maximum below that one, so that
  // what equals it is added.
  //
  // A list that starts at minus infinity is given what fills it, and after each selection what its last level lets
  // through: 227 of 6,050 items for the best 20, with four selections. Behind the maxima of 2,048 items 65, with one at
  // most.
  void raise(const float* scores, int count) {
    if (k_ >= kBlockItems) return;
    float most[kBlockItems];
    std::fill_n(most, kBlockItems, -kInfinity);
    for (int first = 0; first < count; first += kBlockItems) {
      const int n = std::min(kBlockItems, count - first);
      for (int i = 0; i < n; ++i) most[i] = scores[first + i] > most[i] ? scores[first + i] : most[i];
    }
    const float* const kth = most + (k_ - 1);
    std::nth_element(most, most + (k_ - 1), most + kBlockItems, std::greater<float>());
    for (const float* next = kth; next < most + kBlockItems; ++next) {
      if (*next < *kth) level = std::max(level, *next);
    }
  }

  void add(Entry entry) {
    entries_.push_back(entry);
    if (entries_.size() < capacity(static_cast<std::int64_t>(k_))) return;
    std::nth_element(entries_.begin(), entries_.begin() + (k_ - 1), entries_.end(), before);
    entries_.resize(k_);
    level = entries_.back().score;
  }
  const std::vector<Entry>& entries() const { return entries_; }

  float level = 0;  // what is not above it is not among the K best

 private:
  std::size_t k_ = 0;
  std::vector<Entry> entries_;
};

void write_list(const TopkCall& call, std::int64_t b, std::vector<Entry>& found) {
  const auto k = static_cast<std::size_t>(call.k), kept = std::min(k, found.size());
  std::partial_sort(found.begin(), found.begin() + kept, found.end(), before);
  float* scores = call.scores + b * call.k;
  std::int64_t* ids = call.ids + b * call.k;
  for (std::size_t i = 0; i < k; ++i) {
    scores[i] = i < kept ? found[i].score : -kInfinity;
    ids[i] = i < kept ? found[i].id : 0;
  }
}

// Items of which one query's scores are looked at together.
std::int64_t span_of(const TopkCall& call) {
  const std::int64_t row_bytes = call.d * (call.format == Format::fp32 ? 4 : 2);
  return std::clamp<std::int64_t>(kSpanBytes / row_bytes / kBlockItems * kBlockItems, kBlockItems, kMostSpan);
}

// scores [queries, stride] of `count` items from `item` on.
void score(const Kernels& kernels, const TopkCall& call, const float* units, int queries, std::int64_t item, int count,
           float* scores, std::int64_t stride) {
  for (int i = 0; i < count; i += kBlockItems) {
    kernels.block_dots(units, queries, row_at(call.table, call.row_stride, item + i, call.format), call.row_stride,
                       std::min(kBlockItems, count - i), call.d, call.format, scores + i, stride);
  }
}

// Items begin to end for the queries first to last, lists [last - first].
void scan(const Kernels& kernels, const TopkCall& call, const Buffer<float>& units,
          const std::vector<LeftOut>& left_out, std::int64_t first, std::int64_t last, std::int64_t begin,
          std::int64_t end, List* lists) {
  const std::int64_t span = std::min(span_of(call), std::max<std::int64_t>(end - begin, 1));
  Buffer<float> scores(std::min<std::int64_t>(kBlockQueries, last - first) * span);
  Buffer<std::int32_t> places(span);
  for (std::int64_t b = first; b < last; ++b) lists[b - first].start(call.k);
  for (std::int64_t item = begin; item < end; item += span) {
    const int count = static_cast<int>(std::min(span, end - item));
    for (std::int64_t some = first; some < last; some += kBlockQueries) {
      const int queries = static_cast<int>(std::min<std::int64_t>(kBlockQueries, last - some));
      score(kernels, call, units.data() + some * query_stride(call.d), queries, item, count, scores.data(), span);
      for (int q = 0; q < queries; ++q) {
        List& list = lists[some + q - first];
        float* const row = scores.data() + q * span;
        if (item == begin) {
          left_out[some + q].strike(item, count, row);
          list.raise(row, count);
        }
        const int found = kernels.above(row, count, list.level, places.data());
        for (const std::int32_t* place = places.data(); place < places.data() + found; ++place) {
          if (!(row[*place] > list.level) || left_out[some + q].has(item + *place)) continue;
          list.add({row[*place], static_cast<std::int32_t>(item + *place)});
        }
      }
    }
  }
}

// Of the queries [B, d] the units [B, query_stride(d)].
Buffer<float> units_of(const Kernels& kernels, const TopkCall& call) {
  Buffer<float> units(call.batch * query_stride(call.d));
  for (std::int64_t b = 0; b < call.batch; ++b) {
    kernels.query_units(row_at(call.queries, call.query_stride, b, call.format), call.d, call.format,
                        units.data() + b * query_stride(call.d));
  }
  return units;
}

std::vector<LeftOut> left_out_of(const TopkCall& call) {
  std::vector<LeftOut> result;
  result.reserve(static_cast<std::size_t>(call.batch));
  for (std::int64_t b = 0; b < call.batch; ++b) result.emplace_back(call, b);
  return result;
}

}  // namespace

void score_topk(const Kernels& kernels, const TopkCall& call, int threads) {
  const std::vector<LeftOut> left_out = left_out_of(call);
  const Buffer<float> units = units_of(kernels, call);
  const int members = members_for(call.batch * call.items * call.d, threads);
  const auto list_bytes = static_cast<std::int64_t>(List::capacity(call.k) * sizeof(Entry));
  const std::int64_t at_once = std::clamp<std::int64_t>(kMostListBytes / (list_bytes * members), 1, call.batch);
  std::vector<List> lists(static_cast<std::size_t>(members * at_once));
  for (std::int64_t first = 0; first < call.batch; first += at_once) {
    const std::int64_t last = std::min(first + at_once, call.batch);
    run_on_team(members, [&](Team& team, int member) {
      const int size = team.size();
      scan(kernels, call, units, left_out, first, last, 1 + call.items * member / size,
           1 + call.items * (member + 1) / size, lists.data() + member * at_once);
      team.meet();
      std::vector<Entry> found;
      for (std::int64_t b = first + member; b < last; b += size) {
        found.clear();
        for (int m = 0; m < size; ++m) {
          const std::vector<Entry>& some = lists[m * at_once + b - first].entries();
          found.insert(found.end(), some.begin(), some.end());
        }
        write_list(call, b, found);
      }
    });
  }
}

namespace {

// The same number or the next larger float, and room for three roundings of sums and products of such numbers.
float not_less(double x) { return static_cast<float>(x * (1 + 1e-6)) + std::numeric_limits<float>::min(); }

double length_of(const std::vector<double>& x) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  return std::sqrt(squares);
}

// A vector in 8 bits: false where it has no bound.
struct Bytes {
  std::vector<double> values, rest;  // x, and s X - x
  std::vector<std::int8_t> bytes;
  float scale = 0;
  double norm = 0, error = 0, norm_of_bytes = 0;
  bool is_nan = false;  // an element is, and so is every score

  // In whole numbers up to +-most_byte.
  bool of(const char* row, int d, Format format, int most_byte) {
    values.resize(d);
    rest.resize(d);
    bytes.assign(d, 0);
    double most = 0;
    bool finite = true;
    is_nan = false;
    for (int i = 0; i < d; ++i) {
      float x;
      if (format == Format::fp32) {
        std::memcpy(&x, row + 4 * i, sizeof x);
      } else {
        std::uint16_t half;
        std::memcpy(&half, row + 2 * i, sizeof half);
        x = widen(half);
      }
      finite = finite && std::isfinite(x);
      is_nan = is_nan || std::isnan(x);
      values[i] = x;
      most = std::max(most, std::abs(values[i]));
    }
    scale = static_cast<float>(most / most_byte);
    norm = error = norm_of_bytes = 0;
    if (finite && most == 0) return true;
    if (!finite || !(scale >= 1 / kWidestScale && scale <= kWidestScale)) {
      scale = 0;
      return false;
    }
    double squares = 0;
    for (int i = 0; i < d; ++i) {
      const double whole = std::clamp<double>(std::nearbyint(values[i] / scale), -most_byte, most_byte);
      bytes[i] = static_cast<std::int8_t>(whole);
      rest[i] = whole * scale - values[i];
      squares += whole * scale * whole * scale;
    }
    norm = length_of(values);
    error = length_of(rest);
    norm_of_bytes = std::sqrt(squares);
    return true;
  }
};

// Queries that have a bound, in 8 bits.
struct ByteQueries {
  std::vector<std::int64_t> rows;  // which of the batch
  std::vector<float> units;        // [queries, units] of signed bytes
  std::vector<std::int32_t> offsets;
  std::vector<float> scales;
  std::vector<float> of_error, of_norm;  // a margin is of_error * error + of_norm * norm

  // Whether it has one.
  bool add(const TopkCall& call, std::int64_t b, int units_of_row, int most_byte) {
    Bytes made;
    if (!made.of(row_at(call.queries, call.query_stride, b, call.format), call.d, call.format, most_byte)) return false;
    made.bytes.resize(4 * static_cast<std::size_t>(units_of_row), 0);
    std::int32_t offset = 0;
    for (const std::int8_t byte : made.bytes) offset += 128 * byte;
    rows.push_back(b);
    units.resize(units.size() + units_of_row);
    std::memcpy(units.data() + units.size() - units_of_row, made.bytes.data(), made.bytes.size());
    offsets.push_back(offset);
    scales.push_back(made.scale);
    of_error.push_back(not_less(made.norm));
    of_norm.push_back(not_less(made.error + (2.02 * call.d + 32) * 0x1p-24 * made.norm));
    return true;
  }
};

struct Candidate {
  float lower, upper;
  std::int32_t id;
};

// What may be among the K best of a part of the catalogue.
struct Candidates {
  std::vector<Candidate> all;
  float level = -kInfinity;  // K of them reach it
  bool full = false;         // too many: the whole scan answers

  void add(Candidate candidate, std::int64_t k) {
    all.push_back(candidate);
    if (all.size() < std::max(limit_, List::capacity(k))) return;
    raise(k);
    full = static_cast<std::int64_t>(all.size()) > ByteTable::most(k);
    limit_ = 2 * all.size();
  }

  void raise(std::int64_t k) {
    if (static_cast<std::int64_t>(all.size()) < k) return;
    const auto kth = all.begin() + (k - 1);
    std::nth_element(all.begin(), kth, all.end(),
                     [](const Candidate& a, const Candidate& b) { return a.lower > b.lower; });
    const float bound = level = std::max(level, kth->lower);
    all.erase(std::remove_if(all.begin(), all.end(), [bound](const Candidate& c) { return c.upper < bound; }),
              all.end());
  }

 private:
  std::size_t limit_ = 0;
};

// Scores, as the whole scan has them, of those that may be among the K best.
void rescore(const Kernels& kernels, const TopkCall& call, std::int64_t b, Candidates& candidates) {
  candidates.raise(call.k);
  const std::vector<Candidate>& some = candidates.all;
  std::vector<const void*> rows;
  for (const Candidate& c : some) rows.push_back(row_at(call.table, call.row_stride, c.id, call.format));
  std::vector<float> scores(some.size());
  if (!some.empty()) {
    Buffer<float> query(query_stride(call.d));
    kernels.query_units(row_at(call.queries, call.query_stride, b, call.format), call.d, call.format, query.data());
    kernels.dots(query.data(), rows.data(), static_cast<int>(rows.size()), call.d, call.format, scores.data());
  }
  std::vector<Entry> found;
  for (std::size_t i = 0; i < some.size(); ++i) {
    if (scores[i] > -kInfinity) found.push_back({scores[i], some[i].id});
  }
  write_list(call, b, found);
}

}  // namespace

ByteTable::ByteTable(const Kernels& kernels, const void* table, std::int64_t row_stride, std::int64_t items, int d,
                     Format format, int threads)
    : kernels_(kernels), items_(items), d_(d), units_((d + 3) / 4) {
  if (d > 65536) throw std::invalid_argument("d is " + std::to_string(d) + "; expected at most 65536");
  const std::int64_t width = kernels.panel, panels = (items + width - 1) / width;
  bytes_ = Buffer<float>(panels * width * units_);
  scales_ = Buffer<float>(panels * width);
  errors_ = Buffer<float>(panels * width / kernels.lanes);
  norms_ = Buffer<float>(panels * width / kernels.lanes);
  run_on_team(members_for(items * d * 16, threads), [&](Team& team, int member) {
    const std::int64_t end = panels * (member + 1) / team.size();
    for (std::int64_t p = panels * member / team.size(); p < end; ++p) quantise(table, row_stride, format, p);
  });
}

void ByteTable::quantise(const void* table, std::int64_t row_stride, Format format, std::int64_t panel) {
  const int width = kernels_.panel, lanes = kernels_.lanes;
  auto* to = reinterpret_cast<unsigned char*>(bytes_.data() + panel * width * units_);
  std::fill_n(errors_.data() + panel * (width / lanes), width / lanes, 0.0f);
  std::fill_n(norms_.data() + panel * (width / lanes), width / lanes, 0.0f);
  Bytes item;
  for (int column = 0; column < width; ++column) {
    const std::int64_t id = 1 + panel * width + column, place = panel * width + column;
    const bool there = id <= items_;
    const bool bounded = there && item.of(row_at(table, row_stride, id, format), d_, format, 127);
    const bool candidate = there && !item.is_nan;
    scales_.data()[place] = candidate ? item.scale : std::numeric_limits<float>::quiet_NaN();
    for (int i = 0; i < 4 * units_; ++i) {
      const int value = there && i < d_ ? item.bytes[i] : 0;
      to[(static_cast<std::int64_t>(i / 4) * width + column) * 4 + i % 4] = static_cast<unsigned char>(128 + value);
    }
    if (!candidate) continue;
    float& error = errors_.data()[place / lanes];
    float& norm = norms_.data()[place / lanes];
    error = std::max(error, bounded ? not_less(item.error) : kInfinity);
    norm = std::max(norm, bounded ? not_less(std::max(item.norm, item.norm_of_bytes)) : 0.0f);
  }
}

std::int64_t ByteTable::bytes() const {
  return 4 * (bytes_.size() + scales_.size() + errors_.size() + norms_.size());
}

void ByteTable::score_topk(const TopkCall& call, int threads) {
  const std::vector<LeftOut> left_out = left_out_of(call);
  ByteQueries queries;
  std::vector<std::int64_t> rest;  // queries for the whole scan
  for (std::int64_t b = 0; b < call.batch; ++b) {
    if (!queries.add(call, b, units_, kernels_.most_query_byte)) rest.push_back(b);
  }
  const auto count = static_cast<std::int64_t>(queries.rows.size());
  const int width = kernels_.panel, vectors = width / kernels_.lanes;
  const std::int64_t panels = (items_ + width - 1) / width;
  const int members = members_for(count * items_ * d_ / 2, threads);
  std::vector<Candidates> parts(static_cast<std::size_t>(members * count));
  std::vector<char> full(static_cast<std::size_t>(count), 0);
  const auto scan = [&](std::int64_t begin, std::int64_t end, Candidates* part) {
    Buffer<float> scores(kBlockQueries * width);
    std::vector<float> margins(vectors);
    std::vector<std::int32_t> places(width);
    for (std::int64_t p = begin; p < end; ++p) {
      const float* errors = errors_.data() + p * vectors;
      const float* norms = norms_.data() + p * vectors;
      for (std::int64_t first = 0; first < count; first += kBlockQueries) {
        const int some = static_cast<int>(std::min<std::int64_t>(kBlockQueries, count - first));
        kernels_.byte_dots(queries.units.data() + first * units_, some, bytes_.data() + p * width * units_, units_,
                           queries.offsets.data() + first, queries.scales.data() + first,
                           scales_.data() + p * width, scores.data());
        for (int q = 0; q < some; ++q) {
          Candidates& candidates = part[first + q];
          const float* row = scores.data() + q * width;
          const int found =
              kernels_.not_below(row, queries.of_error[first + q], errors, queries.of_norm[first + q], norms,
                                 candidates.level, margins.data(), places.data());
          for (int i = 0; i < found && !candidates.full; ++i) {
            const std::int64_t id = 1 + p * width + places[i];
            const float score = row[places[i]], margin = margins[places[i] / kernels_.lanes];
            if (std::isnan(score) || left_out[queries.rows[first + q]].has(id)) continue;
            candidates.add({score - margin, score + margin, static_cast<std::int32_t>(id)}, call.k);
          }
        }
      }
    }
  };
  run_on_team(members, [&](Team& team, int member) {
    const int size = team.size();
    scan(panels * member / size, panels * (member + 1) / size, parts.data() + member * count);
    team.meet();
    for (std::int64_t q = member; q < count; q += size) {
      Candidates& all = parts[q];
      for (int m = 1; m < size; ++m) {
        const Candidates& more = parts[m * count + q];
        all.full = all.full || more.full;
        all.all.insert(all.all.end(), more.all.begin(), more.all.end());
      }
      if (all.full) {
        full[q] = 1;
      } else {
        rescore(kernels_, call, queries.rows[q], all);
      }
    }
  });
  for (std::int64_t q = 0; q < count; ++q) {
    if (full[q]) rest.push_back(queries.rows[q]);
  }
  for (const std::int64_t b : rest) {
    TopkCall one = call;
    one.batch = 1;
    one.queries = row_at(call.queries, call.query_stride, b, call.format);
    if (call.offsets != nullptr) one.offsets = call.offsets + b;
    one.scores = call.scores + b * call.k;
    one.ids = call.ids + b * call.k;
    fave_fast::score_topk(kernels_, one, threads);
  }
  asked_ += call.batch;
  fallen_ += static_cast<std::int64_t>(rest.size());
}

}  // namespace fave_fast

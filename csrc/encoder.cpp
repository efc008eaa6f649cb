#include "encoder.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "formats.hpp"
#include "pool.hpp"

namespace fave_fast {
namespace {

// Rows that a thread takes through all blocks at a time. More rows read the weights less often (1.6 MB in bfloat16);
// beyond this the rows' own 3 KB each no longer stay in the second cache.
constexpr std::int64_t kMostRows = 112;
constexpr std::int64_t kFewestRows = 48;
constexpr std::int64_t kGroupsPerThread = 4;  // so that the last ones end at about the same time
constexpr std::int64_t kRowsPerMember = 3;    // fewer are not worth a second thread's waits
constexpr std::int64_t kNewestRows = 48;

// The item that the anchor prior of eq. (14) takes.
std::int64_t anchor_of(const std::int64_t* ids, int length, float anchor) {
  const auto items = static_cast<int>(length - std::count(ids, ids + length, 0));
  const int oldest_first = std::min(static_cast<int>(anchor * static_cast<float>(items)), std::max(items - 1, 0));
  return ids[std::min(length - items + oldest_first, length - 1)];
}

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// [2, d] as two rows that end in zeros.
Buffer<float> padded_norm(const float* gain_and_bias, int d) {
  const std::int64_t stride = round_up(d, kVector);
  Buffer<float> result(2 * stride);
  std::fill_n(result.data(), 2 * stride, 0.0f);
  std::copy_n(gain_and_bias, d, result.data());
  std::copy_n(gain_and_bias + d, d, result.data() + stride);
  return result;
}

template <typename T>
void put_pair(T first, T second, float* unit) {
  const T pair[2] = {first, second};
  std::memcpy(unit, pair, sizeof pair);
}

// How a column of weights becomes whole numbers (kernels.hpp).
struct Words {
  double scale = 1;

  Words() = default;
  Words(const float* column, int n) {
    double squares = 0, most = 0;
    for (int i = 0; i < n; ++i) {
      squares += static_cast<double>(column[i]) * column[i];
      most = std::max(most, std::abs(static_cast<double>(column[i])));
    }
    if (squares > 0) scale = std::min(kColumnLength / std::sqrt(squares), 32767 / most);
    if (!std::isfinite(squares)) scale = std::nan("");
  }
  std::int16_t of(float x) const {
    return std::isnan(scale) ? std::int16_t{0} : static_cast<std::int16_t>(std::lrint(x * scale));
  }
};

}  // namespace

// A matrix [columns, units] in panels: of each panel's columns the first unit, then their second, and so on; last, for
// int16_pairs, what they are scaled back by.
struct Encoder::Packed {
  Buffer<float> data;
  int units = 0;
  int panels = 0;
};

struct Encoder::Block {
  Packed q, kv, attention_out, ffn_in, ffn_out;
  Buffer<float> attention_norm, ffn_norm;
};

// Histories of a call that are computed together.
struct Encoder::Group {
  std::int64_t begin, end;
  std::int64_t rows;
};

// What a thread computes in, kept from call to call: fresh memory costs more than a short history.
struct Encoder::Scratch {
  Buffer<float> h, x, qkv, attended, hidden;  // of a group
  Buffer<float> query, attention, narrow;     // of a thread within it
  Buffer<float> newest;                       // of a call

  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

  void hold(const Call& call, std::int64_t rows);
};

struct Encoder::Call {
  const Histories& histories;
  const void* rows;         // E, or
  const std::int64_t* ids;  // ids with
  const InputPath* path;
  const std::vector<std::uint8_t>* present;  // per id, or empty: no zeros among them
  Format format;
  void* out;
  Format out_format;
  float* newest;           // [B, wide]: the newest items' states before the last block
  float* newest_attended;  // units [B, x_stride]
  std::int64_t wide, x_stride, qkv_stride, hidden_stride;
};

void Encoder::Scratch::hold(const Call& call, std::int64_t rows) {
  h.at_least(rows * call.wide);
  x.at_least(rows * call.x_stride);
  qkv.at_least(rows * call.qkv_stride);
  attended.at_least(rows * call.x_stride);
  hidden.at_least(rows * call.hidden_stride);
}

Encoder::Encoder(const EncoderConfig& config, const Kernels& kernels)
    : config_(config),
      kernels_(kernels),
      operand_(config.half ? kernels.half : Operand::fp32),
      blocks_(config.blocks) {
  if (config.d < 1 || config.heads < 1 || config.hidden < 1 || config.blocks < 1 || config.max_length < 1 ||
      config.d % (2 * config.heads) != 0 || config.hidden % 2 != 0) {
    throw std::invalid_argument("sizes of the encoder do not fit: d " + std::to_string(config.d) + ", heads " +
                                std::to_string(config.heads) + ", hidden " + std::to_string(config.hidden) +
                                ", blocks " + std::to_string(config.blocks) + ", max_length " +
                                std::to_string(config.max_length) +
                                "; expected d a multiple of 2 heads, hidden even, all at least 1");
  }
}

Encoder::~Encoder() = default;

Encoder::Packed Encoder::pack(const float* weights, int out, int in) const {
  Packed packed;
  const int width = kernels_.panel;
  packed.units = operand_ == Operand::fp32 ? in : in / 2;
  packed.panels = (out + width - 1) / width;
  const std::int64_t rows = packed.units + (operand_ == Operand::int16_pairs ? 1 : 0);
  const std::int64_t size = packed.panels * rows * width;
  packed.data = Buffer<float>(size);
  std::fill_n(packed.data.data(), size, 0.0f);
  for (int column = 0; column < out; ++column) {
    const float* from = weights + static_cast<std::int64_t>(column) * in;
    float* to = packed.data.data() + column / width * rows * width + column % width;
    const Words words = operand_ == Operand::int16_pairs ? Words(from, in) : Words();
    for (int u = 0; u < packed.units; ++u) {
      switch (operand_) {
        case Operand::fp32: to[u * width] = from[u]; break;
        case Operand::bf16_pairs: put_pair(narrowed(from[2 * u]), narrowed(from[2 * u + 1]), to + u * width); break;
        case Operand::int16_pairs: put_pair(words.of(from[2 * u]), words.of(from[2 * u + 1]), to + u * width); break;
      }
    }
    if (operand_ == Operand::int16_pairs) to[packed.units * width] = static_cast<float>(1 / words.scale);
  }
  return packed;
}

void Encoder::load(int block, const BlockWeights& weights) {
  const int d = config_.d;
  Block& to = blocks_.at(block);
  to.q = pack(weights.qkv, d, d);
  to.kv = pack(weights.qkv + static_cast<std::int64_t>(d) * d, 2 * d, d);
  to.attention_out = pack(weights.attention_out, d, d);
  to.ffn_in = pack(weights.ffn_in, config_.hidden, d);
  to.ffn_out = pack(weights.ffn_out, d, config_.hidden);
  to.attention_norm = padded_norm(weights.attention_norm, d);
  to.ffn_norm = padded_norm(weights.ffn_norm, d);
}

void Encoder::load_final_norm(const float* gain_and_bias) { final_norm_ = padded_norm(gain_and_bias, config_.d); }

void Encoder::load_rotary(const float* cos, const float* sin) {
  const std::int64_t size = static_cast<std::int64_t>(config_.max_length) * (config_.d / config_.heads / 2);
  cos_ = Buffer<float>(size);
  sin_ = Buffer<float>(size);
  std::copy_n(cos, size, cos_.data());
  std::copy_n(sin, size, sin_.data());
}

Histories Encoder::newest_of(Histories histories) const {
  for (std::size_t b = 0; b < histories.lengths.size(); ++b) {
    const int over = histories.lengths[b] - config_.max_length;
    if (over <= 0) continue;
    histories.starts[b] += over;
    histories.lengths[b] -= over;
  }
  return histories;
}

void Encoder::encode(const Histories& histories, const void* rows, Format format, void* out, Format out_format,
                     int threads) const {
  const std::vector<std::uint8_t> none;
  const Histories used = newest_of(histories);
  run(Call{used, rows, nullptr, nullptr, &none, format, out, out_format, nullptr, nullptr, 0, 0, 0, 0}, threads);
}

void Encoder::encode_ids(const Histories& histories, const std::int64_t* ids, const InputPath& path, void* out,
                         Format out_format, int threads) const {
  Histories used = newest_of(histories);
  std::vector<std::uint8_t> present;
  bool gaps = false;
  for (std::size_t b = 0; b < used.lengths.size(); ++b) {
    bool begun = false;
    for (std::int64_t at = used.starts[b], end = at + used.lengths[b]; at < end; ++at) {
      if (ids[at] < 0 || ids[at] > path.items) {
        throw std::invalid_argument("an id is " + std::to_string(ids[at]) + "; expected 0 to " +
                                    std::to_string(path.items));
      }
      if (ids[at] == 0 && begun) gaps = true;
      if (ids[at] == 0 && !begun) {
        ++used.starts[b];
        --used.lengths[b];
      }
      begun |= ids[at] != 0;
    }
  }
  if (gaps) {
    std::int64_t end = 0;
    for (std::size_t b = 0; b < used.lengths.size(); ++b) end = std::max(end, used.starts[b] + used.lengths[b]);
    present.assign(static_cast<std::size_t>(end), 1);
    for (std::size_t b = 0; b < used.lengths.size(); ++b) {
      for (int i = 0; i < used.lengths[b]; ++i) present[used.starts[b] + i] = ids[used.starts[b] + i] != 0;
    }
  }
  run(Call{used, nullptr, ids, &path, &present, path.format, out, out_format, nullptr, nullptr, 0, 0, 0, 0}, threads);
}

void Encoder::run(const Call& given, int threads) const {
  const std::vector<int>& lengths = given.histories.lengths;
  const auto count = static_cast<std::int64_t>(lengths.size());
  std::int64_t total = 0;
  for (const int n : lengths) total += n;
  Call call = given;
  // Rows of int16_pairs are made in the place of their floats.
  const std::int64_t unit_size = operand_ == Operand::bf16_pairs ? 2 : 1, columns = std::max(kernels_.panel, kVector);
  call.wide = round_up(config_.d, columns);
  call.x_stride = call.wide / unit_size;
  call.qkv_stride = config_.d + round_up(2 * config_.d, columns);
  call.hidden_stride = round_up(config_.hidden, columns) / unit_size;
  Scratch& own = Scratch::of_this_thread();
  const std::int64_t newest_size = count * (call.wide + call.x_stride);
  call.newest = own.newest.at_least(newest_size);
  std::fill_n(call.newest, newest_size, 0.0f);  // of histories without items
  call.newest_attended = call.newest + count * call.wide;

  const auto members = static_cast<int>(std::clamp<std::int64_t>(total / kRowsPerMember, 1, std::max(threads, 1)));
  const std::vector<Group> groups = groups_of(lengths, total, members);
  const bool together = groups.size() == 1;
  if (together) own.hold(call, total);
  std::atomic<std::size_t> next{0};
  run_on_team(members, [&](Team& team, int member) {
    Scratch& scratch = Scratch::of_this_thread();
    if (together) {
      run_group(call, groups[0], own, scratch, team, member);
    } else {
      Team alone(1);
      for (std::size_t g = next++; g < groups.size(); g = next++) {
        scratch.hold(call, groups[g].rows);
        run_group(call, groups[g], scratch, scratch, alone, 0);
      }
    }
    team.meet();
    const std::int64_t end = count * (member + 1) / team.size();
    for (std::int64_t b = count * member / team.size(); b < end; b += kNewestRows) {
      run_newest(call, b, std::min(b + kNewestRows, end), scratch);
    }
  });
}

// One group for all threads where the rows are few; else groups of about equal size.
std::vector<Encoder::Group> Encoder::groups_of(const std::vector<int>& lengths, std::int64_t total, int members) {
  const std::int64_t target = total <= members * kMostRows
                                  ? total
                                  : std::clamp(total / (members * kGroupsPerThread), kFewestRows, kMostRows);
  std::vector<Group> groups;
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    if (groups.empty() || groups.back().rows + lengths[b] > target) {
      groups.push_back({static_cast<std::int64_t>(b), static_cast<std::int64_t>(b), 0});
    }
    groups.back().end = static_cast<std::int64_t>(b) + 1;
    groups.back().rows += lengths[b];
  }
  return groups;
}

void Encoder::run_group(const Call& call, const Group& group, Scratch& shared, Scratch& own, Team& team,
                        int member) const {
  const auto begin = static_cast<int>(group.rows * member / team.size());
  const auto end = static_cast<int>(group.rows * (member + 1) / team.size());
  const int rows = end - begin, d = config_.d;
  float* h = shared.h.data() + begin * call.wide;
  float* x = shared.x.data() + begin * call.x_stride;
  float* qkv = shared.qkv.data() + begin * call.qkv_stride;
  const auto multiply = [&](const float* a, std::int64_t stride, int count, const Packed& w, Epilogue epilogue,
                            float* to, std::int64_t to_stride) {
    kernels_.dense(a, stride, count, w.data.data(), w.units, w.panels, epilogue, to, to_stride, operand_);
  };
  put_input(call, group, begin, end, h);
  for (int b = 0; b < config_.blocks; ++b) {
    const Block& block = blocks_[b];
    const bool last = b + 1 == config_.blocks;
    kernels_.norm(norm_of(block.attention_norm), h, rows, call.wide, d, x, call.x_stride, operand_);
    if (!last) multiply(x, call.x_stride, rows, block.q, Epilogue::store, qkv, call.qkv_stride);
    multiply(x, call.x_stride, rows, block.kv, Epilogue::store, qkv + d, call.qkv_stride);
    if (last) put_newest(call, group, begin, end, shared, own);
    team.meet();
    attend(call, group, last, shared, own, team.size(), member);
    if (last) return;
    team.meet();
    float* attended = shared.attended.data() + begin * call.x_stride;
    if (operand_ == Operand::int16_pairs) kernels_.to_words(attended, rows, call.x_stride, d);
    multiply(attended, call.x_stride, rows, block.attention_out, Epilogue::add, h, call.wide);
    kernels_.norm(norm_of(block.ffn_norm), h, rows, call.wide, d, x, call.x_stride, operand_);
    float* hidden = shared.hidden.data() + begin * call.hidden_stride;
    multiply(x, call.x_stride, rows, block.ffn_in, Epilogue::gelu, hidden, call.hidden_stride);
    multiply(hidden, call.hidden_stride, rows, block.ffn_out, Epilogue::add, h, call.wide);
  }
}

Norm Encoder::norm_of(const Buffer<float>& padded) const {
  return {padded.data(), padded.data() + padded.size() / 2, config_.eps, config_.layer_norm};
}

// E of the group's rows begin to end, in float32.
void Encoder::put_input(const Call& call, const Group& group, int begin, int end, float* h) const {
  const int d = config_.d;
  int row = 0;
  for (std::int64_t b = group.begin; b < group.end; ++b) {
    const int length = call.histories.lengths[b];
    const std::int64_t start = call.histories.starts[b];
    const std::size_t size = call.format == Format::fp32 ? 4 : 2;
    const auto* table = static_cast<const char*>(call.ids == nullptr ? call.rows : call.path->table);
    const char* anchor = nullptr;
    if (call.ids != nullptr && call.path->scale != nullptr && length > 0) {
      anchor = table + static_cast<std::size_t>(anchor_of(call.ids + start, length, call.path->anchor)) * d * size;
    }
    for (int i = std::max(0, begin - row); i < length && row + i < end; ++i) {
      float* to = h + (row + i - begin) * call.wide;
      std::fill(to + d, to + call.wide, 0.0f);
      if (call.ids == nullptr) {
        const char* from = table + static_cast<std::size_t>(start + i) * d * size;
        if (call.format == Format::fp32) {
          std::memcpy(to, from, d * sizeof(float));
        } else {
          for (int c = 0; c < d; ++c) to[c] = widen(reinterpret_cast<const std::uint16_t*>(from)[c]);
        }
        continue;
      }
      const Input in{call.format, call.path->norm, config_.input_eps, d};
      const std::int64_t age = length - 1 - i;
      kernels_.input(in, table + static_cast<std::size_t>(call.ids[start + i]) * d * size, anchor,
                     call.path->shift + age * d, anchor == nullptr ? nullptr : call.path->scale + age * d, to);
    }
    row += length;
  }
}

// Before the last block's attention: the states and the queries of those newest items that are among the rows.
void Encoder::put_newest(const Call& call, const Group& group, int begin, int end, Scratch& shared,
                         Scratch& own) const {
  float* x = own.query.at_least(kNewestRows * (call.x_stride + call.wide));
  float* q = x + kNewestRows * call.x_stride;
  std::int64_t rows_at[kNewestRows];
  int count = 0;
  const auto flush = [&] {
    const Packed& w = blocks_.back().q;
    kernels_.dense(x, call.x_stride, count, w.data.data(), w.units, w.panels, Epilogue::store, q, call.wide, operand_);
    for (int i = 0; i < count; ++i) {
      std::copy_n(q + i * call.wide, config_.d, shared.qkv.data() + rows_at[i] * call.qkv_stride);
    }
    count = 0;
  };
  std::int64_t row = 0;
  for (std::int64_t b = group.begin; b < group.end; ++b) {
    row += call.histories.lengths[b];
    const std::int64_t newest = row - 1;
    if (call.histories.lengths[b] == 0 || newest < begin || newest >= end) continue;
    std::copy_n(shared.h.data() + newest * call.wide, call.wide, call.newest + b * call.wide);
    std::copy_n(shared.x.data() + newest * call.x_stride, call.x_stride, x + count * call.x_stride);
    rows_at[count++] = newest;
    if (count == kNewestRows) flush();
  }
  if (count > 0) flush();
}

// This member's heads of the group's histories.
void Encoder::attend(const Call& call, const Group& group, bool last, Scratch& shared, Scratch& own, int members,
                     int member) const {
  const int channels = config_.d / config_.heads;
  float* scratch = own.attention.at_least(attention_scratch(config_.max_length, channels));
  const std::int64_t work = group.rows * config_.heads;
  std::int64_t row = 0;
  for (std::int64_t b = group.begin; b < group.end; ++b) {
    const int length = call.histories.lengths[b];
    for (int head = 0; head < config_.heads && length > 0; ++head) {
      const std::int64_t before = row * config_.heads + static_cast<std::int64_t>(head) * length;
      if (before * members / work != member) continue;
      const Attention attention{shared.qkv.data() + row * call.qkv_stride,
                                call.qkv_stride,
                                config_.d,
                                channels,
                                head,
                                length,
                                last ? length - 1 : 0,
                                config_.causal,
                                config_.rotary ? cos_.data() : nullptr,
                                sin_.data(),
                                call.present->empty() ? nullptr : call.present->data() + call.histories.starts[b]};
      float* out = last ? call.newest_attended + b * call.x_stride : shared.attended.data() + row * call.x_stride;
      kernels_.attend(attention, scratch, out, call.x_stride, operand_);
    }
    row += length;
  }
}

// The rest of the last block and the final norm, for the histories begin to end.
void Encoder::run_newest(const Call& call, std::int64_t begin, std::int64_t end, Scratch& own) const {
  const int count = static_cast<int>(end - begin), d = config_.d;
  const Block& block = blocks_.back();
  own.hold(call, count);
  float* h = call.newest + begin * call.wide;
  float *x = own.x.data(), *hidden = own.hidden.data(), *result = own.narrow.at_least(kNewestRows * call.wide);
  const auto multiply = [&](const float* a, std::int64_t stride, const Packed& w, Epilogue epilogue, float* to,
                            std::int64_t to_stride) {
    kernels_.dense(a, stride, count, w.data.data(), w.units, w.panels, epilogue, to, to_stride, operand_);
  };
  float* attended = call.newest_attended + begin * call.x_stride;
  if (operand_ == Operand::int16_pairs) kernels_.to_words(attended, count, call.x_stride, d);
  multiply(attended, call.x_stride, block.attention_out, Epilogue::add, h, call.wide);
  kernels_.norm(norm_of(block.ffn_norm), h, count, call.wide, d, x, call.x_stride, operand_);
  multiply(x, call.x_stride, block.ffn_in, Epilogue::gelu, hidden, call.hidden_stride);
  multiply(hidden, call.hidden_stride, block.ffn_out, Epilogue::add, h, call.wide);
  kernels_.norm(norm_of(final_norm_), h, count, call.wide, d, result, call.wide, Operand::fp32);
  for (int i = 0; i < count; ++i) {
    const bool empty = call.histories.lengths[begin + i] == 0;
    for (int c = 0; c < d; ++c) {
      const float value = empty ? 0.0f : result[i * call.wide + c];
      const std::int64_t at = (begin + i) * d + c;
      if (call.out_format == Format::fp32) {
        static_cast<float*>(call.out)[at] = value;
      } else {
        static_cast<std::uint16_t*>(call.out)[at] = narrowed(value);
      }
    }
  }
}

}  // namespace fave_fast

#pragma once

// The kernel of tile_encoder.cu.
//
// A warpgroup has a tile of 64 rows: one history at its end, or several of up to 32, 16 or 8 items that a plan has put
// together, each at the end of its own rows. Up to four tiles make a block, which share nothing but the weights until the
// last feed-forward. Eight rows are always of one history: of a warp's 16, a thread has one of the lower eight and one of
// the upper. The residual stream stays in registers as the accumulators of the products that add to it; a row's norm and
// its weights of the attention never leave its warp. What another warp needs lies in shared memory: a head's keys and
// values, and as left operands the normalised rows and the queries.
//
// Weights come by the copy engine in portions of 32 KB, up to three ahead: a head's queries, keys, values and its part of
// the output projection, or 64 hidden units of the feed-forward with both their matrices. Whichever warp is the last to
// have used a portion asks for the one that takes its place.
//
// On an H200 with four transformer blocks one tile a multiprocessor takes 62 us, two 78, four 109 (histories of 50 items,
// warm L2): tensor cores are busy half of the time, and so is the issue of instructions. 512 threads have 128 registers
// each, of which the residual takes 64 and a product 32. Where that does not do the compiler runs products one after
// another (139 us, ptxas says C7512); what keeps it within: addresses of operands are a warp's own (`this_place`), what
// loops do not change is computed anew in them, keys and queries are operands in shared memory rather than registers, and
// no branch leaves a part of an operand undefined. Bringing norms or rows near before they are needed made it slower.

#include <cstdint>

#include "encoder_input.cuh"
#include "gpu_encoders.hpp"
#include "hopper.cuh"

namespace fave_fast {
namespace {

constexpr int kWarpgroup = 128;                       // threads
constexpr std::uint32_t kPortion = 32768;             // bytes of weights
constexpr int kAhead = 3;                             // portions
constexpr int kHeads = 4;
constexpr int kUnits = 8;                             // portions of the feed-forward
constexpr int kPortions = kHeads + kUnits;            // of a transformer block
constexpr std::uint32_t kHeadPanel = 96 * kPanelRow;  // a head's queries, keys and values from 64 channels
constexpr std::uint32_t kValues = 64 * kPanelRow;     // where the values begin in such a panel
constexpr std::uint32_t kOut = 2 * kHeadPanel;        // where its part of the output projection begins
constexpr std::uint32_t kNewestPanel = kPanel / 2;    // 32 rows: one of each eight of four tiles
constexpr std::uint32_t kSecond = 2 * kPanel;         // where the second matrix begins in a portion of the feed-forward

// The history that eight rows are of; its own rows end before row `end` of the tile. No user, no history.
struct Own {
  History history;
  int user;
  unsigned end;

  __device__ __forceinline__ int age(unsigned row) const { return static_cast<int>(end) - 1 - static_cast<int>(row); }
  __device__ __forceinline__ bool has_items() const { return history.present != 0; }
  // Whether the newest item is in the last row of the eight from 8 `eight` on.
  __device__ __forceinline__ bool has_newest(unsigned eight) const { return user >= 0 && end == 8 * eight + 8; }
};

// What a warpgroup's warps tell each other, and their operands.
struct alignas(1024) Tile {
  unsigned char x[2][kPanel];
  unsigned char turned[kPanel];      // row: item; 32 channels of its query, then of its key
  unsigned char values[kPanel / 2];  // row: channel; "channels" are items
};

template <int kTiles>
struct alignas(1024) Shared {
  unsigned char weights[kAhead][kPortion];
  Tile tiles[kTiles];
  std::uint64_t weights_here[kAhead];
  std::uint32_t used[kAhead];  // how often a warp was done with a portion that lay here
  Own own[kTiles][8];          // of each eight rows; read where it is needed, as registers are few
  bool has_items[kTiles];
};

struct Place {
  unsigned group, quad;  // lane = 4 group + quad
  unsigned which;        // the warpgroup
  unsigned warp;         // of the warpgroup
  unsigned row;          // this thread's rows are `row` and `row + 8`
};

__device__ __forceinline__ Place this_place() {
  const unsigned thread = anew(threadIdx.x), lane = thread % 32;
  // From one lane, so that the compiler knows it to be the warp's and keeps addresses in the warp's registers.
  const unsigned warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  return {lane / 4, lane % 4, warp / 4, warp % 4, 16 * (warp % 4) + lane / 4};
}

// Channels 64 half + 8 j + 2 quad + e % 2 of row `row` + 8 (e / 2) are h[half][4 j + e].
using Rows = float[2][32];

// The portions of weights that a block goes through, each to the next of kAhead places.
template <int kTiles>
struct Stream {
  const EncoderCall& call;
  Shared<kTiles>& s;
  std::uint32_t warps;  // that use each portion
  int left;             // portions behind those that are on their way
  int place = 0;
  int round = 0;

  // A thread has a portion brought.
  __device__ __forceinline__ void bring(int portion, int there) const {
    barrier_expect(&s.weights_here[there], kPortion);
    copy_in(s.weights[there],
            static_cast<const unsigned char*>(call.weights) + static_cast<std::int64_t>(portion) * kPortion, kPortion,
            &s.weights_here[there]);
  }

  // Waits for the present portion and returns it as an operand.
  __device__ __forceinline__ std::uint32_t wait() const {
    barrier_wait(&s.weights_here[place], round % 2);
    return operand(shared_address(s.weights[place]));
  }

  // Leaves portions to others. All lanes wait for each before it counts as used: a barrier two portions further looks
  // like one that nothing has come to yet.
  __device__ __forceinline__ void skip(unsigned portions) {
#pragma unroll 1
    for (; portions > 0; --portions) {
      wait();
      __syncwarp();
      next();
    }
  }

  // This warp's products with the present portion are done.
  __device__ __forceinline__ void next() {
    if (left > 0) {
      if (threadIdx.x % 32 == 0 && count_up(&s.used[place]) == warps * (round + 1)) {
        bring(kPortions * call.blocks - left, place);
      }
      --left;
    }
    if (++place == kAhead) place = 0, ++round;
  }
};

// A norm's means (0 of an RMSNorm) and factors.
struct Norm {
  Two mean, rate;
};

template <bool kLayerNorm>
__device__ __forceinline__ Norm norm_of(const EncoderCall& call, const Rows& h) {
  Norm norm = {{0.0f, 0.0f}, {0.0f, 0.0f}};
  if (kLayerNorm) {
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      const float* four = &h[i / 32][i % 32];
      norm.mean.low += four[0] + four[1], norm.mean.high += four[2] + four[3];
    }
    norm.mean = quad_totals(norm.mean);
    norm.mean.low *= 1.0f / kChannels, norm.mean.high *= 1.0f / kChannels;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const float y = h[i / 32][i % 32] - (kLayerNorm ? i & 2 ? norm.mean.high : norm.mean.low : 0.0f);
    (i & 2 ? norm.rate.high : norm.rate.low) += y * y;
  }
  norm.rate = quad_totals(norm.rate);
  norm.rate.low = rsqrtf(norm.rate.low * (1.0f / kChannels) + call.eps);
  norm.rate.high = rsqrtf(norm.rate.high * (1.0f / kChannels) + call.eps);
  return norm;
}

// A quarter of the normalised channels: those of h[quarter / 2] from 16 (quarter % 2) on.
template <bool kLayerNorm>
__device__ __forceinline__ void normalised(const Gains<4>& gains, const Norm& norm, int quarter, const Rows& h,
                                           float (&y)[16]) {
  // Not by the differences to the mean, which norm_of has too: the compiler would keep all 64 of them.
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 gain = gains.gain[i / 4], bias = gains.bias[i / 4];
    const float factor = (i & 2 ? norm.rate.high : norm.rate.low) * (i & 1 ? gain.y : gain.x);
    const float shift = (i & 1 ? bias.y : bias.x) - (i & 2 ? norm.mean.high : norm.mean.low) * factor;
    y[i] = h[quarter / 2][quarter % 2 * 16 + i] * factor + (kLayerNorm ? shift : 0.0f);
  }
}

// Two channels of a panel's row `row` + 8 r, of those that the quad has of the panel's sixteen bytes `chunk`.
__device__ __forceinline__ void store_pair(unsigned char (&panel)[kPanel], const Place& at, int chunk, int r,
                                           std::uint32_t pair) {
  // in_panel(row + 8 r, 8 chunk + 2 quad), of which but a few bits depend on the thread
  const std::uint32_t first = in_panel(at.row, 2 * at.quad);
  *reinterpret_cast<std::uint32_t*>(&panel[(first ^ 16 * chunk) + 8 * r * kPanelRow]) = pair;
}

// Writes norm `number` of the residual as the left operand of products.
template <bool kLayerNorm>
__device__ __forceinline__ void normalise(const EncoderCall& call, int number, const Rows& h, const Place& at,
                                          Tile* tiles) {
  Tile& tile = tiles[at.which];
  Gains<4> gains = load_gains<kLayerNorm, 4>(call, number, at.quad);
  const Norm norm = norm_of<kLayerNorm>(call, h);
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    float y[16];
    normalised<kLayerNorm>(gains, norm, quarter, h, y);
    if (quarter < 3) gains = load_gains<kLayerNorm, 4>(call, number, 16 * quarter + 16 + at.quad);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      store_pair(tile.x[quarter / 2], at, quarter % 2 * 4 + i / 2, i % 2, pack(y[2 * i], y[2 * i + 1]));
    }
  }
  stores_before_products();
  warpgroup_sync(at.which);
}

// Projects the normalised rows to a head's queries, keys and values.
__device__ __forceinline__ void project(const EncoderCall& call, std::uint32_t weights, const Own (&own)[8],
                                        const Place& at, Tile& tile) {
  const std::uint32_t rows = operand(shared_address(tile.x));
  {
    float c[32];
    multiply_panels<2>(c, rows, kPanel, weights, kHeadPanel);
    warpgroup_sync(at.which);  // the head before is done with its own
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int age = min(own[2 * at.warp + r].age(at.row + 8 * r), call.longest - 1);
      const unsigned where = anew(static_cast<unsigned>(age) * 16 + at.quad);
      const float *cosines = call.cos + where, *sines = call.sin + where;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float cosine = __ldg(cosines + 4 * j), sine = __ldg(sines + 4 * j);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const float first = c[16 * part + 4 * j + 2 * r], second = c[16 * part + 4 * j + 2 * r + 1];
          store_pair(tile.turned, at, 4 * part + j, r,
                     pack(first * cosine - second * sine, first * sine + second * cosine));
        }
      }
    }
  }
  float c[16];
  multiply_panels<2>(c, rows, kPanel, further(weights, kValues), kHeadPanel);
  const unsigned lane = 4 * at.group + at.quad;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const unsigned channel = 8 * (j + lane / 16) + lane % 8, items = at.row - at.group + lane / 8 % 2 * 8;
    store_transposed(shared_address(&tile.values[in_panel(channel, items)]), packed(c + 4 * j));
  }
  stores_before_products();
  warpgroup_sync(at.which);
}

// Which keys a thread's rows attend to.
struct Keys {
  std::uint32_t own;  // bit 2 j + e of the lower row, with 16 more of the upper: there is key 8 j + 2 quad + e
  unsigned all;       // bit t: the 16 keys from 16 t on are there for all rows of the warp
};

__device__ __forceinline__ Keys find_keys(const EncoderCall& call, const Own (&own)[8], const Place& at) {
  Keys keys = {0, 0};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Own& one = own[2 * at.warp + r];
    const std::uint64_t rows = __brevll(one.history.present) >> (kFrame - one.end) >> 2 * at.quad;  // bit: row
#pragma unroll
    for (int j = 0; j < 8; ++j) keys.own |= static_cast<std::uint32_t>(rows >> 8 * j & 3) << (16 * r + 2 * j);
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const bool mine = (~keys.own >> 4 * t & 0xf000f) == 0 && !call.causal;
    keys.all |= unsigned{__ballot_sync(0xffffffffu, mine) == 0xffffffffu} << t;
  }
  return keys;
}

// Scores to weights of the attention, which still lack their rows' factors: these are returned. c[i] is of key
// 8 (i / 4) + 2 quad + i % 2 and row `row` + 8 (i / 2 % 2).
__device__ __forceinline__ Two soften(const EncoderCall& call, const Keys& keys, const Place& at, float (&c)[32]) {
  Two top = {kMasked / 2, kMasked / 2}, sum = {0.0f, 0.0f};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    if (keys.all >> t & 1) continue;
#pragma unroll
    for (int i = 8 * t; i < 8 * t + 8; ++i) {
      const unsigned key = 8 * (i / 4) + 2 * at.quad + i % 2;
      const bool there = keys.own >> (i / 4 * 2 + i % 2 + 8 * (i & 2)) & 1;
      c[i] = there && (!call.causal || key <= at.row + 4 * (i & 2)) ? c[i] : kMasked;
    }
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    (i & 2 ? top.high : top.low) = fmaxf(i & 2 ? top.high : top.low, c[i]);
  }
  quad_tops(top);
  top.low *= kScale, top.high *= kScale;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    c[i] = exp2_fast(c[i] * kScale - (i & 2 ? top.high : top.low));
    (i & 2 ? sum.high : sum.low) += c[i];
  }
  sum = quad_totals(sum);
  return {reciprocal(fmaxf(sum.low, 0.5f)), reciprocal(fmaxf(sum.high, 0.5f))};  // a row without any key has sum 0
}

// h = `left` times the weights of both halves of the channels, `first` bytes into a portion and `apart`; with kAdd added
// to h.
template <bool kAdd, int kSteps>
__device__ __forceinline__ void add_product(Rows& h, const uint4 (&left)[kSteps], std::uint32_t portion,
                                            std::uint32_t first, std::uint32_t apart) {
  begin_products();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      product(h[half], left[t], further(portion, first + half * apart + 32 * t), kAdd || t > 0);
    }
  }
  end_products();
}

// One head's attention, added to the residual by its part of the output projection.
template <int kTiles>
__device__ __forceinline__ void attend(const EncoderCall& call, const Keys& keys, std::uint32_t portion, const Place& at,
                                       Shared<kTiles>& s, Rows& h) {
  Tile& tile = s.tiles[at.which];
  project(call, portion, s.own[at.which], at, tile);
  float c[32];
  const std::uint32_t turned = operand(shared_address(tile.turned));
  begin_products();
#pragma unroll
  for (int t = 0; t < 2; ++t) product(c, further(turned, 32 * t), further(turned, 64 + 32 * t), t > 0);
  end_products();
  const Two rates = soften(call, keys, at, c);
  uint4 weights[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) weights[t] = packed(c + 8 * t);
  float o[16];
  begin_products();
#pragma unroll
  for (int t = 0; t < 4; ++t) product(o, weights[t], further(operand(shared_address(tile.values)), 32 * t), t > 0);
  end_products();
#pragma unroll
  for (int i = 0; i < 16; ++i) o[i] *= i & 2 ? rates.high : rates.low;
  const uint4 attended[2] = {packed(o), packed(o + 8)};
  add_product<true>(h, attended, portion, kOut, 64);
}

// 64 hidden units of the rows, with kAdd added to h; a warp whose rows none wants needs no GELU.
template <bool kAdd>
__device__ __forceinline__ void feed(std::uint32_t rows, std::uint32_t rows_apart, std::uint32_t weights, bool answers,
                                     Rows& h) {
  float c[32];
  multiply_panels<2>(c, rows, rows_apart, weights, kPanel);
  if (answers) {
#pragma unroll
    for (float& one : c) one = half_gelu(one);
  }
  uint4 hidden[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) hidden[t] = packed(c + 8 * t);
  add_product<kAdd>(h, hidden, weights, kSecond, kPanel);
}

// The rows of a warp to the residual, four at a time by way of its own rows of the tile.
__device__ __forceinline__ void input(const EncoderCall& call, const Own (&own)[8], const Place& at, Tile& tile,
                                      Rows& h) {
  constexpr int kEach = 4;
  const unsigned lane = 4 * at.group + at.quad, first = 16 * at.warp;
  const auto place = [&](unsigned row) {
    return reinterpret_cast<float4*>(&tile.x[row / 4][(first + row % 4 * 4) * kPanelRow]);
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Own& one = own[2 * at.warp + r];
#pragma unroll 1  // a third of the kernel's code otherwise
    for (int some = 0; some < 8; some += kEach) {
      float v[kEach][4] = {};
      if (one.has_items()) {
        int ages[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) ages[i] = one.age(first + 8 * r + some + i);
        embed(call, one.history, ages, lane, v);
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) place(some + i)[lane ^ (some + i)] = {v[i][0], v[i][1], v[i][2], v[i][3]};
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const unsigned four = 2 * j + at.quad / 2;
      const float2 two = reinterpret_cast<const float2*>(place(at.group) + (four ^ at.group))[at.quad % 2];
      h[j / 8][j % 8 * 4 + 2 * r] = two.x, h[j / 8][j % 8 * 4 + 2 * r + 1] = two.y;
    }
    __syncwarp();
  }
}

// Four channels of a tile's newest row, of which each eight rows may have one: they take the place of the values.
__device__ __forceinline__ float4* newest_row(Tile& tile, unsigned eight, unsigned four) {
  return reinterpret_cast<float4*>(tile.values) + eight * (kChannels / 4) + four;
}

// The newest rows of all of a block's tiles, of which each eight rows may have one, after the last attention: normalised
// as rows 8 tile + eight of panels in the first tile's `turned`, as they are to their tile's `values`.
template <bool kLayerNorm, int kTiles>
__device__ __forceinline__ void gather_newest(const EncoderCall& call, const Rows& h, unsigned leader, const Place& at,
                                              Shared<kTiles>& s) {
  const Norm norm = norm_of<kLayerNorm>(call, h);
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const Gains<4> gains = load_gains<kLayerNorm, 4>(call, 2 * call.blocks - 1, 16 * quarter + at.quad);
    float y[16];
    normalised<kLayerNorm>(gains, norm, quarter, h, y);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned eight = 2 * at.warp + r;
      if (at.group != 7 || !s.own[at.which][eight].has_newest(eight)) continue;
      unsigned char* panel = s.tiles[leader].turned + quarter / 2 * kNewestPanel;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * j + 2 * r, channel = quarter % 2 * 32 + 8 * j + 2 * at.quad;
        *reinterpret_cast<std::uint32_t*>(&panel[in_panel(8 * at.which + eight, channel)]) = pack(y[i], y[i + 1]);
        const float* own = &h[quarter / 2][quarter % 2 * 16 + i];
        auto* there = reinterpret_cast<float2*>(newest_row(s.tiles[at.which], eight, quarter / 2 * 16 + channel / 4));
        there[at.quad % 2] = {own[0], own[1]};
      }
    }
  }
  stores_before_products();
}

// Where four channels of a row of a warpgroup's sums lie in its `x`, so that neither those who write them nor those who
// read them meet in a bank.
__device__ __forceinline__ float4* sums_at(unsigned char (&x)[2][kPanel], unsigned row, unsigned four) {
  return reinterpret_cast<float4*>(x) + row * (kChannels / 4) + (four ^ row % 8);
}

// The last feed-forward, of the newest rows alone, which the block's warpgroups share out: each takes a quarter of the
// hidden units at a time, and where they are fewer than four, others after that. The quarters' sums are added to the rows
// in their order, whoever has made them, four channels by the lane that takes them in store_newest.
template <int kTiles>
__device__ __forceinline__ void feed_newest(Stream<kTiles>& stream, unsigned leader, const Place& at, Shared<kTiles>& s,
                                            Rows& h) {
  unsigned before = 0, count = 0;  // of the warpgroups that have items
#pragma unroll
  for (unsigned i = 0; i < kTiles; ++i) before += s.has_items[i] && i < at.which, count += s.has_items[i];
#pragma unroll 1
  for (unsigned first = 0; first < 4; first += count) {
    const unsigned end = min(4u, first + count), mine = min(end, first + before);
    stream.skip(2 * (mine - first));
    if (mine < end) {
      const std::uint32_t rows = operand(shared_address(s.tiles[leader].turned));
      const bool answers = 2 * at.warp < kTiles;
      feed<false>(rows, kNewestPanel, stream.wait(), answers, h);
      stream.next();
      feed<true>(rows, kNewestPanel, stream.wait(), answers, h);
      stream.next();
    }
    stream.skip(mine < end ? 2 * (end - mine - 1) : 0);
    const Place here = this_place();
#pragma unroll
    for (int i = 0; i < 32; ++i) {  // pairs of channels; the lower row's, then the upper's
      const unsigned row = here.row + 8 * (i % 2), channel = i / 2 * 8 + 2 * here.quad;
      if (row >= 8 * kTiles) continue;
      const float* two = &h[i / 16][i / 2 % 8 * 4 + 2 * (i % 2)];
      reinterpret_cast<float2*>(sums_at(s.tiles[here.which].x, row, channel / 4))[here.quad % 2] = {two[0], two[1]};
    }
    block_sync(count * kWarpgroup);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned eight = 2 * here.warp + r, lane = 4 * here.group + here.quad;
      float4& total = *newest_row(s.tiles[here.which], eight, lane);
      for (unsigned i = 0, quarter = first; i < kTiles && quarter < end; ++i) {
        if (!s.has_items[i]) continue;
        const float4 part = *sums_at(s.tiles[i].x, 8 * here.which + eight, lane);
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        ++quarter;
      }
    }
    if (end < 4) block_sync(count * kWarpgroup);
  }
}

// The last norm of a warp's newest rows, four channels a lane, and where they go. A history without items gets zeros.
template <bool kLayerNorm>
__device__ __forceinline__ void store_newest(const EncoderCall& call, Tile& tile, const Own (&own)[8], const Place& at) {
  const unsigned lane = 4 * at.group + at.quad;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Own& one = own[2 * at.warp + r];
    if (!one.has_newest(2 * at.warp + r)) continue;
    const float4 total = *newest_row(tile, 2 * at.warp + r, lane);
    float v[4] = {total.x, total.y, total.z, total.w};
    const float rate = row_rate<kLayerNorm>(v, call.eps);
    const auto* norm = reinterpret_cast<const float4*>(call.norms) + 2 * call.blocks * (2 * kChannels / 4) + lane;
    const float4 gain = __ldg(norm);
    float4 bias = {0.0f, 0.0f, 0.0f, 0.0f};
    if (kLayerNorm) bias = __ldg(norm + kChannels / 4);
    uint2 packed_row = {pack(v[0] * rate * gain.x + bias.x, v[1] * rate * gain.y + bias.y),
                        pack(v[2] * rate * gain.z + bias.z, v[3] * rate * gain.w + bias.w)};
    if (!one.has_items()) packed_row = {0, 0};
    static_cast<uint2*>(call.out)[static_cast<std::int64_t>(one.user) * (kChannels / 4) + lane] = packed_row;
  }
}

// Who has the eight rows from 8 `eight` on of tile `number`: one of a plan's program, or user `number`.
__device__ __forceinline__ Own find_own(const EncoderCall& call, int number, unsigned eight) {
  Own own = {{0, 0}, -1, kFrame};
  if (call.programs == nullptr) {
    if (number < call.users) own.user = number;
  } else if (number < call.program_count) {
    const std::int32_t* program = call.programs + 3 * number;
    const unsigned which = 8 * eight >> program[2];
    own.end = (which + 1) << program[2];
    if (static_cast<int>(which) < program[1]) own.user = call.order[program[0] + which];
  }
  if (own.user >= 0) own.history = find(call, own.user, threadIdx.x % 32);
  return own;
}

template <bool kLayerNorm, int kTiles>
__device__ __forceinline__ void encode_tiles(const EncoderCall& call) {
  Shared<kTiles>& s = *reinterpret_cast<Shared<kTiles>*>(shared_memory());
  const Place at = this_place();
  const unsigned thread = threadIdx.x, lane = thread % 32;
  // Neighbouring tiles go to different blocks: few of them take as many multiprocessors as there are.
  const int number = blockIdx.x + gridDim.x * at.which;
  if (thread < kTiles) s.has_items[thread] = false;
  if (thread < kAhead) {
    barrier_init(&s.weights_here[thread]);
    s.used[thread] = 0;
    barrier_init_fence();
  }
  bool has_items = false;
#pragma unroll 1
  for (unsigned eight = 2 * at.warp; eight < 2 * at.warp + 2; ++eight) {
    const Own own = find_own(call, number, eight);
    if (lane == 0) s.own[at.which][eight] = own;
    has_items |= own.has_items();
  }
  __syncthreads();
  if (has_items) s.has_items[at.which] = true;
  __syncthreads();
  if (!s.has_items[at.which]) {
    store_newest<kLayerNorm>(call, s.tiles[at.which], s.own[at.which], at);
    return;
  }
  std::uint32_t warps = 0;
  unsigned leader = 0;
#pragma unroll
  for (int i = kTiles - 1; i >= 0; --i) {
    if (s.has_items[i]) warps += kWarpgroup / 32, leader = i;
  }
  Stream<kTiles> stream{call, s, warps, kPortions * call.blocks - kAhead};
  if (thread == leader * kWarpgroup) {
    for (int portion = 0; portion < kAhead; ++portion) stream.bring(portion, portion);
  }
  __syncwarp();
  const Keys keys = find_keys(call, s.own[at.which], at);
  Rows h;
  input(call, s.own[at.which], at, s.tiles[at.which], h);

  for (int block = 0; block < call.blocks; ++block) {
    normalise<kLayerNorm>(call, 2 * block, h, this_place(), s.tiles);
    for (int head = 0; head < kHeads; ++head) {
      attend(call, {anew(keys.own), keys.all}, stream.wait(), this_place(), s, h);
      stream.next();
    }
    if (block + 1 == call.blocks) break;
    normalise<kLayerNorm>(call, 2 * block + 1, h, this_place(), s.tiles);
    for (int unit = 0; unit < kUnits; ++unit) {
      feed<true>(operand(shared_address(s.tiles[this_place().which].x)), kPanel, stream.wait(), true, h);
      stream.next();
    }
    warpgroup_sync(at.which);  // all products with the normalised rows are done
  }
  // The last feed-forward is of the newest items alone. Of the other rows the last attention needed keys and values.
  block_sync(warps * 32);
  gather_newest<kLayerNorm>(call, h, leader, this_place(), s);
  block_sync(warps * 32);
  feed_newest(stream, leader, this_place(), s, h);
  const Place here = this_place();
  store_newest<kLayerNorm>(call, s.tiles[here.which], s.own[here.which], here);
}

template <bool kLayerNorm, int kTiles>
__global__ void __launch_bounds__(kTiles* kWarpgroup, 1) encode_kernel(const __grid_constant__ EncoderCall call) {
  next_may_start();
  await_previous();
  encode_tiles<kLayerNorm, kTiles>(call);
}

}  // namespace
}  // namespace fave_fast

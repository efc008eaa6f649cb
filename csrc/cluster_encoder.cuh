#pragma once

// The kernel of cluster_encoder.cu.
//
// A history lies at the end of a frame of 64 rows, its newest item in row 63. Two blocks of a cluster share a tile
// of 16 rows: each has two of the four heads and half of the feed-forward, and each holds the tile's residual stream
// (the two differ by the rounding of what the other sent). So a transformer block takes three exchanges: keys and
// values go to the other tiles, and each half's share of the attention's and of the feed-forward's output goes to
// the other half. What is sent goes from registers into the receiver's shared memory, in the order in which one of
// its warps reads it (an operand of a product as a lane holds it), and counts at a barrier there: nothing is staged,
// converted or transposed on the way.
//
// Weights are stored as operands too. A block reads 192 KB a transformer block, half of the weights; each warp has the
// copy engine bring its own units, two phases ahead, and takes them into registers where it would otherwise wait for
// another block. (The copy engine brings 192 KB to each of 8 blocks in 2,380 cycles of an H200; loads to registers, 16
// bytes a lane and 64 KB in flight, took 5,040.)
//
// What limits it, on an H200 with four transformer blocks: one takes 8,000 cycles with 50 items and 7,600 with 9, which
// have nothing to send to other tiles. (A round of 4 KB to one block takes 440 cycles, to each of three 980.) By count,
// no counter was read, that leaves shared memory: weights are written there and read again, 2 x 192 KB at 128 bytes a
// cycle or 3,070 cycles, and every warp reads the whole left operand, 1,000 more. To take a phase's weights takes a
// warp 500 to 1,000 cycles, of which an exchange hides 440.

#include <cstdint>

#include "cluster_encoder.hpp"
#include "hopper.cuh"

namespace fave_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 128;
constexpr int kRows = 16;     // of a tile
constexpr int kTiles = 4;
constexpr int kFrame = kRows * kTiles;
constexpr int kUnits = 384;          // of 32 lanes x 16 bytes: the weights of a block and a transformer block
constexpr int kOutFirst = 96;        // the output projection's begin behind those of keys, queries and values
constexpr int kFeedFirst = 128;
constexpr int kFedFirst = 256;
constexpr int kStride = 2 * kUnits * 32;  // from a transformer block's weights to the next one's, in lanes
constexpr int kUnitBytes = 512;
constexpr std::uint32_t kKeyBytes = 2048;    // of keys that a block sends to another; of values as many
constexpr std::uint32_t kShareBytes = 4096;  // of a tile's share in bf16
constexpr float kMasked = -1e30f;
constexpr float kScale = 0.17677669529663687f * 1.4426950408889634f;  // 32^-0.5 log2(e)

// Of a block that owns kOwn of its history's tiles: one, or all four. Rows are padded so that neither ldmatrix nor the
// stores before it meet in a bank.
template <int kOwn>
struct Shared {
  static constexpr int kPair = kOwn == 1 ? 1 : 2;            // tiles side by side: what one waits for, the other hides
  static constexpr int kSlots = kOwn == 1 ? 2 : 1;           // phases whose weights are here or on their way
  static constexpr int kKeyBuffers = kOwn == kTiles ? 1 : 2;  // another block may send the next keys early
  static constexpr int kParts = kOwn == kTiles ? 1 : 8;       // where each warp has one tile's keys alone

  uint4 weights[8][kSlots][16][32];  // by warp
  uint4 out_weights[8][4][32];
  uint4 keys[kKeyBuffers][kTiles][2][4][32];  // by tile and head: halves of keys, of values
  uint4 attended_share[kOwn][kThreads];
  uint4 fed_share[kOwn][kThreads];
  uint4 queries[kOwn][2][2][32];
  float partial[kParts][kRows][40];  // a warp's sums over the values of one tile
  float2 top_and_sum[2][kTiles][kRows];
  std::uint16_t x[kOwn * kRows][136];
  std::uint16_t attended[kOwn * kRows][72];
  union {
    std::uint16_t hidden[kOwn * kRows][264];
    float input[kOwn * kRows][132];
  };
  float reduce[2][kOwn * kRows][12];
  std::uint64_t weights_here[8][kSlots];
  std::uint64_t out_weights_here[8];
  std::uint64_t keys_here[2][kTiles];
  std::uint64_t values_here[2][kTiles];
  std::uint64_t attended_here;
  std::uint64_t fed_here;
};

struct Place {
  int warp, lane, group, quad;  // lane = 4 group + quad: rows `group` and `group + 8` of a product
  int half, own, first;  // own: the first of this block's tiles; first: the tile of the oldest item, or one before it
};

struct History {
  std::int64_t end;       // row behind the newest item
  std::uint64_t present;  // bit a: there is an item of age a
};

__device__ __forceinline__ std::int64_t whole_number(const void* numbers, bool wide, std::int64_t at) {
  return wide ? static_cast<const std::int64_t*>(numbers)[at] : static_cast<const std::int32_t*>(numbers)[at];
}

__device__ __forceinline__ std::uint64_t first_bits(std::int64_t count) {
  return count <= 0 ? 0 : count >= kFrame ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

__device__ __forceinline__ History find(const ClusterEncoderCall& call, int user, int lane) {
  if (call.padded_length == 0) {
    const std::int64_t begin = whole_number(call.bounds, call.wide_bounds, user);
    const std::int64_t end = whole_number(call.bounds, call.wide_bounds, user + 1);
    return {end, first_bits(end - begin < call.longest ? end - begin : call.longest)};  // the newest items count
  }
  const std::int64_t end = static_cast<std::int64_t>(user + 1) * call.padded_length;
  if (call.table == nullptr) {
    const std::int64_t length = whole_number(call.bounds, call.wide_bounds, user);
    return {end, first_bits(length < call.padded_length ? length : call.padded_length)};
  }
  const int length = call.padded_length;
  const bool young = lane < length && whole_number(call.rows, call.wide_rows, end - 1 - lane) != 0;
  const bool old = lane + 32 < length && whole_number(call.rows, call.wide_rows, end - 33 - lane) != 0;
  const std::uint64_t low = __ballot_sync(0xffffffffu, young), high = __ballot_sync(0xffffffffu, old);
  return {end, low | high << 32};
}

__device__ __forceinline__ float warp_total(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

__device__ __forceinline__ void bf16_row(const void* table, std::int64_t row, int lane, float (&v)[4]) {
  const uint2 two = __ldg(static_cast<const uint2*>(table) + row * (kChannels / 4) + lane);
  v[0] = low_half(two.x), v[1] = high_half(two.x), v[2] = low_half(two.y), v[3] = high_half(two.y);
}

// E of eq. (9) of rows of the ages given, four channels a lane: LayerNorm(e) + shift[age] (+ scale[age] times the
// anchor's embedding), zeros where no item is. Rows go side by side: a row's loads wait for one another.
template <int kCount>
__device__ __forceinline__ void embed(const ClusterEncoderCall& call, const History& history, const int (&ages)[kCount],
                                      int lane, float (&v)[kCount][4]) {
  std::int64_t source[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) source[i] = history.end - 1 - (history.present >> ages[i] & 1 ? ages[i] : 0);
  if (call.table == nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (call.wide_rows) {
        const float4 row = __ldg(static_cast<const float4*>(call.rows) + source[i] * (kChannels / 4) + lane);
        v[i][0] = row.x, v[i][1] = row.y, v[i][2] = row.z, v[i][3] = row.w;
      } else {
        bf16_row(call.rows, source[i], lane, v[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) source[i] = whole_number(call.rows, call.wide_rows, source[i]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) bf16_row(call.table, source[i], lane, v[i]);
    const float4 gain = __ldg(reinterpret_cast<const float4*>(call.input_norm) + lane);
    const float4 bias = __ldg(reinterpret_cast<const float4*>(call.input_norm) + kChannels / 4 + lane);
    float4 shift[kCount], scale[kCount];
    float anchor[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (call.scale != nullptr) {
      const int items = __popcll(history.present);
      const int oldest_first = min(static_cast<int>(call.anchor * static_cast<float>(items)), items - 1);
      const std::int64_t which = history.end - items + oldest_first;
      bf16_row(call.table, whole_number(call.rows, call.wide_rows, which), lane, anchor);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int known = min(ages[i], call.longest - 1) * (kChannels / 4) + lane;
      shift[i] = __ldg(reinterpret_cast<const float4*>(call.shift) + known);
      scale[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (call.scale != nullptr) scale[i] = __ldg(reinterpret_cast<const float4*>(call.scale) + known);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float mean = warp_total(v[i][0] + v[i][1] + v[i][2] + v[i][3]) * (1.0f / kChannels);
#pragma unroll
      for (float& one : v[i]) one -= mean;
      const float square =
          warp_total(v[i][0] * v[i][0] + v[i][1] * v[i][1] + v[i][2] * v[i][2] + v[i][3] * v[i][3]) * (1.0f / kChannels);
      const float rate = rsqrtf(square + call.input_eps);
      v[i][0] = v[i][0] * rate * gain.x + bias.x + shift[i].x + scale[i].x * anchor[0];
      v[i][1] = v[i][1] * rate * gain.y + bias.y + shift[i].y + scale[i].y * anchor[1];
      v[i][2] = v[i][2] * rate * gain.z + bias.z + shift[i].z + scale[i].z * anchor[2];
      v[i][3] = v[i][3] * rate * gain.w + bias.w + shift[i].w + scale[i].w * anchor[3];
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (float& one : v[i]) one = history.present >> ages[i] & 1 ? one : 0.0f;
  }
}

// The residual of the block's tiles from `begin` on, as a product leaves it: h[j][4 n + e] is row group + 8 (e / 2) of
// tile j, channel 16 warp + 8 n + 2 quad + e % 2.
template <int kOwn>
__device__ __forceinline__ void input(const ClusterEncoderCall& call, const History& history, const Place& at,
                                      int begin, Shared<kOwn>& s, float (&h)[kOwn][8]) {
  constexpr int kTogether = 2 * Shared<kOwn>::kPair;
#pragma unroll
  for (int first = 0; first < 2 * kOwn; first += kTogether) {
    if (first / 2 < begin) continue;
    int rows[kTogether], ages[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      rows[i] = kRows * ((first + i) / 2) + 2 * at.warp + i % 2;
      ages[i] = kFrame - 1 - at.own * kRows - rows[i];
    }
    float v[kTogether][4];
    embed(call, history, ages, at.lane, v);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      *reinterpret_cast<float4*>(&s.input[rows[i]][4 * at.lane]) = {v[i][0], v[i][1], v[i][2], v[i][3]};
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    if (j < begin) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 16 * at.warp + 8 * (i / 2) + 2 * at.quad;
      const float2 two = *reinterpret_cast<const float2*>(&s.input[kRows * j + at.group + 8 * (i % 2)][column]);
      h[j][4 * (i / 2) + 2 * (i % 2)] = two.x, h[j][4 * (i / 2) + 2 * (i % 2) + 1] = two.y;
    }
  }
}

// Totals over the channels of rows `group` (low) and `group + 8` (high) of a tile, whose part of Shared::reduce is given,
// for all warps in the same bits: each gives its own, and takes them all behind a barrier.
__device__ __forceinline__ void give_row_totals(float low, float high, const Place& at, float (*reduce)[12]) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask <<= 1) {
    low += __shfl_xor_sync(0xffffffffu, low, mask);
    high += __shfl_xor_sync(0xffffffffu, high, mask);
  }
  if (at.quad == 0) {
    reduce[at.group][at.warp] = low;
    reduce[at.group + 8][at.warp] = high;
  }
}

__device__ __forceinline__ float row_total(const float (&parts)[12]) {
  const float4 a = *reinterpret_cast<const float4*>(parts), b = *reinterpret_cast<const float4*>(parts + 4);
  return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
}

__device__ __forceinline__ void take_row_totals(float& low, float& high, const Place& at, const float (*reduce)[12]) {
  low = row_total(reduce[at.group]);
  high = row_total(reduce[at.group + 8]);
}

__device__ __forceinline__ void row_totals(float& low, float& high, const Place& at, float (*reduce)[12]) {
  give_row_totals(low, high, at, reduce);
  __syncthreads();
  take_row_totals(low, high, at, reduce);
}

// Of a norm: a thread's four channels.
struct Gains {
  float2 gain[2], bias[2];
};

// Loaded a phase before they are used.
template <bool kLayerNorm>
__device__ __forceinline__ Gains load_gains(const ClusterEncoderCall& call, int norm, const Place& at) {
  const float2* gains = reinterpret_cast<const float2*>(call.norms + static_cast<std::int64_t>(norm) * 2 * kChannels);
  Gains loaded;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    loaded.gain[n] = __ldg(gains + 8 * at.warp + 4 * n + at.quad);
    loaded.bias[n] = {0.0f, 0.0f};
    if (kLayerNorm) loaded.bias[n] = __ldg(gains + kChannels / 2 + 8 * at.warp + 4 * n + at.quad);
  }
  return loaded;
}

// RMSNorm or LayerNorm of the residual of tile j.
template <bool kLayerNorm, int kOwn>
__device__ __forceinline__ void normalise(const ClusterEncoderCall& call, const Gains& gains, const float (&h)[8],
                                          const Place& at, int j, Shared<kOwn>& s, float (&y)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] = h[i];
  if (kLayerNorm) {
    float low = (h[0] + h[1]) + (h[4] + h[5]), high = (h[2] + h[3]) + (h[6] + h[7]);
    row_totals(low, high, at, s.reduce[1] + kRows * j);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] -= (i & 2 ? high : low) * (1.0f / kChannels);
  }
  float low = (y[0] * y[0] + y[1] * y[1]) + (y[4] * y[4] + y[5] * y[5]);
  float high = (y[2] * y[2] + y[3] * y[3]) + (y[6] * y[6] + y[7] * y[7]);
  row_totals(low, high, at, s.reduce[0] + kRows * j);
  low = rsqrtf(low * (1.0f / kChannels) + call.eps);
  high = rsqrtf(high * (1.0f / kChannels) + call.eps);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 gain = gains.gain[i / 4], bias = gains.bias[i / 4];
    y[i] = y[i] * (i & 2 ? high : low) * (i & 1 ? gain.y : gain.x) + (i & 1 ? bias.y : bias.x);
  }
}

// Tile j normalised, for products over its channels: of an RMSNorm without its rate, which is on its way while the
// product runs. Behind the next barrier they are there for all.
template <bool kLayerNorm, int kOwn>
__device__ __forceinline__ void give_normalised(const ClusterEncoderCall& call, const Gains& gains, const float (&h)[8],
                                                const Place& at, int j, Shared<kOwn>& s) {
  float y[8];
  if (kLayerNorm) {
    normalise<kLayerNorm>(call, gains, h, at, j, s, y);
  } else {
    const float2 left = gains.gain[0], right = gains.gain[1];
    y[0] = h[0] * left.x, y[1] = h[1] * left.y, y[2] = h[2] * left.x, y[3] = h[3] * left.y;
    y[4] = h[4] * right.x, y[5] = h[5] * right.y, y[6] = h[6] * right.x, y[7] = h[7] * right.y;
    const float low = (h[0] * h[0] + h[1] * h[1]) + (h[4] * h[4] + h[5] * h[5]);
    const float high = (h[2] * h[2] + h[3] * h[3]) + (h[6] * h[6] + h[7] * h[7]);
    give_row_totals(low, high, at, s.reduce[0] + kRows * j);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int column = 16 * at.warp + 8 * n + 2 * at.quad;
    *reinterpret_cast<std::uint32_t*>(&s.x[kRows * j + at.group][column]) = pack(y[4 * n], y[4 * n + 1]);
    *reinterpret_cast<std::uint32_t*>(&s.x[kRows * j + at.group + 8][column]) = pack(y[4 * n + 2], y[4 * n + 3]);
  }
}

// The factors of rows `group` and `group + 8` that a product over normalised rows still lacks.
struct Rates {
  float low, high;
};

// What give_normalised left of tile j: the left operand of 8 steps of 16, and its rates.
template <bool kLayerNorm, int kOwn>
__device__ __forceinline__ Rates take_normalised(const ClusterEncoderCall& call, const Place& at, int j,
                                                 const Shared<kOwn>& s, uint4 (&a)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) a[k] = load_matrices(&s.x[kRows * j + at.lane % 16][16 * k + at.lane / 16 * 8]);
  Rates rates{1.0f, 1.0f};
  if (!kLayerNorm) {
    take_row_totals(rates.low, rates.high, at, s.reduce[0] + kRows * j);
    rates.low = rsqrtf(rates.low * (1.0f / kChannels) + call.eps);
    rates.high = rsqrtf(rates.high * (1.0f / kChannels) + call.eps);
  }
  return rates;
}

// A warp has its `count` units from `first` on brought for a phase.
__device__ __forceinline__ void bring(uint4* there, const uint4* weights, int first, int count, std::uint64_t* barrier,
                                      const Place& at) {
  __syncwarp();
  if (at.lane != 0) return;
  barrier_expect(barrier, count * kUnitBytes);
  copy_in(there, weights + first * 32, count * kUnitBytes, barrier);
}

// Units of a phase, one after another, into registers.
template <int kCount>
__device__ __forceinline__ void take(uint4 (&units)[kCount], const uint4 (*here)[32], int lane) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) units[i] = here[i][lane];
}

// What a warp multiplies by, phase after phase.
enum Phase { kAttention, kFeed, kFed, kPhases };

// Has this warp's weights of a phase brought, or of the next block's where `phase` is behind the last.
template <int kOwn>
__device__ __forceinline__ void bring_phase(const uint4* weights, int block, int phase, int feeds, int blocks,
                                            const Place& at, Shared<kOwn>& s) {
  if (phase >= kPhases) ++block, phase -= kPhases;
  // A copy that is on its way must not outlive its block: what is not used is not brought.
  if (block >= (phase == kAttention ? blocks : feeds)) return;
  const int slot = (kPhases * block + phase) % Shared<kOwn>::kSlots;
  const bool few = phase == kAttention && at.warp >= 4;
  const int first = phase == kFeed  ? kFeedFirst + 16 * at.warp
                    : phase == kFed ? kFedFirst + 16 * at.warp
                    : few           ? 32 + 8 * at.warp
                                    : 16 * at.warp;
  bring(s.weights[at.warp][slot][0], weights + static_cast<std::int64_t>(block) * kStride, first, few ? 8 : 16,
        &s.weights_here[at.warp][slot], at);
}

// Takes a phase's weights, in the attention's those of values eight, and has later ones brought in their place.
template <int kOwn>
__device__ __forceinline__ void take_phase(uint4 (&w)[16], const uint4* weights, int block, int phase, int feeds,
                                           int blocks, const Place& at, Shared<kOwn>& s) {
  constexpr int kSlots = Shared<kOwn>::kSlots;
  const int number = kPhases * block + phase;
  barrier_wait(&s.weights_here[at.warp][number % kSlots], number / kSlots % 2);
  take(w, s.weights[at.warp][number % kSlots], at.lane);
  bring_phase(weights, block, phase + kSlots, feeds, blocks, at, s);
}

// One unit holds the right operand of two steps of a product over k.
__device__ __forceinline__ void multiply_step(float (&c)[4], uint4 a, uint4 unit, int odd) {
  multiply(c, a, odd ? unit.z : unit.x, odd ? unit.w : unit.y);
}

// Cosine and sine for rows `group` and `group + 8` of the pairs that a thread of keys or queries has.
struct Turns {
  float cos[2][2], sin[2][2];  // [row][n]
};

__device__ __forceinline__ Turns load_turns(const ClusterEncoderCall& call, const Place& at, int tile) {
  Turns turns;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int age = kFrame - 1 - tile * kRows - at.group - 8 * r;
    const int where = min(age, call.longest - 1) * 16 + 8 * (at.warp % 2) + at.quad;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      turns.cos[r][n] = call.rotary ? __ldg(call.cos + where + 4 * n) : 1.0f;
      turns.sin[r][n] = call.rotary ? __ldg(call.sin + where + 4 * n) : 0.0f;
    }
  }
  return turns;
}

// Keys or queries: 16 channels of a head for rows `group` and `group + 8` of each tile, as the operand of their product
// (a right one holds the columns in this order, a left one has the middle two exchanged).
template <int kPair>
__device__ __forceinline__ void project_turned(const Turns (&turns)[kPair], const uint4 (&a)[kPair][8], const uint4* w,
                                               const Rates (&rates)[kPair], uint4 (&result)[kPair]) {
  float even[kPair][2][4] = {}, odd[kPair][2][4] = {};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int t = 0; t < kPair; ++t) multiply_step(k % 2 ? odd[t][n] : even[t][n], a[t][k], w[4 * n + k / 2], k % 2);
    }
  }
#pragma unroll
  for (int t = 0; t < kPair; ++t) {
    std::uint32_t packed[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float rate = r == 0 ? rates[t].low : rates[t].high, cos = turns[t].cos[r][n], sin = turns[t].sin[r][n];
        const float first = (even[t][n][2 * r] + odd[t][n][2 * r]) * rate;
        const float second = (even[t][n][2 * r + 1] + odd[t][n][2 * r + 1]) * rate;
        packed[r][n] = pack(first * cos - second * sin, first * sin + second * cos);
      }
    }
    result[t] = {packed[0][0], packed[0][1], packed[1][0], packed[1][1]};
  }
}

// 16 channels of the values of each tile, transposed: their product's result is an operand of the next product as it
// stands.
template <int kPair>
__device__ __forceinline__ void project_values(const uint4 (&a)[kPair][8], const uint4* w, const Rates (&rates)[kPair],
                                               const Place& at, uint4 (&result)[kPair]) {
  float even[kPair][2][4] = {}, odd[kPair][2][4] = {};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      multiply(k % 2 ? odd[t][0] : even[t][0], w[k], a[t][k].x, a[t][k].z);
      multiply(k % 2 ? odd[t][1] : even[t][1], w[k], a[t][k].y, a[t][k].w);
    }
  }
#pragma unroll
  for (int t = 0; t < kPair; ++t) {
    float rate[4];  // of rows 2 quad, 2 quad + 1, and 8 behind them
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      rate[e] = __shfl_sync(0xffffffffu, rates[t].low, 4 * (2 * at.quad + e));
      rate[2 + e] = __shfl_sync(0xffffffffu, rates[t].high, 4 * (2 * at.quad + e));
    }
    std::uint32_t packed[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        packed[r][n] = pack((even[t][n][2 * r] + odd[t][n][2 * r]) * rate[2 * n],
                            (even[t][n][2 * r + 1] + odd[t][n][2 * r + 1]) * rate[2 * n + 1]);
      }
    }
    result[t] = {packed[0][0], packed[0][1], packed[1][0], packed[1][1]};
  }
}

// Writes one operand of the keys or values of `tile` here and to the blocks of this half that need it.
template <int kOwn>
__device__ __forceinline__ void publish(uint4 v, uint4* here, std::uint64_t* barrier, const Place& at, int tile,
                                        int blocks_before, bool newest_only) {
  *here = v;
  if (kOwn == kTiles) return;
  const std::uint32_t address = shared_address(here), counted = shared_address(barrier);
#pragma unroll
  for (int other = 0; other < kTiles; ++other) {
    if (other == tile || other < at.first || (newest_only && other != kTiles - 1)) continue;
    const int rank = 2 * (other - blocks_before) + at.half;
    store_remote(in_block(address, rank), v, in_block(counted, rank));
  }
}

// Keys, values and queries of tiles j and, of a pair, j + 1 for this half's two heads. Warps 0 to 3 have 16 channels of
// the keys each, then of the queries, while the others' 16 channels of the values and the keys are on their way.
template <int kOwn, int kPair>
__device__ __forceinline__ void project(const Turns (&turns)[kPair], const uint4 (&a)[kPair][8], const uint4 (&w)[16],
                                        const Rates (&rates)[kPair], const Place& at, int j, Shared<kOwn>& s, int buffer,
                                        int blocks_before, bool newest_only) {
  const int head = at.warp % 4 / 2, half = at.warp % 2, tile = at.own + j;
  uint4 result[kPair];
  if (at.warp < 4) {
    project_turned(turns, a, w, rates, result);
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      publish<kOwn>(result[t], &s.keys[buffer][tile + t][head][half][at.lane], &s.keys_here[buffer][tile + t], at,
                    tile + t, blocks_before, newest_only);
    }
    if (newest_only && tile + kPair != kTiles) return;
    project_turned(turns, a, w + 8, rates, result);
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      s.queries[j + t][head][half][at.lane] = {result[t].x, result[t].z, result[t].y, result[t].w};
    }
  } else {
    project_values(a, w, rates, at, result);
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      publish<kOwn>(result[t], &s.keys[buffer][tile + t][head][2 + half][at.lane], &s.values_here[buffer][tile + t], at,
                    tile + t, blocks_before, newest_only);
    }
  }
}

// Waits for what another tile's block sends, and has the barrier wait for the next but one.
__device__ __forceinline__ void arrived(std::uint64_t* barrier, int parity, const Place& at) {
  barrier_wait(barrier, parity);
  if (at.warp < 4 && at.lane == 0) barrier_expect(barrier, kKeyBytes);
}

// One head's softmax of a tile's queries over the keys of one tile, apart from its sum: p as the left operand of a
// product, top and sum of rows `group` and `group + 8`.
struct Part {
  uint4 p;
  float top[2], sum[2];
};

__device__ __forceinline__ Part weigh(const ClusterEncoderCall& call, std::uint64_t present, const Place& at, int tile,
                                      int part, const uint4 (&queries)[2][32], const uint4 (&operands)[4][32]) {
  const uint4 q0 = queries[0][at.lane], q1 = queries[1][at.lane], k0 = operands[0][at.lane], k1 = operands[1][at.lane];
  float p[2][4] = {};
  multiply(p[0], q0, k0.x, k0.y);
  multiply(p[1], q0, k0.z, k0.w);
  multiply(p[0], q1, k1.x, k1.y);
  multiply(p[1], q1, k1.z, k1.w);
  float top[2] = {kMasked / 2, kMasked / 2}, sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = kRows * part + 8 * n + 2 * at.quad + e % 2;
      const int query = kRows * tile + at.group + 8 * (e / 2);
      const bool allowed = (present >> (kFrame - 1 - row) & 1) && (!call.causal || row <= query);
      p[n][e] = allowed ? p[n][e] * kScale : kMasked;
      top[e / 2] = fmaxf(top[e / 2], p[n][e]);
    }
  }
#pragma unroll
  for (int mask = 1; mask <= 2; mask <<= 1) {
    top[0] = fmaxf(top[0], __shfl_xor_sync(0xffffffffu, top[0], mask));
    top[1] = fmaxf(top[1], __shfl_xor_sync(0xffffffffu, top[1], mask));
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      p[n][e] = exp2_fast(p[n][e] - top[e / 2]);
      sum[e / 2] += p[n][e];
    }
  }
#pragma unroll
  for (int mask = 1; mask <= 2; mask <<= 1) {
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], mask);
    sum[1] += __shfl_xor_sync(0xffffffffu, sum[1], mask);
  }
  return {{pack(p[0][0], p[0][1]), pack(p[0][2], p[0][3]), pack(p[1][0], p[1][1]), pack(p[1][2], p[1][3])},
          {top[0], top[1]},
          {sum[0], sum[1]}};
}

// p times the values: rows `group` and `group + 8`, channels 8 n + 2 quad and the next.
__device__ __forceinline__ void weighted_values(float (&c)[4][4], uint4 p, const uint4 (&operands)[4][32],
                                                const Place& at) {
  const uint4 v0 = operands[2][at.lane], v1 = operands[3][at.lane];
  multiply(c[0], p, v0.x, v0.y);
  multiply(c[1], p, v0.z, v0.w);
  multiply(c[2], p, v1.x, v1.y);
  multiply(c[3], p, v1.z, v1.w);
}

// Of a block with one tile: a warp has a head and the keys of one tile.
__device__ __forceinline__ void attend(const ClusterEncoderCall& call, std::uint64_t present, const Place& at,
                                       Shared<1>& s, int buffer, int parity) {
  const int head = at.warp / 4, part = at.warp % 4;
  if (part != at.own) arrived(&s.keys_here[buffer][part], parity, at);
  const uint4(&operands)[4][32] = s.keys[buffer][part][head];
  const Part weights = weigh(call, present, at, at.own, part, s.queries[0][head], operands);
  if (part != at.own) arrived(&s.values_here[buffer][part], parity, at);
  float c[4][4] = {};
  weighted_values(c, weights.p, operands, at);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    *reinterpret_cast<float2*>(&s.partial[at.warp][at.group][8 * n + 2 * at.quad]) = {c[n][0], c[n][1]};
    *reinterpret_cast<float2*>(&s.partial[at.warp][at.group + 8][8 * n + 2 * at.quad]) = {c[n][2], c[n][3]};
  }
  if (at.quad == 0) {
    s.top_and_sum[head][part][at.group] = {weights.top[0], weights.sum[0]};
    s.top_and_sum[head][part][at.group + 8] = {weights.top[1], weights.sum[1]};
  }
}

// The parts of `attend` as one: four channels of a row a thread.
__device__ __forceinline__ void combine(const Place& at, Shared<1>& s) {
  const int thread = 32 * at.warp + at.lane;
  const int row = thread / 16, head = thread % 16 / 8, channel = thread % 8 * 4;
  float top = kMasked;
#pragma unroll
  for (int part = 0; part < kTiles; ++part) {
    if (part >= at.first) top = fmaxf(top, s.top_and_sum[head][part][row].x);
  }
  float sum = 0.0f;
  float4 o = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int part = 0; part < kTiles; ++part) {
    if (part < at.first) continue;
    const float2 here = s.top_and_sum[head][part][row];
    const float4 v = *reinterpret_cast<const float4*>(&s.partial[4 * head + part][row][channel]);
    const float weight = exp2_fast(here.x - top);
    sum += here.y * weight;
    o.x += v.x * weight, o.y += v.y * weight, o.z += v.z * weight, o.w += v.w * weight;
  }
  const float rate = 1.0f / fmaxf(sum, 0.5f);  // a row without any key has sum 0
  *reinterpret_cast<uint2*>(&s.attended[row][32 * head + channel]) = {pack(o.x * rate, o.y * rate),
                                                                      pack(o.z * rate, o.w * rate)};
}

// Of a block with all tiles: a warp has a head and a tile's queries, and does what `attend` and `combine` do to the bit.
__device__ __forceinline__ void attend_all(const ClusterEncoderCall& call, std::uint64_t present, const Place& at,
                                           int begin, Shared<kTiles>& s) {
  const int head = at.warp / 4, tile = at.warp % 4;
  if (tile < begin) return;
  Part parts[kTiles];
  float top[2] = {kMasked, kMasked};
#pragma unroll
  for (int pair = 0; pair < kTiles; pair += 2) {
    if (pair < at.first) continue;
#pragma unroll
    for (int part = pair; part < pair + 2; ++part) {
      parts[part] = weigh(call, present, at, tile, part, s.queries[tile][head], s.keys[0][part][head]);
      top[0] = fmaxf(top[0], parts[part].top[0]), top[1] = fmaxf(top[1], parts[part].top[1]);
    }
  }
  float sum[2] = {0.0f, 0.0f}, o[4][4] = {};
#pragma unroll
  for (int pair = 0; pair < kTiles; pair += 2) {
    if (pair < at.first) continue;
#pragma unroll
    for (int part = pair; part < pair + 2; ++part) {
      float c[4][4] = {};
      weighted_values(c, parts[part].p, s.keys[0][part][head], at);
      const float weight[2] = {exp2_fast(parts[part].top[0] - top[0]), exp2_fast(parts[part].top[1] - top[1])};
      sum[0] += parts[part].sum[0] * weight[0], sum[1] += parts[part].sum[1] * weight[1];
#pragma unroll
      for (int i = 0; i < 16; ++i) o[i / 4][i % 4] += c[i / 4][i % 4] * weight[i % 4 / 2];
    }
  }
  const float low = 1.0f / fmaxf(sum[0], 0.5f), high = 1.0f / fmaxf(sum[1], 0.5f);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int row = kRows * tile + at.group, column = 32 * head + 8 * n + 2 * at.quad;
    *reinterpret_cast<std::uint32_t*>(&s.attended[row][column]) = pack(o[n][0] * low, o[n][1] * low);
    *reinterpret_cast<std::uint32_t*>(&s.attended[row + 8][column]) = pack(o[n][2] * high, o[n][3] * high);
  }
}

// Adds what the other half has sent of a tile to h, which has this half's; it was rounded, so the two residual streams
// of a tile differ by that.
__device__ __forceinline__ void add_share(float (&h)[8], uint4 sent) {
  const std::uint32_t b[4] = {sent.x, sent.y, sent.z, sent.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    h[2 * i] += low_half(b[i]);
    h[2 * i + 1] += high_half(b[i]);
  }
}

// Adds this half's share of a tile, the sum of two chains, to h, and sends it to the other half.
__device__ __forceinline__ void share(float (&h)[8], const float (&even)[2][4], const float (&odd)[2][4], uint4* there,
                                      std::uint64_t* barrier, int partner) {
  float c[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    c[i] = even[i / 4][i % 4] + odd[i / 4][i % 4];
    h[i] += c[i];
  }
  const uint4 packed = {pack(c[0], c[1]), pack(c[2], c[3]), pack(c[4], c[5]), pack(c[6], c[7])};
  store_remote(in_block(shared_address(there), partner), packed, in_block(shared_address(barrier), partner));
}

// This half's share of tiles j and, of a pair, j + 1: the product of rows that lie in shared memory, kSteps steps of 16.
template <int kPair, int kSteps, int kWidth, int kOwn>
__device__ __forceinline__ void share_product(float (&h)[kOwn][8], const std::uint16_t (*rows)[kWidth], const uint4* w,
                                              const Place& at, int j, uint4 (*there)[kThreads], std::uint64_t* barrier,
                                              int partner) {
  float even[kPair][2][4] = {}, odd[kPair][2][4] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint4 x[kPair];
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      x[t] = load_matrices(&rows[kRows * (j + t) + at.lane % 16][16 * k + at.lane / 16 * 8]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int t = 0; t < kPair; ++t) {
        multiply_step(k % 2 ? odd[t][n] : even[t][n], x[t], w[kSteps / 2 * n + k / 2], k % 2);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kPair; ++t) {
    share(h[j + t], even[t], odd[t], &there[j + t][32 * at.warp + at.lane], barrier, partner);
  }
}

// gelu(4 y) / 2: _half_gelu of kernels/encoder.py.
__device__ __forceinline__ float half_gelu(float y) {
  const float square = __saturatef(y * y);
  return y + y * tanh_fast(y * (3.189956496f + square * (2.3675455104f + square * -0.356818897f)));
}

__device__ __forceinline__ void store_newest(const ClusterEncoderCall& call, const float (&y)[8], int user,
                                             const Place& at) {
  if (at.half != 0 || at.group != 7) return;
  auto* row = static_cast<std::uint32_t*>(call.out) + static_cast<std::int64_t>(user) * (kChannels / 2);
#pragma unroll
  for (int n = 0; n < 2; ++n) row[8 * at.warp + 4 * n + at.quad] = pack(y[4 * n + 2], y[4 * n + 3]);
}

template <int kOwn, bool kLayerNorm>
__device__ __forceinline__ void encode_history(const ClusterEncoderCall& call) {
  using Memory = Shared<kOwn>;
  constexpr int kPair = Memory::kPair;
  Memory& s = *reinterpret_cast<Memory*>(shared_memory());
  const int rank = cluster_rank(), blocks_before = kTiles / kOwn - cluster_size() / 2;
  const int user = blockIdx.x / cluster_size(), thread = threadIdx.x;
  Place at{thread / 32, thread % 32, thread % 32 / 4, thread % 4, rank % 2, (blocks_before + rank / 2) * kOwn, 0};
  const History history = find(call, user, at.lane);
  const int oldest = history.present == 0 ? kTiles : __clzll(history.present) / kRows;
  at.first = max(oldest / kPair * kPair, blocks_before * kOwn);
  const bool newest = at.own + kOwn == kTiles;
  if (at.own + kOwn <= at.first) {
    cluster_arrive();
    if (history.present == 0 && newest) {
      const float zeros[8] = {};
      store_newest(call, zeros, user, at);
    }
    return;
  }
  const int begin = kOwn == 1 ? 0 : at.first;  // the first of this block's tiles that count
  // The last transformer block answers for the newest item alone: other tiles only give it their keys and values.
  const int blocks = call.blocks, feeds = newest ? blocks : blocks - 1;
  const auto answered = [&](int block) { return block == blocks - 1 ? kOwn - kPair : begin; };  // from which tile on
  const auto expect_shares = [&](std::uint64_t* barrier, int block) {
    barrier_expect(barrier, (kOwn - answered(block)) * kShareBytes);
  };
  const uint4* weights = static_cast<const uint4*>(call.weights) + static_cast<std::int64_t>(at.half) * kUnits * 32;
  if (at.lane == 0) {
    for (std::uint64_t& barrier : s.weights_here[at.warp]) barrier_init(&barrier);
    barrier_init(&s.out_weights_here[at.warp]);
    barrier_init_fence();
  }
#pragma unroll
  for (int phase = 0; phase < Memory::kSlots; ++phase) bring_phase(weights, 0, phase, feeds, blocks, at, s);
  const int out_first = kOutFirst + 4 * at.warp;
  uint4* out_weights = s.out_weights[at.warp][0];
  if (feeds > 0) bring(out_weights, weights, out_first, 4, &s.out_weights_here[at.warp], at);
  if (thread == 0) {
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int buffer = 0; buffer < 2; ++buffer) {
        barrier_init(&s.keys_here[buffer][tile]);
        barrier_init(&s.values_here[buffer][tile]);
      }
    }
    barrier_init(&s.attended_here);
    barrier_init(&s.fed_here);
    barrier_init_fence();
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int buffer = 0; buffer < 2; ++buffer) {
        barrier_expect(&s.keys_here[buffer][tile], kKeyBytes);
        barrier_expect(&s.values_here[buffer][tile], kKeyBytes);
      }
    }
    expect_shares(&s.attended_here, 0);
    expect_shares(&s.fed_here, 0);
  }
  __syncwarp();
  cluster_arrive();
  Turns turns[kPair];
  if (kOwn == 1) turns[0] = load_turns(call, at, at.own);
  Gains gains = load_gains<kLayerNorm>(call, 0, at);
  float h[kOwn][8];
  input(call, history, at, begin, s, h);
  cluster_wait();

  for (int block = 0; block < blocks; ++block) {
    const bool last = block == blocks - 1;
    const int parity = block % 2, buffer = block % Memory::kKeyBuffers, from = answered(block);
    uint4 w[16];
    take_phase(w, weights, block, kAttention, feeds, blocks, at, s);
    if (block > 0) {
      barrier_wait(&s.fed_here, 1 - parity);
      if (thread == 0) expect_shares(&s.fed_here, block);
    }
#pragma unroll
    for (int j = 0; j < kOwn; j += kPair) {
      if (j < begin) continue;
#pragma unroll
      for (int t = 0; t < kPair; ++t) {
        if (block > 0) add_share(h[j + t], s.fed_share[j + t][thread]);
        give_normalised<kLayerNorm>(call, gains, h[j + t], at, j + t, s);
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOwn; j += kPair) {
      if (j < begin) continue;
      uint4 a[kPair][8];
      Rates rates[kPair];
#pragma unroll
      for (int t = 0; t < kPair; ++t) {
        if (kOwn > 1) turns[t] = load_turns(call, at, at.own + j + t);
        rates[t] = take_normalised<kLayerNorm>(call, at, j + t, s, a[t]);
      }
      project(turns, a, w, rates, at, j, s, buffer, blocks_before, last);
    }
    if (block == feeds) return;
    gains = load_gains<kLayerNorm>(call, 2 * block + 1, at);
    __syncthreads();
    if constexpr (kOwn == 1) {
      if (at.warp % 4 >= at.first) attend(call, history.present, at, s, buffer, block / 2 % 2);
      __syncthreads();
      combine(at, s);
    } else {
      attend_all(call, history.present, at, from, s);
    }
    uint4 w_out[4];
    barrier_wait(&s.out_weights_here[at.warp], parity);
    take(w_out, s.out_weights[at.warp], at.lane);
    if (block + 1 < feeds) {
      bring(out_weights, weights + static_cast<std::int64_t>(block + 1) * kStride, out_first, 4,
            &s.out_weights_here[at.warp], at);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOwn; j += kPair) {
      if (j < from) continue;
      share_product<kPair, 4>(h, s.attended, w_out, at, j, s.attended_share, &s.attended_here, rank ^ 1);
    }

    take_phase(w, weights, block, kFeed, feeds, blocks, at, s);
    barrier_wait(&s.attended_here, parity);
    if (thread == 0 && !last) expect_shares(&s.attended_here, block + 1);
#pragma unroll
    for (int j = 0; j < kOwn; j += kPair) {
      if (j < from) continue;
#pragma unroll
      for (int t = 0; t < kPair; ++t) {
        add_share(h[j + t], s.attended_share[j + t][thread]);
        give_normalised<kLayerNorm>(call, gains, h[j + t], at, j + t, s);
      }
    }
    __syncthreads();
    gains = load_gains<kLayerNorm>(call, 2 * block + 2, at);
#pragma unroll
    for (int j = 0; j < kOwn; j += kPair) {
      if (j < from) continue;
      uint4 a[kPair][8];
      Rates rates[kPair];
#pragma unroll
      for (int t = 0; t < kPair; ++t) rates[t] = take_normalised<kLayerNorm>(call, at, j + t, s, a[t]);
      float f[kPair][4][4] = {};
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int t = 0; t < kPair; ++t) multiply_step(f[t][n], a[t][k], w[4 * n + k / 2], k % 2);
        }
      }
      if (j == kOwn - kPair) take_phase(w, weights, block, kFed, feeds, blocks, at, s);
#pragma unroll
      for (int t = 0; t < kPair; ++t) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int row = kRows * (j + t) + at.group, column = 32 * at.warp + 8 * n + 2 * at.quad;
          *reinterpret_cast<std::uint32_t*>(&s.hidden[row][column]) =
              pack(half_gelu(f[t][n][0] * rates[t].low), half_gelu(f[t][n][1] * rates[t].low));
          *reinterpret_cast<std::uint32_t*>(&s.hidden[row + 8][column]) =
              pack(half_gelu(f[t][n][2] * rates[t].high), half_gelu(f[t][n][3] * rates[t].high));
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOwn; j += kPair) {
      if (j < from) continue;
      share_product<kPair, 16>(h, s.hidden, w, at, j, s.fed_share, &s.fed_here, rank ^ 1);
    }
  }
  constexpr int kNewest = kOwn - 1;
  barrier_wait(&s.fed_here, (blocks - 1) % 2);
  add_share(h[kNewest], s.fed_share[kNewest][thread]);
  float y[8];
  normalise<kLayerNorm>(call, gains, h[kNewest], at, kNewest, s, y);
  store_newest(call, y, user, at);
}

template <int kOwn, bool kLayerNorm>
__global__ void __launch_bounds__(kThreads, 1) encode_kernel(const __grid_constant__ ClusterEncoderCall call) {
  next_may_start();
  await_previous();
  encode_history<kOwn, kLayerNorm>(call);
}

}  // namespace
}  // namespace fave_fast

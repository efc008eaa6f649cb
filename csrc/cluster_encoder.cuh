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
// What limits it, on an H200 with four transformer blocks: one takes 7,100 cycles with 50 items, and it is 4,400 until
// the rows are there (stamps at c039076, whose blocks do the same). (A round of 4 KB to one block takes 440 cycles, to
// each of three 980.) By count, no counter was read, that leaves shared memory: weights are written there and read
// again, 2 x 192 KB at 128 bytes a cycle or 3,070 cycles, and every warp reads the whole left operand, 1,000 more. To
// take a phase's weights takes a warp 500 to 1,000 cycles, of which an exchange hides 440.

#include <cstdint>

#include "gpu_encoders.hpp"
#include "encoder_input.cuh"
#include "hopper.cuh"

namespace fave_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;     // of a tile
constexpr int kTiles = kFrame / kRows;
constexpr int kUnits = 384;          // of 32 lanes x 16 bytes: the weights of a block and a transformer block
constexpr int kOutFirst = 96;        // the output projection's begin behind those of keys, queries and values
constexpr int kFeedFirst = 128;
constexpr int kFedFirst = 256;
constexpr int kUnitBytes = 512;
constexpr std::uint32_t kKeyBytes = 2048;    // of keys that a block sends to another; of values as many
constexpr std::uint32_t kShareBytes = 4096;  // of a tile's share in bf16

// Rows are padded so that neither ldmatrix nor the stores before it meet in a bank.
struct Shared {
  uint4 weights[8][2][16][32];      // by warp; two phases
  uint4 out_weights[8][4][32];
  uint4 keys[2][kTiles][2][4][32];  // by parity of the transformer block, tile, head: halves of keys, of values
  uint4 attended_share[kThreads];
  uint4 fed_share[kThreads];
  uint4 queries[2][2][32];
  union {
    float partial[8][kRows][40];  // a warp's sums over the values of one tile
    float input[kRows][132];
  };
  float2 top_and_sum[2][kTiles][kRows];
  std::uint16_t x[kRows][136];
  std::uint16_t attended[kRows][72];
  std::uint16_t hidden[kRows][264];
  float reduce[2][kRows][12];
  std::uint64_t weights_here[8][2];
  std::uint64_t out_weights_here[8];
  std::uint64_t keys_here[2][kTiles];
  std::uint64_t values_here[2][kTiles];
  std::uint64_t attended_here;
  std::uint64_t fed_here;
};

struct Place {
  int warp, lane, group, quad;  // lane = 4 group + quad: rows `group` and `group + 8` of a product
  int tile, half, first_tile;   // first_tile: where the oldest item is
};

// The residual of the tile, as a product leaves it: h[4 n + e] is row group + 8 (e / 2), channel
// 16 warp + 8 n + 2 quad + e % 2.
__device__ __forceinline__ void input(const EncoderCall& call, const History& history, const Place& at,
                                      Shared& s, float (&h)[8]) {
  const int youngest = kFrame - 1 - at.tile * kRows - 2 * at.warp;
  float v[2][4];
  embed(call, history, {youngest, youngest - 1}, at.lane, v);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    *reinterpret_cast<float4*>(&s.input[2 * at.warp + i][4 * at.lane]) = {v[i][0], v[i][1], v[i][2], v[i][3]};
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = 16 * at.warp + 8 * (i / 2) + 2 * at.quad;
    const float2 two = *reinterpret_cast<const float2*>(&s.input[at.group + 8 * (i % 2)][column]);
    h[4 * (i / 2) + 2 * (i % 2)] = two.x, h[4 * (i / 2) + 2 * (i % 2) + 1] = two.y;
  }
}

// Totals over the channels of rows `group` (low) and `group + 8` (high), for all warps in the same bits: each gives its
// own, and takes them all behind a barrier.
__device__ __forceinline__ void give_row_totals(float low, float high, const Place& at, float (&reduce)[kRows][12]) {
  const Two totals = quad_totals({low, high});
  if (at.quad == 0) {
    reduce[at.group][at.warp] = totals.low;
    reduce[at.group + 8][at.warp] = totals.high;
  }
}

__device__ __forceinline__ float row_total(const float (&parts)[12]) {
  const float4 a = *reinterpret_cast<const float4*>(parts), b = *reinterpret_cast<const float4*>(parts + 4);
  return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
}

__device__ __forceinline__ void take_row_totals(float& low, float& high, const Place& at,
                                                const float (&reduce)[kRows][12]) {
  low = row_total(reduce[at.group]);
  high = row_total(reduce[at.group + 8]);
}

__device__ __forceinline__ void row_totals(float& low, float& high, const Place& at, float (&reduce)[kRows][12]) {
  give_row_totals(low, high, at, reduce);
  __syncthreads();
  take_row_totals(low, high, at, reduce);
}

// RMSNorm or LayerNorm of the residual.
template <bool kLayerNorm>
__device__ __forceinline__ void normalise(const EncoderCall& call, const Gains<2>& gains, const float (&h)[8],
                                          const Place& at, Shared& s, float (&y)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] = h[i];
  if (kLayerNorm) {
    float low = (h[0] + h[1]) + (h[4] + h[5]), high = (h[2] + h[3]) + (h[6] + h[7]);
    row_totals(low, high, at, s.reduce[1]);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] -= (i & 2 ? high : low) * (1.0f / kChannels);
  }
  float low = (y[0] * y[0] + y[1] * y[1]) + (y[4] * y[4] + y[5] * y[5]);
  float high = (y[2] * y[2] + y[3] * y[3]) + (y[6] * y[6] + y[7] * y[7]);
  row_totals(low, high, at, s.reduce[0]);
  low = rsqrtf(low * (1.0f / kChannels) + call.eps);
  high = rsqrtf(high * (1.0f / kChannels) + call.eps);
  scale_rows(gains, low, high, y);
}

// The factors of rows `group` and `group + 8` that a product over normalised rows still lacks.
struct Rates {
  float low, high;
};

// The normalised tile as the left operand of a product over its channels, 8 steps of 16: an RMSNorm's without its rate,
// which is on its way while the product runs.
template <bool kLayerNorm>
__device__ __forceinline__ Rates normalised_operand(const EncoderCall& call, const Gains<2>& gains,
                                                    const float (&h)[8], const Place& at, Shared& s, uint4 (&a)[8]) {
  float y[8];
  Rates rates{1.0f, 1.0f};
  if (kLayerNorm) {
    normalise<true>(call, gains, h, at, s, y);
  } else {
    const float2 left = gains.gain[0], right = gains.gain[1];
    y[0] = h[0] * left.x, y[1] = h[1] * left.y, y[2] = h[2] * left.x, y[3] = h[3] * left.y;
    y[4] = h[4] * right.x, y[5] = h[5] * right.y, y[6] = h[6] * right.x, y[7] = h[7] * right.y;
    rates.low = (h[0] * h[0] + h[1] * h[1]) + (h[4] * h[4] + h[5] * h[5]);
    rates.high = (h[2] * h[2] + h[3] * h[3]) + (h[6] * h[6] + h[7] * h[7]);
    give_row_totals(rates.low, rates.high, at, s.reduce[0]);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int column = 16 * at.warp + 8 * n + 2 * at.quad;
    *reinterpret_cast<std::uint32_t*>(&s.x[at.group][column]) = pack(y[4 * n], y[4 * n + 1]);
    *reinterpret_cast<std::uint32_t*>(&s.x[at.group + 8][column]) = pack(y[4 * n + 2], y[4 * n + 3]);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 8; ++k) a[k] = load_matrices(&s.x[at.lane % 16][16 * k + at.lane / 16 * 8]);
  if (!kLayerNorm) {
    take_row_totals(rates.low, rates.high, at, s.reduce[0]);
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

// One unit holds the right operand of two steps of a product over k.
__device__ __forceinline__ void multiply_step(float (&c)[4], uint4 a, uint4 unit, int odd) {
  multiply(c, a, odd ? unit.z : unit.x, odd ? unit.w : unit.y);
}

// Cosine and sine for rows `group` and `group + 8` of the pairs that a thread of keys or queries has.
struct Turns {
  float cos[2][2], sin[2][2];  // [row][n]
};

__device__ __forceinline__ Turns load_turns(const EncoderCall& call, const Place& at) {
  Turns turns;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int age = kFrame - 1 - at.tile * kRows - at.group - 8 * r;
    const int where = min(age, call.longest - 1) * 16 + 8 * (at.warp % 2) + at.quad;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      turns.cos[r][n] = call.rotary ? __ldg(call.cos + where + 4 * n) : 1.0f;
      turns.sin[r][n] = call.rotary ? __ldg(call.sin + where + 4 * n) : 0.0f;
    }
  }
  return turns;
}

// Keys or queries: 16 channels of a head for rows `group` and `group + 8`, as the operand of their product (a right one
// holds the columns in this order, a left one has the middle two exchanged).
__device__ __forceinline__ uint4 project_turned(const Turns& turns, const uint4 (&a)[8], const uint4* w, Rates rates) {
  float even[2][4] = {}, odd[2][4] = {};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int n = 0; n < 2; ++n) multiply_step(k % 2 ? odd[n] : even[n], a[k], w[4 * n + k / 2], k % 2);
  }
  std::uint32_t packed[2][2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float rate = r == 0 ? rates.low : rates.high, cos = turns.cos[r][n], sin = turns.sin[r][n];
      const float first = (even[n][2 * r] + odd[n][2 * r]) * rate;
      const float second = (even[n][2 * r + 1] + odd[n][2 * r + 1]) * rate;
      packed[r][n] = pack(first * cos - second * sin, first * sin + second * cos);
    }
  }
  return {packed[0][0], packed[0][1], packed[1][0], packed[1][1]};
}

// 16 channels of the values, transposed: their product's result is an operand of the next product as it stands.
__device__ __forceinline__ uint4 project_values(const uint4 (&a)[8], const uint4* w, Rates rates, const Place& at) {
  float even[2][4] = {}, odd[2][4] = {};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    multiply(k % 2 ? odd[0] : even[0], w[k], a[k].x, a[k].z);
    multiply(k % 2 ? odd[1] : even[1], w[k], a[k].y, a[k].w);
  }
  float rate[4];  // of rows 2 quad, 2 quad + 1, and 8 behind them
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    rate[e] = __shfl_sync(0xffffffffu, rates.low, 4 * (2 * at.quad + e));
    rate[2 + e] = __shfl_sync(0xffffffffu, rates.high, 4 * (2 * at.quad + e));
  }
  std::uint32_t packed[2][2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      packed[r][n] = pack((even[n][2 * r] + odd[n][2 * r]) * rate[2 * n],
                          (even[n][2 * r + 1] + odd[n][2 * r + 1]) * rate[2 * n + 1]);
    }
  }
  return {packed[0][0], packed[0][1], packed[1][0], packed[1][1]};
}

// Writes one operand of the keys or values here and to the blocks of this half that need it.
__device__ __forceinline__ void publish(uint4 v, uint4* here, std::uint64_t* barrier, const Place& at,
                                        int blocks_before, bool newest_only) {
  *here = v;
  const std::uint32_t address = shared_address(here), counted = shared_address(barrier);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile == at.tile || tile < at.first_tile || (newest_only && tile != kTiles - 1)) continue;
    const int rank = 2 * (tile - blocks_before) + at.half;
    store_remote(in_block(address, rank), v, in_block(counted, rank));
  }
}

// Keys, values and queries of this half's two heads. Warps 0 to 3 have 16 channels of the keys each, then of the
// queries, while the others' 16 channels of the values and the keys are on their way.
__device__ __forceinline__ void project(const Turns& turns, const uint4 (&a)[8], const uint4 (&w)[16], Rates rates,
                                        const Place& at, Shared& s, int buffer, int blocks_before, bool newest_only) {
  const int head = at.warp % 4 / 2, half = at.warp % 2;
  uint4(&operands)[4][32] = s.keys[buffer][at.tile][head];
  if (at.warp < 4) {
    const uint4 key = project_turned(turns, a, w, rates);
    publish(key, &operands[half][at.lane], &s.keys_here[buffer][at.tile], at, blocks_before, newest_only);
    const uint4 query = project_turned(turns, a, w + 8, rates);
    s.queries[head][half][at.lane] = {query.x, query.z, query.y, query.w};
  } else {
    const uint4 value = project_values(a, w, rates, at);
    publish(value, &operands[2 + half][at.lane], &s.values_here[buffer][at.tile], at, blocks_before, newest_only);
  }
}

// Waits for what another tile's block sends, and has the barrier wait for the next but one.
__device__ __forceinline__ void arrived(std::uint64_t* barrier, int parity, const Place& at) {
  barrier_wait(barrier, parity);
  if (at.warp < 4 && at.lane == 0) barrier_expect(barrier, kKeyBytes);
}

// One head's softmax over the keys of one tile, apart from its sum, times their values.
__device__ __forceinline__ void attend(const EncoderCall& call, std::uint64_t present, const Place& at,
                                       Shared& s, int buffer, int parity) {
  const int head = at.warp / 4, part = at.warp % 4;
  const uint4(&operands)[4][32] = s.keys[buffer][part][head];
  const uint4 q0 = s.queries[head][0][at.lane], q1 = s.queries[head][1][at.lane];
  if (part != at.tile) arrived(&s.keys_here[buffer][part], parity, at);
  const uint4 k0 = operands[0][at.lane], k1 = operands[1][at.lane];
  float p[2][4] = {};
  multiply(p[0], q0, k0.x, k0.y);
  multiply(p[1], q0, k0.z, k0.w);
  multiply(p[0], q1, k1.x, k1.y);
  multiply(p[1], q1, k1.z, k1.w);
  Two top = {kMasked / 2, kMasked / 2}, sum = {0.0f, 0.0f};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = kRows * part + 8 * n + 2 * at.quad + e % 2;
      const int query = kRows * at.tile + at.group + 8 * (e / 2);
      const bool allowed = (present >> (kFrame - 1 - row) & 1) && (!call.causal || row <= query);
      p[n][e] = allowed ? p[n][e] * kScale : kMasked;
      top[e / 2] = fmaxf(top[e / 2], p[n][e]);
    }
  }
  quad_tops(top);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      p[n][e] = exp2_fast(p[n][e] - top[e / 2]);
      sum[e / 2] += p[n][e];
    }
  }
  if (part != at.tile) arrived(&s.values_here[buffer][part], parity, at);
  const uint4 v0 = operands[2][at.lane], v1 = operands[3][at.lane];
  const uint4 a = {pack(p[0][0], p[0][1]), pack(p[0][2], p[0][3]), pack(p[1][0], p[1][1]), pack(p[1][2], p[1][3])};
  float c[4][4] = {};
  multiply(c[0], a, v0.x, v0.y);
  multiply(c[1], a, v0.z, v0.w);
  multiply(c[2], a, v1.x, v1.y);
  multiply(c[3], a, v1.z, v1.w);
  sum = quad_totals(sum);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    *reinterpret_cast<float2*>(&s.partial[at.warp][at.group][8 * n + 2 * at.quad]) = {c[n][0], c[n][1]};
    *reinterpret_cast<float2*>(&s.partial[at.warp][at.group + 8][8 * n + 2 * at.quad]) = {c[n][2], c[n][3]};
  }
  if (at.quad == 0) {
    s.top_and_sum[head][part][at.group] = {top.low, sum.low};
    s.top_and_sum[head][part][at.group + 8] = {top.high, sum.high};
  }
}

// The parts of `attend` as one: four channels of a row a thread.
__device__ __forceinline__ void combine(const Place& at, Shared& s) {
  const int thread = 32 * at.warp + at.lane;
  const int row = thread / 16, head = thread % 16 / 8, channel = thread % 8 * 4;
  float top = kMasked;
#pragma unroll
  for (int part = 0; part < kTiles; ++part) {
    if (part >= at.first_tile) top = fmaxf(top, s.top_and_sum[head][part][row].x);
  }
  float sum = 0.0f;
  float4 o = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int part = 0; part < kTiles; ++part) {
    if (part < at.first_tile) continue;
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

// Adds this half's share of the tile, the sum of two chains, to h, and sends it to the other half. What is sent is
// rounded, so the two residual streams of a tile differ by that.
__device__ __forceinline__ void share(float (&h)[8], const float (&even)[2][4], const float (&odd)[2][4], uint4* there,
                                      std::uint64_t* barrier, int partner) {
  float c[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    c[i] = even[i / 4][i % 4] + odd[i / 4][i % 4];
    h[i] += c[i];
  }
  store_remote(in_block(shared_address(there), partner), packed(c), in_block(shared_address(barrier), partner));
}

__device__ __forceinline__ void store_newest(const EncoderCall& call, const float (&y)[8], int user,
                                             const Place& at) {
  if (at.half != 0 || at.group != 7) return;
  auto* row = static_cast<std::uint32_t*>(call.out) + static_cast<std::int64_t>(user) * (kChannels / 2);
#pragma unroll
  for (int n = 0; n < 2; ++n) row[8 * at.warp + 4 * n + at.quad] = pack(y[4 * n + 2], y[4 * n + 3]);
}

template <bool kLayerNorm>
__device__ __forceinline__ void encode_history(const EncoderCall& call) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int rank = cluster_rank(), blocks_before = kTiles - cluster_size() / 2;
  const int user = blockIdx.x / cluster_size(), thread = threadIdx.x;
  Place at{thread / 32, thread % 32, thread % 32 / 4, thread % 4, blocks_before + rank / 2, rank % 2, 0};
  const History history = find(call, user, at.lane);
  at.first_tile = max(history.present == 0 ? kTiles : __clzll(history.present) / kRows, blocks_before);
  if (at.tile < at.first_tile) {
    cluster_arrive();
    if (history.present == 0 && at.tile == kTiles - 1) {
      const float zeros[8] = {};
      store_newest(call, zeros, user, at);
    }
    return;
  }
  const uint4* weights = static_cast<const uint4*>(call.weights) + static_cast<std::int64_t>(at.half) * kUnits * 32;
  constexpr int kStride = 2 * kUnits * 32;  // to the next transformer block
  const int attention_first = at.warp < 4 ? 16 * at.warp : 32 + 8 * at.warp, attention_count = at.warp < 4 ? 16 : 8;
  uint4(&slots)[2][16][32] = s.weights[at.warp];
  std::uint64_t* slots_here = s.weights_here[at.warp];
  if (at.lane == 0) {
    barrier_init(&slots_here[0]);
    barrier_init(&slots_here[1]);
    barrier_init(&s.out_weights_here[at.warp]);
    barrier_init_fence();
  }
  bring(slots[0][0], weights, attention_first, attention_count, &slots_here[0], at);
  // The last transformer block answers for the newest item alone: the other tiles only send it their keys and values.
  // (A copy that is on its way must not outlive its block: what is not used is not brought.)
  const int feeds = at.tile == kTiles - 1 ? call.blocks : call.blocks - 1;
  if (feeds > 0) {
    bring(slots[1][0], weights, kFeedFirst + 16 * at.warp, 16, &slots_here[1], at);
    bring(s.out_weights[at.warp][0], weights, kOutFirst + 4 * at.warp, 4, &s.out_weights_here[at.warp], at);
  }
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
    barrier_expect(&s.attended_here, kShareBytes);
    barrier_expect(&s.fed_here, kShareBytes);
  }
  __syncwarp();
  cluster_arrive();
  const Turns turns = load_turns(call, at);
  const int pair = 8 * at.warp + at.quad;
  Gains<2> gains = load_gains<kLayerNorm, 2>(call, 0, pair);
  float h[8];
  input(call, history, at, s, h);
  cluster_wait();

  for (int block = 0; block < call.blocks; ++block, weights += kStride) {
    const bool last = block == call.blocks - 1;
    const int buffer = block % 2, phase = 3 * block;  // phases alternate between the slots
    uint4 w[16], a[8];
    barrier_wait(&slots_here[buffer], phase / 2 % 2);
    take(w, slots[buffer], at.lane);  // of values eight
    if (block < feeds) bring(slots[buffer][0], weights, kFedFirst + 16 * at.warp, 16, &slots_here[buffer], at);
    if (block > 0) {
      barrier_wait(&s.fed_here, 1 - buffer);
      if (thread == 0) barrier_expect(&s.fed_here, kShareBytes);
      add_packed(h, s.fed_share[thread]);
    }
    Rates rates = normalised_operand<kLayerNorm>(call, gains, h, at, s, a);
    project(turns, a, w, rates, at, s, buffer, blocks_before, last);
    if (block == feeds) return;
    gains = load_gains<kLayerNorm, 2>(call, 2 * block + 1, pair);
    __syncthreads();
    if (at.warp % 4 >= at.first_tile) attend(call, history.present, at, s, buffer, block / 2 % 2);
    __syncthreads();
    combine(at, s);
    uint4 w_out[4];
    barrier_wait(&s.out_weights_here[at.warp], buffer);
    take(w_out, s.out_weights[at.warp], at.lane);
    __syncthreads();
    float even[2][4] = {}, odd[2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint4 o = load_matrices(&s.attended[at.lane % 16][16 * k + at.lane / 16 * 8]);
#pragma unroll
      for (int n = 0; n < 2; ++n) multiply_step(k % 2 ? odd[n] : even[n], o, w_out[2 * n + k / 2], k % 2);
    }
    share(h, even, odd, &s.attended_share[thread], &s.attended_here, rank ^ 1);
    barrier_wait(&slots_here[1 - buffer], (phase + 1) / 2 % 2);
    take(w, slots[1 - buffer], at.lane);
    if (!last) {
      bring(slots[1 - buffer][0], weights + kStride, attention_first, attention_count, &slots_here[1 - buffer], at);
    }
    if (block + 1 < feeds) {
      bring(s.out_weights[at.warp][0], weights + kStride, kOutFirst + 4 * at.warp, 4, &s.out_weights_here[at.warp], at);
    }
    barrier_wait(&s.attended_here, buffer);
    if (thread == 0) barrier_expect(&s.attended_here, kShareBytes);
    add_packed(h, s.attended_share[thread]);

    rates = normalised_operand<kLayerNorm>(call, gains, h, at, s, a);
    gains = load_gains<kLayerNorm, 2>(call, 2 * block + 2, pair);
    float f[4][4] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply_step(f[n], a[k], w[4 * n + k / 2], k % 2);
    }
    barrier_wait(&slots_here[buffer], (phase + 2) / 2 % 2);
    take(w, slots[buffer], at.lane);
    if (block + 1 < feeds) {
      bring(slots[buffer][0], weights + kStride, kFeedFirst + 16 * at.warp, 16, &slots_here[buffer], at);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = 32 * at.warp + 8 * n + 2 * at.quad;
      *reinterpret_cast<std::uint32_t*>(&s.hidden[at.group][column]) =
          pack(half_gelu(f[n][0] * rates.low), half_gelu(f[n][1] * rates.low));
      *reinterpret_cast<std::uint32_t*>(&s.hidden[at.group + 8][column]) =
          pack(half_gelu(f[n][2] * rates.high), half_gelu(f[n][3] * rates.high));
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; ++i) even[i / 4][i % 4] = odd[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const uint4 x = load_matrices(&s.hidden[at.lane % 16][16 * k + at.lane / 16 * 8]);
#pragma unroll
      for (int n = 0; n < 2; ++n) multiply_step(k % 2 ? odd[n] : even[n], x, w[8 * n + k / 2], k % 2);
    }
    share(h, even, odd, &s.fed_share[thread], &s.fed_here, rank ^ 1);
  }
  barrier_wait(&s.fed_here, (call.blocks - 1) % 2);
  add_packed(h, s.fed_share[thread]);
  float y[8];
  normalise<kLayerNorm>(call, gains, h, at, s, y);
  store_newest(call, y, user, at);
}

template <bool kLayerNorm>
__global__ void __launch_bounds__(kThreads, 1) encode_kernel(const __grid_constant__ EncoderCall call) {
  next_may_start();
  await_previous();
  encode_history<kLayerNorm>(call);
}

}  // namespace
}  // namespace fave_fast

#pragma once

// The kernel of pair_encoder.cu.
//
// Two blocks of a cluster share a history, which lies at the end of a frame of 64 rows, its newest item in row 63. Each
// block has two of the four heads and half of the feed-forward, and the whole residual stream (the two differ by the
// rounding of what the other sent); so a transformer block takes two exchanges, of each half's share of the attention's
// and of the feed-forward's output. 64 rows are what one product of a warpgroup has: a warp has 16 of them, and the two
// warpgroups of a block share out a product's columns. A warpgroup has one head, whose scores, weights and queries never
// leave its registers.
//
// Weights come by the copy engine in three portions of 64 KB a transformer block, one portion ahead, as the panels that
// the products read.
//
// On an H200 with four transformer blocks it takes 52,000 cycles for up to 66 histories, whatever their length: 6,700
// until the rows are there, 11,200 a transformer block. Of those the two exchanges are 1,900, the norms 2,000, queries,
// keys and values 1,060, the attention 2,000, the feed-forward 2,500 and 1,180. By count its products alone take 3,300
// of them; behind each, all that a row needs waits for it. (The same exchanges with mma.sync, two blocks and warps that
// keep weights in registers for all four tiles of `cluster_encoder.cuh`, took 44 us where this takes 31: two warps a
// scheduler did not hide each other's shared memory. Half of a feed-forward's GELU beside the other half's product took
// 300 cycles more, for its left operand is then read twice.)

#include <cstdint>

#include "encoder_input.cuh"
#include "gpu_encoders.hpp"
#include "hopper.cuh"

namespace fave_fast {
namespace {

constexpr int kThreads = 256;
constexpr std::uint32_t kPortion = 65536;               // bytes of weights
constexpr std::uint32_t kHeadPanel = 96 * kPanelRow;    // a head's queries, keys and values from 64 channels
constexpr std::uint32_t kOut = 4 * kHeadPanel;          // where the output projection's begin in the first portion
constexpr std::uint32_t kFeedPanel = 256 * kPanelRow;   // the feed-forward's first matrix, 64 channels
constexpr std::uint32_t kFedPanel = 128 * kPanelRow;    // its second, 64 hidden units
constexpr std::uint32_t kShareBytes = 16384;            // of all rows in bf16; the newest's warp has a quarter

struct alignas(1024) Shared {
  unsigned char weights[2][kPortion];
  unsigned char x[2][kPanel];
  union {
    struct {
      unsigned char keys[kPanel];      // row: item; channels of head 0, then of head 1
      unsigned char values[kPanel];    // row: channel; "channels" are items
      unsigned char attended[kPanel];
    };
    unsigned char hidden[4][kPanel];
    float4 input[kFrame][kChannels / 4];  // of row r, four channels c lie at c ^ r % 8
  };
  uint4 attended_share[4][kThreads];
  uint4 fed_share[4][kThreads];
  float reduce[2][2][kFrame];  // by warpgroup
  std::uint64_t weights_here[2];
  std::uint64_t attended_here;
  std::uint64_t fed_here;
};

struct Place {
  int group, quad;  // lane = 4 group + quad
  int columns;      // the warpgroup: 0 or 1
  int row;          // this thread's rows are `row` and `row + 8`
  bool newest;      // the warp that has the newest item
};

// Totals of a row's 64 channels over all threads that have some, in the same bits for all: given, and taken behind a
// barrier.
__device__ __forceinline__ void give_totals(Two parts, const Place& at, float (&reduce)[2][kFrame]) {
  parts = quad_totals(parts);
  if (at.quad == 0) {
    reduce[at.columns][at.row] = parts.low;
    reduce[at.columns][at.row + 8] = parts.high;
  }
}

__device__ __forceinline__ Two take_totals(const Place& at, const float (&reduce)[2][kFrame]) {
  return {reduce[0][at.row] + reduce[1][at.row], reduce[0][at.row + 8] + reduce[1][at.row + 8]};
}

__device__ __forceinline__ Two sums(const float (&y)[32]) {
  Two parts = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 32; i += 4) parts.low += y[i] + y[i + 1], parts.high += y[i + 2] + y[i + 3];
  return parts;
}

__device__ __forceinline__ Two squares(const float (&y)[32]) {
  Two parts = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    parts.low += y[i] * y[i] + y[i + 1] * y[i + 1], parts.high += y[i + 2] * y[i + 2] + y[i + 3] * y[i + 3];
  }
  return parts;
}

// The factors of a norm, behind a barrier that give_totals of its squares came before.
__device__ __forceinline__ Two take_rates(const EncoderCall& call, const Place& at, const Shared& s) {
  const Two square = take_totals(at, s.reduce[0]);
  return {rsqrtf(square.low * (1.0f / kChannels) + call.eps), rsqrtf(square.high * (1.0f / kChannels) + call.eps)};
}

// RMSNorm or LayerNorm of the residual, an RMSNorm's without its rate; its squares' totals are given.
template <bool kLayerNorm>
__device__ __forceinline__ void centre(const float (&h)[32], const Place& at, Shared& s, float (&y)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) y[i] = h[i];
  if (kLayerNorm) {
    give_totals(sums(h), at, s.reduce[1]);
    __syncthreads();
    const Two total = take_totals(at, s.reduce[1]);
#pragma unroll
    for (int i = 0; i < 32; ++i) y[i] -= (i & 2 ? total.high : total.low) * (1.0f / kChannels);
  }
  give_totals(squares(y), at, s.reduce[0]);
}

// Writes y as the left operand of a product over all channels, and returns the rates that its rows still lack: an
// RMSNorm's are on their way meanwhile. Behind it all threads have passed a barrier.
template <bool kLayerNorm>
__device__ __forceinline__ Two normalise(const EncoderCall& call, const Gains<8>& gains, const float (&h)[32],
                                         const Place& at, Shared& s) {
  float y[32];
  centre<kLayerNorm>(h, at, s, y);
  Two rates = {1.0f, 1.0f};
  if (kLayerNorm) {
    __syncthreads();
    rates = take_rates(call, at, s);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 gain = gains.gain[j], bias = gains.bias[j];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float rate = r == 0 ? rates.low : rates.high;
      const std::uint32_t two =
          pack(y[4 * j + 2 * r] * rate * gain.x + bias.x, y[4 * j + 2 * r + 1] * rate * gain.y + bias.y);
      *reinterpret_cast<std::uint32_t*>(&s.x[at.columns][in_panel(at.row + 8 * r, 8 * j + 2 * at.quad)]) = two;
    }
  }
  stores_before_products();
  __syncthreads();
  return kLayerNorm ? Two{1.0f, 1.0f} : take_rates(call, at, s);
}

// Cosine and sine of a head's pairs 4 j + quad for rows `row` and `row + 8`.
struct Turns {
  float2 turn[2][4];  // cosine, sine
};

__device__ __forceinline__ Turns load_turns(const EncoderCall& call, const Place& at) {
  Turns turns;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int where = min(kFrame - 1 - at.row - 8 * r, call.longest - 1) * 16 + at.quad;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      turns.turn[r][j] = {1.0f, 0.0f};
      if (call.rotary) turns.turn[r][j] = {__ldg(call.cos + where + 4 * j), __ldg(call.sin + where + 4 * j)};
    }
  }
  return turns;
}

// Keys or queries of a head: pair j of row `row` + 8 r, with its rate and turned.
__device__ __forceinline__ std::uint32_t turned(const float* c, float rate, float2 turn) {
  const float first = c[0] * rate, second = c[1] * rate;
  return pack(first * turn.x - second * turn.y, first * turn.y + second * turn.x);
}

// Projects the normalised rows to this warpgroup's head: queries as left operands, keys and values to shared memory.
__device__ __forceinline__ void project(const Turns& turns, Two rates, std::uint32_t weights, const Place& at, Shared& s,
                                        uint4 (&queries)[2]) {
  float c[48];
  multiply_panels<2>(c, operand(shared_address(s.x)), kPanel, operand(weights + 2 * kHeadPanel * at.columns), kHeadPanel);
  std::uint32_t q[2][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float rate = r == 0 ? rates.low : rates.high;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      q[r][j] = turned(&c[4 * j + 2 * r], rate, turns.turn[r][j]);
      *reinterpret_cast<std::uint32_t*>(
          &s.keys[in_panel(at.row + 8 * r, 32 * at.columns + 8 * j + 2 * at.quad)]) =
          turned(&c[16 + 4 * j + 2 * r], rate, turns.turn[r][j]);
    }
  }
#pragma unroll
  for (int t = 0; t < 2; ++t) queries[t] = {q[0][2 * t], q[1][2 * t], q[0][2 * t + 1], q[1][2 * t + 1]};
  const int lane = 4 * at.group + at.quad;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    uint4 v;
    v.x = pack(c[32 + 4 * j] * rates.low, c[33 + 4 * j] * rates.low);
    v.y = pack(c[34 + 4 * j] * rates.high, c[35 + 4 * j] * rates.high);
    v.z = pack(c[36 + 4 * j] * rates.low, c[37 + 4 * j] * rates.low);
    v.w = pack(c[38 + 4 * j] * rates.high, c[39 + 4 * j] * rates.high);
    const int channel = 32 * at.columns + 8 * (j + lane / 16) + lane % 8;
    const int items = at.row - at.group + lane / 8 % 2 * 8;
    store_transposed(shared_address(&s.values[in_panel(channel, items)]), v);
  }
}

// For each of a thread's keys 8 j + 2 quad + e, whether there is one: bit 2 j + e.
__device__ __forceinline__ std::uint32_t own_keys(std::uint64_t present, const Place& at) {
  std::uint32_t keys = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int row = 8 * (i / 2) + 2 * at.quad + i % 2;
    keys |= static_cast<std::uint32_t>(present >> (kFrame - 1 - row) & 1) << i;
  }
  return keys;
}

// One head's attention of all rows.
__device__ __forceinline__ void attend(const EncoderCall& call, std::uint32_t keys, const uint4 (&queries)[2], bool all,
                                       const Place& at, Shared& s) {
  float c[32];
  begin_products();
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    product(c, queries[t], further(operand(shared_address(s.keys) + 64 * at.columns), 32 * t), t > 0);
  }
  end_products();
  Two sum = {0.0f, 0.0f};
  uint4 weights[4] = {};
  if (all || at.newest) {
    Two top = {kMasked / 2, kMasked / 2};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int key = 8 * (i / 4) + 2 * at.quad + i % 2, r = i / 2 % 2;
      const bool allowed = (keys >> (i / 4 * 2 + i % 2) & 1) && (!call.causal || key <= at.row + 8 * r);
      c[i] = allowed ? c[i] : kMasked;
      top[r] = fmaxf(top[r], c[i]);
    }
    quad_tops(top);
    top.low *= kScale, top.high *= kScale;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      c[i] = exp2_fast(c[i] * kScale - top[i / 2 % 2]);
      sum[i / 2 % 2] += c[i];
    }
    sum = quad_totals(sum);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      weights[t] = {pack(c[8 * t], c[8 * t + 1]), pack(c[8 * t + 2], c[8 * t + 3]), pack(c[8 * t + 4], c[8 * t + 5]),
                    pack(c[8 * t + 6], c[8 * t + 7])};
    }
  }
  float o[16];
  begin_products();
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    product(o, weights[t], further(operand(shared_address(s.values) + 32 * kPanelRow * at.columns), 32 * t), t > 0);
  }
  end_products();
  if (!all && !at.newest) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float rate = 1.0f / fmaxf(sum[r], 0.5f);  // a row without any key has sum 0
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *reinterpret_cast<std::uint32_t*>(
          &s.attended[in_panel(at.row + 8 * r, 32 * at.columns + 8 * j + 2 * at.quad)]) =
          pack(o[4 * j + 2 * r] * rate, o[4 * j + 2 * r + 1] * rate);
    }
  }
}

// This half's share of the output: kPanels panels of rows times those of weights, for this warpgroup's 64 columns. It is
// added to the residual and sent to the other half.
template <int kPanels>
__device__ __forceinline__ void share(std::uint32_t rows, std::uint32_t weights, bool all, const Place& at,
                                      float (&h)[32], uint4 (&there)[4][kThreads], std::uint64_t* barrier, int partner) {
  float c[32];
  multiply_panels<kPanels>(c, operand(rows), kPanel, operand(weights + kPanel * at.columns), kFedPanel);
  if (!all && !at.newest) return;
  const std::uint32_t counted = in_block(shared_address(barrier), partner);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    store_remote(in_block(shared_address(&there[i][threadIdx.x]), partner), packed(c + 8 * i), counted);
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) h[i] += c[i];
}

// Adds what the other half has sent to the residual, which has this half's.
__device__ __forceinline__ void add_share(float (&h)[32], const uint4 (&sent)[4][kThreads]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) add_packed(h + 8 * i, sent[i][threadIdx.x]);
}

// The hidden units of this warpgroup, half of the block's.
__device__ __forceinline__ void feed(std::uint32_t weights, Two rates, bool all, const Place& at, Shared& s) {
  float c[64];
  multiply_panels<2>(c, operand(shared_address(s.x)), kPanel, operand(weights + 128 * kPanelRow * at.columns), kFeedPanel);
  if (!all && !at.newest) return;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float rate = r == 0 ? rates.low : rates.high, *v = &c[4 * j + 2 * r];
      *reinterpret_cast<std::uint32_t*>(
          &s.hidden[2 * at.columns + j / 8][in_panel(at.row + 8 * r, j % 8 * 8 + 2 * at.quad)]) =
          pack(half_gelu(v[0] * rate), half_gelu(v[1] * rate));
    }
  }
}

// A thread has a portion of the weights brought.
__device__ __forceinline__ void bring(const EncoderCall& call, int half, int portion, Shared& s) {
  constexpr int kPieces = 4;
  std::uint64_t* barrier = &s.weights_here[portion % 2];
  const auto* from = static_cast<const unsigned char*>(call.weights) +
                     (static_cast<std::int64_t>(portion / 3) * 6 + 3 * half + portion % 3) * kPortion;
  barrier_expect(barrier, kPortion);
  for (int i = 0; i < kPieces; ++i) {
    constexpr std::uint32_t kPiece = kPortion / kPieces;
    copy_in(s.weights[portion % 2] + i * kPiece, from + i * kPiece, kPiece, barrier);
  }
}

// The rows of a history to the residual of all threads.
__device__ __forceinline__ void input(const EncoderCall& call, const History& history, const Place& at, Shared& s,
                                      float (&h)[32]) {
  constexpr int kEach = kFrame / (kThreads / 32);
  const int lane = 4 * at.group + at.quad, first = threadIdx.x / 32 * kEach;
  int ages[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) ages[i] = kFrame - 1 - first - i;
  float v[kEach][4];
  embed(call, history, ages, lane, v);
#pragma unroll
  for (int i = 0; i < kEach; ++i) s.input[first + i][lane ^ i] = {v[i][0], v[i][1], v[i][2], v[i][3]};
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int row = at.row + i % 2 * 8, four = 16 * at.columns + 2 * (i / 2) + at.quad / 2;
    const float2 two = reinterpret_cast<const float2*>(&s.input[row][four ^ at.group])[at.quad % 2];
    h[2 * i] = two.x, h[2 * i + 1] = two.y;
  }
}

// A thread's sixteen channels of the newest row.
__device__ __forceinline__ void store_newest(const EncoderCall& call, const float (&y)[32], int user, const Place& at) {
  auto* row = static_cast<std::uint32_t*>(call.out) + static_cast<std::int64_t>(user) * (kChannels / 2);
#pragma unroll
  for (int j = 0; j < 8; ++j) row[32 * at.columns + 4 * j + at.quad] = pack(y[4 * j + 2], y[4 * j + 3]);
}

template <bool kLayerNorm>
__device__ __forceinline__ void encode_history(const EncoderCall& call) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int half = cluster_rank(), user = blockIdx.x / 2, thread = threadIdx.x, lane = thread % 32;
  const int warp = thread / 32;
  const Place at{lane / 4, lane % 4, warp / 4, 16 * (warp % 4) + lane / 4, warp % 4 == 3};
  const bool stores = half == 0 && at.newest && at.group == 7;
  const History history = find(call, user, lane);
  if (history.present == 0) {
    const float zeros[32] = {};
    if (stores) store_newest(call, zeros, user, at);
    return;
  }
  const int portions = 3 * call.blocks;
  if (thread == 0) {
    for (std::uint64_t& barrier : s.weights_here) barrier_init(&barrier);
    barrier_init(&s.attended_here);
    barrier_init(&s.fed_here);
    barrier_init_fence();
    for (int portion = 0; portion < 2; ++portion) bring(call, half, portion, s);
    barrier_expect(&s.attended_here, call.blocks == 1 ? kShareBytes / 4 : kShareBytes);
    barrier_expect(&s.fed_here, call.blocks == 1 ? kShareBytes / 4 : kShareBytes);
  }
  __syncwarp();
  cluster_arrive();
  const Turns turns = load_turns(call, at);
  const int pair = 32 * at.columns + at.quad;
  Gains<8> gains = load_gains<kLayerNorm, 8>(call, 0, pair);
  const std::uint32_t keys = own_keys(history.present, at);
  float h[32];
  input(call, history, at, s, h);
  cluster_wait();

  for (int block = 0, portion = 0; block < call.blocks; ++block) {
    // The last transformer block answers for the newest item alone: of the other rows it needs keys and values.
    const bool all = block + 1 < call.blocks;
    const std::uint32_t next_share = block + 2 < call.blocks ? kShareBytes : kShareBytes / 4;
    const auto weights_of = [&](int number) {
      barrier_wait(&s.weights_here[number % 2], number / 2 % 2);
      return shared_address(s.weights[number % 2]);
    };
    const auto products_done = [&](int number) {  // by all threads: others may take the place of its weights
      if (thread == 0 && number + 2 < portions) bring(call, half, number + 2, s);
    };
    if (block > 0) {
      barrier_wait(&s.fed_here, (block - 1) % 2);
      add_share(h, s.fed_share);
      if (thread == 0) barrier_expect(&s.fed_here, all ? kShareBytes : kShareBytes / 4);
    }
    Two rates = normalise<kLayerNorm>(call, gains, h, at, s);
    if (block > 0) products_done(portion - 1);
    gains = load_gains<kLayerNorm, 8>(call, 2 * block + 1, pair);
    const std::uint32_t first = weights_of(portion);
    uint4 queries[2];
    project(turns, rates, first, at, s, queries);
    stores_before_products();
    warpgroup_sync(at.columns);
    attend(call, keys, queries, all, at, s);
    stores_before_products();
    __syncthreads();
    share<1>(shared_address(s.attended), first + kOut, all, at, h, s.attended_share, &s.attended_here, half ^ 1);

    barrier_wait(&s.attended_here, block % 2);
    add_share(h, s.attended_share);
    if (thread == 0 && all) barrier_expect(&s.attended_here, next_share);
    rates = normalise<kLayerNorm>(call, gains, h, at, s);
    products_done(portion);
    gains = load_gains<kLayerNorm, 8>(call, 2 * block + 2, pair);
    feed(weights_of(portion + 1), rates, all, at, s);
    stores_before_products();
    __syncthreads();
    products_done(portion + 1);
    share<4>(shared_address(s.hidden), weights_of(portion + 2), all, at, h, s.fed_share, &s.fed_here, half ^ 1);
    portion += 3;
  }
  barrier_wait(&s.fed_here, (call.blocks - 1) % 2);
  add_share(h, s.fed_share);
  float y[32];
  centre<kLayerNorm>(h, at, s, y);
  __syncthreads();
  const Two rates = take_rates(call, at, s);
  scale_rows(gains, rates.low, rates.high, y);
  if (stores) store_newest(call, y, user, at);
}

template <bool kLayerNorm>
__global__ void __launch_bounds__(kThreads, 1) encode_kernel(const __grid_constant__ EncoderCall call) {
  next_may_start();
  await_previous();
  encode_history<kLayerNorm>(call);
}

}  // namespace
}  // namespace fave_fast

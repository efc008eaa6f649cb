#pragma once

// What the encoders' kernels have in common: which items a history has, their rows, and a few numbers.

#include <cstdint>

#include "gpu_encoders.hpp"
#include "hopper.cuh"
#include "numbers.cuh"

namespace fave_fast {
namespace {

constexpr int kChannels = 128;
constexpr int kFrame = 64;  // rows of a history, its newest item in the last
constexpr std::uint32_t kPanel = kFrame * kPanelRow;  // bytes of its 64 rows
constexpr float kMasked = -1e30f;
constexpr float kScale = 0.17677669529663687f * 1.4426950408889634f;  // 32^-0.5 log2(e)

struct History {
  std::int64_t end;       // row behind the newest item
  std::uint64_t present;  // bit a: there is an item of age a
};

__device__ __forceinline__ std::uint64_t first_bits(std::int64_t count) {
  return count <= 0 ? 0 : count >= kFrame ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

__device__ __forceinline__ History find(const EncoderCall& call, int user, int lane) {
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

// Of rows `row` and `row + 8`.
struct Two {
  float low, high;

  __device__ __forceinline__ float& operator[](int upper) { return upper ? high : low; }
};

// Totals, and the greatest, of two rows over the four lanes that have a product's columns of them.
__device__ __forceinline__ Two quad_totals(Two parts) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask <<= 1) {
    parts.low += __shfl_xor_sync(0xffffffffu, parts.low, mask);
    parts.high += __shfl_xor_sync(0xffffffffu, parts.high, mask);
  }
  return parts;
}

__device__ __forceinline__ void quad_tops(Two& parts) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask <<= 1) {
    parts.low = fmaxf(parts.low, __shfl_xor_sync(0xffffffffu, parts.low, mask));
    parts.high = fmaxf(parts.high, __shfl_xor_sync(0xffffffffu, parts.high, mask));
  }
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

// A norm's factor of a row, four channels a lane, from which its mean is taken with kCentre.
template <bool kCentre>
__device__ __forceinline__ float row_rate(float (&v)[4], float eps) {
  if (kCentre) {
    const float mean = warp_total(v[0] + v[1] + v[2] + v[3]) * (1.0f / kChannels);
#pragma unroll
    for (float& one : v) one -= mean;
  }
  const float square = warp_total(v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3]) * (1.0f / kChannels);
  return rsqrtf(square + eps);
}

// E of eq. (9) of rows of the ages given, of a history that has items, four channels a lane: LayerNorm(e) + shift[age]
// (+ scale[age] times the anchor's embedding), zeros where no item is. Rows go side by side, since each waits for its
// item, then for that item's row.
template <int kCount>
__device__ __forceinline__ void embed(const EncoderCall& call, const History& history, const int (&ages)[kCount],
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
    std::int64_t anchor_item = 0;
    if (call.scale != nullptr) {
      const int items = __popcll(history.present);
      const int oldest_first = min(static_cast<int>(call.anchor * static_cast<float>(items)), items - 1);
      anchor_item = whole_number(call.rows, call.wide_rows, history.end - items + oldest_first);
    }
    const float4 gain = __ldg(reinterpret_cast<const float4*>(call.input_norm) + lane);
    const float4 bias = __ldg(reinterpret_cast<const float4*>(call.input_norm) + kChannels / 4 + lane);
    float4 shift[kCount], scale[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int known = min(ages[i], call.longest - 1) * (kChannels / 4) + lane;
      shift[i] = __ldg(reinterpret_cast<const float4*>(call.shift) + known);
      scale[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (call.scale != nullptr) scale[i] = __ldg(reinterpret_cast<const float4*>(call.scale) + known);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) bf16_row(call.table, source[i], lane, v[i]);
    float anchor[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (call.scale != nullptr) bf16_row(call.table, anchor_item, lane, anchor);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float rate = row_rate<true>(v[i], call.input_eps);
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

// Of a norm: a thread's pairs of channels, every fourth from pair `first` on. Loaded a phase before they are used.
template <int kPairs>
struct Gains {
  float2 gain[kPairs], bias[kPairs];
};

template <bool kLayerNorm, int kPairs>
__device__ __forceinline__ Gains<kPairs> load_gains(const EncoderCall& call, int norm, int first) {
  const float2* gains = reinterpret_cast<const float2*>(call.norms + static_cast<std::int64_t>(norm) * 2 * kChannels);
  Gains<kPairs> loaded;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    loaded.gain[j] = __ldg(gains + first + 4 * j);
    loaded.bias[j] = {0.0f, 0.0f};
    if (kLayerNorm) loaded.bias[j] = __ldg(gains + kChannels / 2 + first + 4 * j);
  }
  return loaded;
}

// The end of a norm: y[4 j + e] is row e / 2 of two, whose factors are `low` and `high`, and channel e % 2 of pair j.
template <int kPairs>
__device__ __forceinline__ void scale_rows(const Gains<kPairs>& gains, float low, float high, float (&y)[4 * kPairs]) {
#pragma unroll
  for (int i = 0; i < 4 * kPairs; ++i) {
    const float2 gain = gains.gain[i / 4], bias = gains.bias[i / 4];
    y[i] = y[i] * (i & 2 ? high : low) * (i & 1 ? gain.y : gain.x) + (i & 1 ? bias.y : bias.x);
  }
}

// Eight floats as bf16, and added to eight: what one half sends of its share, and what the other does with it.
__device__ __forceinline__ uint4 packed(const float* c) {
  return {pack(c[0], c[1]), pack(c[2], c[3]), pack(c[4], c[5]), pack(c[6], c[7])};
}

__device__ __forceinline__ void add_packed(float* h, uint4 sent) {
  const std::uint32_t two[4] = {sent.x, sent.y, sent.z, sent.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    h[2 * i] += low_half(two[i]);
    h[2 * i + 1] += high_half(two[i]);
  }
}

// c = rows times weights, by a warpgroup; operands of kPanels panels each, which lie `rows_apart` and `apart`.
template <int kPanels, int kCount>
__device__ __forceinline__ void multiply_panels(float (&c)[kCount], std::uint32_t rows, std::uint32_t rows_apart,
                                                std::uint32_t weights, std::uint32_t apart) {
  begin_products();
#pragma unroll
  for (int k = 0; k < 4 * kPanels; ++k) {
    const std::uint32_t within = k % 4 * 32;
    product(c, further(rows, k / 4 * rows_apart + within), further(weights, k / 4 * apart + within), k > 0);
  }
  end_products();
}

// gelu(4 y) / 2: _half_gelu of kernels/encoder.py.
__device__ __forceinline__ float half_gelu(float y) {
  const float square = __saturatef(y * y);
  return y + y * tanh_fast(y * (3.189956496f + square * (2.3675455104f + square * -0.356818897f)));
}

}  // namespace
}  // namespace fave_fast

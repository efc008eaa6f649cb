#pragma once

// csrc/hopper.cuh on a CPU: every thread of a cluster is a coroutine, and what the threads of a warp or a block do
// together waits until all of them are there. An asynchronous copy is done at once.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  std::uint32_t x, y;
};
struct uint4 {
  std::uint32_t x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  int x;
};

using std::max;
using std::min;

namespace emulation {

constexpr std::size_t kAligned = 1024;  // shared memory

struct Meeting {  // of `size` threads, again and again
  int size = 0, here = 0, turn = 0;
};

struct Warp {
  Meeting meeting;
  std::uint32_t words[32];
  const void* rows[32];
  uint4 a[32];
  std::uint32_t b[2][32];
};

struct Block {
  std::vector<unsigned char> bytes;
  Meeting meeting;
  std::vector<Meeting> warpgroups;
  Meeting some;
  std::vector<Warp> warps;

  unsigned char* memory() {
    void* start = bytes.data();
    std::size_t room = bytes.size();
    return static_cast<unsigned char*>(std::align(kAligned, bytes.size() - kAligned, start, room));
  }
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  int block, number;
  bool done;
};

struct Barrier {  // in the 64 bits of an mbarrier that expects one arrival
  std::int32_t bytes;
  std::uint16_t arrivals, phase;
};
static_assert(sizeof(Barrier) == 8);

inline std::vector<Block> blocks;
inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline int arrived_at_cluster = 0;

inline void yield() { swapcontext(&current->context, &scheduler); }
inline Block& block() { return blocks[current->block]; }
inline Warp& warp() { return block().warps[current->number / 32]; }
inline int lane() { return current->number % 32; }

inline void meet(Meeting& meeting) {
  const int turn = meeting.turn;
  if (++meeting.here == meeting.size) {
    meeting.here = 0;
    ++meeting.turn;
  }
  while (meeting.turn == turn) yield();
}

template <typename T>
T exchange(T mine, int from) {
  Warp& here = warp();
  std::memcpy(&here.words[lane()], &mine, 4);
  meet(here.meeting);
  T theirs;
  std::memcpy(&theirs, &here.words[from], 4);
  meet(here.meeting);
  return theirs;
}

inline float bf16(std::uint32_t pair, bool high) {
  const std::uint32_t bits = high ? pair & 0xffff0000u : pair << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline std::uint32_t rounded(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline void change(void* word, std::int32_t bytes, int arrivals) {
  Barrier barrier;
  std::memcpy(&barrier, word, 8);
  barrier.bytes += bytes;
  barrier.arrivals -= arrivals;
  if (barrier.arrivals == 0 && barrier.bytes == 0) {
    barrier.arrivals = 1;
    barrier.phase ^= 1;
  }
  std::memcpy(word, &barrier, 8);
}

inline unsigned char* at(std::uint32_t address) {  // of another block
  return blocks.at(address >> 20).memory() + (address & 0xfffff);
}

}  // namespace emulation

inline Index threadIdx, blockIdx, gridDim;

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline void __syncwarp() { emulation::meet(emulation::warp().meeting); }
inline void __syncthreads() { emulation::meet(emulation::block().meeting); }
template <typename T>
T __shfl_sync(unsigned, T v, int from) {
  return emulation::exchange(v, from);
}
inline float __shfl_xor_sync(unsigned, float v, int mask) { return emulation::exchange(v, emulation::lane() ^ mask); }
inline unsigned __ballot_sync(unsigned, bool v) {
  unsigned all = 0;
  for (int i = 0; i < 32; ++i) all |= emulation::exchange<std::uint32_t>(v, i) << i;
  return all;
}
inline int __clzll(std::uint64_t v) { return v == 0 ? 64 : __builtin_clzll(v); }
inline std::uint64_t __brevll(std::uint64_t v) {
  std::uint64_t reversed = 0;
  for (int i = 0; i < 64; ++i) reversed |= (v >> i & 1) << (63 - i);
  return reversed;
}
inline int __popcll(std::uint64_t v) { return __builtin_popcountll(v); }
inline float __saturatef(float v) { return v < 0.0f ? 0.0f : v > 1.0f ? 1.0f : v; }
inline int __float_as_int(float v) {
  int bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

namespace fave_fast {

inline unsigned char* shared_memory() { return emulation::block().memory(); }

inline std::uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - shared_memory();
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(emulation::block().bytes.size())) std::abort();
  return static_cast<std::uint32_t>(offset);
}

inline void next_may_start() {}
inline void await_previous() {}
inline int cluster_rank() { return emulation::current->block; }
inline int cluster_size() { return static_cast<int>(emulation::blocks.size()); }
inline void cluster_arrive() { ++emulation::arrived_at_cluster; }
inline void cluster_wait() {
  while (emulation::arrived_at_cluster < cluster_size() * emulation::block().meeting.size) emulation::yield();
}
inline std::uint32_t in_block(std::uint32_t address, int rank) {
  return static_cast<std::uint32_t>(rank) << 20 | address;
}

inline unsigned anew(unsigned number) { return number; }
inline std::uint32_t count_up(std::uint32_t* counter) { return ++*counter; }

inline void barrier_init(std::uint64_t* barrier) {
  const emulation::Barrier fresh{0, 1, 0};
  std::memcpy(barrier, &fresh, 8);
}
inline void barrier_init_fence() {}
inline void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  emulation::change(barrier, static_cast<std::int32_t>(bytes), 1);
}
inline void barrier_wait(std::uint64_t* barrier, int parity) {
  emulation::Barrier now;
  while (std::memcpy(&now, barrier, 8), now.phase == parity) emulation::yield();
}
inline void store_remote(std::uint32_t address, uint4 v, std::uint32_t barrier) {
  std::memcpy(emulation::at(address), &v, 16);
  emulation::change(emulation::at(barrier), -16, 0);
}
inline void copy_in(void* there, const void* source, std::uint32_t bytes, std::uint64_t* barrier) {
  std::memcpy(there, source, bytes);
  emulation::change(barrier, -static_cast<std::int32_t>(bytes), 0);
}

inline uint4 load_matrices(const void* row) {
  emulation::Warp& warp = emulation::warp();
  const int lane = emulation::lane();
  warp.rows[lane] = row;
  emulation::meet(warp.meeting);
  std::uint32_t v[4];
  for (int m = 0; m < 4; ++m) {
    std::memcpy(&v[m], static_cast<const unsigned char*>(warp.rows[8 * m + lane / 4]) + 4 * (lane % 4), 4);
  }
  emulation::meet(warp.meeting);
  return {v[0], v[1], v[2], v[3]};
}

inline void multiply(float (&c)[4], uint4 a, std::uint32_t b0, std::uint32_t b1) {
  emulation::Warp& warp = emulation::warp();
  const int lane = emulation::lane();
  warp.a[lane] = a, warp.b[0][lane] = b0, warp.b[1][lane] = b1;
  emulation::meet(warp.meeting);
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    double sum = 0.0;
    for (int k = 0; k < 16; ++k) {
      const uint4 left = warp.a[row % 8 * 4 + k % 8 / 2];
      const std::uint32_t pair = k < 8 ? (row < 8 ? left.x : left.y) : (row < 8 ? left.z : left.w);
      sum += static_cast<double>(emulation::bf16(pair, k % 2)) *
             emulation::bf16(warp.b[k / 8][4 * column + k % 8 / 2], k % 2);
    }
    c[e] += static_cast<float>(sum);
  }
  emulation::meet(warp.meeting);
}

constexpr std::uint32_t kPanelRow = 128;

inline std::uint32_t in_panel(unsigned row, unsigned channel) {
  return row * kPanelRow + ((channel / 8 ^ row % 8) * 16 + channel % 8 * 2);
}

inline void stores_before_products() {}
inline void warpgroup_sync(int which) { emulation::meet(emulation::block().warpgroups.at(which)); }

inline void block_sync(unsigned threads) {
  emulation::block().some.size = static_cast<int>(threads);
  emulation::meet(emulation::block().some);
}

inline void store_transposed(std::uint32_t row, uint4 v) {
  emulation::Warp& warp = emulation::warp();
  const int lane = emulation::lane();
  warp.words[lane] = row, warp.a[lane] = v;
  emulation::meet(warp.meeting);
  for (int m = 0; m < 4; ++m) {  // a lane writes elements 2 (lane % 4) and the next of row lane / 4
    unsigned char* there = shared_memory() + warp.words[8 * m + lane / 4];
    for (int e = 0; e < 2; ++e) {
      const int from = 4 * (2 * (lane % 4) + e) + lane / 4 / 2;
      const uint4 theirs = warp.a[from];
      const std::uint32_t pair = m == 0 ? theirs.x : m == 1 ? theirs.y : m == 2 ? theirs.z : theirs.w;
      const auto value = static_cast<std::uint16_t>(lane / 4 % 2 ? pair >> 16 : pair);
      std::memcpy(there + 2 * (2 * (lane % 4) + e), &value, 2);
    }
  }
  emulation::meet(warp.meeting);
}

inline std::uint32_t operand(std::uint32_t address) { return address; }
inline std::uint32_t further(std::uint32_t operand, std::uint32_t bytes) { return operand + bytes; }
inline void begin_products() {}
inline void end_products() {}

inline float of_operand(std::uint32_t operand, int row, int k) {
  const auto lies = operand + row * kPanelRow + 2 * k;
  std::uint16_t value;
  std::memcpy(&value, shared_memory() + (lies ^ (lies >> 7 & 7) << 4), 2);
  return emulation::bf16(value, false);
}

template <int kCount, typename Left>
void product_of(float (&c)[kCount], Left left, std::uint32_t b, bool add) {
  const int lane = emulation::lane();
  for (int i = 0; i < kCount; ++i) {
    const int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    double sum = 0.0;
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(left(row, k)) * of_operand(b, column, k);
    c[i] = (add ? c[i] : 0.0f) + static_cast<float>(sum);
  }
}

template <int kCount>
void product(float (&c)[kCount], std::uint32_t a, std::uint32_t b, bool add) {
  const int first = emulation::current->number / 32 % 4 * 16;
  product_of(c, [=](int row, int k) { return of_operand(a, first + row, k); }, b, add);
}

template <int kCount>
void product(float (&c)[kCount], uint4 a, std::uint32_t b, bool add) {
  emulation::Warp& warp = emulation::warp();
  warp.a[emulation::lane()] = a;
  emulation::meet(warp.meeting);
  product_of(
      c,
      [&](int row, int k) {
        const uint4 v = warp.a[row % 8 * 4 + k % 8 / 2];
        return emulation::bf16(k < 8 ? (row < 8 ? v.x : v.y) : (row < 8 ? v.z : v.w), k % 2);
      },
      b, add);
  emulation::meet(warp.meeting);
}

inline std::uint32_t pack(float low, float high) { return emulation::rounded(low) | emulation::rounded(high) << 16; }
inline float low_half(std::uint32_t v) { return emulation::bf16(v, false); }
inline float high_half(std::uint32_t v) { return emulation::bf16(v, true); }
inline float tanh_fast(float x) { return std::tanh(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace fave_fast

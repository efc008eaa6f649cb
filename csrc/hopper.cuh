#pragma once

#include <cstdint>

// Instructions of compute capability 9.0 that CUDA C++ has no words for. Addresses are of shared memory, 32 bits, as
// the instructions take them.

namespace fave_fast {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// The next kernel of the stream may start, if it was launched so, as soon as all blocks of this one have.
__device__ __forceinline__ void next_may_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the kernel before this one, beside which it may have started, has ended and its writes are visible.
__device__ __forceinline__ void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The same number, of which the compiler does not know so: what is computed from it is computed there, and not kept in
// registers from before a loop.
__device__ __forceinline__ unsigned anew(unsigned number) {
  asm volatile("" : "+r"(number));
  return number;
}

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ int cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_size() {
  std::uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// Relaxed: barrier_init_fence has released what the others must see (a release here is a fence of the whole device).
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ std::uint32_t in_block(std::uint32_t address, int rank) {
  std::uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Makes the initialised barriers known to the cluster; cluster_arrive follows.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The barrier's phase ends when `bytes` have been written to this block.
__device__ __forceinline__ void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Acquires for this block: what has come is in its shared memory. (Acquiring for the cluster would drop the L1 cache.)
__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Writes 16 bytes to another block and counts them at its barrier; both addresses come from in_block.
__device__ __forceinline__ void store_remote(std::uint32_t address, uint4 v, std::uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}

// Starts a copy of `bytes` from device memory to this block, counted at `barrier`.
__device__ __forceinline__ void copy_in(void* there, const void* source, std::uint32_t bytes, std::uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(there)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Adds one to a counter in this block's shared memory and returns what it has become.
__device__ __forceinline__ std::uint32_t count_up(std::uint32_t* counter) {
  std::uint32_t before;
  asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "r"(shared_address(counter))
               : "memory");
  return before + 1;
}

// Four 8 x 8 matrices of 16 bits: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ uint4 load_matrices(const void* row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(row))
               : "memory");
  return v;
}

// c += a b for a [16, 16] and b [16, 8] in bf16, in the layout of mma.m16n8k16.
__device__ __forceinline__ void multiply(float (&c)[4], uint4 a, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// What follows is called by a warpgroup, four warps, together. It multiplies what lies in panels: rows of 64 channels in
// bf16, 128 bytes, from a multiple of 1,024 on. Of row r the 16 bytes c lie at c ^ r % 8, so that neither the tensor
// cores nor a warp's stores meet in a bank.
constexpr std::uint32_t kPanelRow = 128;

__device__ __forceinline__ std::uint32_t in_panel(unsigned row, unsigned channel) {
  return row * kPanelRow + ((channel / 8 ^ row % 8) * 16 + channel % 8 * 2);
}

// What is behind it in program order and reads shared memory by the tensor cores or the copy engine sees this thread's
// stores, once a barrier has told its threads.
__device__ __forceinline__ void stores_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for the other threads of this warpgroup, the block's number `which`.
__device__ __forceinline__ void warpgroup_sync(int which) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + which) : "memory");
}

// Waits for as many threads of the block, whole warps, as `threads`; the others have ended.
__device__ __forceinline__ void block_sync(unsigned threads) {
  asm volatile("bar.sync 15, %0;" ::"r"(threads) : "memory");
}

// Four 8 x 8 matrices of 16 bits, of which a lane has the pair (row lane / 4, columns 2 (lane % 4) and the next), are
// written transposed: lane i gives the address of what becomes row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(std::uint32_t row, uint4 v) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Sixteen channels of a panel's rows as an operand; `address` is that of the first row's first of them. These are the low
// bits of the instruction's descriptor; an operand some bytes further on has that many sixteenths more.
__device__ __forceinline__ std::uint32_t operand(std::uint32_t address) {
  return (address >> 4 & 0x3fff) | 1u << 16;
}

__device__ __forceinline__ std::uint32_t further(std::uint32_t operand, std::uint32_t bytes) {
  return operand + (bytes >> 4);
}

// Products of a warpgroup are begun between these two; their operands and results are not to be touched before the second
// has returned.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define FAVE_FAST_8(c, i)                                                                                      \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])

// Rows of a panel are 1,024 bytes apart by eights and swizzled: the upper half of a descriptor.
#define FAVE_FAST_OPERAND(name, i) "  .reg .b64 " #name ";\nmov.b64 " #name ", {%" #i ", 0x40000040};\n"
#define FAVE_FAST_ADD(i) "{\n.reg .pred add;\nsetp.ne.b32 add, %" #i ", 0;\n"

// c = a b^T (+ c with `add`) for 16 channels of a [64, 16], rows of the warpgroup's or, as uint4, 16 of each warp's in
// the layout of mma.m16n8k16, and of b [N, 16]. c[4 j + e] is row 16 warp + lane / 4 + 8 (e / 2), column
// 8 j + 2 (lane % 4) + e % 2.
__device__ __forceinline__ void product(float (&c)[32], std::uint32_t a, std::uint32_t b, bool add) {
  asm volatile(
      FAVE_FAST_ADD(34) FAVE_FAST_OPERAND(a, 32) FAVE_FAST_OPERAND(b, 33)
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "a, b, add, 1, 1, 0, 0;\n}"
      : FAVE_FAST_8(c, 0), FAVE_FAST_8(c, 8), FAVE_FAST_8(c, 16), FAVE_FAST_8(c, 24)
      : "r"(a), "r"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void product(float (&c)[16], std::uint32_t a, std::uint32_t b, bool add) {
  asm volatile(
      FAVE_FAST_ADD(18) FAVE_FAST_OPERAND(a, 16) FAVE_FAST_OPERAND(b, 17)
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "a, b, add, 1, 1, 0, 0;\n}"
      : FAVE_FAST_8(c, 0), FAVE_FAST_8(c, 8)
      : "r"(a), "r"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void product(float (&c)[48], std::uint32_t a, std::uint32_t b, bool add) {
  asm volatile(
      FAVE_FAST_ADD(50) FAVE_FAST_OPERAND(a, 48) FAVE_FAST_OPERAND(b, 49)
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
      "a, b, add, 1, 1, 0, 0;\n}"
      : FAVE_FAST_8(c, 0), FAVE_FAST_8(c, 8), FAVE_FAST_8(c, 16), FAVE_FAST_8(c, 24),
        FAVE_FAST_8(c, 32), FAVE_FAST_8(c, 40)
      : "r"(a), "r"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void product(float (&c)[64], std::uint32_t a, std::uint32_t b, bool add) {
  asm volatile(
      FAVE_FAST_ADD(66) FAVE_FAST_OPERAND(a, 64) FAVE_FAST_OPERAND(b, 65)
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "a, b, add, 1, 1, 0, 0;\n}"
      : FAVE_FAST_8(c, 0), FAVE_FAST_8(c, 8), FAVE_FAST_8(c, 16), FAVE_FAST_8(c, 24),
        FAVE_FAST_8(c, 32), FAVE_FAST_8(c, 40), FAVE_FAST_8(c, 48), FAVE_FAST_8(c, 56)
      : "r"(a), "r"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void product(float (&c)[16], uint4 a, std::uint32_t b, bool add) {
  asm volatile(
      FAVE_FAST_ADD(21) FAVE_FAST_OPERAND(b, 20)
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, b, add, 1, 1, 0;\n}"
      : FAVE_FAST_8(c, 0), FAVE_FAST_8(c, 8)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void product(float (&c)[32], uint4 a, std::uint32_t b, bool add) {
  asm volatile(
      FAVE_FAST_ADD(37) FAVE_FAST_OPERAND(b, 36)
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, b, add, 1, 1, 0;\n}"
      : FAVE_FAST_8(c, 0), FAVE_FAST_8(c, 8), FAVE_FAST_8(c, 16), FAVE_FAST_8(c, 24)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b), "r"(static_cast<int>(add)));
}

#undef FAVE_FAST_8
#undef FAVE_FAST_OPERAND
#undef FAVE_FAST_ADD

// Two floats as bf16, the first in the low half.
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  std::uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

__device__ __forceinline__ float low_half(std::uint32_t v) { return __uint_as_float(v << 16); }

__device__ __forceinline__ float high_half(std::uint32_t v) { return __uint_as_float(v & 0xffff0000u); }

__device__ __forceinline__ float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {  // to a bit
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fave_fast

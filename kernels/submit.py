"""The first and the last kernel of a request: one reads it from the host's memory, one writes the answer there and then
tells a host that spins on a word of its own memory that the request is done.

A kernel that reads or writes pinned memory costs a request about a microsecond; copy nodes of the graph cost twelve and
more (one H200, host to host: copy, kernel, copy and flag 19 to 25 us, kernel and flag 6 to 7; `bench.submit`).
"""

import triton
import triton.language as tl

BLOCK = 1024  # words that a program carries


@triton.jit
def _carry(source_ptr, target_ptr, n, PDL: tl.constexpr, BLOCK: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + place, tl.load(source_ptr + place, place < n, 0), place < n)


@triton.jit
def _hand_over(source_ptr, target_ptr, n, counts_ptr, flag_ptr, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """Copy to the host's memory; the program that ends last counts one more in counts[0] and writes the count to the
    host's flag. counts[1] counts the programs that have ended.

    Everything that came before on the stream is visible to the host when the count is: a fence of system scope follows
    each thread's copy and stands before the flag's store. (An exchange would need atomics over PCIe.)
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + place, tl.load(source_ptr + place, place < n, 0), place < n)
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; mov.s32 $0, $1;", "=r,r", [place], tl.int32, is_pure=False, pack=1
    )  # fmt: skip
    tl.debug_barrier()
    ended = tl.atomic_add(counts_ptr + 1, 1)
    if ended == tl.num_programs(0) - 1:
        tl.store(counts_ptr + 1, 0)
        count = tl.load(counts_ptr) + 1
        tl.store(counts_ptr, count)
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; st.relaxed.sys.global.s32 [$1], $2; mov.s32 $0, $2;",
            "=r,l,r",
            [flag_ptr.to(tl.int64, bitcast=True), count],
            tl.int32,
            is_pure=False,
            pack=1,
        )


def carry(source, target, *, pdl):
    """Copy int32 `source` in pinned memory to `target` of the same shape on the device."""
    n = source.numel()
    early = {"launch_pdl": True} if pdl else {}
    _carry[(triton.cdiv(n, BLOCK),)](source, target, n, PDL=pdl, BLOCK=BLOCK, num_warps=4, **early)


def hand_over(source, target, counts, flag, *, pdl):
    """Copy int32 `source` on the device to `target` in pinned memory, both [n], then raise the flag.

    `counts` int32 [2] on the device, `flag` int32 [1] in pinned memory.
    """
    n = source.numel()
    early = {"launch_pdl": True} if pdl else {}
    _hand_over[(max(1, triton.cdiv(n, BLOCK)),)](
        source, target, n, counts, flag, PDL=pdl, BLOCK=BLOCK, num_warps=4, **early
    )  # fmt: skip

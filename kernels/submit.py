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
def _fence_of_system(x, FLAG: tl.constexpr, flag):
    """A fence of system scope by the program's first thread, which with FLAG then writes x to the address `flag`.

    By that thread alone: by all of 128 threads, for eight elements each, it took 5 us (H200).
    """
    if FLAG:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first fence.acq_rel.sys;
            @first st.relaxed.sys.global.s32 [$1], $2;
            mov.s32 $0, $2;
            }""",
            "=r,l,r",
            [flag, x],
            tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first fence.acq_rel.sys;
            mov.s32 $0, $1;
            }""",
            "=r,r",
            [x],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _hand_over(
    source_ptr, target_ptr, n, counts_ptr, flag_ptr, PDL: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Copy to the host's memory; the program that ends last counts one more in counts[0] and writes the count to the
    host's flag. counts[1] counts the programs that have ended; a program that is ALONE needs no count of them.

    Everything that came before on the stream is visible to the host when the count is: a barrier and a fence of system
    scope stand behind a program's copies, and one before the flag's store. (An exchange would need atomics over PCIe.)
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + place, tl.load(source_ptr + place, place < n, 0), place < n)
    tl.debug_barrier()
    last = True
    if not ALONE:
        _fence_of_system(0, False, 0)
        last = tl.atomic_add(counts_ptr + 1, 1) == tl.num_programs(0) - 1
    if last:
        tl.store(counts_ptr + 1, 0)
        count = tl.load(counts_ptr) + 1
        tl.store(counts_ptr, count)
        _fence_of_system(count, True, flag_ptr.to(tl.int64, bitcast=True))


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
    programs = max(1, triton.cdiv(n, BLOCK))
    early = {"launch_pdl": True} if pdl else {}
    _hand_over[(programs,)](
        source, target, n, counts, flag, PDL=pdl, ALONE=programs == 1, BLOCK=BLOCK, num_warps=4, **early
    )  # fmt: skip

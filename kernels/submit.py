"""The first and the last kernel of a request: one reads it from the host's memory, one tells a host that spins on a
word of its own memory that the request is done.

A kernel that reads or writes pinned memory costs a request about a microsecond; copy nodes of the graph cost twelve and
more (one H200, host to host: copy, kernel, copy and flag 19 to 25 us, kernel and flag 6 to 7; `bench.submit`).
"""

import triton
import triton.language as tl


@triton.jit
def _raise_flag(counter_ptr, flag_ptr):
    """Count one more in `counter_ptr`, on the device, and write the count to `flag_ptr`, in the host's memory.

    Everything that came before on the stream is visible to the host when the count is: the store follows a fence of
    system scope. (An exchange would need atomics over PCIe.)
    """
    count = tl.load(counter_ptr) + 1
    tl.store(counter_ptr, count)
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; st.relaxed.sys.global.s32 [$1], $2; mov.s32 $0, $2;",
        "=r,l,r",
        [flag_ptr.to(tl.int64, bitcast=True), count],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _carry(source_ptr, target_ptr, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + place, tl.load(source_ptr + place, place < n, 0), place < n)


def carry(source, target):
    """Copy int32 `source` to `target` of the same shape; one of them may be in pinned memory."""
    n = source.numel()
    _carry[(triton.cdiv(n, 1024),)](source, target, n, BLOCK=1024, num_warps=4)


def raise_flag(counter, flag):
    """Launch it: `counter` int32 [1] on the device, `flag` int32 [1] in pinned memory."""
    _raise_flag[(1,)](counter, flag, num_warps=1)

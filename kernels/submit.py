"""The last kernel of a request: it tells a host that spins on a word of its own memory that the request is done."""

import triton
import triton.language as tl


@triton.jit
def _raise_flag(counter_ptr, flag_ptr, PDL: tl.constexpr):
    """Count one more in `counter_ptr`, on the device, and write the count to `flag_ptr`, in the host's memory.

    Everything that came before on the stream is visible to the host when the count is: the store follows a fence of
    system scope. (An exchange would need atomics over PCIe.)
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
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


def raise_flag(counter, flag, *, pdl):
    """Launch it: `counter` int32 [1] on the device, `flag` int32 [1] in pinned memory."""
    _raise_flag[(1,)](counter, flag, PDL=pdl, num_warps=1, **({"launch_pdl": True} if pdl else {}))

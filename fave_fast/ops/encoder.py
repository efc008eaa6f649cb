"""The network from its input E, or from item ids, to the endpoint f of eq. (10), for inference.

Histories are packed (rows of all users end to end, oldest first, and offsets [B + 1]) or padded on the left. The
endpoint is the newest item's state after all blocks and the final norm: `FAVE.encode` on E; on ids, `flow.encode`, the
one step of eq. (25): E = LayerNorm(e) + lambda (x_0 + z) with t = 0 and r = 1, so that z is a constant of the weights
and x_0 = m e_k, or one Gaussian vector, depends on nothing but the history.

A history's result has the same bits in any batch, in any place, packed or padded; in 16 bits under any plan of 64 or
128 rows too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fave_fast.ops import encoder_cluster, encoder_cpu, encoder_hopper, encoder_pair, encoder_tile, native
from fave_fast.ops.attention import rotary_by_age
from fave_fast.ops.registry import Implementation, Op, interpreting, not_interpreted, triton_kernels
from fave_fast.ops.tuning import launches_overlap, tile_shapes
from fave_fast.profiling import ranged

if TYPE_CHECKING:  # what is below imports nothing of what is above it
    from fave_fast.config import FlowConfig
    from fave_fast.flow import InferenceNoise
    from fave_fast.model import FAVE

MAX_ROWS = 128  # the longest history that one program of the kernel holds
MIN_SLOT = 8  # rows of the smallest slot: sums over keys are fixed relative to eight of them
MAX_PLANNED = 4096  # users that one program sorts by length
KERNEL_CHANNELS = (16, 32, 64, 128, 256)


# The kernels of csrc for Hopper GPUs, by backend.
HOPPER = {"cpp": encoder_cluster, "pair": encoder_pair, "tile": encoder_tile}


@dataclass(frozen=True)
class EncoderWeights:
    """A model's blocks as the kernel reads them; `refresh` copies again in place after the model has changed.

    Attributes:
        model: where the weights come from, and what the reference runs.
        matrices: [blocks * (4 D + 2 F), D] in the model's dtype, F the feed-forward's hidden size; the order is that of
            `fave_fast.kernels.encoder`.
        norms: float32 [2 * blocks + 1, 2, D]: gain and bias before attention and feed-forward of each block, and last.
            Those before the feed-forward are a quarter of the model's, and `matrices` has twice its second matrix: the
            kernel's GELU is gelu(4 y) / 2. Powers of two change no bit.
        cos: float32 [max_length, C / 2], row a for age a, C = D / heads; 1 where positions turn nothing.
        sin: likewise.
        packed: the matrices again, as each backend for Hopper GPUs reads them (`HOPPER`); none where these do not take
            the model.
        native: the weights once more, as the cpp backend reads them on a CPU; None where it cannot run.
    """

    model: FAVE
    matrices: Tensor
    norms: Tensor
    cos: Tensor
    sin: Tensor
    packed: dict[str, Tensor]
    native: encoder_cpu.NativeWeights | None

    @classmethod
    @torch.no_grad()
    def pack(cls, model: FAVE) -> EncoderWeights:
        """Copy the blocks of `model` on its device, in its dtype."""
        config = model.config
        device = model.item_embedding.weight.device
        cos, sin = rotary_by_age(config.max_length, config.d // config.heads, device)
        if config.position != "rotary":
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        native_weights = encoder_cpu.NativeWeights.pack(model)
        packed = {}
        if model.item_embedding.weight.dtype == torch.bfloat16 and encoder_hopper.beyond(model) is None:
            packed = {backend: module.pack(model) for backend, module in HOPPER.items()}
        return cls(model, _matrices(model), _norms(model), cos, sin, packed, native_weights)

    @cached_property
    def beyond(self) -> dict[str, str]:
        """Why a model of these sizes is not for a backend's kernel, by backend."""
        return _beyond_kernels(self.model)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights again, into the same memory."""
        self.matrices.copy_(_matrices(self.model))
        self.norms.copy_(_norms(self.model))
        for backend, packed in self.packed.items():
            packed.copy_(HOPPER[backend].pack(self.model))
        if self.native is not None:
            self.native.refresh(self.model)


@dataclass(frozen=True)
class InputPath:
    """Everything but the history that E of eq. (9) depends on, for answers drawn with `noise`.

    Attributes:
        flow: which prior, and the rest of what the reference reads.
        noise: what is drawn.
        norm: float32 [2, D], gain and bias of the embeddings' LayerNorm.
        shift: float32 [max_length, D], row a for age a: lambda z, or lambda (x_0 + z) where x_0 is Gaussian.
        scale: float32 [max_length, D]: lambda m, what the anchor's embedding is multiplied with; None where x_0 is
            Gaussian.
        anchor: u of `anchor_positions`.
    """

    flow: FlowConfig
    noise: InferenceNoise
    norm: Tensor
    shift: Tensor
    scale: Tensor | None
    anchor: float

    @classmethod
    @torch.no_grad()
    def pack(cls, model: FAVE, flow: FlowConfig, noise: InferenceNoise) -> InputPath:
        """Fold the constants, in float64; waits for the device."""
        norm, shift, scale = _input_constants(model, flow, noise)
        return cls(flow, noise, norm, shift, scale, float(noise.anchor))

    @cached_property
    def arrays(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """The memory of norm, shift and scale on a CPU: to make these arrays takes 3 us."""
        return self.norm.numpy(), self.shift.numpy(), None if self.scale is None else self.scale.numpy()

    @torch.no_grad()
    def refresh(self, model: FAVE) -> None:
        """Fold again after the model has changed, into the same memory."""
        norm, shift, _ = _input_constants(model, self.flow, self.noise)
        self.norm.copy_(norm)
        self.shift.copy_(shift)


def planned_rows(max_length: int) -> int:
    """M for a plan of histories of up to `max_length` items, at most `MAX_ROWS`."""
    return 64 if max_length <= 64 else MAX_ROWS


@dataclass(frozen=True)
class Plan:
    """Which histories share a program of the kernel: ones of about equal length, so that padding is not computed.

    Attributes:
        order: int32 [B]: the users, the longest histories first.
        programs: int32 [P, 3]: first place in `order`, number of users, and log2 of the rows a user has; programs
            without users come last and return at once.
        rows: M of the kernel that the plan was made for.
    """

    order: Tensor
    programs: Tensor
    rows: int

    @classmethod
    def of(cls, lengths: Tensor, rows: int = 64, programs: int | None = None) -> Plan:
        """Plan for histories of `lengths` [B], each at most `rows`; on the lengths' device, without waiting for it.

        Args:
            lengths: int32 or int64 [B].
            rows: M, a power of two from 16. 64 is faster than 128 (B = 4,096, L = 50: 980 us against 1,195): two
                programs on a multiprocessor fill each other's waits, two halves of one wait together.
            programs: how many programs to launch; by default as many as can be needed; too few leave users out.
        """
        smallest, largest = MIN_SLOT.bit_length() - 1, rows.bit_length() - 1
        if programs is None:
            programs = len(lengths) + largest - smallest
        bounds = 2 ** torch.arange(smallest, largest, device=lengths.device)
        buckets = torch.bucketize(lengths, bounds)  # 0 for up to MIN_SLOT items
        order = buckets.sort(descending=True, stable=True).indices
        shifts = torch.arange(largest, smallest - 1, -1, device=lengths.device)
        sizes = (buckets[:, None] == shifts - smallest).sum(0)  # users of each bucket, the longest first
        slots = 2 ** (largest - shifts)
        ends = torch.cumsum((sizes + slots - 1) // slots, 0)
        program = torch.arange(programs, device=lengths.device)
        bucket = torch.bucketize(program, ends, right=True).clamp_max(len(shifts) - 1)
        done = (program - (ends - (sizes + slots - 1) // slots)[bucket]) * slots[bucket]
        count = torch.minimum(sizes[bucket] - done, slots[bucket]).clamp_min(0)
        first = (torch.cumsum(sizes, 0) - sizes)[bucket] + done
        table = torch.stack((first.clamp_max(max(0, len(lengths) - 1)), count, shifts[bucket]), 1)
        return cls(order.int(), table.int(), rows)

    @classmethod
    def empty(cls, users: int, rows: int, device: torch.device) -> Plan:
        """Memory for the plan of `users` histories; `refill` makes it."""
        programs = users + (rows // MIN_SLOT).bit_length() - 1
        order, table = torch.empty(users, dtype=torch.int32), torch.empty(programs, 3, dtype=torch.int32)
        return cls(order.to(device), table.to(device), rows)

    def refill(self, offsets: Tensor, overlap: bool = False) -> None:
        """`of` the lengths between `offsets` [B + 1], into the same memory, by one launch of a Triton kernel.

        B is at most `MAX_PLANNED`. `overlap` as in `encode_ids`.
        """
        from fave_fast.kernels import encoder as kernels

        pdl = overlap and launches_overlap(offsets.device)
        kernels.plan(offsets, self.order, self.programs, rows=self.rows, smallest=MIN_SLOT, pdl=pdl)

    def trimmed(self) -> Plan:
        """Without the programs that have no users; waits for the device."""
        used = int((self.programs[:, 1] > 0).sum())
        return Plan(self.order, self.programs[:used].contiguous(), self.rows)


@dataclass(frozen=True)
class _Call:
    """One call's arguments, checked."""

    weights: EncoderWeights
    path: InputPath | None
    rows: Tensor  # E [rows, D] or ids [rows]
    bounds: Tensor | None
    padded_length: int | None
    plan: Plan | None
    out: Tensor
    overlap: bool


@ranged("fave/encoder")
def encode(
    weights: EncoderWeights,
    e: Tensor,
    bounds: Tensor,
    *,
    plan: Plan | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The endpoint of each history from its input E.

    Of a packed history longer than the model's longest the newest items count. One without items gets zeros.
    NaN and infinities in one history may reach others.

    Args:
        weights: of the model, which is in eval mode.
        e: packed [total, D] or padded on the left [B, L, D], in the weights' dtype or float32.
        bounds: int32 or int64: offsets [B + 1] from 0 to total, or lengths [B].
        plan: for the backends triton and tile: which histories share a program; by default those of triton's that are
            neighbours do, in slots for the model's longest history.
        out: [B, D] in the weights' dtype, contiguous: where the result goes, and what is returned.
        backend: auto, reference, triton, cpp (on a CPU in float32 and bfloat16, on a GPU `encoder_cluster`), pair
            (`encoder_pair`) or tile (`encoder_tile`).

    Returns:
        [B, D] in the weights' dtype.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit, or a model in training mode.
        BackendError: the backend cannot run here.
    """
    if e.dim() not in (2, 3) or e.shape[-1] != weights.model.config.d:
        raise ValueError(f"e is {list(e.shape)}; expected [total, D] or [B, L, D] with D = {weights.model.config.d}")
    if e.dtype not in (weights.matrices.dtype, torch.float32):
        raise ValueError(f"e is {e.dtype}; expected {weights.matrices.dtype} or torch.float32")
    padded_length = e.shape[1] if e.dim() == 3 else None
    return _run(weights, None, e.reshape(-1, e.shape[-1]), bounds, padded_length, plan, out, backend, False)


@ranged("fave/encoder")
def encode_ids(
    weights: EncoderWeights,
    path: InputPath,
    ids: Tensor,
    offsets: Tensor | None = None,
    *,
    plan: Plan | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
    overlap: bool = False,
) -> Tensor:
    """The endpoint of each history from its item ids: `encode` with the input path of eq. (9) in front.

    Args:
        weights: as in `encode`.
        path: the constants of E.
        ids: int32 or int64, packed [total] or padded on the left with 0 [B, L]; from 0 to N, which is not checked on a
            GPU.
        offsets: int32 or int64 [B + 1] from 0 to total, for packed ids.
        plan: as in `encode`.
        out: as in `encode`.
        backend: as in `encode`.
        overlap: what precedes this on the stream is a kernel, beside whose end this may start.

    Returns:
        [B, D] in the weights' dtype.

    Raises:
        ValueError: as in `encode`.
        BackendError: the backend cannot run here.
    """
    expected = 2 if offsets is None else 1
    if ids.dim() != expected or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ids are {ids.dtype} {list(ids.shape)}; expected int32 or int64, [total] with offsets or [B, L] without"
        )
    padded_length = ids.shape[1] if offsets is None else None
    rows = ids if offsets is not None else ids.reshape(-1)
    return _run(weights, path, rows, offsets, padded_length, plan, out, backend, overlap)


def _run(
    weights: EncoderWeights,
    path: InputPath | None,
    rows: Tensor,
    bounds: Tensor | None,
    padded_length: int | None,
    plan: Plan | None,
    out: Tensor | None,
    backend: str,
    overlap: bool,
) -> Tensor:
    matrices, config = weights.matrices, weights.model.config
    if weights.model.training:
        raise ValueError("the model is in training mode; expected model.eval()")
    if rows.device != matrices.device:
        raise ValueError(f"the input is on {rows.device} and the weights on {matrices.device}; expected one device")
    # len of a tensor takes 0.4 us, its shape 0.1, no_grad around a call 2.4, for which the implementations that need it
    # ask themselves: on a CPU a request feels them.
    if bounds is None:
        users = 0 if not padded_length else rows.shape[0] // padded_length
    else:
        users = bounds.shape[0] - (padded_length is None)
        _check_bounds(bounds, rows, padded_length)
    if padded_length is not None and not 1 <= padded_length <= config.max_length:
        raise ValueError(f"histories are {padded_length} long; expected 1 to {config.max_length}")
    if out is None:
        out = torch.empty(users, config.d, dtype=matrices.dtype, device=matrices.device)
    elif out.shape != (users, config.d) or out.dtype != matrices.dtype or out.device != matrices.device:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}; expected {matrices.dtype} [{users}, {config.d}] "
            f"on {matrices.device}"
        )
    elif not out.is_contiguous():
        raise ValueError("out is not contiguous")
    if plan is not None and len(plan.order) != users:
        raise ValueError(f"the plan is for {len(plan.order)} histories; expected {users}")
    run = OP.resolve(backend, matrices.device, matrices.dtype, weights.beyond)
    if users > 0:
        run(_Call(weights, path, rows.contiguous(), bounds, padded_length, plan, out, overlap))
    return out


def _check_bounds(bounds: Tensor, rows: Tensor, padded_length: int | None) -> None:
    if bounds.dim() != 1 or bounds.dtype not in (torch.int32, torch.int64) or bounds.device != rows.device:
        raise ValueError(
            f"bounds are {bounds.dtype} {list(bounds.shape)} on {bounds.device}; expected int32 or int64 of one "
            f"dimension on {rows.device}"
        )
    count, total = bounds.shape[0], rows.shape[0]
    if count == 0 and padded_length is None:
        raise ValueError("offsets are empty; expected [B + 1]")
    if padded_length is not None and count * padded_length != total:
        raise ValueError(f"there are {count} lengths; expected {total // max(1, padded_length)}")
    if bounds.device.type != "cpu":  # a look at the values would make the host wait
        return
    values = bounds.numpy()  # one request's three numbers: NumPy's calls take a quarter of PyTorch's time
    if padded_length is None and (values[0] != 0 or values[-1] != total):
        raise ValueError(f"offsets do not go from 0 to the number of rows, {total}")
    most = total if padded_length is None else padded_length
    if padded_length is None and count == 2:
        return  # one history from 0 to all rows
    lengths = values if padded_length is not None else values[1:] - values[:-1]
    if len(lengths) > 0 and (lengths.min() < 0 or lengths.max() > most):
        raise ValueError(f"a history's length is not within 0 to {most}")


def _beyond_kernels(model: FAVE) -> dict[str, str]:
    config = model.config
    channels, hidden = config.d // config.heads, config.ffn_mult * config.d
    reason = None
    if config.max_length > MAX_ROWS:
        reason = f"its kernel holds histories of up to {MAX_ROWS} items, and the model's may have {config.max_length}"
    elif config.d not in KERNEL_CHANNELS:
        reason = f"its kernel takes D of {', '.join(map(str, KERNEL_CHANNELS))}, and the model has {config.d}"
    elif channels not in KERNEL_CHANNELS:
        reason = f"its kernel takes heads of a power of two from 16 channels, and the model's have {channels}"
    elif hidden % min(64, hidden) != 0:
        reason = f"its kernel takes a feed-forward of whole 64 channels, and the model's has {hidden}"
    on_gpu = model.item_embedding.weight.device.type == "cuda"
    if config.conditioning != "add":
        reason = f"its kernel adds x_t as eq. (9) does, and the model has conditioning {config.conditioning!r}"
        return dict.fromkeys(("triton", *HOPPER), reason)
    reasons = {"triton": reason, **dict.fromkeys(HOPPER, encoder_hopper.beyond(model))}
    if not on_gpu:
        reasons["cpp"] = None
    return {backend: why for backend, why in reasons.items() if why is not None}


@torch.no_grad()
def _run_reference(call: _Call) -> None:
    model = call.weights.model
    if call.padded_length is None:
        assert call.bounds is not None
        rows, present = _grid(call.bounds, model.config.max_length)
    else:
        rows = torch.arange(len(call.rows), device=call.rows.device).view(-1, call.padded_length)
        present = torch.ones_like(rows, dtype=torch.bool)
        if call.bounds is not None:
            present = torch.arange(call.padded_length, 0, -1, device=rows.device) <= call.bounds[:, None]
    if call.path is None:
        e = torch.where(present[..., None], call.rows[rows], 0).to(call.out.dtype)
        endpoint = model.encode(e, present).endpoint
    else:
        history = torch.where(present, call.rows[rows], 0).long()
        present = history != 0
        noise, flow = call.path.noise, call.path.flow
        prior = noise.prior(model, flow, history)
        start = prior.new_zeros(len(prior))
        endpoint = model(history, prior, start, start + 1, noise.lambdas(history)).endpoint
    call.out.copy_(endpoint * present.any(1)[:, None])


def _grid(offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Row of each place of a left-padded grid int64 [B, L], and whether an item is there; waits for the device."""
    lengths = offsets.diff().clamp_max(longest)
    ages = torch.arange(max(1, int(lengths.max())) - 1, -1, -1, device=offsets.device)
    present = ages < lengths[:, None]
    return torch.where(present, offsets[1:, None] - 1 - ages, 0), present


@torch.no_grad()
def _run_triton(call: _Call) -> None:
    from fave_fast.kernels import encoder as kernels

    weights, path, plan = call.weights, call.path, call.plan
    model, config = weights.model, weights.model.config
    slot_rows = max(MIN_SLOT, 1 << (config.max_length - 1).bit_length())
    shapes = tile_shapes("encoder", _variant(call, slot_rows), call.out.device)
    rows = plan.rows if plan is not None else max(shapes["M"], slot_rows, 16)
    hidden = config.ffn_mult * config.d
    kernels.encode(
        call.rows,
        call.bounds,
        None if plan is None else plan.order,
        None if plan is None else plan.programs,
        weights.matrices,
        weights.norms,
        weights.cos,
        weights.sin,
        call.out,
        None if path is None else model.item_embedding.weight.detach(),
        None if path is None else path.norm,
        None if path is None else path.shift,
        None if path is None else path.scale,
        0.0 if path is None else path.anchor,
        padded_length=call.padded_length,
        longest=config.max_length,
        heads=config.heads,
        hidden=hidden,
        blocks=config.blocks,
        slot_rows=slot_rows,
        layer_norm=config.norm == "layer",
        eps=model.final_norm.eps,
        input_eps=model.embedding_norm.eps,
        rotary=config.position == "rotary",
        causal=config.attention == "causal",
        exact=weights.matrices.dtype == torch.float32 or interpreting(),
        tma=bool(shapes["TMA"]),
        pdl=call.overlap and launches_overlap(call.out.device),
        M=rows,
        CHUNK=min(shapes["CHUNK"], hidden),
        num_warps=max(shapes["num_warps"], 8 if rows > 64 else 4),
        num_stages=shapes["num_stages"],
    )


def _run_cpp(call: _Call) -> None:
    run = encoder_cluster.run if call.out.device.type == "cuda" else encoder_cpu.run
    run(call)


def _why_not_cpp(device: torch.device, dtype: torch.dtype) -> str | None:
    return encoder_hopper.why_not(device, dtype) if device.type == "cuda" else native.why_not(device, dtype)


def _why_not_auto_cpp(device: torch.device, dtype: torch.dtype) -> str | None:
    return encoder_hopper.why_not_auto(device, dtype) if device.type == "cuda" else None


def _variant(call: _Call, slot_rows: int) -> str:
    if call.out.dtype == torch.float32:
        return "fp32"
    return "16bit_wide" if call.out.shape[1] > 128 else "16bit"


def _matrices(model: FAVE) -> Tensor:
    """The kernel's matrix of all blocks' weights."""
    config = model.config
    channels = config.d // config.heads
    paired = encoder_hopper.rotary_pairs(channels, model.item_embedding.weight.device)
    parts: list[Tensor] = []
    blocks: Any = model.blocks
    for block in blocks:
        q, k, v = (part.view(config.heads, channels, config.d) for part in block.qkv.weight.chunk(3))
        out = block.attention_out.weight.T.reshape(config.heads, channels, config.d)
        heads = torch.stack((q[:, paired], k[:, paired], v, out), 1)  # [H, 4, C, D]
        parts += [heads.reshape(-1, config.d), block.ffn_in.weight, 2 * block.ffn_out.weight.T]
    return torch.cat(parts).contiguous()


def _norms(model: FAVE) -> Tensor:
    found: list[Any] = []
    blocks: Any = model.blocks
    for block in blocks:
        found += [block.attention_norm, block.ffn_norm]
    norms = torch.stack([_gain_and_bias(norm) for norm in (*found, model.final_norm)])
    norms[1:-1:2] /= 4
    return norms


def _gain_and_bias(norm: Any) -> Tensor:
    """Float32 [2, D] of a norm over D channels; an RMSNorm has no bias."""
    gain = norm.weight.detach().float()
    return torch.stack((gain, norm.bias.detach().float() if hasattr(norm, "bias") else torch.zeros_like(gain)))


def input_constants(model: FAVE, flow: FlowConfig, noise: InferenceNoise) -> tuple[Tensor, Tensor | None]:
    """What E of eq. (9) adds to LayerNorm(e), for t = 0 and r = 1: shift + scale * e_k.

    Returns:
        Shift and scale, float64 [max_length, D], the newest position last; scale is None where x_0 is Gaussian.
    """
    times = torch.zeros(1, dtype=torch.float64, device=noise.lam.device)
    embed = copy.deepcopy(model.time_embedding).double()
    z = (embed(times) + embed(times + 1))[0]  # eq. (8)
    lam = noise.lam.double()
    if flow.prior == "gaussian":
        return lam * (noise.gaussian.double() + z), None
    return lam * z, lam * noise.keep.double()


def _input_constants(model: FAVE, flow: FlowConfig, noise: InferenceNoise) -> tuple[Tensor, Tensor, Tensor | None]:
    shift, scale = (None if part is None else part.flip(0).float() for part in input_constants(model, flow, noise))
    assert shift is not None
    return _gain_and_bias(model.embedding_norm), shift, scale


OP: Op[Callable[[_Call], None]] = Op(
    "encoder",
    (
        Implementation("triton", _run_triton, triton_kernels, not_interpreted),
        Implementation("cpp", _run_cpp, _why_not_cpp, _why_not_auto_cpp),
        *(
            Implementation(backend, HOPPER[backend].run, encoder_hopper.why_not, encoder_hopper.why_not_auto)
            for backend in ("pair", "tile")
        ),
        Implementation("reference", _run_reference),
    ),
)

"""Histories out of a log, and what a loss reads beside them: the kernels are the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fave_fast.errors import BackendError
from fave_fast.ops import pack_windows, pick
from fave_fast.ops.packed import DecoderWeights, Packed, decoder_hidden, padded_weights, rows_of
from fave_fast.ops.registry import interpreting, why_no_triton

needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
on_cpu = pytest.mark.skipif(
    why_no_triton() is not None or not interpreting(), reason="kernels take CPU tensors interpreted"
)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=on_cpu)])
DEVICES = [pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=pytest.mark.gpu)]
property_test = settings(max_examples=40, deadline=None)
LOGS = st.lists(st.integers(1, 12), min_size=1, max_size=8)


def log(lengths: list[int], high: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Items from 1 to `high`, and where histories of these lengths start and end among them."""
    ends = torch.tensor(lengths).cumsum(0)
    draws = torch.Generator().manual_seed(sum(lengths))
    items = torch.randint(1, high + 1, (int(ends[-1]),), generator=draws, dtype=torch.int32)
    return items, ends - torch.tensor(lengths), ends


@each_backend
@property_test
@given(lengths=LOGS, longest=st.integers(1, 7), data=st.data())
def test_pack_windows(backend: str, lengths: list[int], longest: int, data: st.DataObject) -> None:
    items, starts, ends = log(lengths, 10**6)
    fillers = data.draw(st.integers(0, 3))
    rest = data.draw(st.integers(fillers, fillers * longest))
    total = sum(min(length, longest) for length in lengths)
    packed = pack_windows(items, starts, ends, longest, total + rest, fillers, backend=backend)
    parts = packed.ids.tensor_split(packed.offsets[1:-1])
    for part, start, end in zip(parts, starts.tolist(), ends.tolist(), strict=False):
        assert part.tolist() == items[start:end][-longest:].tolist()
    for part in parts[len(lengths) :]:
        assert 1 <= len(part) <= longest
        assert not part.any()
    assert packed.owners.tolist() == [owner for owner, part in enumerate(parts) for _ in part]
    assert packed.users.tolist() == list(range(len(lengths) + fillers))
    last = [row for row, owner in enumerate(packed.owners.tolist()) if row + 1 == packed.offsets[owner + 1]]
    assert packed.newest.rows.tolist() == last
    assert [row for row, owner in enumerate(packed.newest.owners.tolist()) if owner >= 0] == last
    assert packed.newest.owners[last].tolist() == packed.users.tolist()
    assert (packed.count, packed.longest, packed.offsets[0], packed.offsets[-1]) == (
        len(lengths), longest, 0, total + rest,
    )  # fmt: skip
    assert {one.dtype for one in (packed.ids, packed.offsets, packed.owners, packed.users)} == {torch.int64}


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("count", "longest", "fillers"), [(1, 50, 0), (512, 50, 11), (3, 200, 2), (513, 1, 0), (700, 20, 300)]
)
def test_full_sizes_are_the_reference(device: str, count: int, longest: int, fillers: int) -> None:
    draws = torch.Generator().manual_seed(count)
    items, starts, ends = log(torch.randint(1, 2 * longest + 1, (count,), generator=draws).tolist(), 12_101)
    total = int((ends - starts).clamp_max(longest).sum())
    places = [one.to(device) for one in (items, starts, ends)]
    mine, other = (
        pack_windows(*places, longest, total + 2 * fillers * min(longest, 2), fillers, backend=backend)
        for backend in ("triton", "reference")
    )
    for name in ("ids", "offsets", "owners", "users"):
        assert torch.equal(getattr(mine, name), getattr(other, name)), name
    assert torch.equal(mine.newest.rows, other.newest.rows)
    assert torch.equal(mine.newest.owners, other.newest.owners)
    assert (mine.count, mine.longest) == (other.count, other.longest)


def picked(packed: Packed, dtype: torch.dtype, device: str, high: int) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(5)
    outputs = torch.randn(packed.count, high + 4, generator=draws).to(device, dtype)
    outputs[:, 0] = torch.nan  # column 0 is read by none
    drawn = torch.randint(1, high + 1, packed.ids.shape, generator=draws).to(device)
    return {backend: pick(outputs, packed, drawn, backend=backend) for backend in ("triton", "reference")}


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "longest", "fillers"), [(1, 50, 0), (63, 50, 3), (3, 200, 2), (5, 1, 0)])
def test_pick_is_the_reference(device: str, dtype: torch.dtype, count: int, longest: int, fillers: int) -> None:
    """Items few enough that many drawn ones are met and some repeat."""
    draws = torch.Generator().manual_seed(count)
    items, starts, ends = log(torch.randint(1, 2 * longest + 1, (count,), generator=draws).tolist(), 90)
    total = int((ends - starts).clamp_max(longest).sum())
    places = [one.to(device) for one in (items, starts, ends)]
    packed = pack_windows(*places, longest, total + 2 * fillers, fillers, backend="reference")
    mine, other = picked(packed, dtype, device, 90).values()
    live = other.errors != 0  # where none is counted the place is of no meaning
    assert torch.equal(mine.errors, other.errors)
    assert torch.equal(mine.places[live], other.places[live])
    assert float(mine.counted) == float(other.counted)
    assert 0 < total <= float(mine.counted) <= 2 * total
    # Sums of positive numbers in another order: each addition of at most 2 rows errs by 2^-24 of the sum.
    assert abs(float(mine.squares) - float(other.squares)) <= 2 * total * 2**-23 * float(other.squares)


@on_cpu
def test_more_than_the_kernels_take_goes_to_the_reference() -> None:
    items, starts, ends = log([3, 2], 9)
    with pytest.raises(BackendError, match="its kernels take up to 16384 histories of 4096 items, not 2 of 5000"):
        pack_windows(items, starts, ends, 5000, 5, 0, backend="triton")
    assert len(pack_windows(items, starts, ends, 5000, 5, 0).ids) == 5


def decoded(backend: str, inputs: list[torch.Tensor], upstream: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The hidden layer and the gradients of E_u and of the weights."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    out = decoder_hidden(leaves[0], DecoderWeights(*leaves[1:]), 8, dtype, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "d"), [(1, 16), (37, 32), (300, 64), (20, 256), (512, 128)])
def test_decoder_hidden(device: str, count: int, d: int) -> None:
    """Errors at most twice PyTorch's float32, both against fp64; in 16 bits those of the result's rounding."""
    draws = torch.Generator().manual_seed(count)
    inputs = [torch.randn(count, d, generator=draws)]
    for scale in (d**-0.5, 0.1, d**-0.5, 0.1):
        shape = (d, d) if scale != 0.1 else (d,)
        inputs.append(scale * torch.randn(shape, generator=draws))
    inputs[0][: count // 2] *= 1e-3  # where a hyperbolic tangent by exponentials alone has lost digits
    upstream = torch.randn(count, d + 8, generator=draws).to(device)
    inputs = [one.to(device) for one in inputs]
    exact = decoded("reference", [one.double() for one in inputs], upstream, torch.float64)
    theirs = decoded("reference", inputs, upstream, torch.float32)
    ours = decoded("triton", inputs, upstream, torch.float32)
    narrow = decoded("triton", inputs, upstream.bfloat16().float(), torch.bfloat16)
    for mine, other, some, want in zip(ours, theirs, narrow, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - want).norm() <= 2 * (other - want).norm() + 1e-7 * want.norm()
        assert (some - want).norm() <= 1e-2 * want.norm()
    assert torch.equal(narrow[0][:, d:].float(), ours[0][:, d:])
    assert ours[0][:, d:].tolist() == [[1.0] + [0.0] * 7] * count


@on_cpu
def test_decoder_of_other_widths_is_refused_by_name() -> None:
    inputs = [torch.zeros(2, 24), torch.zeros(24, 24), torch.zeros(24), torch.zeros(24, 24), torch.zeros(24)]
    with pytest.raises(BackendError, match="not 24"):
        decoded("triton", inputs, torch.zeros(2, 32), torch.float32)


@each_backend
@property_test
@given(ids=st.lists(st.integers(0, 5), max_size=70))
def test_rows_of_a_table(backend: str, ids: list[int]) -> None:
    table = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    upstream = torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(2))
    items = torch.tensor(ids, dtype=torch.int64)
    rows = rows_of(table, items, backend=backend)
    assert torch.equal(rows, table[items])
    (got,) = torch.autograd.grad(rows, table, upstream)
    want = torch.zeros(7, 16, dtype=torch.float64).index_add_(0, items, upstream.double())
    want[0] = 0
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "d"), [(1, 16), (25, 24), (12_102, 128)])
def test_padded_weights(device: str, rows: int, d: int) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter cuts bfloat16 off
    draws = torch.Generator().manual_seed(rows)
    given = [torch.randn(shape, generator=draws).to(device) for shape in ((rows, d), (rows,))]
    upstream = torch.randn(-(-rows // 8) * 8, d + 8, generator=draws).to(device, dtype)
    both = []
    for backend in ("triton", "reference"):
        leaves = [one.clone().requires_grad_() for one in given]
        padded = padded_weights(*leaves, 8, dtype, backend=backend)
        both.append([padded, *torch.autograd.grad(padded, leaves, upstream)])
    for mine, other in zip(*both, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)

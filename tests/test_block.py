"""A transformer block and its dual form against an fp64 oracle, forward and backward."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fave_fast.config import ModelConfig
from fave_fast.model import Block
from fave_fast.ops.attention import Histories, rotary_by_age, rotary_tables
from fave_fast.ops.block import BlockDropout, BlockWeights, block, block_dual, normed, reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass
class Case:
    lengths: list[int]
    d: int = 32
    heads: int = 2
    hidden: int = 64
    dtype: torch.dtype = torch.float32
    layer_norm: bool = False
    causal: bool = False
    last: bool = False
    dual: bool = True
    p: float = 0.0
    seed: int = 0
    wide: bool = False  # weights of float32 whatever `dtype` is

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, spread: float = 1.0, offset: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * spread + offset).to(self.dtype).to(DEVICE)

        d, total = self.d, sum(self.lengths)
        self.inputs = [draw(total, d) for _ in range(1 + self.dual)]
        self.weights = BlockWeights(
            draw(d, spread=0.2, offset=1),
            draw(d) if self.layer_norm else None,
            draw(3 * d, d, spread=d**-0.5),
            draw(d, d, spread=d**-0.5),
            draw(d, spread=0.2, offset=1),
            draw(d) if self.layer_norm else None,
            draw(self.hidden, d, spread=d**-0.5),
            draw(d, self.hidden, spread=self.hidden**-0.5),
        )
        rows = len(self.lengths) if self.last else total
        self.upstream = [draw(rows, d) for _ in range(1 + self.dual)]
        self.offsets = torch.tensor([0, *self.lengths], device=DEVICE).cumsum(0)
        self.tables = rotary_by_age(max(self.lengths), d // self.heads, DEVICE)
        self.dropout = BlockDropout(self.p, torch.tensor([12345678912345 + self.seed], device=DEVICE), 3)

    def leaves(self, dtype: torch.dtype) -> tuple[list[Tensor], BlockWeights]:
        inputs = [one.to(dtype, copy=True).requires_grad_() for one in self.inputs]
        of_weights = torch.float32 if self.wide and dtype == self.dtype else dtype
        weights = (None if one is None else one.to(of_weights, copy=True).requires_grad_() for one in self.weights)
        return inputs, BlockWeights(*weights)

    def outcome(self, backend: str) -> list[Tensor]:
        """Outputs, then gradients of the inputs and of the weights, through the public call."""
        inputs, weights = self.leaves(self.dtype)
        call = block_dual if self.dual else block
        outputs = call(
            *inputs, weights, self.offsets, self.heads, self.tables, causal=self.causal, last_only=self.last,
            dropout=self.dropout, backend=backend,
        )  # fmt: skip
        outputs = outputs if self.dual else (outputs,)
        given = [*inputs, *(one for one in weights if one is not None)]
        return [*outputs, *torch.autograd.grad(outputs, given, self.upstream)]

    def oracle(self) -> list[Tensor]:
        """As `outcome`, in fp64: the value formula by torch.func.jvp, and autograd through both."""
        inputs, weights = self.leaves(torch.float64)
        histories = Histories(self.offsets, None, self.heads, self.tables, self.causal, self.last)

        def value(x: Tensor) -> Tensor:
            y, *_ = reference((x,), weights, histories, self.dropout if self.p else None)
            return y

        outputs = [value(inputs[0])]
        if self.dual:
            outputs = list(torch.func.jvp(value, (inputs[0],), (inputs[1],)))
        given = [*inputs, *(one for one in weights if one is not None)]
        return [*outputs, *torch.autograd.grad(outputs, given, [one.double() for one in self.upstream])]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """One error a matrix, and one of all vectors, whose few elements are too few for rounding errors to average out."""
    pairs = list(zip(got, want, strict=True))
    vectors = sum(error(a, b) ** 2 for a, b in pairs if b.dim() == 1) ** 0.5
    return [error(a, b) for a, b in pairs if b.dim() > 1] + [vectors]


def check(*cases: Case) -> None:
    """The error is at most twice that of PyTorch; of several cases, the root of their mean squares."""
    found, limits = [], []
    for case in cases:
        want, got = case.oracle(), case.outcome("triton")
        assert all(one.isfinite().all() for one in got)
        found.append(errors(got, want))
        limits.append(errors(case.outcome("reference"), want))
    mean, limit = (torch.tensor(each).square().mean(0).sqrt() for each in (found, limits))
    assert (mean <= 2 * limit).all(), f"{mean.tolist()} against {(2 * limit).tolist()}"


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(
    ("last", "layer_norm", "causal", "p", "dtype", "d", "hidden"),
    [
        (False, False, False, 0.3, torch.float32, 32, 64),
        (True, True, False, 0.3, torch.float32, 24, 40),
        (True, False, False, 0.0, torch.float32, 32, 64),
        (False, True, True, 0.0, torch.float32, 32, 64),
        (False, False, False, 0.3, torch.float16, 32, 64),
    ],
)
def test_values_and_gradients(
    dual: bool, last: bool, layer_norm: bool, causal: bool, p: float, dtype: torch.dtype, d: int, hidden: int
) -> None:
    check(Case([5, 1, 17, 22], d, 2, hidden, dtype, layer_norm, causal, last, dual, p))


@pytest.mark.parametrize(("last", "dual"), [(False, True), (True, False)])
def test_weights_in_float32_beside_rows_of_16_bits(last: bool, dual: bool) -> None:
    check(Case([5, 1, 17, 22], dtype=torch.float16, layer_norm=last, last=last, dual=dual, p=0.3, wide=True))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_reference_is_the_model(layer_norm: bool, last: bool) -> None:
    case = Case([7, 3], layer_norm=layer_norm, last=last, dual=False)
    model = Block(ModelConfig(d=32, heads=2, ffn_mult=2, dropout=0.0, norm="layer" if layer_norm else "rms")).to(DEVICE)
    names = ["attention_norm", "qkv", "attention_out", "ffn_norm", "ffn_in", "ffn_out"]
    weights = [one for index, one in enumerate(case.weights) if index not in (1, 5)]
    state = {f"{name}.weight": one for name, one in zip(names, weights, strict=True)}
    if layer_norm:
        state |= {"attention_norm.bias": case.weights[1], "ffn_norm.bias": case.weights[5]}
    model.load_state_dict(state)
    grid = torch.zeros(2, 7, 32, device=DEVICE)
    present = torch.arange(6, -1, -1, device=DEVICE) < torch.tensor(case.lengths, device=DEVICE)[:, None]
    grid[present] = case.inputs[0]
    tables = rotary_tables(torch.arange(6, -1, -1, device=DEVICE), 16)
    y = model(grid, present[:, None, None, :], tables, last)
    torch.testing.assert_close(case.outcome("reference")[0], y[:, 0] if last else y[present])


def test_dropout_masks() -> None:
    seed = torch.tensor([7], device=DEVICE)
    masks = [BlockDropout(0.3, seed, layer).factors(second, 500, 64) for layer in (0, 1) for second in (False, True)]
    for index, mask in enumerate(masks):
        kept = mask > 0
        assert torch.equal(mask[kept], torch.full_like(mask[kept], 1 / 0.7))
        assert abs(float(kept.float().mean()) - 0.7) < 5 * (0.21 / 32000) ** 0.5
        for other in masks[:index]:
            assert abs(float(((other > 0) == kept).float().mean()) - 0.58) < 0.02
    again = BlockDropout(0.3, torch.tensor([7 + 2**32], device=DEVICE)).factors(False, 500, 64)
    assert not torch.equal(again, masks[0])


def test_same_mask_for_value_and_tangent() -> None:
    case = Case([40], p=0.5)
    case.weights = case.weights._replace(
        attention_out=torch.zeros_like(case.weights[3]), ffn_out=torch.randn_like(case.weights[7])
    )
    y, dy = case.outcome("triton")[:2]
    silent = y == case.inputs[0]
    assert 0.4 < float(silent.float().mean()) < 0.6
    assert torch.equal(silent, dy == case.inputs[1])


@pytest.mark.parametrize(
    ("lengths", "last"),
    [
        # The interpreter's products (BLAS) depend on a row's place in its tile (of 128 rows at most): it must stay,
        # which it does not for tangents, below the values in one product.
        ([64, 64, 33], False),
        ([64, 64, 33], True),
        pytest.param([5, 33, 18, 50, 200, 1], False, marks=pytest.mark.gpu),
        pytest.param([5, 33, 18, 50, 200, 1], True, marks=pytest.mark.gpu),
    ],
)
def test_bits_do_not_depend_on_the_batch(lengths: list[int], last: bool) -> None:
    case = Case(lengths, last=last, dual=not INTERPRETED)
    whole = case.outcome("triton")
    assert all(torch.equal(a, b) for a, b in zip(whole, case.outcome("triton"), strict=True))
    users = range(len(lengths))
    if INTERPRETED:
        users = (0,) if last else (0, 2)
    for user in users:
        rows = slice(int(case.offsets[user]), int(case.offsets[user + 1]))
        out = slice(user, user + 1) if last else rows
        alone = Case([case.lengths[user]], last=last, dual=case.dual)
        alone.tables, alone.weights = case.tables, case.weights
        alone.inputs = [one[rows] for one in case.inputs]
        alone.upstream = [one[out] for one in case.upstream]
        count = 1 + case.dual  # outputs, and as many gradients of inputs
        for index, (one, many) in enumerate(zip(alone.outcome("triton")[: 2 * count], whole, strict=False)):
            assert torch.equal(one, many[out if index < count else rows])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_forward_mode_is_refused(backend: str) -> None:
    case = Case([2, 3], dual=False)

    def along(x: Tensor) -> Tensor:
        call = lambda x: block(x, case.weights, case.offsets, 2, case.tables, backend=backend)  # noqa: E731
        return torch.func.jvp(call, (x,), (torch.ones_like(x),))[1]

    with pytest.raises(NotImplementedError, match="block has no forward-mode"):
        along(case.inputs[0])
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|disable"):
        torch.compile(along, backend="eager")(case.inputs[0])


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(("layer_norm", "d", "dtype"), [(False, 32, torch.float32), (True, 24, torch.float16)])
def test_norm_alone(layer_norm: bool, d: int, dtype: torch.dtype, dual: bool) -> None:
    """Of the first rows, as wide as its gain; the others' gradients are zeros."""
    case = Case([40], d, dtype=dtype, layer_norm=layer_norm, dual=dual)

    def outcome(backend: str, wide: torch.dtype, narrow: torch.dtype) -> list[Tensor]:
        inputs = [one.to(narrow).requires_grad_() for one in case.inputs]
        named = case.weights.ffn_gain, case.weights.ffn_bias
        gain, bias = (None if one is None else one.to(wide, copy=True).requires_grad_() for one in named)
        outputs = normed(tuple(inputs), gain, bias, 1e-5, 37, wide, backend=backend)
        given = [*inputs, *(one for one in (gain, bias) if one is not None)]
        upstream = [one[:37].to(wide) for one in case.upstream]
        return [*outputs, *torch.autograd.grad(outputs, given, upstream)]

    want = outcome("reference", torch.float64, torch.float64)
    ours, theirs = (errors(outcome(backend, torch.float32, dtype), want) for backend in ("triton", "reference"))
    assert all(one <= 2 * two + 1e-7 for one, two in zip(ours, theirs, strict=True)), f"{ours} against {theirs}"


def test_no_rows() -> None:
    case = Case([2], dual=False)
    x = case.inputs[0][:0].requires_grad_()
    y = block(x, case.weights, torch.zeros(1, dtype=torch.int64, device=DEVICE), 2, backend="triton")
    assert y.shape == (0, 32)
    y.sum().backward()


def test_refusals() -> None:
    case = Case([2, 3], dual=False)
    x, offsets = case.inputs[0], case.offsets
    with pytest.raises(ValueError, match=r"x is .*; expected \[total, D\]"):
        block(x[None], case.weights, offsets, 2)
    with pytest.raises(ValueError, match="ffn_in is"):
        block(x, case.weights._replace(ffn_in=x[:, :-1]), offsets, 2)
    with pytest.raises(ValueError, match="dx is"):
        block_dual(x, x[:-1], case.weights, offsets, 2)
    with pytest.raises(ValueError, match="two norms of one kind"):
        block(x, case.weights._replace(ffn_bias=x[0]), offsets, 2)
    with pytest.raises(ValueError, match="offsets are"):
        block(x, case.weights, offsets.float(), 2)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="do not rise"):
            block(x, case.weights, offsets.flip(0), 2)
    with pytest.raises(ValueError, match="p is 1"):
        BlockDropout(1.0, case.dropout.seed)
    with pytest.raises(ValueError, match="seed is"):
        BlockDropout(0.5, case.dropout.seed[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("users", [1, 2, 3, 63, 132, 513])
def test_odd_shapes(dtype: torch.dtype, last: bool, users: int) -> None:
    generator = torch.Generator().manual_seed(users)
    lengths = torch.randint(1, 51, (users,), generator=generator).tolist()
    lengths[0], lengths[-1] = 50, 200
    # What a norm's root or a softmax's sum is rounded by is common to a row or to one of four heads. Of one row, the
    # errors of equally exact code differ by chance, like variances of 4 degrees of freedom: one in ten by more than
    # twice. Of 8 draws, which have 32, one in 10,000.
    draws = 8 if users <= 3 else 1
    for dual in (False, True):
        check(*(Case(lengths, 128, 4, 512, dtype, False, False, last, dual, 0.3, seed) for seed in range(draws)))


@pytest.mark.gpu
def test_graph_replay() -> None:
    case = Case([50, 3, 17, 120], 128, 4, 512, torch.bfloat16, p=0.3)

    def step() -> list[Tensor]:
        # Detached: the leaves' nodes would live on and belong to the stream of their first use.
        return [one.detach() for one in case.outcome("triton")]

    want = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for one in got:
        one.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    case.dropout.seed.add_(1)
    graph.replay()
    assert not torch.equal(got[0], want[0])


@pytest.mark.gpu
@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    length = 50
    users = 2**31 // (512 * length) + 1000  # of the hidden layer's elements
    case = Case([length], 128, 4, 512, torch.bfloat16, dual=False)
    x = torch.randn(users * length, 128, device=DEVICE, dtype=torch.bfloat16)

    def run(rows: Tensor) -> list[Tensor]:
        rows = rows.detach().requires_grad_()
        y = block(rows, case.weights, torch.arange(len(rows) // length + 1, device=DEVICE) * length, 4, case.tables)
        return [y, *torch.autograd.grad(y, rows, rows.detach())]

    tail = slice(-3 * length, None)
    assert all(torch.equal(a[tail], b) for a, b in zip(run(x), run(x[tail]), strict=True))

"""input_modulation against the network itself in float64, its kernels against the same-dtype PyTorch code."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fave_fast import flow
from fave_fast.config import ModelConfig
from fave_fast.errors import BackendError
from fave_fast.model import FAVE
from fave_fast.ops import philox
from fave_fast.ops.input_modulation import (
    Anchor,
    Drawn,
    Draws,
    Shared,
    Times,
    constant_time_features,
    input_modulation,
    input_modulation_dual,
)
from fave_fast.ops.registry import interpreting, why_no_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
kernels = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
# The interpreter's product of bfloat16 operands is not one.
DTYPES = [torch.float32, torch.float16] + ([] if DEVICE.type == "cpu" else [torch.bfloat16])

NAMES = ("table", "norm_weight", "norm_bias", "x_t", "dx_t", "hidden_weight", "hidden_bias", "out_weight", "out_bias")


class PoisonedTorch:
    """`torch`, except that fresh floating-point memory holds NaN: what a kernel leaves out shows."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty(self, *sizes: int, **options: object) -> Tensor:
        return _poisoned(torch.empty(*sizes, **options))  # type: ignore[call-overload]

    def empty_like(self, like: Tensor, **options: object) -> Tensor:
        return _poisoned(torch.empty_like(like, **options))  # type: ignore[call-overload]


def _poisoned(memory: Tensor) -> Tensor:
    return memory.fill_(torch.nan) if memory.is_floating_point() else memory


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Times.__module__], "torch", PoisonedTorch())


@dataclass(frozen=True)
class Case:
    """Histories in both forms, and what they are modulated with; everything in one dtype but the times."""

    padded: Tensor
    packed: Tensor
    offsets: Tensor
    parameters: dict[str, Tensor]
    t: Tensor
    r: Tensor
    draws: Draws

    @property
    def count(self) -> int:
        return len(self.padded)

    def to(self, dtype: torch.dtype) -> Case:
        parameters = {name: value.detach().to(dtype).requires_grad_() for name, value in self.parameters.items()}
        times = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(self, parameters=parameters, t=self.t.to(times), r=self.r.to(times))

    def times(self, users: slice | Tensor = slice(None)) -> Times:
        return Times(self.t[users], self.r[users], *(self.parameters[name] for name in NAMES[5:]))

    def call(
        self,
        lam: Tensor | float | Drawn | Shared,
        packed: bool = False,
        dual: bool = False,
        dropout: float = 0.0,
        backend: str = "triton",
        **options: object,
    ) -> tuple[Tensor, ...]:
        p = self.parameters
        ids, offsets = (self.packed, self.offsets) if packed else (self.padded, None)
        options = {"offsets": offsets, "draws": self.draws, "dropout": dropout, "backend": backend, **options}
        arguments = (ids, p["table"], p["norm_weight"], p["norm_bias"], p["x_t"])
        if dual:
            return input_modulation_dual(*arguments, p["dx_t"], self.times(), lam, **options)  # type: ignore[arg-type]
        return (input_modulation(*arguments, self.times(), lam, **options),)  # type: ignore[arg-type]


def make(
    count: int, longest: int, d: int, items: int = 97, seed: int = 0, lengths: Sequence[int] | None = None
) -> Case:
    rng = torch.Generator().manual_seed(seed)
    size = torch.tensor(lengths) if lengths else torch.randint(1, longest + 1, (count,), generator=rng)
    size[-1] = longest
    ids = torch.randint(1, items + 1, (count, longest), generator=rng)
    real = torch.arange(longest) >= (longest - size)[:, None]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(NAMES, (d,)) | {
        "table": (items + 1, d),
        "x_t": (count, d),
        "dx_t": (count, d),
    }
    shapes |= {"hidden_weight": (d, d), "out_weight": (d, d)}
    parameters = {name: torch.randn(shapes[name], generator=rng) for name in NAMES}
    for name in ("hidden_weight", "out_weight"):
        parameters[name] /= d**0.5
    t = torch.rand(count, generator=rng)
    r = t + (1 - t) * torch.rand(count, generator=rng)
    draws = Draws(
        torch.tensor([2**40 + 12345], device=DEVICE), torch.randint(2**40, (count,), generator=rng).to(DEVICE)
    )
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), size.cumsum(0)))
    moved = {name: value.to(DEVICE) for name, value in parameters.items()}
    case = Case(*(x.to(DEVICE) for x in (ids * real, ids[real], offsets)), moved, t.to(DEVICE), r.to(DEVICE), draws)
    return case.to(torch.float32)


def network(case: Case) -> FAVE:
    """The reference network in float64 with the case's parameters."""
    p = case.parameters
    items, d = p["table"].shape
    model = (
        FAVE(ModelConfig(d=d, heads=1, blocks=1, ffn_mult=1, max_length=1, source_block=0), items - 1)
        .double()
        .to(DEVICE)
    )
    model.eval()
    embedding = model.time_embedding
    targets = (
        (model.item_embedding, "weight"), (model.embedding_norm, "weight"), (model.embedding_norm, "bias"),
        (embedding.hidden, "weight"), (embedding.hidden, "bias"), (embedding.out, "weight"), (embedding.out, "bias"),
    )  # fmt: skip
    for (module, name), key in zip(targets, (*NAMES[:3], *NAMES[5:]), strict=True):
        setattr(module, name, torch.nn.Parameter(p[key].detach().double()))
    return model


def lambda_of(case: Case, packed: bool) -> Tensor:
    rows = case.packed.shape if packed else case.padded.shape
    rng = torch.Generator().manual_seed(5)
    return torch.randn(*rows, case.parameters["table"].shape[1], generator=rng).to(DEVICE)


def gradients(case: Case, values: tuple[Tensor, ...], size: float = 1.0) -> dict[str, Tensor]:
    """Of a fixed random weighting of the values, times `size`: `values` too, by name."""
    rng = torch.Generator().manual_seed(9)
    weights = [size * torch.randn(value.shape, generator=rng).half().to(value) for value in values]
    wanted = [name for name in NAMES if name != "dx_t" or len(values) == 2]
    sources = [case.parameters[name] for name in wanted]
    grads = torch.autograd.grad([(v * w).sum() for v, w in zip(values, weights, strict=True)], sources)
    return dict(zip(("E", "dE"), values, strict=False)) | dict(zip(wanted, grads, strict=True))


def distance(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact.double()).norm().item()


def check_errors(cases: Sequence[Case], dtype: torch.dtype, packed: bool, dual: bool, dropout: float) -> None:
    """All values and gradients: at most twice the error of the same-dtype PyTorch code, or that of rounding.

    Of several cases, the root of their mean squares.
    """
    found: dict[str, list[float]] = defaultdict(list)
    plain, rounding = copy.deepcopy(found), copy.deepcopy(found)
    # The times' weights have gradients of up to 10^5 through the derivative of sin(999 t): beyond float16.
    size = 2.0**-6 if dtype == torch.float16 and dual else 1.0
    for case in cases:
        rounded = case.to(dtype)
        wide = rounded.to(torch.float64)
        lam = Drawn(0.5)
        exact = gradients(wide, wide.call(lam, packed, dual, dropout, "reference"), size)
        theirs = gradients(rounded, rounded.call(lam, packed, dual, dropout, "reference"), size)
        ours = gradients(rounded, rounded.call(lam, packed, dual, dropout), size)
        # An interpreter's second run would say nothing.
        again = gradients(rounded, rounded.call(lam, packed, dual, dropout), size) if DEVICE.type == "cuda" else ours
        for name, value in ours.items():
            assert value.dtype == dtype
            assert torch.equal(value, again[name]), name
            found[name].append(distance(value, exact[name]))
            plain[name].append(distance(theirs[name], exact[name]))
            rounding[name].append(torch.finfo(dtype).eps / 2 * exact[name].norm().item())
    for name in found:
        error, limit, least = (math.hypot(*each[name]) for each in (found, plain, rounding))
        assert error <= max(2 * limit, least), name


@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_is_the_network(packed: bool) -> None:
    case = make(4, 6, 16).to(torch.float64)
    model, lam = network(case), lambda_of(case, packed).double()
    x_t, dx_t = case.parameters["x_t"].detach(), case.parameters["dx_t"].detach()
    real = case.padded != 0
    spread = torch.zeros(*case.padded.shape, 16, dtype=torch.float64, device=DEVICE)
    spread[real] = lam if packed else lam[real]
    embedded = model.embed_history(case.padded)
    wanted, tangent = torch.func.jvp(
        lambda x, t: model.modulate(embedded, x, t, case.r, spread), (x_t, case.t), (dx_t, torch.ones_like(case.t))
    )
    value, derivative = case.call(lam, packed, dual=True, backend="reference")
    (alone,) = case.call(lam, packed, backend="reference")
    for got, expected in ((value, wanted), (derivative, tangent), (alone, wanted)):
        torch.testing.assert_close(got if packed else got[real], expected[real], rtol=1e-11, atol=1e-9)
        assert packed or got[~real].eq(0).all()
    assert tangent[real].abs().min() > 0


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ k[0], second % 2**32, first >> 32 ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_words_are_philox() -> None:
    # The known answer of the generator's authors for a counter and a key of zeros, and of all ones.
    assert python_philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert python_philox([2**32 - 1] * 4, [2**32 - 1] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    users, ages = torch.tensor([0, 2**40 + 3, -1]), torch.tensor([0, 49, 2**31])
    for seed, stream in itertools.product((0, 2**63 - 5, -7), (0, 1)):
        got = philox.words(torch.tensor([seed]), users, ages, 16, stream).tolist()
        for row, user, age in zip(got, users.tolist(), ages.tolist(), strict=True):
            halves = [user % 2**32, (user >> 32) % 2**32]
            key = [seed % 2**32, (seed >> 32) % 2**32]
            assert row[:4] == python_philox([stream << 31, age, *halves], key)
            assert row[4:] == python_philox([1 + (stream << 31), age, *halves], key)


def drawn_lambda(case: Case, delta: float, packed: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the kernel draws, read back: E of a table of zeros, x_t = 0, z = 1 is lambda."""
    d = case.parameters["table"].shape[1]
    zeros, ones = torch.zeros(98, d, device=DEVICE, dtype=dtype), torch.ones(d, device=DEVICE, dtype=dtype)
    return input_modulation(
        case.packed if packed else case.padded, zeros, ones, zeros[0], zeros[0].expand(case.count, d), ones,
        Drawn(delta), offsets=case.offsets if packed else None, draws=case.draws, backend="triton",
    )  # fmt: skip


def owners_and_ages(case: Case) -> tuple[Tensor, Tensor]:
    owners = torch.arange(case.count, device=DEVICE).repeat_interleave(case.offsets.diff())
    return owners, case.offsets[1:][owners] - 1 - torch.arange(len(case.packed), device=DEVICE)


@kernels
@pytest.mark.parametrize(("d", "dtype"), [(16, torch.float32), (64, torch.float16)])
def test_kernels_draw_the_lambda_that_the_definition_says(d: int, dtype: torch.dtype) -> None:
    case = make(5, 9, d)
    owners, ages = owners_and_ages(case)
    expected = 0.5 + 0.5 * philox.normals(case.draws.seed, case.draws.users[owners], ages, d, torch.float64)
    # float32 through logarithm, root and sine at a radius of at most 5.4; in 16 bits the rounding of the result itself.
    bound = 0.5 * 5.4 * 2**-19 + 3.3 * torch.finfo(dtype).eps
    assert (drawn_lambda(case, 0.5, dtype=dtype) - expected).abs().max() <= bound


@kernels
def test_lambda_is_normal_with_mean_and_deviation_delta() -> None:
    case = make(8, 8, 128)
    lam = drawn_lambda(case, 0.25).double().cpu()
    noise, count = lam / 0.25 - 1, lam.numel()
    # Five standard errors of each statistic of `count` independent N(0, 1).
    assert noise.mean().abs() <= 5 / count**0.5
    assert (noise.square().mean() - 1).abs() <= 5 * (2 / count) ** 0.5
    assert noise.pow(3).mean().abs() <= 5 * (15 / count) ** 0.5
    assert (noise.pow(4).mean() - 3).abs() <= 5 * (96 / count) ** 0.5
    assert ((noise.abs() > 2).double().mean() - 0.0455).abs() <= 5 * (0.0455 / count) ** 0.5
    # Neighbours: the same counter's other channels, the next counter, the next age.
    for lag in (1, 2, 3, 4, 8, 128):
        flat = noise.flatten()
        assert (flat[lag:] * flat[:-lag]).mean().abs() <= 5 / (count - lag) ** 0.5


def test_normals_reach_both_tails() -> None:
    users = torch.arange(4000)
    noise = philox.normals(torch.tensor([3]), users, torch.zeros_like(users), 256, torch.float64)
    assert noise.max() > 4.4
    assert noise.min() < -4.4
    assert noise.abs().max() < 5.4


SMALL = [(1, 1, 64, False, 0.3, True), (3, 9, 32, False, 0.3, False), (2, 5, 32, True, 0.0, True)]
MANY = pytest.param(2049, 6, 128, True, 0.3, True, marks=pytest.mark.gpu)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "longest", "d", "dual", "dropout", "packed"), [*SMALL, MANY])
def test_errors_are_those_of_pytorch(
    count: int, longest: int, d: int, dual: bool, dropout: float, packed: bool, dtype: torch.dtype
) -> None:
    check_errors([make(count, longest, d)], dtype, packed, dual, dropout)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dual", "dropout"), [(False, 0.0), (False, 0.3), (True, 0.0), (True, 0.3)])
@pytest.mark.parametrize("d", [16, 64, 128, 256])
def test_errors_are_those_of_pytorch_on_the_gpu(d: int, dual: bool, dropout: float, dtype: torch.dtype) -> None:
    for count, longest in ((1, 1), (1, 50), (2, 49), (3, 200), (63, 50), (132, 7), (513, 50), (2049, 6)):
        # A norm's root is rounded once a row: of one row, equally exact code errs by more or less by chance.
        draws = 8 if count <= 3 else 1
        for packed in (False, True):
            check_errors(
                [make(count, longest, d, seed=count + 100 * draw) for draw in range(draws)],
                dtype, packed, dual, dropout,
            )  # fmt: skip


@kernels
@pytest.mark.parametrize("dtype", DTYPES if DEVICE.type == "cuda" else DTYPES[1:])
def test_a_history_is_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    case = make(4, 9, 16).to(dtype)
    p, lam = case.parameters, Drawn(0.5)
    together = case.call(lam, packed=True, dual=True, dropout=0.3)
    padded = case.call(lam, dual=True, dropout=0.3)
    order = torch.tensor([3, 0, 1, 2], device=DEVICE)
    draws = Draws(case.draws.seed, case.draws.users[order])
    shuffled = input_modulation_dual(
        case.padded[order], p["table"], p["norm_weight"], p["norm_bias"], p["x_t"][order], p["dx_t"][order],
        case.times(order), lam, draws=draws, dropout=0.3, backend="triton",
    )  # fmt: skip
    for part in range(2):
        assert torch.equal(padded[part][case.padded != 0], together[part])
        assert torch.equal(shuffled[part], padded[part][order])
    for user in range(case.count):
        check_alone(case, user, lam, together)


def check_alone(case: Case, user: int, lam: Drawn, together: tuple[Tensor, ...]) -> None:
    """A packed history's rows of E and its tangent have these bits where no other history is."""
    p, one = case.parameters, slice(user, user + 1)
    rows = slice(*case.offsets[user : user + 2].tolist())
    alone = input_modulation_dual(
        case.packed[rows], p["table"], p["norm_weight"], p["norm_bias"], p["x_t"][one], p["dx_t"][one],
        case.times(one), lam, offsets=case.offsets[user : user + 2] - case.offsets[user],
        draws=Draws(case.draws.seed, case.draws.users[one]), dropout=0.3, backend="triton",
    )  # fmt: skip
    assert all(torch.equal(own, both[rows]) for own, both in zip(alone, together, strict=True))


@pytest.mark.gpu
def test_a_history_is_the_same_bits_among_thousands() -> None:
    """Whose programs have so many tiles that they wait for z first, where one of few waits in its first tile."""
    case, lam = make(2500, 100, 128).to(torch.bfloat16), Drawn(0.5)
    together = case.call(lam, packed=True, dual=True, dropout=0.3)
    for user in (0, 1, 1300, 2499):
        check_alone(case, user, lam, together)


@kernels
def test_draws_follow_seed_user_and_age_alone() -> None:
    case = make(3, 6, 16)
    lam = drawn_lambda(case, 0.5)
    other = replace(case, draws=Draws(case.draws.seed + 1, case.draws.users))
    assert not torch.isclose(drawn_lambda(other, 0.5), lam, atol=0).any()
    swapped = replace(case, draws=Draws(case.draws.seed, case.draws.users.roll(1)))
    assert not torch.isclose(drawn_lambda(swapped, 0.5), lam, atol=0).any()
    # One item more at the old end changes no number of the others.
    longer = replace(case, packed=case.packed[case.offsets[2] - 1 :], offsets=case.offsets[2:] - case.offsets[2])
    longer = replace(longer, offsets=torch.stack((longer.offsets[0], longer.offsets[1] + 1)), padded=case.padded[2:])
    longer = replace(longer, draws=Draws(case.draws.seed, case.draws.users[2:]))
    assert torch.equal(drawn_lambda(longer, 0.5)[1:], lam[case.offsets[2] :])


@kernels
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_of_lambda(packed: bool) -> None:
    case = make(4, 5, 16)
    wide = case.to(torch.float64)
    rows = lambda_of(case, packed)
    table = torch.randn(7, 16, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    pairs = ((0.25, 0.25), (rows, rows.double()), (Shared(table), Shared(table.double())))
    for lam, exact in pairs:
        expected = wide.call(exact, packed, dual=True, backend="reference")
        got = case.call(lam, packed, dual=True)
        for value, wanted in zip(got, expected, strict=True):
            # float32 through a sum of 16 products, twice
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())
        assert torch.equal(case.call(lam, packed)[0], got[0])
    if not packed:
        rows = torch.where((case.padded == 0)[..., None], torch.nan, rows)
    got_gradients = gradients(case, case.call(rows, packed, dual=True))
    expected_gradients = gradients(wide, wide.call(rows.nan_to_num().double(), packed, dual=True, backend="reference"))
    for name, wanted in expected_gradients.items():
        bound = 1e-6 * wanted.abs().max().item()
        torch.testing.assert_close(got_gradients[name].double(), wanted, rtol=1e-5, atol=bound)


@kernels
def test_padding_gets_zeros_and_gives_no_gradient() -> None:
    case = make(3, 6, 16, lengths=[2, 1, 6])
    (value,) = case.call(Drawn(0.5), dropout=0.3)
    assert value[case.padded == 0].eq(0).all()
    weights = torch.where((case.padded == 0)[..., None], torch.nan, torch.ones_like(value))
    (grad,) = torch.autograd.grad(value, case.parameters["table"], weights)
    assert grad[0].eq(0).all()
    assert grad.isfinite().all()


@kernels
def test_dropout_takes_its_share_and_gives_nothing_back() -> None:
    d = 32
    case = make(6, 12, d)
    ids = torch.arange(1, len(case.packed) + 1, device=DEVICE)
    table = torch.ones(len(ids) + 1, d, device=DEVICE)
    # A LayerNorm of zeros and 1 / (1 - p): what is below its row's mean was dropped.
    p = case.parameters
    zero = torch.zeros(case.count, d, device=DEVICE)
    dropped = input_modulation(
        ids, table, torch.ones_like(p["norm_weight"]), torch.zeros_like(p["norm_bias"]), zero, zero[0], 0.0,
        offsets=case.offsets, draws=case.draws, dropout=0.3, backend="triton",
    ) < 0  # fmt: skip
    share = dropped.double().mean()
    assert (share - 0.3).abs() <= 5 * (0.3 * 0.7 / dropped.numel()) ** 0.5
    owners, ages = owners_and_ages(case)
    factors = philox.dropout_factors(case.draws.seed, case.draws.users[owners], ages, d, 0.3)
    assert torch.equal(dropped, factors == 0)
    table = torch.randn(table.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    value = input_modulation(
        ids, table, p["norm_weight"].detach(), p["norm_bias"].detach(), zero, zero[0], 0.0, offsets=case.offsets,
        draws=case.draws, dropout=0.3, backend="triton",
    )  # fmt: skip
    value.square().sum().backward()
    assert table.grad is not None
    assert torch.equal(table.grad[1:] == 0, dropped)


@kernels
def test_gradients_of_frequent_items_are_joined_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[Times.__module__]
    plain = module.tile_shapes  # type: ignore[attr-defined]
    small = {"chunk": 16, "step": 2, "num_warps": 4}
    monkeypatch.setattr(
        module, "tile_shapes", lambda op, kernel, device: small if "table" in kernel else plain(op, kernel, device)
    )
    # 97 rows of item 1 fill six chunks, among others that begin and end inside one, and paddings.
    case = make(4, 50, 16, items=40, lengths=[50, 3, 44, 50])
    ids = torch.where(torch.arange(50, device=DEVICE) % 2 == 0, case.padded.clamp_max(1), case.padded)
    case = replace(case, padded=ids, packed=ids[ids != 0])
    for packed in (False, True):
        ours, plain_grad, exact = (
            torch.autograd.grad(one.call(0.5, packed, backend=backend)[0].square().sum(), one.parameters["table"])[0]
            for one, backend in ((case, "triton"), (case, "reference"), (case.to(torch.float64), "reference"))
        )
        assert distance(ours, exact) <= 2 * distance(plain_grad, exact)
        # Each item by itself: a lost edge would be small beside the others' sum.
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@kernels
@pytest.mark.parametrize("packed", [False, True])
def test_an_anchor_is_the_prior_of_the_flow(packed: bool) -> None:
    case = make(4, 6, 16, lengths=[1, 3, 6, 2])
    p = {name: value.detach() for name, value in case.parameters.items()}
    ages = torch.tensor([0, 2, 4, 1], device=DEVICE)
    z = torch.randn(16, device=DEVICE)
    for keep in ((torch.rand(16) < 0.5).float().to(DEVICE), (torch.rand(4, 16) < 0.5).float().to(DEVICE)):
        x_0 = flow.anchor_prior(p["table"], case.padded, 5 - ages, keep)
        ids, offsets = (case.packed, case.offsets) if packed else (case.padded, None)
        norm = (p["table"], p["norm_weight"], p["norm_bias"])
        for backend in ("triton", "reference"):
            anchored = input_modulation(ids, *norm, Anchor(ages, keep), z, 0.5, offsets=offsets, backend=backend)
            given = input_modulation(ids, *norm, x_0, z, 0.5, offsets=offsets, backend=backend)
            assert torch.equal(anchored, given)


def test_constant_time_features_are_those_at_0_and_1() -> None:
    model = network(make(1, 1, 16))
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    z = constant_time_features(model)
    torch.testing.assert_close(z.double(), model.time_features(0 * one, one)[0], rtol=1e-6, atol=1e-6)
    assert (z.dtype, z.shape, z.requires_grad) == (torch.float32, (16,), False)
    half = constant_time_features(model.half())
    assert model.time_embedding.hidden.weight.dtype == torch.float16
    torch.testing.assert_close(half, z, rtol=0.05, atol=0.05)


@kernels
def test_given_memory_is_used_whatever_it_holds() -> None:
    case = make(3, 4, 16)
    with torch.no_grad():
        expected = case.call(Drawn(0.5), dual=True)
        alone = case.call(Drawn(0.5))[0]
        out = tuple(torch.full((3, 4, 16), torch.nan, device=DEVICE) for _ in range(2))
        space = torch.full((2, 3, 16), torch.nan, device=DEVICE)
        for _ in range(2):
            got = case.call(Drawn(0.5), dual=True, out=out, workspace=space)
            assert all(a is b and torch.equal(a, c) for a, b, c in zip(got, out, expected, strict=True))
        (again,) = case.call(Drawn(0.5), out=out[1], workspace=space[0])
        assert torch.equal(again, alone)
        (plain,) = case.call(Drawn(0.5), out=out[0], backend="reference")
        assert plain is out[0]


@kernels
def test_strided_inputs() -> None:
    case = make(3, 4, 16)

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, torch.zeros_like(tensor)), -1)[..., 0]

    apart = replace(
        case,
        **{name: strided(getattr(case, name)) for name in ("padded", "packed", "offsets", "t", "r")},
        parameters={name: strided(value.detach()).requires_grad_() for name, value in case.parameters.items()},
        draws=Draws(case.draws.seed, strided(case.draws.users)),
    )
    for packed in (False, True):
        lam = lambda_of(case, packed)
        for plain, other in ((lam, strided(lam)), (Drawn(0.5), Drawn(0.5))):
            expected = gradients(case, case.call(plain, packed, dual=True))
            for name, value in gradients(apart, apart.call(other, packed, dual=True)).items():
                assert torch.equal(value, expected[name]), name


@kernels
def test_e_in_16_bits_from_a_table_in_32() -> None:
    case = make(3, 4, 16)
    got = gradients(case, case.call(0.5, dual=True, dtype=torch.float16))
    expected = gradients(case, case.call(0.5, dual=True, backend="reference"))
    assert got["E"].dtype == torch.float16
    for name, value in got.items():
        torch.testing.assert_close(
            value.float(), expected[name], rtol=0.02, atol=0.02 * expected[name].abs().max().item()
        )
        assert value.dtype == (torch.float16 if name in ("E", "dE") else torch.float32)


@kernels
@pytest.mark.parametrize("lengths", [[0, 3, 4], [0, 0, 4]])
def test_empty_histories_and_narrow_ids(lengths: list[int]) -> None:
    case = make(3, 4, 16, lengths=lengths)
    (wide,) = case.call(Drawn(0.5), packed=True)
    narrow = replace(case, packed=case.packed.int(), padded=case.padded.int())
    assert torch.equal(narrow.call(Drawn(0.5), packed=True)[0], wide)
    assert torch.equal(narrow.call(Drawn(0.5))[0][case.padded != 0], wide)
    grads = gradients(narrow, narrow.call(Drawn(0.5), packed=True))
    assert grads["x_t"][0].eq(0).all()
    assert all(grad.isfinite().all() for grad in grads.values())


@kernels
def test_no_users_and_no_items() -> None:
    case = make(1, 1, 16)
    nobody = replace(
        case, padded=case.padded[:0], packed=case.packed[:0], offsets=case.offsets[:1], t=case.t[:0], r=case.r[:0],
        parameters=case.parameters | {name: case.parameters[name][:0] for name in ("x_t", "dx_t")},
        draws=Draws(case.draws.seed, case.draws.users[:0]),
    )  # fmt: skip
    for packed in (False, True):
        value, _ = nobody.call(Drawn(0.5), packed, dual=True)
        assert value.shape == ((0, 16) if packed else (0, 1, 16))
        value.sum().backward()
        assert case.parameters["hidden_weight"].grad is not None
        assert case.parameters["hidden_weight"].grad.eq(0).all()


@kernels
def test_gradients_only_of_what_is_trained() -> None:
    case = make(3, 5, 16)
    everything = gradients(case, case.call(Drawn(0.5), dual=True))
    for name in ("table", "norm_bias", "out_bias"):
        for other, value in case.parameters.items():
            value.requires_grad_(other == name)
        values = case.call(Drawn(0.5), dual=True)
        rng = torch.Generator().manual_seed(9)
        weights = [torch.randn(value.shape, generator=rng).half().to(value) for value in values]
        wanted = torch.autograd.grad(values, case.parameters[name], weights)[0]
        assert torch.equal(wanted, everything[name])


@kernels
def test_transforms_and_second_derivatives_are_refused() -> None:
    case = make(2, 3, 16)
    p = case.parameters

    def value(x_t: Tensor) -> Tensor:
        return replace(case, parameters=p | {"x_t": x_t}).call(0.5)[0]

    with pytest.raises(RuntimeError):
        torch.func.jvp(value, (p["x_t"].detach(),), (p["dx_t"].detach(),))
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: value(x).sum())(p["x_t"].detach())
    (first,) = torch.autograd.grad(value(p["x_t"]).square().sum(), p["x_t"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@kernels
def test_a_width_that_kernels_lack_is_refused_by_name_and_computed_by_the_reference() -> None:
    case = make(2, 3, 24)
    with pytest.raises(BackendError, match=r"its kernels take D of .* not 24"):
        case.call(0.5)
    assert torch.equal(case.call(0.5, backend="auto")[0], case.call(0.5, backend="reference")[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.ones(2, 3)}, r"ids are torch.float32 \[2, 3\]"),
        ({"ids": torch.ones(6, dtype=torch.int64)}, r"ids are torch.int64 \[6\]"),
        ({"offsets": torch.tensor([0, 6])}, "expected int32 or int64"),
        ({"table": torch.ones(5)}, r"expected floating point \[N \+ 1, D\]"),
        ({"norm_weight": torch.ones(3)}, r"norm_weight is torch.float32 \[3\]"),
        ({"x_t": torch.ones(3, 16)}, r"x_t is torch.float32 \[3, 16\]"),
        ({"x_t": Anchor(torch.zeros(2), torch.ones(16))}, "anchor ages is torch.float32"),
        ({"time": torch.ones(5)}, r"z is torch.float32 \[5\].* expected floating point \[16\] or \[2, 16\]"),
        ({"time": torch.ones(16, requires_grad=True)}, "are not differentiated"),
        ({"lam": torch.ones(2, 16)}, r"lam is torch.float32 \[2, 16\]"),
        ({"lam": Shared(torch.ones(2, 16))}, r"expected \[at least 3, 16\]"),
        ({"lam": Drawn(0.5)}, "draws is None"),
        ({"dropout": 0.1}, "draws is None"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"draws": Draws(torch.tensor([1]), torch.tensor([1]))}, r"users is torch.int64 \[1\]"),
        ({"out": torch.ones(2, 3, 8)}, r"out is torch.float32 \[2, 3, 8\]"),
        ({"x_t": torch.ones(2, 16, requires_grad=True), "out": torch.ones(2, 3, 16)}, "under torch.no_grad"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "ids": torch.ones(2, 3, dtype=torch.int64),
        "table": torch.ones(5, 16),
        "norm_weight": torch.ones(16),
        "norm_bias": torch.zeros(16),
        "x_t": torch.ones(2, 16),
        "time": torch.zeros(16),
        "lam": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        input_modulation(**{**good, **change})  # type: ignore[arg-type]


def test_auto_takes_the_reference_where_kernels_are_interpreted() -> None:
    case = make(2, 3, 16)
    if interpreting():
        assert torch.equal(case.call(0.5, backend="auto")[0], case.call(0.5, backend="reference")[0])


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_for_each_seed() -> None:
    case = make(63, 50, 128)
    with torch.no_grad():
        out, space = torch.empty(63, 50, 128, device=DEVICE), torch.empty(63, 128, device=DEVICE)

        def run() -> None:
            case.call(Drawn(0.5), dropout=0.3, out=out, workspace=space)

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for seed in (1, 2):
            case.draws.seed.fill_(seed)
            out.fill_(torch.nan)
            graph.replay()
            replayed = out.clone()
            assert torch.equal(case.call(Drawn(0.5), dropout=0.3)[0], replayed)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    count, length, d = 170_000, 100, 128
    ids = torch.randint(1, 98, (count, length), device=DEVICE)
    part = make(1, 1, d)
    p = {name: value.detach().bfloat16() for name, value in part.parameters.items()}
    x_t = torch.randn(count, d, device=DEVICE, dtype=torch.bfloat16)
    draws = Draws(part.draws.seed, torch.arange(count, device=DEVICE))
    out = torch.full((count, length, d), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    assert out.numel() > 2**31
    norm = (p["table"], p["norm_weight"], p["norm_bias"])
    z = p["x_t"][0]
    input_modulation(ids, *norm, x_t, z, Drawn(0.5), draws=draws, out=out, backend="triton")
    for rows in (slice(0, 50), slice(count - 50, count)):
        one = Draws(draws.seed, draws.users[rows])
        assert torch.equal(
            out[rows], input_modulation(ids[rows], *norm, x_t[rows], z, Drawn(0.5), draws=one, backend="triton")
        )

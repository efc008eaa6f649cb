from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fave_fast import dual, flow
from fave_fast.config import Config, ModelConfig
from fave_fast.data import IdMap, Interactions
from fave_fast.errors import BackendError
from fave_fast.fused import Network
from fave_fast.losses import source_loss
from fave_fast.model import FAVE
from fave_fast.ops import pack_windows
from fave_fast.ops.packed import Packed
from fave_fast.steps import FusedSteps, ReferenceSteps, rounded_rows, steps_for
from fave_fast.train import make_optimiser

ITEMS, D, L = 24, 16, 6
MODEL = ModelConfig(
    d=D, blocks=2, heads=2, ffn_mult=2, max_length=L, dropout=0, embedding_dropout=0, delta=0.3, time_scale=5.0
)
OTHER = [{"conditioning": name} for name in ("gate", "film", "token")]
LAYER = {"norm": "layer", "position": "none", "attention": "causal", "source_block": -1}
DROPPED = {"dropout": 0.4, "embedding_dropout": 0.3}
# Sums of up to 1e2 products in fp64 on values of order 1 to 10, in another order: 1e3 roundings of 1e-16.
TIGHT = {"rtol": 1e-11, "atol": 1e-11}
LENGTHS = [3, 1, 9, 6, 4]


def build(changes: dict[str, Any], device: str = "cpu") -> FAVE:
    torch.manual_seed(0)
    model = FAVE(replace(MODEL, **changes), ITEMS).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.item_embedding.weight[0] = 0
    return model.to(device).train()


def log() -> tuple[Tensor, Tensor, Tensor]:
    """Items, and start and end of five histories among them."""
    ends = torch.tensor(LENGTHS).cumsum(0)
    items = torch.randint(1, ITEMS + 1, (int(ends[-1]),), generator=torch.Generator().manual_seed(4))
    return items, ends - torch.tensor(LENGTHS), ends


def batch(fillers: int = 2, device: str = "cpu") -> Packed:
    total = sum(min(length, L) for length in LENGTHS)
    return pack_windows(*(one.to(device) for one in log()), L, total + 3 * fillers, fillers)


def padded(packed: Packed, width: int = L) -> tuple[Tensor, Tensor]:
    """The row of each place of a left-padded grid [B, L], and whether an item is there."""
    ages = torch.arange(width - 1, -1, -1, device=packed.ids.device)
    rows = packed.offsets[1 : packed.count + 1, None] - 1 - ages
    there = rows >= packed.offsets[: packed.count, None]
    return rows.clamp_min(0), there


def network(model: FAVE, packed: Packed, backend: str = "reference", seed: int = 1, **options: Any) -> Network:
    device = packed.ids.device
    return Network(model, packed, torch.tensor([seed], device=device), options.pop("dtype", torch.float64), backend,
                   **options)  # fmt: skip


def points(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, r, v."""
    draws = torch.Generator().manual_seed(1)
    x_t, v = torch.randn(2, len(LENGTHS), D, generator=draws, dtype=torch.float64)
    t = 0.1 + 0.4 * torch.rand(len(LENGTHS), generator=draws, dtype=torch.float64)
    return tuple(one.to(device) for one in (x_t, t, t + 0.2, v))


def everything(results: list[Tensor], model: FAVE) -> list[Tensor]:
    """The results, and the gradients of a function of all of them by every parameter of the network."""
    loss = sum(((one.double() + weight) ** 2).sum() for weight, one in enumerate(results, 1))
    leaves = [one for name, one in model.named_parameters() if not name.startswith("history_decoder")]
    return [*results, *torch.autograd.grad(loss, leaves)]


def reference(model: FAVE, packed: Packed, lam: Tensor, tangent: bool, x: tuple[Tensor, ...]) -> list[Tensor]:
    rows, there = padded(packed)
    history, lam = torch.where(there, packed.ids[rows], 0), lam[rows]
    *point, v = x
    if tangent:
        prediction, derivative = dual.predict(model, history, *point, lam, v)
        return everything([prediction.endpoint, prediction.source, derivative], model)
    prediction = model(history, *point, lam)
    return everything([prediction.endpoint, prediction.source], model)


def fused(net: Network, tangent: bool, x: tuple[Tensor, ...]) -> list[Tensor]:
    *point, v = x
    if tangent:
        prediction, derivative = net.predict_with_tangent(*point, v)
        return everything([prediction.endpoint, prediction.source, derivative], net.model)
    prediction = net.predict(*point)
    return everything([prediction.endpoint, prediction.source], net.model)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 200))
def test_rounded_rows(total: int, longest: int) -> None:
    rows, fillers = rounded_rows(total, longest)
    assert fillers <= rows - total <= fillers * longest
    assert rows - total <= 2 * 256 + total / 6  # a rounding step and what fillers need at least


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("changes", [{}, LAYER, {"blocks": 3, "source_block": 0}, *OTHER])
def test_network_is_the_reference_network(changes: dict[str, Any], tangent: bool) -> None:
    model, packed = build(changes), batch()
    lam = torch.randn(len(packed.ids), D, dtype=torch.float64)
    want = reference(model, packed, lam, tangent, points())
    for one, two in zip(fused(network(model, packed, lam=lam), tangent, points()), want, strict=True):
        torch.testing.assert_close(one, two, **TIGHT)
    assert (want[2].abs().max() > 1e-2) or not tangent


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_are_the_reference_network(device: str, tangent: bool) -> None:
    """fp32: errors at most twice the reference network's, both against fp64."""
    model, packed = build(LAYER if tangent else {}, device), batch(1, device)
    lam = torch.randn(len(packed.ids), D, generator=torch.Generator().manual_seed(2)).to(device)
    want = reference(model, packed, lam.double(), tangent, points(device))
    model.float()
    x = tuple(one.float() for one in points(device))
    ours = fused(network(model, packed, "triton", lam=lam, dtype=torch.float32), tangent, x)
    theirs = reference(model, packed, lam, tangent, x)

    def worst(results: list[Tensor]) -> float:
        return max(((one - two).norm() / two.norm()).item() for one, two in zip(results, want, strict=True))

    assert worst(ours) <= 2 * worst(theirs)


@pytest.mark.parametrize("tangent", [False, True])
def test_fillers_change_nothing(tangent: bool) -> None:
    """Not even what is drawn: lambda and masks are those of a batch without them."""
    model = build(DROPPED)
    few, many = (fused(network(model, batch(count)), tangent, points()) for count in (0, 3))
    for one, two in zip(few, many, strict=True):
        torch.testing.assert_close(one, two, **TIGHT)


def test_seed_decides_lambda_and_dropout() -> None:
    model, (x_t, t, r, _) = build(DROPPED), points()
    first, again, other = (network(model, batch(), seed=seed).predict(x_t, t, r).endpoint for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
    model.eval()
    model.config = replace(model.config, delta=0.0)
    calm = [network(model, batch(), seed=seed).predict(x_t, t, r).endpoint for seed in (1, 2)]
    assert torch.equal(*calm)


def test_anchor_is_drawn_as_on_padded_histories() -> None:
    model, packed = build({}), batch()
    rows, there = padded(packed)
    history = torch.where(there, packed.ids[rows], 0)
    for seed in range(5):
        got, want = (torch.Generator().manual_seed(seed) for _ in range(2))
        x_0 = network(model, packed).draw_anchor(0.7, got)
        assert torch.equal(x_0, flow.draw_anchor(model.item_embedding.weight, history, 0.7, want))


@pytest.mark.parametrize("kind", ["sampled", "dense"])
def test_source_loss(kind: Any) -> None:
    """Repeated items and items drawn twice count as often as in `losses.source_loss`, which is given the same draws."""
    model, packed = build({}), batch()
    source = torch.randn(packed.count, D, dtype=torch.float64, requires_grad=True)
    leaves = [source, *model.history_decoder.parameters()]
    got = network(model, packed).source_loss(source, kind, torch.Generator().manual_seed(3))
    drawn = torch.randint(1, ITEMS + 1, packed.ids.shape, generator=torch.Generator().manual_seed(3))
    if kind == "dense":
        rows, there = padded(packed)
        want = source_loss(model, source, torch.where(there, packed.ids[rows], 0), "dense", None)
    else:
        errors: list[Tensor] = []
        for row in range(len(drawn)):
            user = int(packed.owners[row])
            if user < packed.count:
                history = packed.ids[packed.owners == user]
                output = model.history_decoder(source[user])
                errors.append((output[packed.ids[row] - 1] - 1) ** 2)
                errors += [] if (history == drawn[row]).any() else [output[drawn[row] - 1] ** 2]
        assert len(errors) < 2 * sum(min(length, L) for length in LENGTHS), "a draw in its history is to be left out"
        want = torch.stack(errors).mean()
    for one, two in zip((got, *grads(got, leaves)), (want, *grads(want, leaves)), strict=True):
        torch.testing.assert_close(one, two, **TIGHT)


def grads(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def interactions() -> Interactions:
    items, _, ends = log()
    ids = IdMap(np.arange(1, ITEMS + 1))
    offsets = np.concatenate(([0], ends.numpy()))
    return Interactions(items.numpy().astype(np.int32), offsets, ids, ids, None, "made", ())


def windows(data: Interactions, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Starts and targets of batches of 8."""
    draws = np.random.default_rng(0)
    for _ in range(count):
        users = draws.choice([0, 2, 3, 4], 8)
        starts = data.offsets[users]
        yield starts, starts + draws.integers(1, np.array(LENGTHS)[users])


def trained(kind: Any, stage: int, config: Config, device: str, dtype: torch.dtype, **options: Any) -> list[Any]:
    """The losses of six steps, and the weights after them."""
    torch.manual_seed(0)
    model = FAVE(config.model, ITEMS).to(device, torch.float64 if dtype == torch.float64 else torch.float32).train()
    model.item_embedding.weight.requires_grad_(stage == 1)
    data = interactions()
    steps = kind(
        data, config, model, make_optimiser(model, 0.01, 0.0, captured=device == "cuda"), stage, dtype, **options
    )
    taken = []
    for seed, places in enumerate(windows(data, 6)):
        loss = steps.take(*places, seed)
        assert not loss.requires_grad  # or who keeps it keeps the step's tensors
        taken.append(loss.item())
    return [*taken, *model.state_dict().values()]


@pytest.mark.parametrize("loss", [{}, {"target": "unseen"}, {"rec": 0.0, "beta": 0.0}])
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {}),
        (2, {}),
        *((2, one) for one in OTHER),
        (1, {"max_length": 17}),
        (2, {"max_length": 17, "conditioning": "token"}),
    ],
)
def test_steps_are_the_reference_steps(stage: int, changes: dict[str, Any], loss: dict[str, Any]) -> None:
    """In fp64, where nothing is drawn by generators of their own."""
    still = replace(MODEL, delta=0.0, **changes)
    values = {"loss": {"source": "dense", **loss}, "train": {"batch_size": 8}}
    config = Config(model=still).override(values, "test")
    ours = trained(FusedSteps, stage, config, "cpu", torch.float64, backend="reference")
    theirs = trained(ReferenceSteps, stage, config, "cpu", torch.float64)
    for one, two in zip(ours, theirs, strict=True):
        # Adam divides by the gradient's size and 1e-8: a rounding of 1e-14 of a gradient near 0 moves a weight by
        # 0.01 * 1e-14 / 1e-8 = 1e-8 a step.
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


def test_fused_steps_are_taken_where_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for backend in ("auto", "reference", "triton", "cpp"):
        assert steps_for(cpu, torch.float32, backend, 128) is ReferenceSteps
    cuda = torch.device("cuda")
    assert steps_for(cuda, torch.bfloat16, "cpp", 128) is ReferenceSteps
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match=r"training_step: backend 'triton' cannot run"):
            steps_for(cuda, torch.bfloat16, "triton", 128)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for backend, taken in (("auto", FusedSteps), ("triton", FusedSteps), ("reference", ReferenceSteps)):
        assert steps_for(cuda, torch.bfloat16, backend, 128) is taken
    assert steps_for(cuda, torch.float32, "auto", 128) is ReferenceSteps
    assert steps_for(cuda, torch.bfloat16, "auto", 96) is ReferenceSteps
    with pytest.raises(BackendError, match=r"D of .*, not 96"):
        steps_for(cuda, torch.bfloat16, "triton", 96)
    monkeypatch.setenv("FAVE_FAST_BACKEND", "triton")
    assert steps_for(cuda, torch.float32, "auto", 128) is FusedSteps


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
def test_captured_steps_are_the_launched_ones(stage: int) -> None:
    config = Config(model=replace(MODEL, **DROPPED)).override({"train": {"batch_size": 8}}, "test")
    launched = trained(FusedSteps, stage, config, "cuda", torch.bfloat16, backend="triton", capture=False)
    for _ in range(2):
        for one, two in zip(
            trained(FusedSteps, stage, config, "cuda", torch.bfloat16, backend="triton"), launched, strict=True
        ):
            assert one == two if isinstance(one, float) else torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [{}, {"source": "dense"}, {"target": "unseen"}])
@pytest.mark.parametrize("longest", [50, 7])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_runs_beside_changes_no_bit(
    stage: int, dropout: float, blocks: int, longest: int, loss: dict[str, Any]
) -> None:
    """At a size where branches overlap and memory goes from hand to hand: captured, and launched in one stream."""
    values = {
        "model": {
            "dropout": dropout, "embedding_dropout": dropout, "blocks": blocks, "source_block": -min(blocks, 2)
        },
        "loss": loss,
        "train": {"batch_size": 256},
    }  # fmt: skip
    config = Config.from_dict(values, "test")
    draws = np.random.default_rng(0)
    lengths = draws.integers(1, longest + 1, 256)
    items = draws.integers(1, 12_102, 256 * 60).astype(np.int32)
    starts = np.arange(256) * 60
    ids = IdMap(np.arange(1, 12_102))
    data = Interactions(items, np.append(starts, len(items)), ids, IdMap(np.arange(256)), None, "made", ())

    def results(capture: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = FAVE(config.model, 12_101).to("cuda").train()
        model.item_embedding.weight.requires_grad_(stage == 1)
        adam = make_optimiser(model, 0.001, 0.0, captured=True)
        steps = FusedSteps(data, config, model, adam, stage, torch.bfloat16, backend="triton", capture=capture)
        taken = [steps.take(starts, starts + lengths, seed).clone() for seed in range(8)]
        return [*taken, *model.state_dict().values()]

    for one, two in zip(results(capture=True), results(capture=False), strict=True):
        assert torch.equal(one, two)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fave_fast.config import Config, ModelConfig
from fave_fast.losses import (
    Losses,
    Objective,
    ReferenceNetwork,
    absent_items,
    consistency_loss,
    matching_loss,
    predict_with_tangent,
    source_loss,
    stage1_objective,
    stage2_objective,
    target_loss,
)
from fave_fast.model import FAVE

ITEMS = 12
MODEL = ModelConfig(
    d=8, blocks=2, heads=2, ffn_mult=2, max_length=5, dropout=0, embedding_dropout=0, delta=0.3, time_scale=5.0
)
CONFIG = Config(model=MODEL)
HISTORY = torch.tensor([[0, 0, 3, 1, 3], [0, 0, 0, 0, 12], [5, 4, 3, 2, 1], [0, 7, 8, 9, 10]])
TARGETS = torch.tensor([1, 12, 6, 2])
# Sums of up to 1e2 products in fp64 on values of order 1 to 10, in another order: 1e3 roundings of 1e-16.
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
# A central difference of step h errs by h^2 / 6 |f'''| + 1e-16 |f| k / h, k some 1e2 roundings. With angles 5 t, f'''
# is around 5^3 times f' at most 1e2 of it, so h = 1e-5 gives 2e-9 + 1e-9 of values of order 1; 1e-6 leaves margin.
H = 1e-5
DIFFERENCE = {"rtol": 1e-6, "atol": 1e-7}


def by_reference(objective: Objective) -> Callable[..., Losses]:
    def losses(
        model: FAVE, config: Config, history: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Losses:
        return objective(ReferenceNetwork(model, history, generator), config, targets, generator)

    return losses


stage1_losses, stage2_losses = by_reference(stage1_objective), by_reference(stage2_objective)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: ModelConfig = MODEL) -> FAVE:
    torch.manual_seed(0)
    model = FAVE(config, ITEMS).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.item_embedding.weight[0] = 0
    return model


def squared(difference: np.ndarray, reduction: str) -> float:
    """Mean over rows of the sum or mean of squares, one element at a time."""
    rows = [sum(float(x) ** 2 for x in row) / (len(row) if reduction == "mean" else 1) for row in difference]
    return sum(rows) / len(rows)


def cross_entropy(
    endpoint: np.ndarray, embedding: np.ndarray, targets: np.ndarray, seen: np.ndarray | None = None
) -> float:
    """Over all items, or without those of `seen` [B, L] that are not the target."""
    terms = []
    for at, (row, target) in enumerate(zip(endpoint, targets, strict=True)):
        out = () if seen is None else set(seen[at].tolist()) - {int(target)}
        scores = {j: float(row @ embedding[j]) for j in range(1, len(embedding)) if j not in out}
        terms.append(np.log(np.sum(np.exp(list(scores.values())))) - scores[int(target)])
    return float(np.mean(terms))


def decode(model: FAVE, source: np.ndarray) -> np.ndarray:
    """D of eq. (13) for one E_u; index 0 is padding."""
    w = {name: value.detach().numpy() for name, value in model.history_decoder.named_parameters()}
    hidden = np.tanh(w["first.weight"] @ source + w["first.bias"])
    hidden = np.tanh(w["second.weight"] @ hidden + w["second.bias"])
    return w["out.weight"] @ hidden + w["out.bias"]


def sampled_source(model: FAVE, sources: np.ndarray, history: np.ndarray, drawn: np.ndarray) -> float:
    errors = []
    for source, items, others in zip(sources, history, drawn, strict=True):
        outputs = decode(model, source)
        for item, other in zip(items, others, strict=True):
            if item:
                errors.append((outputs[item] - 1) ** 2)
                if other not in items:
                    errors.append(outputs[other] ** 2)
    return float(np.mean(errors))


def difference(function: Callable[..., Tensor], x_t: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
    """The derivative along [v, 1, 0] by a central difference."""
    with torch.no_grad():
        return (function(x_t + H * v, t + H, r) - function(x_t - H * v, t - H, r)) / (2 * H)


def points() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    source = generator(1)
    x_t, v = torch.randn(2, 4, 8, generator=source, dtype=torch.float64)
    t = 0.1 + 0.4 * torch.rand(4, generator=source, dtype=torch.float64)
    lam = 0.3 + 0.3 * torch.randn(4, 5, 8, generator=source, dtype=torch.float64)
    return x_t, t, t + torch.tensor([0.1, 0.2, 0.4, 0.0]), lam, v


def endpoint_function(model: FAVE, lam: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    embedded = model.embed_history(HISTORY).detach()
    return lambda x_t, t, r: model.encode(model.modulate(embedded, x_t, t, r, lam), HISTORY != 0).endpoint


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_squared_losses(reduction: Any) -> None:
    f, x_1 = torch.randn(2, 4, 8, generator=generator(), dtype=torch.float64)
    want = squared(f.numpy() - x_1.numpy(), reduction)
    np.testing.assert_allclose(matching_loss(f, x_1, reduction).item(), want, rtol=1e-13)  # 32 roundings of 1e-16
    want = squared(f.numpy(), reduction)
    np.testing.assert_allclose(consistency_loss(f, reduction).item(), want, rtol=1e-13)


def test_target_loss() -> None:
    f = torch.randn(4, 8, generator=generator(), dtype=torch.float64)
    embedding = build().item_embedding.weight.detach()
    embedding[0] = 100  # padding is no candidate: its score would drown the others
    want = cross_entropy(f.numpy(), embedding.numpy(), TARGETS.numpy())
    np.testing.assert_allclose(target_loss(f, embedding, TARGETS).item(), want, rtol=1e-12)  # ~1e2 roundings


def test_losses_of_narrow_tensors_are_summed_in_fp32() -> None:
    f = torch.full((512, 64), 1.0, dtype=torch.bfloat16)
    assert matching_loss(f, torch.zeros_like(f), "sum").item() == 64
    assert matching_loss(f, torch.zeros_like(f)).dtype == torch.float32
    assert (
        target_loss(f, torch.zeros(5, 64, dtype=torch.bfloat16), torch.ones(512, dtype=torch.int64)).dtype
        == f.float().dtype
    )


def test_absent_items_are_uniform_and_absent() -> None:
    history = HISTORY.repeat(3000, 1)
    drawn, counts = absent_items(history, ITEMS, generator())
    assert torch.equal(counts, (history != 0) & (drawn[:, :, None] != history[:, None, :]).all(-1))
    shares = torch.bincount(drawn.flatten(), minlength=ITEMS + 1).double() / drawn.numel()
    assert shares[0] == 0
    # Six binomial deviations.
    assert (shares[1:] - 1 / ITEMS).abs().max() < 6 * (1 / ITEMS / drawn.numel()) ** 0.5


def test_sampled_source_loss() -> None:
    model, source = build(), torch.randn(4, 8, generator=generator(), dtype=torch.float64)
    drawn = torch.randint(1, ITEMS + 1, HISTORY.shape, generator=generator(9)).numpy()
    want = sampled_source(model, source.numpy(), HISTORY.numpy(), drawn)
    got = source_loss(model, source, HISTORY, "sampled", generator(9))
    np.testing.assert_allclose(got.item(), want, rtol=1e-11)  # as TIGHT


def test_dense_source_loss() -> None:
    model, source = build(), torch.randn(4, 8, generator=generator(), dtype=torch.float64)
    errors = [
        (decode(model, row)[item] - (item in items)) ** 2
        for row, items in zip(source.numpy(), HISTORY.tolist(), strict=True)
        for item in range(1, ITEMS + 1)
    ]
    got = source_loss(model, source, HISTORY, "dense", None)
    np.testing.assert_allclose(got.item(), np.mean(errors), rtol=1e-11)  # as TIGHT


@pytest.mark.parametrize("kind", ["sampled", "dense"])
def test_source_loss_of_histories_without_items_is_finite(kind: Any) -> None:
    model = build()
    loss = source_loss(model, torch.ones(2, 8).double(), torch.zeros(2, 5, dtype=torch.int64), kind, generator())
    assert loss.isfinite()
    assert kind == "dense" or loss == 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", [{}, {"norm": "layer", "position": "none", "attention": "causal"}])
def test_tangent_is_the_derivative_along_v_1_0(training: bool, changes: dict[str, Any]) -> None:
    model = build(replace(MODEL, **changes)).train(training)
    x_t, t, r, lam, v = points()
    function = endpoint_function(model, lam)
    prediction, tangent = predict_with_tangent(model, HISTORY, x_t, t, r, lam, v)
    want = difference(function, x_t, t, r, v)
    assert (want.abs().max(1).values > 1e-2).all()
    torch.testing.assert_close(tangent, want, **DIFFERENCE)
    plain = model(HISTORY, x_t, t, r, lam)
    torch.testing.assert_close(prediction.endpoint, plain.endpoint, **TIGHT)
    torch.testing.assert_close(prediction.source, plain.source, **TIGHT)
    # Each part of the direction counts: without the 1 on t, or with one on r too, the result is another.
    fixed = (function(x_t + H * v, t, r) - function(x_t - H * v, t, r)) / (2 * H)
    moved = (function(x_t + H * v, t + H, r + H) - function(x_t - H * v, t - H, r - H)) / (2 * H)
    assert (tangent - fixed).abs().max() > 1e-3
    assert (tangent - moved).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name",
    ["time_embedding.hidden.weight", "blocks.0.qkv.weight", "blocks.1.ffn_in.weight", "embedding_norm.weight"],
)
def test_gradient_of_consistency_loss(name: str) -> None:
    model = build()
    x_t, t, r, lam, v = points()
    parameter = dict(model.named_parameters())[name]

    def loss() -> Tensor:
        return consistency_loss(predict_with_tangent(model, HISTORY, x_t, t, r, lam, v)[1])

    (gradient,) = torch.autograd.grad(loss(), parameter)
    flat, grad = parameter.data.view(-1), gradient.reshape(-1)
    for index in (int(grad.abs().argmax()), 1, flat.numel() - 1):
        value, sides = flat[index].item(), []
        for sign in (1, -1):
            flat[index] = value + sign * H
            sides.append(loss().item())
        flat[index] = value
        want = (sides[0] - sides[1]) / (2 * H)
        # As DIFFERENCE, relative to the largest entry: the loss' roundings do not shrink with the gradient.
        assert abs(grad[index].item() - want) <= 1e-6 * (1 + grad.abs().max().item())
    assert grad.abs().max() > 1e-3


def expected(
    model: FAVE, config: Config, prediction: Any, x_1: Tensor, drawn: Tensor, tangent: Tensor | None, matching: float
) -> dict[str, float]:
    """Every loss by this file's own arithmetic, with weights applied; `matching` is that of L_rec or L_match."""
    weights = config.loss
    f = prediction.endpoint.detach().numpy()
    parts = {
        "match": squared(f - x_1.detach().numpy(), weights.reduction),
        "target": cross_entropy(
            f,
            model.item_embedding.weight.detach().numpy(),
            TARGETS.numpy(),
            HISTORY.numpy() if weights.target == "unseen" else None,
        ),
        "source": sampled_source(model, prediction.source.detach().numpy(), HISTORY.numpy(), drawn.numpy()),
        "consistency": 0.0 if tangent is None else squared(tangent.numpy(), weights.reduction),
    }
    if weights.beta == 0:
        parts["source"] = 0.0
    total = matching * parts["match"] + weights.alpha * parts["target"] + weights.beta * parts["source"]
    return parts | {"total": total + weights.gamma * parts["consistency"]}


def assert_losses(got: Losses, want: dict[str, float], rtol: float) -> None:
    for name, value in want.items():
        np.testing.assert_allclose(getattr(got, name).item(), value, rtol=rtol, atol=1e-12, err_msg=name)


WEIGHTS = {"alpha": 0.5, "beta": 0.3, "gamma": 0.7, "rec": 0.8, "match": 1.5}


@pytest.mark.parametrize(
    "changes", [WEIGHTS, WEIGHTS | {"reduction": "sum"}, WEIGHTS | {"target": "unseen"}, {"rec": 0.0}, {"beta": 0.0}]
)
def test_stage1_losses(changes: dict[str, Any]) -> None:
    model, config = build(), CONFIG.override({"loss": changes}, "test")
    draws = generator(7)
    x_0 = torch.randn(4, 8, generator=draws).double()
    u = torch.rand(4, generator=draws)
    # In fp32, as drawn: 1 - u - (cos^2 - 1 + u), whose roundings of 2^-24 the comparison must not see.
    t = (1 - u - 1.0 * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u)).clamp(0, 1).double()
    lam = (torch.randn(4, 5, 8, generator=draws) * 0.3 + 0.3).double()
    drawn = torch.randint(1, ITEMS + 1, HISTORY.shape, generator=draws)
    x_1 = model.item_embedding.weight[TARGETS]
    x_t = (1 - t[:, None]) * x_0 + t[:, None] * x_1
    prediction = model(HISTORY, x_t, t, torch.ones_like(t), lam)
    got = stage1_losses(model, config, HISTORY, TARGETS, generator(7))
    # lambda and t may differ by an fp32 rounding (6e-8), amplified by angles of 5 t and two blocks: below 1e-5.
    assert_losses(got, expected(model, config, prediction, x_1, drawn, None, config.loss.rec), 1e-5)


@pytest.mark.parametrize(
    ("flow", "loss"),
    [
        ({}, WEIGHTS),
        ({}, WEIGHTS | {"reduction": "sum"}),
        ({"tangent": "learned"}, WEIGHTS),
        ({"prior": "gaussian"}, WEIGHTS),
        ({"p_end": 0.0, "rho": 0.2}, WEIGHTS),
        ({}, {"gamma": 0.0}),
        ({}, {"match": 0.0, "beta": 0.0}),
    ],
)
def test_stage2_losses(flow: dict[str, Any], loss: dict[str, Any]) -> None:
    model, config = build().eval(), CONFIG.override({"flow": flow, "loss": loss}, "test")
    draws = generator(8)
    weight = model.item_embedding.weight.detach()
    if config.flow.prior == "anchor":
        u, keep = torch.rand(4, generator=draws), torch.rand(4, 8, generator=draws) < config.flow.rho
        rows = [[item for item in row if item] for row in HISTORY.tolist()]
        items = [row[int(x * len(row))] for row, x in zip(rows, u.tolist(), strict=True)]
        x_0 = weight[items] * keep
    else:
        x_0 = torch.randn(4, 8, generator=draws).double()
    t, u, end = torch.rand(3, 4, generator=draws).double()
    r = torch.where(end < config.flow.p_end, 1.0, t + u * (1 - t))
    lam = (torch.randn(4, 5, 8, generator=draws) * 0.3 + 0.3).double()
    drawn = torch.randint(1, ITEMS + 1, HISTORY.shape, generator=draws)
    x_1 = weight[TARGETS]
    x_t = (1 - t[:, None]) * x_0 + t[:, None] * x_1
    prediction = model(HISTORY, x_t, t, r, lam)
    v = (x_1 if config.flow.tangent == "conditional" else prediction.endpoint.detach()) - x_0
    tangent = None
    if config.loss.gamma:
        tangent = difference(endpoint_function(model, lam), x_t, t, r, v)
        assert tangent.abs().max() > 1e-2
    got = stage2_losses(model, config, HISTORY, TARGETS, generator(8))
    # As in stage 1: lambda and r are drawn in fp32.
    assert_losses(got, expected(model, config, prediction, x_1, drawn, tangent, config.loss.match), 1e-5)


def test_stage2_without_gamma_computes_no_tangent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a tangent was computed")

    monkeypatch.setattr("fave_fast.losses.predict_with_tangent", refuse)
    config = CONFIG.override({"loss": {"gamma": 0.0}}, "test")
    assert stage2_losses(build(), config, HISTORY, TARGETS, generator()).consistency == 0


@pytest.mark.parametrize("tangent", ["conditional", "learned"])
def test_stage2_with_frozen_embeddings_trains_the_rest(tangent: str) -> None:
    model, config = build().train(), CONFIG.override({"flow": {"tangent": tangent}}, "test")
    model.item_embedding.weight.requires_grad_(False)
    before = model.item_embedding.weight.clone()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    stage2_losses(model, config, HISTORY, TARGETS, generator()).total.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []
    optimiser.step()
    assert torch.equal(model.item_embedding.weight, before)


def test_stage2_trains_under_dropout() -> None:
    dropped = replace(MODEL, dropout=0.3, embedding_dropout=0.3)
    torch.manual_seed(0)
    losses = stage2_losses(build(dropped).train(), replace(CONFIG, model=dropped), HISTORY, TARGETS, generator())
    losses.total.backward()
    assert losses.total.isfinite()
    assert losses.consistency > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("stage", [stage1_losses, stage2_losses])
def test_both_stages_train_in_bf16(stage: Callable[..., Losses], device: str) -> None:
    model = build().float().to(device)
    with torch.autocast(device, torch.bfloat16):
        losses = stage(model, CONFIG, HISTORY.to(device), TARGETS.to(device))
    losses.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert model.blocks[0].qkv.weight.grad.abs().sum() > 0


def test_seed_decides_every_draw() -> None:
    model = build().eval()
    for stage in (stage1_losses, stage2_losses):
        first, again, other = (stage(model, CONFIG, HISTORY, TARGETS, generator(s)).total.item() for s in (1, 1, 2))
        assert first == again
        assert first != other

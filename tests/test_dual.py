"""The standing check: compiled dual = torch.func.jvp = central differences in fp64, and the tangent is not zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fave_fast import dual
from fave_fast.config import ModelConfig
from fave_fast.model import FAVE, Prediction

ITEMS = 12
MODEL = ModelConfig(
    d=8, blocks=2, heads=2, ffn_mult=2, max_length=5, dropout=0.3, embedding_dropout=0.3, delta=0.3, time_scale=5.0
)
HISTORY = torch.tensor([[0, 0, 3, 1, 3], [0, 0, 0, 0, 12], [5, 4, 3, 2, 1], [0, 7, 8, 9, 10]])
OTHER = [{"conditioning": name} for name in ("gate", "film", "token")]
LAYER = {"norm": "layer", "position": "none", "attention": "causal", "source_block": -1}
# Sums of up to 1e2 products in fp64 on values of order 1 to 10, in another order: 1e3 roundings of 1e-16.
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
# As in test_losses.py: of step 1e-5 and values of order 1, cut off after the second derivative and rounded.
H = 1e-5
DIFFERENCE = {"rtol": 1e-6, "atol": 1e-7}

Tangents = tuple[Prediction, Tensor]


def build(config: ModelConfig = MODEL, device: str = "cpu") -> FAVE:
    torch.manual_seed(0)
    model = FAVE(config, ITEMS).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.item_embedding.weight[0] = 0
    return model.to(device)


def points(device: str = "cpu") -> tuple[Tensor, ...]:
    """x_t, t, r, lambda, v."""
    draws = torch.Generator().manual_seed(1)
    x_t, v = torch.randn(2, 4, 8, generator=draws, dtype=torch.float64)
    t = 0.1 + 0.4 * torch.rand(4, generator=draws, dtype=torch.float64)
    lam = 0.3 + 0.3 * torch.randn(4, 5, 8, generator=draws, dtype=torch.float64)
    r = t + torch.tensor([0.1, 0.2, 0.4, 0.0])
    return tuple(one.to(device) for one in (x_t, t, r, lam, v))


def forward_mode(model: FAVE, history: Tensor, x_t: Tensor, t: Tensor, r: Tensor, lam: Tensor, v: Tensor) -> Tangents:
    """The oracle."""
    embedded = model.embed_history(history)
    model = copy.copy(model)  # the same parameters
    model._modules = {
        **model._modules,
        **{name: written_out(model._modules[name]) for name in ("blocks", "final_norm")},
    }

    def endpoint_of(x_t: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        prediction = model.encode(model.modulate(embedded, x_t, t, r, lam), model.present(history), forward_mode=True)
        return prediction.endpoint, prediction.source

    with sdpa_kernel(SDPBackend.MATH):  # the only one with a forward-mode derivative
        result: tuple[Tensor, ...] = torch.func.jvp(
            endpoint_of, (x_t, t, r), (v, torch.ones_like(t), torch.zeros_like(r)), has_aux=True
        )
    return Prediction(result[0], result[2]), result[1]


class WrittenOutLayerNorm(nn.Module):
    """PyTorch (2.13) takes mean and deviation for constants in the backward pass of `layer_norm`'s tangent."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def written_out(module: nn.Module) -> nn.Module:
    """The module, sharing its parameters, without PyTorch's `layer_norm`."""
    if isinstance(module, nn.LayerNorm):
        return WrittenOutLayerNorm(module)
    result = copy.copy(module)
    result._modules = {name: written_out(child) for name, child in module._modules.items() if child is not None}
    return result


def everything(predict: Callable[..., Tangents], model: FAVE, device: str) -> list[Tensor]:
    """Endpoint, source, tangent, and the gradient of a function of all three by every parameter and by x_t and v."""
    x_t, *rest, v = points(device)
    x_t, v = x_t.requires_grad_(), v.requires_grad_()
    torch.manual_seed(5)
    prediction, tangent = predict(model, HISTORY.to(device), x_t, *rest, v)
    results = [prediction.endpoint, prediction.source, tangent]
    loss = sum(((one + weight) ** 2).sum() for weight, one in enumerate(results, 1))
    leaves = [x_t, v, *(one for name, one in model.named_parameters() if not name.startswith("history_decoder"))]
    return [*results, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("changes", [{}, LAYER, *OTHER])
def test_dual_is_forward_mode(changes: dict[str, Any]) -> None:
    """Under dropout: both draw the same masks, one for value and tangent."""
    model = build(replace(MODEL, **changes)).train()
    got, want = everything(dual.predict, model, "cpu"), everything(forward_mode, model, "cpu")
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, **TIGHT)
    assert (want[2].abs().max(1).values > 1e-2).all(), "a zero tangent would equal another"


@torch.no_grad()
@pytest.mark.parametrize("changes", OTHER)
def test_dual_is_the_difference_quotient(changes: dict[str, Any]) -> None:
    """Where `test_compiled_dual` does not look: its compiler would take minutes."""
    model = build(replace(MODEL, dropout=0, embedding_dropout=0, **changes))
    x_t, t, r, lam, v = points()
    after, before = (model(HISTORY, x_t + step * v, t + step, r, lam).endpoint for step in (H, -H))
    tangent = dual.predict(model, HISTORY, x_t, t, r, lam, v)[1]
    torch.testing.assert_close(tangent, (after - before) / (2 * H), **DIFFERENCE)
    assert (tangent.abs().max(1).values > 1e-2).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_dual(device: str) -> None:
    blocks = 2 if device == "cuda" else 1  # a second one takes the CPU's compiler another 25 s
    model = build(replace(MODEL, dropout=0, embedding_dropout=0, blocks=blocks, source_block=0), device)
    compiled = everything(torch.compile(dual.predict), model, device)
    for one, two in zip(compiled, everything(forward_mode, model, device), strict=True):
        # The rotary tables are fp32: a cosine may differ by a rounding of 6e-8, amplified here less than a hundredfold.
        torch.testing.assert_close(one, two, rtol=0, atol=6e-6 * float(two.abs().max()))
    x_t, t, r, lam, v = points(device)
    with torch.no_grad():
        after, before = (model(HISTORY.to(device), x_t + step * v, t + step, r, lam).endpoint for step in (H, -H))
    torch.testing.assert_close(compiled[2], (after - before) / (2 * H), **DIFFERENCE)
    assert (compiled[2].abs().max(1).values > 1e-2).all()


@pytest.mark.gpu
def test_compiled_dual_trains_under_dropout() -> None:
    """`torch.compile` of `torch.func.jvp` failed here on torch 2.11."""
    model = build(device="cuda").train()
    results = everything(torch.compile(dual.predict), model, "cuda")
    assert all(bool(one.isfinite().all()) for one in results)
    assert (results[2].abs().max(1).values > 1e-3).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_dual_in_bf16(device: str) -> None:
    """Under autocast the tangent errs by at most twice what forward mode's does, both against fp64."""
    model = build(replace(MODEL, dropout=0, embedding_dropout=0), device)
    want = everything(forward_mode, model, device)[2].detach()
    x_t, t, r, lam, v = (one.float() for one in points(device))
    model.float()
    errors = []
    for predict in (dual.predict, forward_mode):
        with torch.autocast(device, torch.bfloat16), torch.no_grad():
            tangent = predict(model, HISTORY.to(device), x_t, t, r, lam, v)[1]
        errors.append(((tangent.double() - want).norm() / want.norm()).item())
    assert errors[0] <= 2 * errors[1]

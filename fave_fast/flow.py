"""Paths, priors, times and samplers: eqs. (2), (3), (14), (20), (25) and the Euler steps of stage 1.

Everything random takes a generator; None means PyTorch's global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fave_fast.config import FlowConfig
from fave_fast.model import FAVE


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """Eq. (2): x_t = (1 - t) x_0 + t x_1 for x_0, x_1 [B, D] and t [B]."""
    return torch.lerp(x_0, x_1, t[:, None])


def conditional_velocity(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Eq. (3): d x_t / dt = x_1 - x_0."""
    return x_1 - x_0


def learned_velocity(endpoint: Tensor, x_0: Tensor) -> Tensor:
    """Eq. (10): v = f(x_t, t, r) - x_0."""
    return endpoint - x_0


def mode_times(count: int, scale: float, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Heavy-tailed mode sampling (Esser et al. 2024): t = 1 - u - s (cos^2(pi u / 2) - 1 + u), u ~ U(0, 1); [count]."""
    u = torch.rand(count, device=device, generator=generator)
    # As (1 + s) (1 - u) - s cos^2: five launches, where the formula as it stands takes nine.
    cosine = torch.cos(math.pi / 2 * u)
    t = torch.rsub(u, 1 + scale, alpha=1 + scale).addcmul(cosine, cosine, value=-scale)
    return t.clamp(0, 1)  # rounding may step outside by an ulp


def stage2_times(
    count: int, p_end: float, device: torch.device, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. (20): t ~ U(0, 1); r = 1 with probability p_end, else U(t, 1). Two tensors [count]."""
    t, u, end = torch.rand(3, count, device=device, generator=generator)
    return t, torch.where(end < p_end, torch.ones_like(t), t + u * (1 - t))


def gaussian_prior(count: int, d: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """x_0 ~ N(0, I) of stage 1; [count, d]."""
    return torch.randn(count, d, device=device, generator=generator)


def anchor_positions(history: Tensor, uniform: Tensor) -> Tensor:
    """The position [B] of e_k in a left-padded history [B, L]: the floor(u n)-th oldest of its n items.

    uniform is u [B] in [0, 1). Padding is never chosen; a history without items gives its last position.
    """
    lengths = (history != 0).sum(1)
    oldest_first = (uniform * lengths).long().clamp_max((lengths - 1).clamp_min(0))
    return (history.shape[1] - lengths + oldest_first).clamp_max(history.shape[1] - 1)


def anchor_prior(embedding: Tensor, history: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
    """Eq. (14): x_0 = m * e_k.

    Args:
        embedding: [N + 1, D] item embeddings.
        history: int64 [B, L], left-padded with 0.
        positions: int64 [B], which position of the history is k.
        keep: m, [B, D] or [D], 1 where a channel of the anchor is kept.
    """
    items = history.gather(1, positions[:, None]).squeeze(1)
    return embedding[items] * keep


def draw_anchor(embedding: Tensor, history: Tensor, rho: float, generator: torch.Generator | None = None) -> Tensor:
    """Eq. (14) with its draws: k uniform over the history's items, m ~ Bernoulli(rho) for each channel; [B, D]."""
    count = len(history)
    uniform = torch.rand(count, device=history.device, generator=generator)
    keep = torch.rand(count, embedding.shape[1], device=history.device, generator=generator) < rho
    return anchor_prior(embedding, history, anchor_positions(history, uniform), keep.to(embedding.dtype))


@dataclass(frozen=True)
class InferenceNoise:
    """All that is random in one answer, drawn once from a seed.

    Nothing in it depends on the user or the batch, so the same history gets the same list alone or among others.
    """

    keep: Tensor  # [D]: m of eq. (14)
    anchor: Tensor  # []: u of `anchor_positions`, just below 1 for "the last item"
    gaussian: Tensor  # [D]: x_0 where the prior is Gaussian
    lam: Tensor  # [L, D], newest position last: lambda of eq. (9)

    @classmethod
    def draw(cls, model: FAVE, flow: FlowConfig, seed: int | None = None) -> InferenceNoise:
        """Draw on the CPU, so that every device gets the same numbers, and move to the model's device and dtype."""
        generator = torch.Generator().manual_seed(flow.seed if seed is None else seed)
        d, length = model.config.d, model.config.max_length
        cpu = torch.device("cpu")
        keep = (torch.rand(d, generator=generator) < flow.rho).float()
        anchor = torch.rand((), generator=generator)
        if flow.anchor_at_inference == "last":
            anchor = torch.tensor(1 - 2.0**-24)
        gaussian = torch.randn(d, generator=generator)
        if flow.lambda_at_inference == "mean":
            lam = torch.full((length, d), model.config.delta)
        else:
            lam = model.draw_lambda((length, d), cpu, generator)
        weight = model.item_embedding.weight
        return cls(*(part.to(weight.device, weight.dtype) for part in (keep, anchor, gaussian, lam)))

    def prior(self, model: FAVE, flow: FlowConfig, history: Tensor) -> Tensor:
        """x_0 [B, D] of `history` [B, L] under the prior that `flow` names."""
        if flow.prior == "gaussian":
            return self.gaussian.expand(len(history), -1)
        positions = anchor_positions(history, self.anchor.float().expand(len(history)))
        return anchor_prior(model.item_embedding.weight, history, positions, self.keep)

    def lambdas(self, history: Tensor) -> Tensor:
        """Lambda [B, L, D] for `history` [B, L], L at most the model's longest."""
        return self.lam[-history.shape[1] :].expand(len(history), -1, -1)


def one_step(model: FAVE, history: Tensor, x_0: Tensor, lam: Tensor) -> Tensor:
    """Eq. (25): the endpoint f(x_0, 0, 1) [B, D], one pass."""
    t = x_0.new_zeros(len(x_0))
    endpoint: Tensor = model(history, x_0, t, torch.ones_like(t), lam).endpoint
    return endpoint


def encode(model: FAVE, flow: FlowConfig, noise: InferenceNoise, histories: npt.NDArray[np.int64]) -> Tensor:
    """Eq. (25) as it is served: the endpoint [B, D] for histories int64 [B, L], left-padded with 0."""
    history = torch.from_numpy(histories).to(model.item_embedding.weight.device)
    return one_step(model, history, noise.prior(model, flow, history), noise.lambdas(history))


def euler(
    model: FAVE,
    history: Tensor,
    x_0: Tensor,
    lam: Tensor,
    steps: int,
    on_step: Callable[[Tensor], None] = lambda x: None,
) -> Tensor:
    """`steps` Euler steps of d x / dt = f(x_t, t, 1) - x_0 from t = 0 to 1; [B, D].

    This is how FMRec samples (30 steps from a Gaussian x_0). One step is eq. (25). `on_step` gets x after each step.

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    x = x_0
    r = x_0.new_ones(len(x_0))
    for step in range(steps):
        endpoint = model(history, x, r * (step / steps), r, lam).endpoint
        x = x + learned_velocity(endpoint, x_0) / steps
        on_step(x)
    return x

"""How FMRec and DiffuRec answer, written anew from their description, on this package's network.

Both need one pass of the network a step, 30 and 32 of them. Everything is drawn on the device and nothing waits for the
host; their published code draws lambda on the host at every step and copies it over, which is most of its time
(`MEASURED_BEFOREHAND`). Noise is drawn anew in each answer, as theirs is.

Sources: FMRec (github.com/FengLiu-1/FMRec, `euler_sampler`, 30 steps, start 0.001); DiffuRec (arXiv 2304.00686,
github.com/WHUIR/DiffuRec, truncated linear schedule, 32 steps).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fave_fast.model import FAVE

# Their published code, milliseconds for one batch of histories of 50 items among 12,101, on an H200 (driver 580, torch
# 2.11), before this package existed: not measured again here.
MEASURED_BEFOREHAND = {
    "FMRec, its published code": {1: 210.0, 64: 232.0, 512: 1026.0},
    "DiffuRec, its published code": {1: 126.0, 64: 219.0, 512: 907.0},
}


FMREC_STEPS, DIFFUREC_STEPS = 30, 32


class Sampler(nn.Module):
    """What both share: the network's prediction of x_1 at each of its times, lambda drawn anew for every position."""

    times: Tensor  # [steps], from 0 to 1, in the order in which they are taken

    def __init__(self, model: FAVE, times: list[float]) -> None:
        super().__init__()
        self.model = model
        device = model.item_embedding.weight.device
        self.register_buffer("times", torch.tensor(times, device=device), persistent=False)

    def predictions(self, history: Tensor) -> Callable[[int, Tensor], Tensor]:
        """For int64 [B, L] the function of a step's number and x [B, D] that gives [B, D]."""
        model, present = self.model, self.model.present(history)
        embedded = model.embed_history(history)
        features = model.time_features(self.times, torch.ones_like(self.times))  # r = 1, as these are trained

        def predict(step: int, x: Tensor) -> Tensor:
            lam = torch.randn_like(embedded) * model.config.delta + model.config.delta
            endpoint: Tensor = model.encode(model.conditioning(embedded, x + features[step], lam), present).endpoint
            return endpoint

        return predict

    def noise(self, history: Tensor) -> Tensor:
        """N(0, I) [B, D]."""
        weight = self.model.item_embedding.weight
        return torch.randn(len(history), weight.shape[1], device=weight.device, dtype=weight.dtype)


class FMRec(Sampler):
    """Euler steps along v = f(x, t) - z from Gaussian noise z."""

    def __init__(self, model: FAVE, steps: int = FMREC_STEPS, start: float = 1e-3) -> None:
        super().__init__(model, [step / steps * (1 - start) + start for step in range(steps)])

    def forward(self, history: Tensor) -> Tensor:
        """Endpoints [B, D] of histories int64 [B, L], left-padded with 0."""
        predict, steps = self.predictions(history), len(self.times)
        z = self.noise(history)
        x = z
        for step in range(steps):
            x = x + (predict(step, x) - z) / steps
        return x


class DiffuRec(Sampler):
    """The reverse diffusion from Gaussian noise, the network predicting x_0 of each step."""

    def __init__(self, model: FAVE, steps: int = DIFFUREC_STEPS) -> None:
        super().__init__(model, [step / steps for step in reversed(range(steps))])
        self.kept, self.carried, self.deviation = posterior(steps)

    def forward(self, history: Tensor) -> Tensor:
        """Endpoints [B, D] of histories int64 [B, L], left-padded with 0."""
        predict, steps = self.predictions(history), len(self.times)
        x = self.noise(history)
        for number, step in enumerate(reversed(range(steps))):
            x = self.kept[step] * predict(number, x) + self.carried[step] * x
            if step > 0:
                x = x + self.deviation[step] * torch.randn_like(x)
        return x


def variances(steps: int) -> np.ndarray:
    """Of the noise added in each step: linear from 0.1 / steps + 0.01 to 20 / steps + 0.01, DiffuRec's "trunc_lin"."""
    return np.linspace(0.1 / steps + 0.01, 20 / steps + 0.01, steps)


def diffused(steps: int) -> tuple[list[float], list[float]]:
    """Of q(x_t | x_0): the factors of x_0 and of the noise, for each t from 0."""
    signal = np.cumprod(1 - variances(steps))
    return np.sqrt(signal).tolist(), np.sqrt(1 - signal).tolist()


def posterior(steps: int) -> tuple[list[float], list[float], list[float]]:
    """Of q(x_{t-1} | x_t, x_0): the factors of x_0 and of x_t, and the standard deviation, for each t from 0."""
    beta = variances(steps)
    signal = np.cumprod(1 - beta)
    before = np.append(1.0, signal[:-1])
    kept = beta * np.sqrt(before) / (1 - signal)
    carried = (1 - before) * np.sqrt(1 - beta) / (1 - signal)
    variance = beta * (1 - before) / (1 - signal)
    return kept.tolist(), carried.tolist(), np.sqrt(variance).tolist()


class Lists(nn.Module):
    """A sampler, or any other way to an endpoint, with the product and `topk` that make lists of it."""

    def __init__(self, endpoints: nn.Module, table: Tensor, k: int) -> None:
        super().__init__()
        self.endpoints, self.k = endpoints, k
        self.register_buffer("table", table, persistent=False)

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, K] and item numbers [B, K] for int64 [B, L]; items of the history are no candidates."""
        scores = F.linear(self.endpoints(history), self.table)
        scores = scores.scatter(1, F.pad(history, (1, 0)), -torch.inf)  # and number 0, the padding
        best: tuple[Tensor, Tensor] = scores.topk(self.k)
        return best

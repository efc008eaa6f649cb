"""How FMRec and DiffuRec answer, written anew from their description, on this package's network.

Both need one pass of the network a step, 30 and 32 of them. Everything is drawn on the device and nothing waits for the
host; their published code draws lambda on the host at every step and copies it over, which is most of its time
(`MEASURED_BEFOREHAND`). Noise is drawn anew in each answer, as theirs is.

Sources: FMRec (github.com/FengLiu-1/FMRec, `euler_sampler`, 30 steps, start 0.001); DiffuRec (arXiv 2304.00686,
github.com/WHUIR/DiffuRec, truncated linear schedule, 32 steps).
"""

from __future__ import annotations

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


class Sampler(nn.Module):
    """What both share: the network's prediction of x_1 at a time, lambda drawn anew for every position."""

    def __init__(self, model: FAVE) -> None:
        super().__init__()
        self.model = model

    def predict(self, embedded: Tensor, present: Tensor, x: Tensor, t: float) -> Tensor:
        """[B, D] from the embedded history [B, L, D], x [B, D] and a time from 0 to 1."""
        model = self.model
        lam = torch.randn_like(embedded) * model.config.delta + model.config.delta
        time = model.time_embedding(torch.full((len(x),), t, device=x.device))
        endpoint: Tensor = model.encode(embedded + lam * (x + time)[:, None], present).endpoint
        return endpoint


class FMRec(Sampler):
    """Euler steps along v = f(x, t) - z from Gaussian noise z."""

    def __init__(self, model: FAVE, steps: int = 30, start: float = 1e-3) -> None:
        super().__init__(model)
        self.steps, self.start = steps, start

    def forward(self, history: Tensor) -> Tensor:
        """Endpoints [B, D] of histories int64 [B, L], left-padded with 0."""
        embedded, present = self.model.embed_history(history), history != 0
        z = torch.randn_like(embedded[:, -1])
        x = z
        for step in range(self.steps):
            t = step / self.steps * (1 - self.start) + self.start
            x = x + (self.predict(embedded, present, x, t) - z) / self.steps
        return x


class DiffuRec(Sampler):
    """The reverse diffusion from Gaussian noise, the network predicting x_0 of each step."""

    def __init__(self, model: FAVE, steps: int = 32) -> None:
        super().__init__(model)
        self.kept, self.carried, self.noise = posterior(steps)

    def forward(self, history: Tensor) -> Tensor:
        """Endpoints [B, D] of histories int64 [B, L], left-padded with 0."""
        embedded, present = self.model.embed_history(history), history != 0
        x = torch.randn_like(embedded[:, -1])
        steps = len(self.kept)
        for step in reversed(range(steps)):
            predicted = self.predict(embedded, present, x, step / steps)
            x = self.kept[step] * predicted + self.carried[step] * x
            if step > 0:
                x = x + self.noise[step] * torch.randn_like(x)
        return x


def posterior(steps: int) -> tuple[list[float], list[float], list[float]]:
    """Of q(x_{t-1} | x_t, x_0): the factors of x_0 and of x_t, and the standard deviation, for each t from 0.

    Noise variances rise linearly from 0.1 / steps + 0.01 to 20 / steps + 0.01, DiffuRec's truncated linear schedule.
    """
    beta = np.linspace(0.1 / steps + 0.01, 20 / steps + 0.01, steps)
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

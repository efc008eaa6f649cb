"""What the flow of a trained model does: one step against N, straightness, how far the prior is, what x_t says.

`diagnose` measures it on test histories, `bench.quality` keeps it with each run, before and after stage 2, and
`bench.figures` draws it. Everything is drawn from fixed seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fave_fast import dual
from fave_fast.config import Config
from fave_fast.data import Interactions, gather_histories, history_exclusions
from fave_fast.engine import merge_drawn
from fave_fast.evaluate import LIST_LENGTH, Positions, target_starts
from fave_fast.flow import InferenceNoise, conditional_velocity, euler, gaussian_prior, interpolate, one_step
from fave_fast.metrics import coverage, intra_list_diversity, rank_metrics
from fave_fast.model import FAVE
from fave_fast.ops import Exclusions, rank_count, score_topk

STEPS = (1, 2, 5, 10, 30)
SAMPLES = (1, 4, 16)
MOST_USERS = 4096  # as many as fill a GPU; coverage is a share of the catalogue that lists of so many users show
_SEED = 1


@dataclass(frozen=True)
class Asked:
    """Histories with their targets, and the model that is asked, in evaluation mode."""

    model: FAVE
    config: Config
    history: Tensor  # int64 [U, L], left-padded with 0
    targets: Tensor  # int64 [U]
    exclude: Exclusions

    @classmethod
    def of(cls, model: FAVE, config: Config, data: Interactions, targets: Positions, most: int = MOST_USERS) -> Asked:
        """Up to `most` of the flat positions `targets`, evenly spread."""
        targets = targets[np.linspace(0, len(targets) - 1, min(len(targets), most)).astype(np.int64)]
        starts, device = target_starts(data, targets), model.item_embedding.weight.device
        history = gather_histories(data.items, starts, targets, config.model.max_length)
        seen = (torch.from_numpy(part).to(device) for part in history_exclusions(data.items, starts, targets))
        wanted = torch.from_numpy(data.items[targets].astype(np.int64))
        return cls(model, config, torch.from_numpy(history).to(device), wanted.to(device), Exclusions(*seen))

    @property
    def table(self) -> Tensor:
        """[N + 1, D]."""
        return self.model.item_embedding.weight.detach()

    def noise(self, draw: int = 0) -> InferenceNoise:
        """What an answer is drawn with; `draw` 0 is what is served."""
        return InferenceNoise.draw(self.model, self.config.flow, self.config.flow.seed + draw)

    def prior(self, name: str | None = None) -> Tensor:
        """x_0 [U, D] as it is served, or of the prior called `name`, a Gaussian one drawn anew for each user."""
        if name == "gaussian":
            draws = torch.Generator().manual_seed(_SEED)
            noise = gaussian_prior(len(self.history), self.table.shape[1], torch.device("cpu"), draws)
            return noise.to(self.table)
        noise = self.noise()
        flow = self.config.flow
        if name == "anchor":
            flow = Config().flow  # whose prior it is; what is drawn lies in `noise`
        return noise.prior(self.model, flow, self.history)

    def one_step(self, x_0: Tensor, noise: InferenceNoise | None = None) -> Tensor:
        """f(x_0, 0, 1) [U, D], lambda being that of `noise`, or as it is served."""
        noise = noise or self.noise()
        return self._in_parts(lambda some: one_step(self.model, some[0], some[1], noise.lambdas(some[0])), x_0)

    def euler(self, x_0: Tensor, steps: int) -> Tensor:
        """The end [U, D] of so many Euler steps."""
        noise = self.noise()
        return self._in_parts(lambda some: euler(self.model, some[0], some[1], noise.lambdas(some[0]), steps), x_0)

    def tangent(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """[v, 1, 0] . grad f(x_t, t, 1) [U, D]."""
        noise = self.noise()

        def part(some: tuple[Tensor, ...]) -> Tensor:
            history, x_t, t, v = some
            return dual.predict(self.model, history, x_t, t, torch.ones_like(t), noise.lambdas(history), v)[1]

        return self._in_parts(part, x_t, t, v)

    def _in_parts(self, call: Callable[[tuple[Tensor, ...]], Tensor], *rows: Tensor) -> Tensor:
        size = 4096 if self.table.device.type == "cuda" else 512
        parts: Iterator[tuple[Tensor, ...]] = zip(*(one.split(size) for one in (self.history, *rows)), strict=True)
        return torch.cat([call(some) for some in parts])

    def lists(self, endpoint: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and items [U, 20] without the history."""
        return score_topk(endpoint, self.table, LIST_LENGTH, self.exclude)

    def quality(self, endpoint: Tensor) -> dict[str, float]:
        """HR@20 and NDCG@20, filtered."""
        found = rank_metrics(rank_count(endpoint, self.table, self.targets, self.exclude).cpu(), (LIST_LENGTH,))
        return {name: found[name] for name in ("HR@20", "NDCG@20")}


@torch.no_grad()
def diagnose(model: FAVE, config: Config, data: Interactions, targets: Positions) -> dict[str, Any]:
    """Everything that this module measures, of a model in evaluation mode, on the flat positions `targets`."""
    asked = Asked.of(model, config, data, targets)
    return {
        "users": len(asked.history),
        "steps": steps(asked),
        "straightness": straightness(asked),
        "distance": distances(asked),
        "x_0": dependence(asked),
        "samples": samples(asked),
    }


def steps(asked: Asked) -> dict[str, Any]:
    """For 1 to 30 Euler steps from the served prior: quality, and the end's relative distance from the one step's."""
    x_0 = asked.prior()
    first = asked.euler(x_0, 1)
    result = {}
    for count in STEPS:
        end = asked.euler(x_0, count)
        result[str(count)] = {**asked.quality(end), "gap": _relative(end - first, first)}
    return result


def straightness(asked: Asked) -> dict[str, float]:
    """The norm of f's total derivative along the path from the served prior to the target, at uniform t.

    `jvp` as a share of the endpoint's norm (0: a straight path); `l_cons` is the loss of eqs. (22) and (23).
    """
    x_0, x_1 = asked.prior(), asked.table[asked.targets]
    t = torch.rand(len(x_0), generator=torch.Generator().manual_seed(_SEED)).to(x_0)
    tangent = asked.tangent(interpolate(x_0, x_1, t), t, conditional_velocity(x_0, x_1))
    return {"jvp": _relative(tangent, asked.one_step(x_0)), "l_cons": tangent.square().mean().item()}


def distances(asked: Asked) -> dict[str, float]:
    """Mean Euclidean distance of priors to the target's embedding, and the cosine's for the anchor.

    `anchor of another user` is what an anchor that says nothing about its own user would have.
    """
    x_1 = asked.table[asked.targets]
    anchor, noise = asked.prior("anchor"), asked.prior("gaussian")
    cosine = torch.nn.functional.cosine_similarity(anchor, x_1, dim=-1)
    return {
        "anchor": (anchor - x_1).norm(dim=-1).mean().item(),
        "anchor of another user": (anchor.roll(1, 0) - x_1).norm(dim=-1).mean().item(),
        "gaussian": (noise - x_1).norm(dim=-1).mean().item(),
        "anchor, cosine": (1 - cosine).mean().item(),
    }


def dependence(asked: Asked) -> dict[str, float]:
    """How much of the one step's answer x_0 decides, everything else equal.

    `change` is the endpoint's relative change for another draw of x_0 (another mask, or other noise), `change, another
    user's` for that of another user; `overlap` the share of the top 20 that stays.
    """
    x_0 = asked.prior()
    end = asked.one_step(x_0)
    other = asked.noise(draw=1).prior(asked.model, asked.config.flow, asked.history)
    result = {}
    for name, changed in (("", other), (", another user's", x_0.roll(1, 0))):
        found = asked.one_step(changed)
        result[f"change{name}"] = _relative(found - end, end)
        result[f"overlap{name}"] = _overlap(asked.lists(found)[1], asked.lists(end)[1])
    return result


def samples(asked: Asked) -> dict[str, Any]:
    """Filtered lists of the best of n drawn endpoints (`flow.n_samples`): hits, NDCG, coverage and ILD."""
    result = {}
    drawn: list[tuple[Tensor, Tensor]] = []
    for count in SAMPLES:
        for draw in range(len(drawn), count):
            noise = asked.noise(draw)
            x_0 = noise.prior(asked.model, asked.config.flow, asked.history)
            drawn.append(asked.lists(asked.one_step(x_0, noise)))
        items = merge_drawn(drawn, LIST_LENGTH)[1]
        hit = items == asked.targets[:, None]
        place = torch.where(hit.any(1), hit.long().argmax(1) + 1, LIST_LENGTH + 1)
        found = rank_metrics(place.cpu(), (LIST_LENGTH,))
        result[str(count)] = {
            "HR@20": found["HR@20"],
            "NDCG@20": found["NDCG@20"],
            "coverage@20": coverage(items, asked.model.num_items),
            "ild@20": intra_list_diversity(items, asked.table),
        }
    return result


def _relative(change: Tensor, of: Tensor) -> float:
    """The mean of the rows' norms relative to those of `of`."""
    return (change.norm(dim=-1) / of.norm(dim=-1)).mean().item()


def _overlap(one: Tensor, other: Tensor) -> float:
    """The mean share of the items [U, 20] of one list that the other has."""
    there = (one[:, :, None] == other[:, None, :]) & (one[:, :, None] != 0)
    return (there.any(2).sum(1) / (one != 0).sum(1).clamp_min(1)).mean().item()

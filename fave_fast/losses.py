"""The paper's losses, equation by equation, and the two stages' objectives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fave_fast import dual, flow
from fave_fast.config import Config
from fave_fast.model import FAVE, Prediction
from fave_fast.ops import cross_entropy
from fave_fast.ops.cross_entropy import Pairs
from fave_fast.precision import widened

Reduction = Literal["mean", "sum"]


@functools.cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scalar; made before a step is captured, for the first of each kind is not."""
    return torch.full((), value, dtype=dtype, device=device)


@dataclass(frozen=True)
class Losses:
    """One batch's losses, scalars. `match` is L_rec in stage 1, L_match in stage 2; stage 1 has no `consistency`.

    Of a network that computes beside the current stream none is to be read before that is joined.
    """

    weighted: tuple[tuple[float, Tensor], ...]  # what the total consists of, with its weights
    match: Tensor
    target: Tensor
    source: Tensor
    consistency: Tensor

    @property
    def total(self) -> Tensor:
        """The weighted sum."""
        counted = [part if weight == 1 else weight * part for weight, part in self.weighted]
        return sum(counted[1:], counted[0]) if counted else torch.zeros_like(self.match)

    def backward(self, scale: float = 1.0) -> None:
        """The gradients of `scale` times the total, which no gradient needs, nor do they need the losses' values."""
        parts = [(weight, part) for weight, part in self.weighted if part.requires_grad]
        factors = [_constant(scale * weight, part.dtype, part.device) for weight, part in parts]
        torch.autograd.backward([part for _, part in parts], factors)


@dataclass(frozen=True)
class Share:
    """A part of a batch that several ranks have in common; its losses' means, weighted by shares, are the batch's."""

    part: float  # of the batch's samples; 0: this rank has none, and what it computes counts for nothing
    summed: Callable[[Tensor], Tensor]  # over ranks

    def divisor(self, count: Tensor) -> Tensor:
        """What a sum over `count` places is to be divided by, where ranks' counts go otherwise than their samples."""
        everywhere = self.summed(count * float(self.part > 0))
        return everywhere.clamp_min(1) * self.part if self.part > 0 else count.clamp_min(1)


def _squared(error: Tensor, reduction: Reduction) -> Tensor:
    """Squared error [B, D]: mean over the batch, mean or sum over the channels; in fp32 or above."""
    return averaged(widened(error).square(), reduction)


def averaged(squares: Tensor, reduction: Reduction) -> Tensor:
    """Squares [B, D]: mean over the batch, mean or sum over the channels."""
    # Row by row first: PyTorch adds 65,536 numbers up in one program, 13 us of a training step (H200).
    rows = squares.mean(-1) if reduction == "mean" else squares.sum(-1)
    return rows.mean()


def matching_loss(endpoint: Tensor, x_1: Tensor, reduction: Reduction = "mean") -> Tensor:
    """L_rec of eq. (11) and L_match of eq. (21): ||f(x_t, t, r) - x_1||^2 for [B, D] tensors."""
    return _squared(endpoint - x_1, reduction)


def target_loss(endpoint: Tensor, embedding: Tensor, targets: Tensor, seen: Pairs | None = None) -> Tensor:
    """L_tgt of eq. (12): cross-entropy of f . e_j over items 1 to N.

    Args:
        endpoint: [B, D].
        embedding: [N + 1, D]; row 0 is padding and no candidate.
        targets: int64 [B], from 1 to N.
        seen: items that j leaves out, row by row: those that a filtered ranking does not choose among either.
    """
    return cross_entropy(endpoint, embedding, targets, seen)


def absent_items(history: Tensor, num_items: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Uniform items, one for each position of `history` [B, L], and whether each is to count [B, L].

    A draw counts if its position holds an item and the draw is not in that history itself.
    """
    drawn = torch.randint(1, num_items + 1, history.shape, device=history.device, generator=generator)
    # Membership by search in the sorted row: B L log L, where comparing all pairs would make a [B, L, L] tensor.
    ordered = history.sort(dim=1).values
    found = torch.searchsorted(ordered, drawn).clamp_max(history.shape[1] - 1)
    return drawn, (ordered.gather(1, found) != drawn) & (history != 0)


def source_loss(
    model: FAVE,
    source: Tensor,
    history: Tensor,
    kind: Literal["sampled", "dense"],
    generator: torch.Generator | None,
    share: Share | None = None,
) -> Tensor:
    """L_src of eq. (13): squared error of D(E_u) against the 0/1 history vector A_u.

    `sampled`: mean over the history's positions (A_u = 1) and as many drawn absent items (A_u = 0), memory B x L x D.
    `dense`: mean over all N items. source is E_u [B, D], history int64 [B, L]. `share`: where B is a rank's part.
    """
    decoder = model.history_decoder
    if kind == "dense":
        wanted = torch.zeros(len(history), model.num_items + 1, device=history.device, dtype=source.dtype)
        wanted.scatter_(1, history, 1.0)
        return _squared(decoder(source) - wanted[:, 1:], "mean")
    drawn, counts = absent_items(history, model.num_items, generator)
    items = torch.cat((history, drawn), dim=1)  # [B, 2 L]
    weights = torch.cat((history != 0, counts), dim=1).to(source.dtype)
    wanted = torch.cat((torch.ones_like(history), torch.zeros_like(history)), dim=1)
    error = (decoder.at(source, items) - wanted).square() * weights
    count = weights.sum()
    return error.sum() / (count.clamp_min(1) if share is None else share.divisor(count))


def predict_with_tangent(
    model: FAVE, history: Tensor, x_t: Tensor, t: Tensor, r: Tensor, lam: Tensor, v: Tensor
) -> tuple[Prediction, Tensor]:
    """f(x_t, t, r) and its derivative along [v, 1, 0], [B, D], by one forward-mode pass: eqs. (22) and (23)."""
    return dual.predict(model, history, x_t, t, r, lam, v)


def consistency_loss(tangent: Tensor, reduction: Reduction = "mean") -> Tensor:
    """L_cons of eqs. (22) and (23): ||[v, 1, 0] . grad f||^2, the tangent [B, D] coming from one forward-mode pass."""
    return _squared(tangent, reduction)


class Network(Protocol):
    """What the objectives ask of a network over one batch of histories."""

    def embed(self, items: Tensor) -> Tensor:
        """The table's rows of items int64 [B], [B, D]."""

    def predict(self, x_t: Tensor, t: Tensor, r: Tensor) -> Prediction:
        """f(x_t, t, r) for x_t [B, D], t and r [B]."""

    def predict_with_tangent(self, x_t: Tensor, t: Tensor, r: Tensor, v: Tensor) -> tuple[Prediction, Tensor]:
        """`predict`, and the endpoint's derivative [B, D] along [v, 1, 0]."""

    def draw_anchor(self, rho: float, generator: torch.Generator | None) -> Tensor:
        """x_0 of eq. (14), [B, D]."""

    def source_loss(
        self, source: Tensor, kind: Literal["sampled", "dense"], generator: torch.Generator | None
    ) -> Tensor:
        """L_src of eq. (13) for E_u [B, D]."""

    def matching_loss(self, endpoint: Tensor, x_1: Tensor, reduction: Reduction) -> Tensor:
        """L_rec of eq. (11) and L_match of eq. (21) for [B, D] tensors."""

    def target_loss(self, endpoint: Tensor, targets: Tensor, kind: Literal["all", "unseen"]) -> Tensor:
        """L_tgt of eq. (12), of int64 targets [B], over all items or without those of each history."""


class ReferenceNetwork:
    """The reference network on left-padded histories [B, L]; lambda is drawn when it is first needed."""

    def __init__(
        self, model: FAVE, history: Tensor, generator: torch.Generator | None, share: Share | None = None
    ) -> None:
        self.model, self.history, self.generator, self.share = model, history, generator, share
        self._lam: Tensor | None = None

    def _lambda(self, like: Tensor) -> Tensor:
        if self._lam is None:
            if not self.model.conditioning.reads_lambda:
                return like.new_zeros(())
            shape = (*self.history.shape, self.model.config.d)
            self._lam = self.model.draw_lambda(shape, self.history.device, self.generator).to(like.dtype)
        return self._lam

    def embed(self, items: Tensor) -> Tensor:
        """As `Network`, and so are the others."""
        rows: Tensor = self.model.item_embedding(items)
        return rows

    def predict(self, x_t: Tensor, t: Tensor, r: Tensor) -> Prediction:
        """In one pass."""
        prediction: Prediction = self.model(self.history, x_t, t, r, self._lambda(x_t))
        return prediction

    def predict_with_tangent(self, x_t: Tensor, t: Tensor, r: Tensor, v: Tensor) -> tuple[Prediction, Tensor]:
        """By forward mode."""
        return predict_with_tangent(self.model, self.history, x_t, t, r, self._lambda(x_t), v)

    def draw_anchor(self, rho: float, generator: torch.Generator | None) -> Tensor:
        """By `flow.draw_anchor`."""
        return flow.draw_anchor(self.model.item_embedding.weight, self.history, rho, generator)

    def source_loss(
        self, source: Tensor, kind: Literal["sampled", "dense"], generator: torch.Generator | None
    ) -> Tensor:
        """By the function of this name."""
        return source_loss(self.model, source, self.history, kind, generator, self.share)

    def matching_loss(self, endpoint: Tensor, x_1: Tensor, reduction: Reduction) -> Tensor:
        """By the function of this name."""
        return matching_loss(endpoint, x_1, reduction)

    def target_loss(self, endpoint: Tensor, targets: Tensor, kind: Literal["all", "unseen"]) -> Tensor:
        """By the function of this name."""
        table, seen = self.model.item_embedding.weight, None
        if kind == "unseen":
            users = torch.arange(len(self.history), device=self.history.device)
            seen = Pairs(users.repeat_interleave(self.history.shape[1]), self.history.flatten())
        return target_loss(endpoint, table, targets, seen)


Objective = Callable[[Network, Config, Tensor, torch.Generator | None], Losses]
"""A network over one batch of histories, the configuration, int64 targets [B], a generator: the losses."""


def stage1_objective(
    network: Network, config: Config, targets: Tensor, generator: torch.Generator | None = None
) -> Losses:
    """Stage 1: rec L_rec + alpha L_tgt + beta L_src with r = 1, heavy-tailed t and, in the paper, x_0 ~ N(0, I).

    Targets int64 [B].
    """
    x_1 = network.embed(targets)  # eq. (7)
    x_0 = _prior(config.flow.prior_stage1, network, config, x_1, generator)
    t = flow.mode_times(len(targets), config.flow.mode_scale, targets.device, generator).to(x_1.dtype)
    prediction = network.predict(flow.interpolate(x_0, x_1, t), t, torch.ones_like(t))
    return _weigh(network, config, config.loss.rec, prediction, x_1, targets, None, generator)


def stage2_objective(
    network: Network, config: Config, targets: Tensor, generator: torch.Generator | None = None
) -> Losses:
    """Stage 2, eq. (24): match L_match + gamma L_cons + alpha L_tgt + beta L_src from the configured prior.

    Targets int64 [B]. The item embeddings stay as they are: the trainer freezes them. With gamma = 0 no tangent is
    computed.
    """
    count = len(targets)
    x_1 = network.embed(targets)
    x_0 = _prior(config.flow.prior, network, config, x_1, generator)
    t, r = (part.to(x_1.dtype) for part in flow.stage2_times(count, config.flow.p_end, targets.device, generator))
    x_t = flow.interpolate(x_0, x_1, t)
    if config.loss.gamma == 0:
        prediction, tangent = network.predict(x_t, t, r), None
    else:
        v = flow.conditional_velocity(x_0, x_1)
        if config.flow.tangent == "learned":
            with torch.no_grad():
                v = flow.learned_velocity(network.predict(x_t, t, r).endpoint, x_0).to(x_t.dtype)
        prediction, tangent = network.predict_with_tangent(x_t, t, r, v)
    return _weigh(network, config, config.loss.match, prediction, x_1, targets, tangent, generator)


def _prior(name: str, network: Network, config: Config, x_1: Tensor, generator: torch.Generator | None) -> Tensor:
    """x_0 like x_1 [B, D]."""
    if name == "anchor":
        return network.draw_anchor(config.flow.rho, generator)
    return flow.gaussian_prior(len(x_1), x_1.shape[1], x_1.device, generator).to(x_1.dtype)


OBJECTIVES: tuple[Objective, Objective] = (stage1_objective, stage2_objective)


def _weigh(
    network: Network,
    config: Config,
    matching: float,
    prediction: Prediction,
    x_1: Tensor,
    targets: Tensor,
    tangent: Tensor | None,
    generator: torch.Generator | None,
) -> Losses:
    weights = config.loss
    zero = x_1.new_zeros((), dtype=torch.promote_types(x_1.dtype, torch.float32))
    source = network.source_loss(prediction.source, weights.source, generator) if weights.beta > 0 else zero
    match = network.matching_loss(prediction.endpoint, x_1, weights.reduction)
    target = network.target_loss(prediction.endpoint, targets, weights.target)
    consistency = zero if tangent is None else consistency_loss(tangent, weights.reduction)
    parts = [(matching, match), (weights.alpha, target), (weights.beta, source), (weights.gamma, consistency)]
    weighted = tuple((weight, part) for weight, part in parts if weight > 0 and part is not zero)
    return Losses(weighted, match, target, source, consistency)

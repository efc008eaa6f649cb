"""An exponential moving average of the weights in training, judged and kept in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """The moving average of a model's trained parameters, on their device and in their dtype; of none with decay 0.

    Step n has the decay min(decay, (1 + n) / (10 + n)): the average soon leaves the weights that it began with.

    Attributes:
        weights: the averages by the parameters' names.
        steps: n, taken since it began.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin at the present weights; `decay` from 0 up to, not including, 1."""
        self._decay = decay
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad} if decay > 0 else {}
        self._parameters: list[Tensor] = list(trained.values())
        self.weights = {name: one.detach().clone() for name, one in trained.items()}
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step; without waiting for the device."""
        if self.weights:
            decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(list(self.weights.values()), self._parameters, 1 - decay)
            self.steps += 1

    def load(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Go on from `weights`, which hold at least the averaged ones by name, on any device, after `steps` steps."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
        self.steps = steps

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages for weights inside, the very bits of before after it, and always its addresses."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self.weights.values(), strict=True):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)

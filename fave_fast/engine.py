"""Recommender: histories of original ids in, lists of original ids out, by one forward pass and an exact top-K."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fave_fast import checkpoint as checkpoints
from fave_fast.checkpoint import Checkpoint
from fave_fast.config import Config
from fave_fast.data import gather_histories, history_exclusions
from fave_fast.errors import InputError
from fave_fast.flow import InferenceNoise, encode
from fave_fast.model import DTYPES
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.score_topk import OP as SCORE_TOPK

ItemId = int | str


@dataclass(frozen=True)
class Recommendation:
    """One user's list, best first. It is shorter than K where fewer items are left to recommend."""

    items: list[ItemId]
    scores: list[float]  # inner products; how often an item was trained on where `popular`
    unknown: int  # items of the history that the catalogue does not hold: skipped
    popular: bool  # no item of the history is known: the most popular items instead


class Recommender:
    """A trained model, ready to answer. Answers depend on nothing but the history, the options and the seed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        backend: str = "auto",
    ) -> None:
        """Put the model on `device` in `dtype` (or its name, fp32 or bf16).

        Raises:
            InputError: a name that is no dtype of ours.
            BackendError: `backend` was asked for by name and cannot run here.
            CheckpointError: weights and configuration do not fit.
        """
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
            dtype = DTYPES[dtype]
        self.checkpoint = checkpoint
        self.config: Config = checkpoint.config
        self.backend = backend
        self._model = checkpoint.build_model().to(device, dtype)
        self._table = self._model.item_embedding.weight.detach()
        SCORE_TOPK.resolve(backend, self._table.device, dtype)
        self._popularity = checkpoint.popularity.numpy()
        self._by_popularity = np.argsort(-self._popularity[1:], kind="stable") + 1
        self._noise: dict[int, InferenceNoise] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        backend: str = "auto",
    ) -> Recommender:
        """Load a checkpoint written by `fave_fast.train`.

        Raises:
            CheckpointError: the file is no whole checkpoint of a version that can be read.
            BackendError: `backend` was asked for by name and cannot run here.
        """
        return cls(checkpoints.load(path), device=device, dtype=dtype, backend=backend)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._table.device

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[ItemId]],
        k: int = 20,
        exclude_history: bool = True,
        deny: Iterable[ItemId] | None = None,
        *,
        batch_size: int = 512,
        n_samples: int | None = None,
        seed: int | None = None,
    ) -> list[Recommendation]:
        """The K best next items of each history.

        Args:
            histories: original item ids, oldest first; only the last L count, all of them are excluded.
            k: length of the lists, K.
            exclude_history: never recommend an item of the user's own history.
            deny: original ids that nobody gets; unknown ones change nothing.
            batch_size: histories in one forward pass.
            n_samples: endpoints drawn a history, an item's score being its best; more make lists more diverse when
                `flow.lambda_at_inference` is "sample" or rho is small. None: the checkpoint's configuration.
            seed: of whatever is drawn. None: the checkpoint's configuration.

        Raises:
            InputError: k, batch_size or n_samples below 1, or an id that is neither a whole number nor text.
        """
        samples = self.config.flow.n_samples if n_samples is None else n_samples
        for name, value in (("k", k), ("batch_size", batch_size), ("n_samples", samples)):
            if value < 1:
                raise InputError(f"{name} is {value}; expected a whole number of at least 1")
        numbers, offsets, unknown = self._number(histories)
        denied = self._deny_bitmap(deny)
        first = self.config.flow.seed if seed is None else seed
        noises = [self._draw(first + sample) for sample in range(samples)]
        results: list[Recommendation | None] = [None] * len(histories)
        known = np.flatnonzero(np.diff(offsets) > 0)
        for start in range(0, len(known), batch_size):
            rows = known[start : start + batch_size]
            scores, items = self._best(numbers, offsets[rows], offsets[rows + 1], k, exclude_history, denied, noises)
            for row, row_scores, row_items in zip(rows, scores.tolist(), items.numpy(), strict=True):
                count = int((row_items != 0).sum())
                names = self.checkpoint.item_ids.take(row_items[:count] - 1)
                results[row] = Recommendation(names, row_scores[:count], int(unknown[row]), False)
        if len(known) < len(histories):
            popular = self._most_popular(k, denied)
            for row in np.flatnonzero(np.diff(offsets) == 0):
                results[row] = Recommendation(*popular, int(unknown[row]), True)
        return [result for result in results if result is not None]

    def _number(
        self, histories: Sequence[Sequence[ItemId]]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Known items by number, end to end; where each history begins; how many unknown items each had."""
        lengths = np.fromiter(map(len, histories), np.int64, len(histories))
        try:
            numbers = self.checkpoint.item_ids.index([item for history in histories for item in history]) + 1
        except (TypeError, ValueError) as error:
            raise InputError(f"a history holds an id that is neither a whole number nor text: {error}") from None
        owners = np.repeat(np.arange(len(histories)), lengths)
        unknown = np.bincount(owners[numbers == 0], minlength=len(histories))
        offsets = np.concatenate(([0], np.cumsum(lengths - unknown)))
        return numbers[numbers != 0].astype(np.int32), offsets, unknown

    def _deny_bitmap(self, deny: Iterable[ItemId] | None) -> Tensor | None:
        if deny is None:
            return None
        denied = torch.zeros(len(self._table), dtype=torch.bool)
        denied[torch.from_numpy(self.checkpoint.item_ids.index(list(deny)) + 1)] = True
        return denied.to(self._table.device)

    def _draw(self, seed: int) -> InferenceNoise:
        if seed not in self._noise:
            noise = InferenceNoise.draw(self._model, self.config.flow, seed)
            if seed != self.config.flow.seed:  # a caller's own seeds may be many: not kept
                return noise
            self._noise[seed] = noise
        return self._noise[seed]

    def _best(
        self,
        numbers: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        k: int,
        exclude_history: bool,
        denied: Tensor | None,
        noises: Sequence[InferenceNoise],
    ) -> tuple[Tensor, Tensor]:
        """Scores float32 [B, K] and item numbers int64 [B, K] on the CPU, best first, 0 where a list ends early."""
        history = gather_histories(numbers, starts, ends, self.config.model.max_length)
        exclude = None
        if exclude_history:
            seen = history_exclusions(numbers, starts, ends)
            exclude = Exclusions(*map(torch.from_numpy, seen)).to(self._table.device)
        k = min(k, len(self._table) - 1)
        drawn = []
        for noise in noises:
            endpoint = encode(self._model, self.config.flow, noise, history)
            drawn.append(score_topk(endpoint, self._table, k, exclude, denied, backend=self.backend))
        scores, items = drawn[0] if len(drawn) == 1 else _merge(drawn, k)
        return scores.cpu(), items.cpu()

    def _most_popular(self, k: int, denied: Tensor | None) -> tuple[list[ItemId], list[float]]:
        order = self._by_popularity
        if denied is not None:
            order = order[~denied.cpu().numpy()[order]]
        order = order[:k]
        return self.checkpoint.item_ids.take(order - 1), self._popularity[order].astype(float).tolist()


def _merge(drawn: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The K best of several lists [B, K], each item with its best score; equal scores by lower item number."""
    scores, items = (torch.cat(part, dim=1) for part in zip(*drawn, strict=True))
    for by_item in (False, True):  # in the end by item, an item's best score first
        order = (items if by_item else scores).sort(dim=1, descending=not by_item, stable=True).indices
        scores, items = scores.gather(1, order), items.gather(1, order)
    repeated = torch.zeros_like(items, dtype=torch.bool)
    repeated[:, 1:] = items[:, 1:] == items[:, :-1]
    scores = scores.masked_fill(repeated, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    scores, items = scores.gather(1, order), items.gather(1, order)
    return scores, items.masked_fill(scores == -torch.inf, 0)

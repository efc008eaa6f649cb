"""What must hold before a time of a whole step is taken."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from fave_fast.engine import Recommender
from fave_fast.flow import InferenceNoise
from fave_fast.graphs import Histories, Step
from fave_fast.model import FAVE
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.encoder import EncoderWeights, InputPath, encode_ids

PART = 1 << 18  # rows of a catalogue in float64 at a time
CHECKED = 8  # histories of a request, its last ones: the exact scores of more would not fit beside a large catalogue


def oracle(model: FAVE, step: Step) -> tuple[EncoderWeights, InputPath]:
    """The same network in float64, with the noise that `step` answers with. Without the catalogue's own copy."""
    parts = ("keep", "anchor", "gaussian", "lam")
    noise = InferenceNoise(*(getattr(step.path.noise, name).double() for name in parts))
    exact = copy.deepcopy(model).double()
    return EncoderWeights.pack(exact), InputPath.pack(exact, step.path.flow, noise)


def step_is_right(model: FAVE, step: Step, request: Histories, k: int) -> None:
    """Endpoints at most twice as wrong as PyTorch's in the same dtype, and no list that lacks an item.

    Raises:
        AssertionError: what differs.
    """
    count = min(CHECKED, len(request.offsets) - 1)
    begin = int(request.offsets[-1 - count])
    ids = torch.from_numpy(request.ids[begin:]).to(step.table.device)
    offsets = torch.from_numpy(request.offsets[-1 - count :] - begin).to(step.table.device)
    exact = encode_ids(*oracle(model, step), ids, offsets, backend="reference")
    usual = encode_ids(step.weights, step.path, ids, offsets, backend="reference")
    backend = step.encoder_backend(len(request.offsets) - 1)  # of the whole request: small ones have their own
    found = encode_ids(step.weights, step.path, ids, offsets, backend=backend)
    if not (found - exact).norm() <= 2 * (usual - exact).norm():
        raise AssertionError(f"{count} endpoints are not the network's")
    exclude = Exclusions(ids, offsets)
    scores, items = score_topk(found, step.table, k, exclude, backend=step.backend)
    lists_are_complete(found, step.table, exclude, scores, items)


def lists_are_complete(
    queries: Tensor, table: Tensor, exclude: Exclusions | None, scores: Tensor, items: Tensor
) -> None:
    """Scores are the items' inner products, and no item that is left out has a higher one, but for rounding.

    A sum of D products in float32, each exact or rounded once, is off by at most (D + 1) 2^-24 |q| |e|, to first order.

    Raises:
        AssertionError: what differs.
    """
    wide = queries.double()
    largest = max(float(part.double().norm(dim=1).max()) for part in table.split(PART))
    every = torch.cat([wide @ part.double().T for part in table.split(PART)], 1)
    bound = (table.shape[1] + 1) * 2.0**-24 * largest * wide.norm(dim=1, keepdim=True)
    every[:, 0] = -torch.inf
    if exclude is not None:
        every[exclude.owners(), exclude.ids.long()] = -torch.inf
    if not ((every.gather(1, items) - scores.double()).abs() <= bound).all():
        raise AssertionError("a score is not the item's inner product")
    best = every.scatter(1, items, -torch.inf).amax(1, keepdim=True)
    if (best > scores[:, -1:].double() + 2 * bound).any():
        raise AssertionError("a list lacks an item")


def answers_are_the_steps(recommender: Recommender, step: Step, request: Histories, k: int) -> None:
    """What the engine answers is what its kernels give one by one, bit for bit.

    Nothing is asked where another kernel answers, whose last bits differ.

    Raises:
        AssertionError: it is not.
    """
    ids, offsets = (torch.from_numpy(part).to(step.table.device) for part in request)
    with torch.no_grad():
        scores, items = step(ids, offsets, Exclusions(ids, offsets), k)
    found = recommender.best_items(request.ids, request.offsets, k)
    users = len(offsets) - 1
    graphs = recommender._graphs
    if graphs is not None:
        # One that holds so many items may be of a larger batch, whose encoder's kernel may be the other one.
        used = graphs.batch_of(request)
        if used is not None and step.encoder_backend(used) != step.encoder_backend(users):
            return
    if not (np.array_equal(found[0], scores.cpu()) and np.array_equal(found[1], items.cpu())):
        raise AssertionError(f"the engine's lists of {len(request.offsets) - 1} histories are not those of its kernels")

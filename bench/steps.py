"""What more steps buy: NDCG@20 and the time of a request for 1 to 30 Euler steps of one trained network, beside ours.

`python bench/run.py --suite steps --ckpt model.pt --data FILE`. The steps start from noise, as FMRec's do, through the
network as it was trained (`flow.euler`); ours is the one step from the anchor that `fave_fast` serves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from bench.measure import HOST, Row, host_us
from bench.methods import Sampled
from bench.peers import Captured, Eager
from bench.sampling import Lists
from bench.suites import K, Options
from fave_fast import checkpoint as checkpoints
from fave_fast.data import gather_histories, history_exclusions, split
from fave_fast.engine import Recommender
from fave_fast.errors import InputError
from fave_fast.evaluate import rank_targets, target_starts, translate
from fave_fast.flow import euler
from fave_fast.graphs import Histories
from fave_fast.metrics import rank_metrics
from fave_fast.model import DTYPES, FAVE

STEPS = (1, 2, 5, 10, 30)
MOST_USERS = 1_000  # ranked on a CPU; on a GPU all are


class Euler(nn.Module):
    """Endpoints by Euler steps from noise, drawn anew in each answer as lambda is."""

    def __init__(self, model: FAVE, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, history: Tensor) -> Tensor:
        """[B, D] of int64 [B, L]."""
        weight = self.model.item_embedding.weight
        shape = len(history), self.model.config.d
        noise = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        lam = torch.randn((*history.shape, shape[1]), device=weight.device, dtype=weight.dtype)
        lam = self.model.config.delta * (1 + lam)
        return euler(self.model, history, noise, lam, self.steps)


def steps(path: str, options: Options) -> Iterator[Row]:
    """A row for each number of steps and batch.

    Raises:
        InputError: the checkpoint or the log cannot be read, or does not fit the other.
    """
    checkpoint = checkpoints.load(path)
    [(name, log)] = options.data().items()
    data = translate(log, checkpoint, str(options.logs[0]))
    config, dtype = checkpoint.config, DTYPES[options.dtype]
    targets = split(data, config.data).test
    if not options.on_gpu:
        targets = targets[np.linspace(0, len(targets) - 1, min(len(targets), MOST_USERS)).astype(np.int64)]
    if len(targets) == 0:
        raise InputError(f"{options.logs[0]}: no test targets")
    model = checkpoint.build_model().to(options.device, dtype).eval()
    recommender = Recommender(checkpoint, device=options.device, dtype=dtype, backend=options.backend)
    seconds = recommender.warmup(K, sorted(options.batches))
    ranking = rank_targets(model, config, data, targets, full=False, backend=options.backend)
    one_step = rank_metrics(ranking.filtered)["NDCG@20"]
    ndcg = {}
    for count in STEPS:
        sampler = functools.partial(Sampled, functools.partial(Euler, steps=count))
        found = rank_targets(model, config, data, targets, full=False, backend=options.backend, sampler=sampler)
        ndcg[count] = rank_metrics(found.filtered)["NDCG@20"]
    starts = target_starts(data, targets)
    for batch in options.batches:
        some = np.resize(np.arange(len(targets)), batch)
        ids, offsets = history_exclusions(data.items, starts[some], targets[some])
        request = Histories(ids.astype(np.int32), offsets)
        grid = gather_histories(data.items, starts[some], targets[some], config.model.max_length)
        grid = np.pad(grid, ((0, 0), (config.model.max_length - grid.shape[1], 0)))
        case = f"B {batch}, {name}, {len(targets)} users ranked"
        spent = host_us(lambda _, request=request: recommender.best_items(*request, K), options.seconds)  # type: ignore[misc]
        yield Row(
            "steps", case, "fave_fast, 1 step from the anchor", spent, clock=HOST, prepared_s=seconds, ndcg=one_step
        )
        for count in STEPS:
            lists = Lists(Euler(model, count), model.item_embedding.weight.detach(), K).eval()
            answer = Captured(lists, batch, grid.shape[1]) if options.on_gpu else Eager(lists, options.device)
            spent = host_us(lambda _, answer=answer, grid=grid: answer(grid), options.seconds, least=5)  # type: ignore[misc]
            how = "in a CUDA graph" if options.on_gpu else "eager"
            who = f"PyTorch {how}, {count} Euler steps from noise"
            yield Row("steps", case, who, spent, clock=HOST, ndcg=ndcg[count])

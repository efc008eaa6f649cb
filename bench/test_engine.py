"""The engine from histories on the host to lists on the host, beside plain PyTorch and the samplers of many steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from bench.conftest import Sizes
from bench.latency import full_length, padded, random_checkpoint
from bench.peers import Eager, OnePass, overlap
from bench.sampling import DiffuRec, FMRec, Lists
from bench.suites import LEAST_OVERLAP
from fave_fast.config import Config
from fave_fast.engine import Recommender
from fave_fast.model import FAVE

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=3)
K = 20
PEERS = {"PyTorch eager": OnePass, "FMRec, 30 steps, eager": FMRec, "DiffuRec, 32 steps, eager": DiffuRec}


@cache
def engine(sizes: Sizes) -> tuple[Recommender, FAVE]:
    checkpoint = random_checkpoint(sizes.items)
    recommender = Recommender(checkpoint, device=sizes.device, dtype=sizes.dtype)
    recommender.warmup(K)
    return recommender, checkpoint.build_model().to(sizes.device, sizes.dtype).eval()


# The samplers at one size: what a pass more costs grows as the pass does.
@pytest.mark.parametrize(
    ("batch", "who"),
    [
        *((1, who) for who in ("fave_fast", "fave_fast, through ids", *PEERS)),
        *((16, who) for who in ("fave_fast", "fave_fast, through ids", "PyTorch eager")),
    ],
)
def test_request(batch: int, who: str, sizes: Sizes, timed: Callable[..., object]) -> None:
    recommender, model = engine(sizes)
    request = full_length(batch, sizes.items)[0]
    grid = padded(request, model.config.max_length).numpy()
    expected = recommender.best_items(*request, K)
    if who == "fave_fast":
        call = lambda: recommender.best_items(*request, K)  # noqa: E731
    elif who in PEERS:
        make = PEERS[who]
        endpoints = make(model, Config().flow) if make is OnePass else make(model)
        answer = Eager(Lists(endpoints, model.item_embedding.weight.detach(), K).eval(), sizes.device)
        if make is OnePass:
            assert overlap(answer(grid), expected) >= LEAST_OVERLAP
        call = lambda: answer(grid)  # noqa: E731
    else:
        histories = [part.tolist() for part in torch.from_numpy(request.ids).split(model.config.max_length)]
        found = recommender.recommend(histories, K)  # of this checkpoint, ids are the items' numbers
        assert [list(one.items) for one in found] == expected[1].tolist()
        call = lambda: recommender.recommend(histories, K)  # noqa: E731
    timed("request", f"B {batch}, N {sizes.items}, {model.config.max_length} items", who, call)

"""A sharded catalogue on the GPUs of one machine, histories on the host to top 20 on the host.

    torchrun --nproc-per-node 2 -m bench.sharded --items 10_000_000 100_000_000 --batch 1 64

Each rank makes its own part of a random table on its GPU. Lists are checked before anything is timed: captured ones are
those of the same kernels one by one, to the bit, and where the whole table fits beside rank 0's part those of one GPU.
One JSON object a row; compare with `--nproc-per-node 1`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from bench.latency import full_length
from bench.measure import CEILINGS, Time, host_us
from fave_fast.checkpoint import Checkpoint
from fave_fast.cli import whole_number
from fave_fast.config import Config
from fave_fast.data import IdMap
from fave_fast.flow import InferenceNoise
from fave_fast.graphs import Histories, Step
from fave_fast.model import FAVE
from fave_fast.ops import Exclusions
from fave_fast.ops.encoder import EncoderWeights, InputPath
from fave_fast.sharded import ShardedRecommender

K, DTYPE = 20, torch.bfloat16
BLOCK = 1 << 20  # items whose embeddings come from one seed, whoever makes them
WHOLE = 20_000_000  # items up to which rank 0 compares with the whole table on its GPU


def random_rows(first: int, count: int, d: int, device: torch.device) -> Tensor:
    """The padding and items `first` to `first + count - 1` of the random table, [count + 1, d]."""
    rows = torch.zeros(count + 1, d, dtype=DTYPE, device=device)
    for block in range((first - 1) // BLOCK, -(-(first - 1 + count) // BLOCK)):
        source = torch.Generator(device).manual_seed(block)
        made = torch.randn(BLOCK, d, generator=source, device=device) / d**0.5
        start, end = max(first, 1 + block * BLOCK), min(first + count, 1 + (block + 1) * BLOCK)
        rows[start - first + 1 : end - first + 1] = made[start - 1 - block * BLOCK : end - 1 - block * BLOCK]
    return rows


def random_model(rows: Tensor) -> FAVE:
    """An untrained network, the same wherever it is made, over `rows`."""
    torch.manual_seed(0)
    model = FAVE(Config().model, 1)
    model.item_embedding = nn.Embedding(*rows.shape, padding_idx=0, _weight=rows)
    model.history_decoder = None  # type: ignore[assignment]
    return model


def nameless(items: int) -> Checkpoint:
    """A checkpoint without weights: the ids are the items' numbers."""
    none = torch.zeros(0, dtype=torch.int64)
    ids = IdMap(np.arange(1, items + 1))
    popularity = torch.zeros(items + 1, dtype=torch.int64)
    return Checkpoint(Config(), {}, ids, IdMap.from_ids([]), popularity, {}, none, none, none.new_zeros(1))


class RandomShards(ShardedRecommender):
    """A sharded recommender whose table is never in the host's memory."""

    def __init__(self, items: int, device: torch.device, **options: Any) -> None:
        self._place = device
        super().__init__(nameless(items), device=device, dtype=DTYPE, backend="triton", **options)

    def _build(self, checkpoint: Checkpoint) -> FAVE:
        return random_model(random_rows(self._start + 1, self._size, checkpoint.config.model.d, self._place))


def of_one_gpu(items: int, device: torch.device, histories: Histories) -> tuple[Tensor, Tensor]:
    """The lists by the whole table on one GPU."""
    config = Config()
    model = random_model(random_rows(1, items, config.model.d, device)).to(device, DTYPE).eval()
    path = InputPath.pack(model, config.flow, InferenceNoise.draw(model, config.flow, config.flow.seed))
    ids, offsets = (torch.from_numpy(part).to(device) for part in histories)
    step = Step(EncoderWeights.pack(model), path, "triton")
    with torch.no_grad():
        scores, found = step(ids, offsets, Exclusions(ids, offsets), K)
    return scores.cpu(), found.cpu()


def same(mine: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(mine, other, strict=True))


def measure(
    recommender: RandomShards, items: int, batches: list[int], seconds: float, case: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of rank 0: one by one, then captured."""
    asked = {batch: full_length(batch, items) for batch in batches}
    one_by_one = {}
    for captured in (False, True):
        prepared = recommender.warmup(K, batches) if captured else 0.0
        for batch, requests in asked.items():
            found = recommender.best_items(*requests[0], K)
            if not captured:
                one_by_one[batch] = found
            if not same(found, one_by_one[batch]):
                raise AssertionError(f"B {batch}: captured lists are not those of the kernels one by one")
            if not captured and items <= WHOLE and not same(found, of_one_gpu(items, recommender.device, requests[0])):
                raise AssertionError(f"B {batch}: lists are not those of one GPU")
            spent: Time = host_us(lambda at, r=requests: recommender.best_items(*r[at % len(r)], K), seconds)  # type: ignore[misc]
            ceiling = CEILINGS.get(case["gpu"])
            read = -(-items // case["ranks"]) * Config().model.d * (1 if case["table_bytes"] else 2)
            floor = None if ceiling is None else round(1e6 * read / ceiling["bytes"], 1)
            yield case | {
                "batch": batch, "captured": captured, "p50_us": round(spent.median, 1), "p20_us": round(spent.p20, 1),
                "p80_us": round(spent.p80, 1), "p99_us": round(spent.p99, 1), "floor_us": floor,
                "capture_s": round(prepared, 2), "fallback_share": recommender.fallback_share,
            }  # fmt: skip
    counts = dict(recommender.batches)
    if set(counts) != {"not warmed up", "captured"}:
        raise AssertionError(f"batches were {counts}; expected captured ones after the warm-up")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sharded", description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=whole_number(1), nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--batch", type=whole_number(1), nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=3.0, help="of repeats for each row (default: 3)")
    parser.add_argument("--table-bytes", action="store_true", help="scan one byte an element")
    arguments = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("no LOCAL_RANK; expected torchrun --nproc-per-node N -m bench.sharded")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures GPUs")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    distributed.init_process_group("gloo")
    for items in arguments.items:
        recommender = RandomShards(items, device, timeout=60.0, table_bytes=arguments.table_bytes)
        case = {
            "gpu": torch.cuda.get_device_name(device), "ranks": distributed.get_world_size(), "items": items,
            "table_bytes": arguments.table_bytes,
        }  # fmt: skip
        if recommender.rank == 0:
            try:
                for row in measure(recommender, items, arguments.batch, arguments.seconds, case):
                    print(json.dumps(row), flush=True)
            finally:
                recommender.close()
        else:
            recommender.follow()
            recommender.close()
        del recommender
        gc.collect()
        torch.cuda.empty_cache()
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

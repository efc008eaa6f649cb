"""Full ranking: each target against the whole catalogue, streamed; `python -m fave_fast.evaluate`.

Every figure comes twice. `filtered`: the items of the user's history are no candidates (the paper's text). `raw`: they
are (the public code of this family). With a sketch there is a third, `sketched`: they are candidates, pushed down as
`fave_fast.sketch` does. Equal scores rank the lower id first; the target is always a candidate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fave_fast import checkpoint as checkpoints
from fave_fast import cli
from fave_fast.checkpoint import Checkpoint
from fave_fast.config import Config
from fave_fast.data import Interactions, history_exclusions, split
from fave_fast.errors import DataError
from fave_fast.flow import InferenceNoise
from fave_fast.metrics import CUTOFFS, coverage, intra_list_diversity, rank_metrics
from fave_fast.model import DTYPES, FAVE
from fave_fast.ops import Exclusions, rank_count, score_topk
from fave_fast.ops.encoder import MAX_ROWS, EncoderWeights, InputPath, Plan, encode_ids, planned_rows
from fave_fast.profiling import Trace
from fave_fast.ranks import ALONE, Ranks, joined
from fave_fast.sketch import HistorySketch

LIST_LENGTH = 20
KINDS = ("filtered", "raw", "sketched")
Positions = npt.NDArray[np.int64]
Endpoints = Callable[[Interactions, Positions, Positions], Tensor]
"""[B, D] of a log, the starts and the ends [B] of histories items[start:end], of which the last L count."""
Sampler = Callable[[FAVE, Config, str], Endpoints]
"""How a model in evaluation mode, its configuration and a backend come to endpoints."""


@dataclass(frozen=True)
class Ranking:
    """Where the targets stand; one row a target, in the order of the positions asked for."""

    filtered: Tensor  # int64 [U], ranks from 1 with the history left out
    raw: Tensor | None  # int64 [U], with the history among the candidates
    lists: Tensor | None  # int64 [U, 20], the filtered top-20, 0 where a list ends early
    sketched: Tensor | None = None  # int64 [U], as raw, by the sketch's scores


def protocol(split_name: str, description: str, max_length: int, sketch: int = 0) -> str:
    """The rules behind the figures, in words, as written beside them; `sketch`: its channels."""
    return (
        f"{description}; {split_name} target ranked among the whole catalogue; input: the last {max_length} items"
        " before the target; filtered: items of the whole history are no candidates, raw: they are; "
        + (f"sketched: they are, pushed down by a sketch of {sketch} channels; " if sketch else "")
        + "equal score: lower id first; HR, NDCG, MRR, coverage in per cent; ild@20: mean pairwise cosine distance in a"
        " filtered list"
    )


def target_starts(data: Interactions, targets: Positions) -> Positions:
    """Flat start of the sequence that each target [U] belongs to."""
    return data.offsets[np.searchsorted(data.offsets, targets, side="right") - 1]


def _batches(lengths: Positions, batch_size: int) -> Iterator[Positions]:
    """Rows in batches of like length, which keeps padding away."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting for it: the host is to be ahead of a GPU, batch after batch."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class ServedEndpoints:
    """Endpoints as they are served (eq. 25): a `Sampler`."""

    def __init__(self, model: FAVE, config: Config, backend: str) -> None:
        noise = InferenceNoise.draw(model, config.flow)
        self._longest = config.model.max_length
        self._weights, self._path = EncoderWeights.pack(model), InputPath.pack(model, config.flow, noise)
        # The command's backend is that of the catalogue's operations, which take models that the encoder's refuses. Its
        # kernel in float32 is ordinary multiply-adds, unrolled: a training would wait for its compiler first.
        wide = self._weights.matrices.dtype == torch.float32 and self._weights.matrices.device.type == "cuda"
        self._backend = "reference" if wide or backend == "reference" else "auto"

    def __call__(self, data: Interactions, starts: Positions, ends: Positions) -> Tensor:
        """Endpoints [B, D] of the last items of items[start:end]."""
        device = self._weights.matrices.device
        ids, offsets = map(
            torch.from_numpy, history_exclusions(data.items, np.maximum(starts, ends - self._longest), ends)
        )
        plan = None
        if device.type == "cuda" and self._longest <= MAX_ROWS and self._backend != "reference":
            made = Plan.of(offsets.diff(), planned_rows(self._longest)).trimmed()  # on the host
            plan = Plan(_moved(made.order, device), _moved(made.programs, device), made.rows)
        return encode_ids(
            self._weights, self._path, _moved(ids, device), _moved(offsets, device), plan=plan, backend=self._backend
        )


@torch.no_grad()
def rank_targets(
    model: FAVE,
    config: Config,
    data: Interactions,
    targets: Positions,
    *,
    full: bool = True,
    batch_size: int | None = None,
    backend: str = "auto",
    ranks: Ranks = ALONE,
    after_batch: Callable[[], None] = lambda: None,
    sampler: Sampler = ServedEndpoints,
    sketch: HistorySketch | None = None,
) -> Ranking:
    """Rank the items at the flat positions `targets` [U], each given what comes before it in its sequence.

    The model must be in evaluation mode. `full=False` leaves out raw ranks and lists. Memory: batches of users (512 by
    default, 4,096 on a GPU) times tiles of the catalogue, never users times items. `after_batch` is called after each.
    `sampler` is for other methods than ours. `sketch`, of the model's table, gives sketched ranks beside raw ones.
    Several ranks share the batches, which are the same for any number of ranks, and so is the ranking; each gets all
    of it.
    """
    starts = target_starts(data, targets)
    table = model.item_embedding.weight
    endpoints = sampler(model, config, backend)
    if batch_size is None:
        batch_size = 4096 if table.device.type == "cuda" else 512
    order, filtered, raw, lists, sketched = [], [], [], [], []
    batches = list(_batches(np.minimum(targets - starts, config.model.max_length), batch_size))
    for rows in batches[::-1][ranks.number :: ranks.count]:  # the longest histories first, dealt out
        endpoint = endpoints(data, starts[rows], targets[rows])
        seen = Exclusions(*map(torch.from_numpy, history_exclusions(data.items, starts[rows], targets[rows])))
        wanted = _moved(torch.from_numpy(data.items[targets[rows]].astype(np.int64)), table.device)
        exclude = Exclusions(*(_moved(part, table.device) for part in (seen.ids, seen.offsets)))
        order.append(torch.from_numpy(rows))
        filtered.append(rank_count(endpoint, table, wanted, exclude, backend=backend))
        if full:
            raw.append(rank_count(endpoint, table, wanted, backend=backend))
            if sketch is not None:
                sketched.append(rank_count(sketch.queries(endpoint, exclude), sketch.table, wanted, backend=backend))
            lists.append(score_topk(endpoint, table, LIST_LENGTH, exclude, backend=backend)[1])
        after_batch()

    def whole(parts: list[Tensor], *width: int) -> Tensor:
        """Int64 [U, ...] of all ranks."""
        result = torch.zeros(len(targets), *width, dtype=torch.int64)
        for rows, part in zip(order, parts, strict=True):
            result[rows] = part.cpu()
        return ranks.sum(result)

    if not full:
        return Ranking(whole(filtered), None, None)
    return Ranking(whole(filtered), whole(raw), whole(lists, LIST_LENGTH), None if sketch is None else whole(sketched))


def translate(data: Interactions, checkpoint: Checkpoint, path: str) -> Interactions:
    """`data` with the checkpoint's item numbers.

    Raises:
        DataError: the log has items that the checkpoint does not know: its figures would not be comparable.
    """
    numbers = checkpoint.item_ids.index(data.item_ids.ids) + 1
    unknown = np.flatnonzero(numbers == 0)
    if len(unknown):
        raise DataError(
            f"{path}: {len(unknown)} of its {data.num_items} items are not in the checkpoint "
            f"({data.item_ids.id_at(int(unknown[0]))!r}, say); expected the log that the model was trained on"
        )
    items = np.concatenate(([0], numbers)).astype(np.int32)[data.items]
    return Interactions(items, data.offsets, checkpoint.item_ids, data.user_ids, data.times, data.name, data.decisions)


def evaluate(
    checkpoint: Checkpoint,
    data: Interactions,
    split_name: Literal["val", "test"],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    backend: str = "auto",
    ranks: Ranks = ALONE,
    after_batch: Callable[[], None] = lambda: None,
    sampler: Sampler = ServedEndpoints,
    sketch: int = 0,
) -> dict[str, Any]:
    """All figures of one split as a plain dictionary, the object that `--json` prints; the same on each of `ranks`.

    `sampler` as in `rank_targets`; `sketch`: how many channels the sketch has, 0 for none.

    Raises:
        DataError: the split cannot be made.
    """
    started = time.perf_counter()
    config = checkpoint.config
    parts = split(data, config.data)
    targets = parts.val if split_name == "val" else parts.test
    model = checkpoint.build_model().to(device, dtype)
    ranking = rank_targets(
        model, config, data, targets, batch_size=batch_size, backend=backend, ranks=ranks, after_batch=after_batch,
        sampler=sampler,
        sketch=HistorySketch.of(model.item_embedding.weight, sketch, LIST_LENGTH) if sketch else None,
    )  # fmt: skip
    if ranking.raw is None or ranking.lists is None:
        raise AssertionError("a full ranking has raw ranks and lists")
    return {
        "dataset": data.name,
        "split": split_name,
        "users": len(targets),
        "items": data.num_items,
        "protocol": protocol(split_name, parts.description, config.model.max_length, sketch),
        "filtered": rank_metrics(ranking.filtered),
        "raw": rank_metrics(ranking.raw),
        **({} if ranking.sketched is None else {"sketched": rank_metrics(ranking.sketched)}),
        "coverage@20": coverage(ranking.lists, data.num_items),
        "ild@20": intra_list_diversity(ranking.lists, model.item_embedding.weight),
        "seconds": time.perf_counter() - started,
    }


def table(result: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [f"{result['dataset']}, {result['split']}: {result['users']:,} users, {result['items']:,} items"]
    lines += ["", f"{'':10}" + "".join(f"{f'{name}@{k}':>9}" for name in ("HR", "NDCG", "MRR") for k in CUTOFFS)]
    for kind in [name for name in KINDS if name in result]:
        figures = [result[kind][f"{name}@{k}"] for name in ("HR", "NDCG", "MRR") for k in CUTOFFS]
        lines.append(f"{kind:10}" + "".join(f"{figure:9.2f}" for figure in figures))
    lines += ["", f"coverage@20 {result['coverage@20']:.1f} %   ILD@20 {result['ild@20']:.3f}"]
    return "\n".join([*lines, "", f"{result['protocol']}.", f"{result['seconds']:.2f} s"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.Parser("evaluate", "Rank every user's target among the whole catalogue.")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint written by fave_fast.train")
    parser.add_argument("--data", required=True, metavar="FILE", help="the interaction log it was trained on")
    parser.add_argument("--split", default="test", choices=("test", "val"), help="which targets")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    users = "users at a time (default: 512, on a GPU 4,096)"
    parser.add_argument("--batch-size", type=cli.whole_number(1), default=argparse.SUPPRESS, help=users)
    parser.add_argument(
        "--sketch",
        type=cli.whole_number(0),
        default=0,
        metavar="R",
        help="also rank with the user's own items among the candidates, but pushed down by R channels more (128, say)",
    )
    cli.add_log_options(parser)
    cli.add_run_options(parser, "of weights and scores")
    cli.add_profile_option(parser)
    with joined() as ranks:
        with ranks.together():
            arguments = parser.parse_args(argv)
            device = cli.resolve_device(arguments.device)
            checkpoint = checkpoints.load(arguments.ckpt)
            data = _log_of(checkpoint, arguments)
            trace = Trace(arguments.profile if ranks.first else None, "evaluate")
        with ranks.together(), trace:  # what can be wrong now is the same on all ranks
            result = evaluate(
                checkpoint,
                data,
                arguments.split,
                device=device,
                dtype=DTYPES[arguments.dtype],
                batch_size=getattr(arguments, "batch_size", None),
                backend=arguments.backend,
                ranks=ranks,
                after_batch=trace.step,
                sketch=arguments.sketch,
            )
        cli.say_decisions(trace.notes())
        if ranks.first:
            print(json.dumps(result) if arguments.json else table(result))
    return 0


def _log_of(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Interactions:
    """The log with the checkpoint's item numbers; a note where it is not the one that the model was trained on."""
    data = cli.load_log(arguments, checkpoint.config.data)
    facts = checkpoint.facts
    if (data.num_users, data.num_interactions) != (facts["users"], facts["interactions"]):
        cli.say(
            f"note: {arguments.data} has {data.num_users:,} users and {data.num_interactions:,} interactions, but the "
            f"model was trained on {facts['dataset']} with {facts['users']:,} and {facts['interactions']:,}"
        )
    return translate(data, checkpoint, arguments.data)


if __name__ == "__main__":
    cli.run(main)

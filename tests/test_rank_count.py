"""rank_count's kernels against a full sort and against themselves.

Embeddings of small whole numbers have exact scores in every dtype and tile, so ranks are compared for equality; random
ones show that a score's bits depend on neither kernel, tile nor batch: the ranks of all items for one query are then a
permutation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fave_fast.ops import Exclusions, rank_count
from fave_fast.ops.registry import why_no_triton
from fave_fast.ops.tuning import tile_shapes

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's product of bf16 is garbage.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SPECIAL = (float("nan"), float("inf"), float("-inf"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def whole(rows: int, d: int, dtype: torch.dtype, seed: int = 0, spread: int = 2) -> Tensor:
    return torch.randint(-spread, spread + 1, (rows, d), generator=generator(seed), device=DEVICE).to(dtype)


def with_special(table: Tensor, seed: int = 0) -> Tensor:
    """Up to three rows each of NaN, inf and -inf."""
    rows = torch.randint(0, len(table), (3, 3), generator=generator(seed), device=DEVICE)
    for value, some in zip(SPECIAL, rows, strict=True):
        table[some] = value
    return table


def some_targets(batch: int, n: int, seed: int = 0) -> Tensor:
    targets = torch.randint(1, n + 1, (batch,), generator=generator(seed), device=DEVICE)
    targets[:2] = torch.tensor([n, 1], device=DEVICE)[: len(targets)]
    return targets


def some_exclusions(batch: int, n: int, targets: Tensor, most: int = 12, seed: int = 0) -> Exclusions:
    """Rows of 0 to `most` ids: repeated ones, the target itself, ids outside the catalogue, and empty rows."""
    source = torch.Generator().manual_seed(seed)
    rows = []
    for target in targets.tolist():
        length = max(0, int(torch.randint(-3, most + 1, (1,), generator=source)))
        ids = torch.randint(-1, n + 3, (length,), generator=source).tolist()
        rows.append([*ids, *ids[:3], target] if length % 2 else ids)
    assert len(rows) == batch
    return Exclusions.from_lists(rows).to(DEVICE)


def sorted_ranks(queries: Tensor, table: Tensor, targets: Tensor, exclude: Exclusions | None) -> list[int]:
    """By a stable sort of all scores in fp64, row by row."""
    ranks = []
    for row, target in enumerate(targets.tolist()):
        scores = (queries[row].double() * table[1:].double()).sum(1)
        scores = torch.where(scores.isnan(), -torch.inf, scores)
        ids = scores.sort(descending=True, stable=True).indices + 1
        if exclude is not None:
            gone = exclude.ids[exclude.offsets[row] : exclude.offsets[row + 1]]
            ids = ids[~torch.isin(ids, gone[gone != target])]
        ranks.append(int((ids == target).nonzero()) + 1)
    return ranks


def ranked(queries: Tensor, table: Tensor, targets: Tensor, exclude: Exclusions | None = None) -> Tensor:
    """By the kernels, into poisoned buffers that were used before."""
    out = torch.full_like(targets, -(1 << 40))
    workspace = torch.full((2, len(targets)), torch.nan, device=targets.device)
    result = rank_count(queries, table, targets, exclude, out=out, workspace=workspace, backend="triton")
    assert result is out
    again = rank_count(queries, table, targets, exclude, out=out.clone(), workspace=workspace, backend="triton")
    assert torch.equal(result, again)
    return result


def gpu(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.gpu)


SIZES = [(1, 1, 16), (2, 97, 4), (3, 200, 64), (66, 150, 16)]
GPU_SIZES = [(b, n, 128) for b in (1, 2, 3, 63, 132, 513) for n in (1, 97, 1682, 12101)]
GPU_SIZES += [(132, 1682, d) for d in (16, 20, 64, 256, 300)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("batch", "n", "d"), [*SIZES, *(gpu(*size) for size in GPU_SIZES)])
def test_equals_a_full_sort(batch: int, n: int, d: int, special: bool, dtype: torch.dtype) -> None:
    queries, table = whole(batch, d, dtype, 1), whole(n + 1, d, dtype, 2)
    table[0] = 100  # the padding would win nearly everywhere if it were a candidate
    if special:
        table = with_special(table)
        table[0] = torch.nan
    targets = some_targets(batch, n)
    exclude = some_exclusions(batch, n, targets)
    raw, filtered = ranked(queries, table, targets), ranked(queries, table, targets, exclude)
    some = torch.arange(0, batch, max(1, batch // 40))  # a sort each
    assert torch.equal(raw, rank_count(queries, table, targets, backend="reference"))
    assert torch.equal(filtered, rank_count(queries, table, targets, exclude, backend="reference"))
    assert raw[some].tolist() == sorted_ranks(queries[some], table, targets[some], None)
    if batch <= 3:
        assert filtered.tolist() == sorted_ranks(queries, table, targets, exclude)


def test_targets_at_the_borders_of_tiles() -> None:
    n = 260
    targets = torch.tensor([1, 63, 64, 65, 127, 128, 129, 256, 257, n], device=DEVICE)
    for queries, table in (
        (whole(10, 16, torch.float16, 1), whole(n + 1, 16, torch.float16, 2)),
        (whole(10, 16, torch.float16, 1), torch.ones(n + 1, 16, dtype=torch.float16, device=DEVICE)),
    ):
        assert ranked(queries, table, targets).tolist() == sorted_ranks(queries, table, targets, None)


def test_a_row_that_excludes_all_but_its_target_ranks_first() -> None:
    queries, table = whole(3, 16, torch.float32), whole(71, 16, torch.float32, 1)
    exclude = Exclusions.from_lists([[*range(1, 71)] * 2, [], [*range(70, 0, -1)]]).to(DEVICE)
    targets = torch.tensor([7, 8, 70], device=DEVICE)
    raw = rank_count(queries, table, targets, backend="reference")
    assert ranked(queries, table, targets, exclude).tolist() == [1, int(raw[1]), 1]


def test_most_rows_exclude_nothing() -> None:
    """More empty rows in a line than are looked at in one step, at the start, between and at the end."""
    batch = 300
    queries, table = whole(batch, 16, torch.float16, 1), whole(71, 16, torch.float16, 2)
    targets = some_targets(batch, 70)
    rows: list[list[int]] = [[] for _ in range(batch)]
    rows[90], rows[91], rows[200] = [*range(1, 60)], [3, 3, 70], [*range(30, 71), *range(1, 40)]
    exclude = Exclusions.from_lists(rows).to(DEVICE)
    expected = rank_count(queries, table, targets, exclude, backend="reference")
    assert torch.equal(ranked(queries, table, targets, exclude), expected)
    assert not torch.equal(expected, rank_count(queries, table, targets, backend="reference"))


def test_a_diverged_model_ranks_by_id() -> None:
    for value in SPECIAL:
        queries = torch.full((3, 16), value, device=DEVICE)
        targets = torch.tensor([1, 40, 90], device=DEVICE)
        exclude = Exclusions.from_lists([[1, 2], [2, 2, 40, 41], []]).to(DEVICE)
        table = torch.ones(91, 16, device=DEVICE)
        assert ranked(queries, table, targets).tolist() == [1, 40, 90]
        assert ranked(queries, table, targets, exclude).tolist() == [1, 39, 90]


def test_equal_scores_rank_by_id() -> None:
    """Zeros of either sign, the smallest numbers that there are, and the largest."""
    for values in ([0.0, -0.0], [1e-45, 0.0, -1e-45], [3.4028235e38, float("inf"), -3.4028235e38, float("-inf")]):
        column = torch.tensor([7.0, *values * 20], device=DEVICE)
        table = torch.nn.functional.pad(column[:, None], (0, 15))
        queries = torch.zeros(len(column) - 1, 16, device=DEVICE)
        queries[:, 0] = 1
        targets = torch.arange(1, len(column), device=DEVICE)
        order = column[1:].sort(descending=True, stable=True).indices
        expected = torch.empty_like(targets)
        expected[order] = targets
        assert torch.equal(ranked(queries, table, targets), expected)


def test_only_rows_of_16_bytes_are_taken_as_they_are() -> None:
    wide, rows = whole(80, 21, torch.float16), whole(2, 21, torch.float16, 1)
    targets = some_targets(2, 79)
    expected = rank_count(rows[:, 1:17].clone(), wide[:, 1:17].clone(), targets, backend="reference")
    assert torch.equal(ranked(rows[:, 1:17], wide[:, 1:17], targets), expected)
    shifted = wide.flatten()[1 : 1 + 16 * 80].view(80, 16)
    expected = rank_count(rows[:, :16].clone(), shifted.clone(), targets, backend="reference")
    assert torch.equal(ranked(rows[:, :16], shifted, targets), expected)


def test_buffers_that_do_not_fit_are_refused() -> None:
    queries, table, targets = whole(2, 16, torch.float32), whole(9, 16, torch.float32), torch.tensor([1, 2]).to(DEVICE)
    for change in (
        {"out": torch.empty(3, dtype=torch.int64, device=DEVICE)},
        {"out": torch.empty(2, device=DEVICE)},
        {"out": torch.empty(4, dtype=torch.int64, device=DEVICE)[::2]},
        {"workspace": torch.empty(2, 3, device=DEVICE)},
        {"workspace": torch.empty(2, 2, dtype=torch.float64, device=DEVICE)},
    ):
        with pytest.raises(ValueError, match=r"(out|workspace) is .*expected contiguous"):
            rank_count(queries, table, targets, backend="triton", **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_out_is_what_comes_back(backend: str) -> None:
    queries, table, targets = whole(2, 16, torch.float32), whole(9, 16, torch.float32), torch.tensor([1, 2]).to(DEVICE)
    out = torch.full_like(targets, -7)
    assert rank_count(queries, table, targets, out=out, backend=backend) is out
    assert torch.equal(out, rank_count(queries, table, targets, backend="reference"))


@pytest.mark.parametrize(("tiles", "row_blocks"), [(1, 1), (63, 1), (64, 3), (95, 175), (7813, 4), (781_251, 1)])
def test_spans_cover_the_tiles_and_fill_the_gpu(tiles: int, row_blocks: int) -> None:
    from fave_fast.kernels.rank_count import SPAN_TILES, span_tiles

    length = span_tiles(tiles, row_blocks, 264)
    assert 1 <= length <= SPAN_TILES
    programs = row_blocks * -(-tiles // length)
    if row_blocks * tiles >= 264 * 4:
        assert programs / 264 / -(-programs // 264) > 0.8


# What follows depends on how the GPU rounds.


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, int]], None]:
    """Put a tile shape in the place of the pinned ones."""

    def put(change: dict[str, int]) -> None:
        def changed(op: str, variant: str, device: torch.device) -> dict[str, int]:
            return {**tile_shapes(op, variant, device), **change}

        monkeypatch.setattr(importlib.import_module("fave_fast.ops.rank_count"), "tile_shapes", changed)

    return put


TILES = {
    "pinned": {},
    "64x64": {"M": 64, "T": 64, "num_warps": 4},
    "64x128": {"M": 64, "T": 128, "num_warps": 4},
    "128x64": {"M": 128, "T": 64, "num_warps": 8},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [16, 128, 256])
@pytest.mark.parametrize("name", TILES)
def test_ranks_of_all_items_are_a_permutation(
    name: str, d: int, dtype: torch.dtype, shapes: Callable[[dict[str, int]], None]
) -> None:
    shapes(TILES[name])
    n = 2500
    table = torch.randn(n + 1, d, generator=generator(1), device=DEVICE).to(dtype)
    table[1300:2300] = table[1:1001]  # the same items again, in other columns of other tiles
    queries = torch.randn(1, d, generator=generator(2), device=DEVICE).to(dtype).expand(n, d).contiguous()
    targets = torch.arange(1, n + 1, device=DEVICE)
    ranks = ranked(queries, table, targets)
    assert torch.equal(ranks.sort().values, targets)
    assert (ranks[1299:2299] > ranks[:1000]).all()
    # With every other item excluded the ranks of those left are a permutation again.
    exclude = Exclusions(targets[::2].repeat(n), torch.arange(n + 1, device=DEVICE) * len(targets[::2]))
    assert torch.equal(ranked(queries, table, targets, exclude)[1::2].sort().values, targets[: n // 2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_ranks_alike_in_any_batch(dtype: torch.dtype) -> None:
    table = torch.randn(12102, 128, generator=generator(1), device=DEVICE).to(dtype)
    table[6000:9000] = table[1:3001]
    queries = torch.randn(513, 128, generator=generator(2), device=DEVICE).to(dtype)
    targets = some_targets(513, 12101)
    exclude = some_exclusions(513, 12101, targets, most=60)
    together = ranked(queries, table, targets, exclude)
    for start, stop in ((0, 1), (5, 8), (64, 127), (200, 332), (512, 513)):
        part = ranked(queries[start:stop], table, targets[start:stop], exclude.rows(start, stop))
        assert torch.equal(part, together[start:stop])
    turned = ranked(queries.flip(0), table, targets.flip(0))
    assert torch.equal(turned.flip(0), ranked(queries, table, targets))


@pytest.mark.gpu
def test_a_graph_replays_without_allocating() -> None:
    table = whole(12102, 128, torch.bfloat16, 1)
    queries = whole(132, 128, torch.bfloat16, 2)
    targets = some_targets(132, 12101)
    exclude = some_exclusions(132, 12101, targets)
    out, workspace = torch.empty_like(targets), torch.empty(2, 132, device=DEVICE)

    def call() -> None:
        rank_count(queries, table, targets, exclude, out=out, workspace=workspace, backend="triton")

    call()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in (3, 4):
        queries.copy_(whole(132, 128, torch.bfloat16, seed))
        targets.copy_(some_targets(132, 12101, seed))
        out.fill_(-1)
        workspace.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, rank_count(queries, table, targets, exclude, backend="reference"))


@pytest.mark.gpu
def test_a_million_items() -> None:
    n = 1_000_003
    table = with_special(whole(n + 1, 128, torch.bfloat16, 1))
    queries = whole(513, 128, torch.bfloat16, 2)
    targets = some_targets(513, n)
    exclude = some_exclusions(513, n, targets)
    ranks = ranked(queries, table, targets, exclude)
    assert torch.equal(ranks, rank_count(queries, table, targets, exclude, backend="reference"))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    n = (1 << 31) // 128 + 1000
    table = torch.zeros(n + 1, 128, dtype=torch.bfloat16, device=DEVICE)
    table[1:, 0] = (torch.arange(1, n + 1, device=DEVICE) % 251).to(torch.bfloat16)
    queries = torch.zeros(3, 128, dtype=torch.bfloat16, device=DEVICE)
    queries[:, 0] = 1
    targets = torch.tensor([n, n - 251, 1], device=DEVICE)
    exclude = Exclusions.from_lists([[n - 251, n - 251], [n], [n, 1, 2]]).to(DEVICE)
    scores = table[1:, 0].float()
    ids = torch.arange(1, n + 1, device=DEVICE)
    expected = []
    for target, gone in zip(targets.tolist(), ([n - 251], [n], [n, 2]), strict=True):
        s = scores[target - 1]
        before = (scores > s) | ((scores == s) & (ids < target))
        before[torch.tensor(gone, device=DEVICE) - 1] = False
        expected.append(int(before.sum()) + 1)
    assert ranked(queries, table, targets, exclude).tolist() == expected

"""The exact top K of a few queries in CUDA C++, against the reference; without a GPU by the emulation of its threads.

Whole numbers unless a test says otherwise: their inner products are exact, so lists are compared for equality.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_score_topk import DEVICE, assert_is_the_reference_s, denied, exclusions, poisoned, whole_numbers
from torch import Tensor

from fave_fast.errors import BackendError
from fave_fast.ops import Exclusions, score_topk, score_topk_gpu
from fave_fast.ops.score_topk import beyond_kernels, workspace_bytes
from fave_fast.ops.score_topk_gpu import MAX_K, MAX_ROWS, MAX_TILE
from fave_fast.ops.tiles import Sizes
from fave_fast.ops.tuning import multiprocessors

GPU = torch.cuda.is_available()
REFUSED = score_topk_gpu.why_not(DEVICE, torch.bfloat16) if GPU else None
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))

Lists = tuple[Tensor, Tensor]
Few = Callable[..., Lists]  # score_topk by the kernels


@pytest.fixture(scope="session")
def emulator(emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL | None:
    return None if GPU else emulation("score_topk.cpp")


@pytest.fixture
def few(emulator: ctypes.CDLL | None, monkeypatch: pytest.MonkeyPatch) -> Few:
    """Into outputs and workspace that someone used."""
    strides = [1]

    def emulate(arguments: dict[str, int], device: torch.device, overlap: bool) -> None:
        class Call(ctypes.Structure):
            _fields_ = [
                (name, ctypes.c_bool if isinstance(value, bool) else ctypes.c_int32 if at > 7 else ctypes.c_void_p)
                for at, (name, value) in enumerate(arguments.items())
            ]

        assert emulator is not None
        assert ctypes.sizeof(Call) == emulator.call_bytes()
        assert emulator.emulate(ctypes.byref(Call(*arguments.values())), ctypes.c_uint(strides[0])) == 0

    if not GPU:
        monkeypatch.setattr(score_topk_gpu, "launch", emulate)

    def run(
        queries: Tensor,
        table: Tensor,
        k: int,
        exclude: Exclusions | None = None,
        deny: Tensor | None = None,
        stride: int = 1,
    ) -> Lists:
        strides[0] = stride
        sizes = Sizes(len(queries), queries.shape[1], k, len(table) - 1)
        assert score_topk_gpu.beyond(sizes, DEVICE) is None
        out, workspace = poisoned(queries, table, k, exclude)
        assert score_topk_gpu.workspace_bytes(sizes, DEVICE) <= len(workspace)
        excluded = None if exclude is None else (exclude.ids, exclude.offsets)
        score_topk_gpu.run(queries, table, deny, excluded, out, workspace, overlap=False)
        return out

    return run


def numbers(batch: int, items: int, d: int, spread: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    return whole_numbers(batch, items, d, seed, spread, torch.bfloat16)


def narrow(exclude: Exclusions) -> Exclusions:
    return Exclusions(exclude.ids.int(), exclude.offsets.int())


def assert_equals_the_reference(few: Few, *case: Any) -> None:
    assert_is_the_reference_s(few(*case), *case)


@pytest.mark.parametrize(
    ("batch", "items", "d", "k", "spread"),
    [
        (1, 1, 64, 3, 3),
        (1, 97, 128, 20, 3),
        (MAX_ROWS, 700, 128, MAX_K, 3),
        (3, 97, 64, 1, 0),
        (2, 700, 256, 20, 1),
        (5, 768, 64, 20, 3),
    ],
)
def test_lists_equal_the_reference(few: Few, batch: int, items: int, d: int, k: int, spread: int) -> None:
    assert_equals_the_reference(few, *numbers(batch, items, d, spread), k)


@pytest.mark.parametrize("lengths", [(0, 3, 150), (400,)])
def test_exclusions_and_a_deny_list(few: Few, lengths: tuple[int, ...]) -> None:
    queries, table = numbers(3, 700, 64)
    exclude = exclusions(3, 700, lengths)
    for some in (exclude, narrow(exclude)):
        assert_equals_the_reference(few, queries, table, 20, some)
        assert_equals_the_reference(few, queries, table, 20, some, denied(700, 0.3))


def test_of_few_candidates_the_list_ends_early(few: Few) -> None:
    queries, table = numbers(2, 97, 64)
    exclude = Exclusions.from_lists([range(1, 98), range(6, 98)]).to(DEVICE)
    scores, ids = few(queries, table, 8, exclude)
    assert ids[0].eq(0).all()
    assert scores[0].eq(-torch.inf).all()
    assert sorted(ids[1, :5].tolist()) == [1, 2, 3, 4, 5]
    assert ids[1, 5:].eq(0).all()
    assert_equals_the_reference(few, queries, table, 8, exclude)


def test_the_best_items_in_one_tile_and_none_elsewhere(few: Few) -> None:
    """All K lie in one tile, whose list is the only one that is read to its end."""
    queries, table = numbers(1, 700, 64)
    table[1:] = -queries[0]
    table[40:80] = torch.arange(40, device=DEVICE)[:, None] * queries[0]
    assert_equals_the_reference(few, queries, table, MAX_K)


def test_nan_infinite_and_negative_zero_scores(few: Few) -> None:
    rng = np.random.default_rng(0)
    queries, table = numbers(2, 300, 64)
    queries[1] = 0  # half of its products are 0, half are -0
    for row in rng.choice(301, 200, replace=False):
        table[row, 0] = rng.choice([float("nan"), float("inf"), float("-inf"), -0.0])
    assert_equals_the_reference(few, queries, table, 30, exclusions(2, 300, (20,)))
    table[:] = torch.nan
    assert_equals_the_reference(few, queries, table, 3)


def test_a_list_does_not_depend_on_the_batch_nor_on_the_order_of_threads(few: Few) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, table = (torch.randn(n, 128, generator=generator).to(DEVICE, torch.bfloat16) for n in (MAX_ROWS, 301))
    exclude = exclusions(MAX_ROWS, 300, (0, 40))
    scores, ids = few(queries, table, 20, exclude)
    for stride in (1, 255, 129):
        again = few(queries, table, 20, exclude, stride=stride)
        assert torch.equal(again[0], scores)
        assert torch.equal(again[1], ids)
    for row in (0, 5):
        alone = few(queries[row : row + 1], table, 20, exclude.rows(row, row + 1))
        assert torch.equal(alone[0], scores[row : row + 1])
        assert torch.equal(alone[1], ids[row : row + 1])


def test_what_is_beyond_the_kernels_is_named() -> None:
    items = MAX_TILE * min(256, multiprocessors(DEVICE))
    for sizes, reason in (
        (Sizes(MAX_ROWS + 1, 128, 20, 97), "up to 8 queries, not 9"),
        (Sizes(1, 96, 20, 97), "D = 64, 128, 256, not 96"),
        (Sizes(1, 128, MAX_K + 1, 97), "K up to 32, not 33"),
        (Sizes(1, 128, 20, items + 1), f"N up to {items}, not {items + 1}"),
    ):
        assert reason in str(score_topk_gpu.beyond(sizes, DEVICE))
    assert score_topk_gpu.beyond(Sizes(MAX_ROWS, 128, MAX_K, items), DEVICE) is None


@pytest.mark.gpu
def test_a_named_backend_refuses_what_it_does_not_take() -> None:
    queries, table = numbers(MAX_ROWS + 1, 97, 64)
    with pytest.raises(BackendError, match="up to 8 queries, not 9"):
        score_topk(queries, table, 20, backend="cpp")
    assert "cpp" in beyond_kernels(Sizes(MAX_ROWS + 1, 64, 20, 97), DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("items", [97, 12_101, 33_000])
@pytest.mark.parametrize("batch", [1, 3, MAX_ROWS])
@pytest.mark.parametrize("d", score_topk_gpu.WIDTHS)
def test_the_bits_are_those_of_triton(batch: int, items: int, d: int) -> None:
    """Of random floats: products of the tensor cores add up alike in both, so `auto` may choose by size."""
    generator = torch.Generator().manual_seed(0)
    queries, table = (torch.randn(n, d, generator=generator).to(DEVICE, torch.bfloat16) for n in (batch, items + 1))
    exclude = narrow(exclusions(batch, items, (0, 50, 90)))
    want = score_topk(queries, table, 20, exclude, backend="triton")
    got = score_topk(queries, table, 20, exclude, backend="cpp")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    chosen = score_topk(queries, table, 20, exclude)
    assert torch.equal(chosen[0], want[0])


@pytest.mark.gpu
def test_tensors_that_are_not_contiguous_or_aligned() -> None:
    queries, table = numbers(2, 200, 128)
    wanted = score_topk(queries[:, ::2], table[:, 1::2], 20, backend="reference")
    assert torch.equal(score_topk(queries[:, ::2], table[:, 1::2], 20, backend="cpp")[1], wanted[1])
    shifted = [
        torch.empty(one.numel() + 1, dtype=one.dtype, device=DEVICE)[1:].view_as(one) for one in (queries, table)
    ]
    for one, other in zip(shifted, (queries, table), strict=True):
        one.copy_(other)
    wanted = score_topk(queries, table, 20, backend="reference")
    assert torch.equal(score_topk(*shifted, 20, backend="cpp")[1], wanted[1])


@pytest.mark.gpu
def test_graph_replay_follows_its_inputs_and_allocates_nothing() -> None:
    queries, table = numbers(3, 12_101, 128)
    exclude = exclusions(3, 12_101, (0, 50))
    out = torch.empty(3, 20, device=DEVICE), torch.empty(3, 20, dtype=torch.int64, device=DEVICE)
    room = workspace_bytes(queries, table, 20, len(exclude.ids))
    workspace = torch.empty(room, dtype=torch.uint8, device=DEVICE)

    def call() -> None:
        score_topk(queries, table, 20, exclude, out=out, workspace=workspace, backend="cpp", overlap=True)

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queries.add_(0)  # a kernel, behind which the scan may start early
        call()
    for seed in (1, 2):
        queries.copy_(numbers(3, 1, 128, seed=seed)[0])
        out[0].fill_(torch.nan)
        workspace.random_(0, 256)
        graph.replay()
        expected = score_topk(queries, table, 20, exclude, backend="reference")
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])

"""cross_entropy and its sampled form against fp64 by the formula; the kernels against PyTorch of the same dtype."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fave_fast.errors import BackendError
from fave_fast.ops import cross_entropy, sampled_cross_entropy
from fave_fast.ops.cross_entropy import Pairs
from fave_fast.ops.registry import why_no_triton

MODULE = importlib.import_module("fave_fast.ops.cross_entropy")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])  # the interpreter's bf16 is garbage
needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


def inputs(batch: int, n: int, d: int, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator(DEVICE).manual_seed(seed)
    endpoint = torch.randn(batch, d, dtype=torch.float64, device=DEVICE, generator=source)
    table = spread * d**-0.5 * torch.randn(n + 1, d, dtype=torch.float64, device=DEVICE, generator=source)
    targets = torch.randint(1, n + 1, (batch,), device=DEVICE, generator=source)
    targets[:2] = torch.tensor([n, 1], device=DEVICE)[:batch]
    table[0] = 50.0  # the padding would swallow the sum if it were a candidate
    return endpoint, table, targets


def seen(targets: Tensor, n: int) -> Pairs:
    """Some items of each row; among them the target, items twice, none at all, and some of rows that are not there."""
    source, batch = torch.Generator(DEVICE).manual_seed(3), len(targets)
    rows = torch.randint(0, batch + 2, (batch * min(n, 200) // 3,), device=DEVICE, generator=source)
    items = torch.randint(0, n + 1, rows.shape, device=DEVICE, generator=source)
    own = torch.arange(batch, device=DEVICE), targets
    return Pairs(*(torch.cat((one, one[:5], more)) for one, more in zip((rows, items), own, strict=True)))


def without(scores: Tensor, targets: Tensor, left_out: Pairs | None) -> Tensor:
    """Scores [B, N] of the candidates."""
    if left_out is None:
        return scores
    there = left_out.rows < len(targets)
    out = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=DEVICE)
    out[left_out.rows[there], left_out.items[there]] = True
    out[torch.arange(len(targets)), targets] = False
    return scores.masked_fill(out[:, 1:], -torch.inf)


def formula(
    endpoint: Tensor, table: Tensor, targets: Tensor, left_out: Pairs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients."""
    scores = without(endpoint @ table[1:].T, targets, left_out)
    weights = scores.softmax(1)
    loss = (scores.logsumexp(1) - scores.gather(1, targets[:, None] - 1)[:, 0]).mean()
    weights[torch.arange(len(targets)), targets - 1] -= 1
    weights /= len(targets)
    by_table = torch.cat((torch.zeros_like(table[:1]), weights.T @ endpoint))
    return loss, weights @ table[1:], by_table


def results(
    endpoint: Tensor, table: Tensor, targets: Tensor, backend: str, scale: float = 1.0, left_out: Pairs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    endpoint, table = endpoint.detach().requires_grad_(), table.detach().requires_grad_()
    loss = cross_entropy(endpoint, table, targets, left_out, backend=backend)
    by_endpoint, by_table = torch.autograd.grad(scale * loss, (endpoint, table))
    return loss.detach(), by_endpoint, by_table


def plain(
    endpoint: Tensor, table: Tensor, targets: Tensor, left_out: Pairs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    endpoint, table = endpoint.detach().requires_grad_(), table.detach().requires_grad_()
    scores = without(F.linear(endpoint, table[1:]).float(), targets, left_out)
    loss = F.cross_entropy(scores, targets - 1)
    by_endpoint, by_table = torch.autograd.grad(loss, (endpoint, table))
    return loss.detach(), by_endpoint, by_table


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def gpu(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.gpu)


@pytest.mark.parametrize("chunk", [None, 7, 1000])
@pytest.mark.parametrize(("batch", "n", "d"), [(1, 1, 3), (5, 40, 8), (3, 97, 16)])
def test_the_reference_is_the_formula(
    batch: int, n: int, d: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(MODULE, "MAX_SCORES", 0)
        monkeypatch.setattr(MODULE, "_CHUNK_SCORES", chunk)
    case = inputs(batch, n, d, 2.0)
    for left_out in (None, seen(case[2], n)):
        expected = formula(*case, left_out)
        for found, truth in zip(results(*case, "reference", left_out=left_out), expected, strict=True):
            # Sums of some hundred terms in fp64.
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)


def test_chunks_take_narrow_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint, table, targets = inputs(9, 300, 32, 2.0)
    case = endpoint.bfloat16(), table.bfloat16(), targets
    exact = formula(case[0].double(), case[1].double(), targets)
    expected = plain(*case)
    monkeypatch.setattr(MODULE, "MAX_SCORES", 0)
    monkeypatch.setattr(MODULE, "_CHUNK_SCORES", 9 * 64)
    found = results(*case, "reference")
    assert found[0].dtype == torch.float32
    # Each score is rounded to bf16 once, by half of 2^-7 of itself at most.
    assert (found[0] - exact[0]).abs() <= 2**-8 * (case[0].double() @ case[1][1:].double().T).abs().max()
    for one, other, truth in zip(found[1:], expected[1:], exact[1:], strict=True):
        assert one.dtype == other.dtype
        assert error(one, truth) <= 2 * error(other, truth) + torch.finfo(torch.float32).eps


@needs_triton
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
@pytest.mark.parametrize(
    ("batch", "n", "d"),
    [(1, 1, 16), (3, 97, 16), (70, 200, 32)]
    + [gpu(b, n, 128) for b in (1, 2, 3, 63, 132, 513) for n in (1, 97, 1682, 12101)]
    + [gpu(132, 1682, d) for d in (16, 32, 64, 256)],
)
def test_the_kernels_err_no_more_than_twice_what_pytorch_does(
    batch: int, n: int, d: int, spread: float, dtype: torch.dtype, some: bool
) -> None:
    """Over all items, and without some of each row's."""
    endpoint, table, targets = inputs(batch, n, d, spread)
    case, left_out = (endpoint.to(dtype), table.to(dtype), targets), seen(targets, n) if some else None
    exact = formula(case[0].double(), case[1].double(), targets, left_out)
    expected = plain(*case, left_out)
    found = results(*case, "triton", left_out=left_out)
    for one, other, truth in zip(found, expected, exact, strict=True):
        assert one.dtype == other.dtype
        if n == 1:  # one item, probability 1: no loss, no gradient
            assert one.abs().max() <= 1e-3
            continue
        assert error(one, truth) <= 2 * error(other, truth) + 4 * torch.finfo(torch.float32).eps
    assert found[2][0].abs().max() == 0
    for one, again in zip(found, results(*case, "triton", left_out=left_out), strict=True):
        assert torch.equal(one, again)
    halved = results(*case, "triton", scale=0.5, left_out=left_out)
    torch.testing.assert_close(2 * halved[1], found[1], rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_a_row_of_which_only_the_target_is_left_has_no_loss(backend: str) -> None:
    endpoint, table, targets = (one.half() if one.is_floating_point() else one for one in inputs(2, 70, 16))
    every = torch.arange(71, device=DEVICE)
    loss, by_endpoint, by_table = results(
        endpoint, table, targets, backend, left_out=Pairs(torch.zeros_like(every), every)
    )
    alone = results(endpoint[1:], table, targets[1:], backend)
    assert by_endpoint[0].abs().max() <= 1e-3  # a probability of 1 less 1, of fp32 sums
    torch.testing.assert_close(2 * loss, alone[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(2 * by_table, alone[2], rtol=2**-9, atol=2e-3)  # fp16


@needs_triton
def test_only_what_is_asked_for_is_computed() -> None:
    endpoint, table, targets = inputs(3, 50, 16)
    narrow = endpoint.to(torch.float16), table.to(torch.float16)
    _, by_endpoint, by_table = results(*narrow, targets, "triton")
    for index, whole in enumerate((by_endpoint, by_table)):
        leaves = [one.detach().requires_grad_(index == at) for at, one in enumerate(narrow)]
        (one,) = torch.autograd.grad(cross_entropy(*leaves, targets, backend="triton"), leaves[index])
        assert torch.equal(one, whole)


@needs_triton
def test_scores_far_below_zero_leave_the_table_s_end_out() -> None:
    """2^(0 - log sum), the weight of what lies past the last item, overflows here."""
    endpoint = torch.full((3, 16), -8.0, device=DEVICE, dtype=torch.float16)
    table = torch.randint(5, 9, (71, 16), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).half()
    targets = torch.tensor([1, 30, 70], device=DEVICE)
    case = endpoint, table, targets
    exact = formula(endpoint.double(), table.double(), targets)
    for one, other, truth in zip(results(*case, "triton"), plain(*case), exact, strict=True):
        assert error(one, truth) <= 2 * error(other, truth) + 4 * torch.finfo(torch.float32).eps


@needs_triton
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    endpoint = torch.zeros(2, 16, device=DEVICE, dtype=torch.float16)
    endpoint[:, 0] = 100
    table = torch.zeros(200, 16, device=DEVICE, dtype=torch.float16)
    table[:, 0] = torch.linspace(-300, 300, 200, device=DEVICE)
    targets = torch.tensor([1, 199], device=DEVICE)
    loss = cross_entropy(endpoint, table, targets, backend="triton")
    torch.testing.assert_close(loss, cross_entropy(endpoint.float(), table.float(), targets, backend="reference"))


def test_autocast_narrows_both_factors() -> None:
    endpoint, table, targets = inputs(4, 30, 16)
    endpoint, table = endpoint.float(), table.float()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = cross_entropy(endpoint, table, targets, backend="reference")
    assert found.dtype == torch.float32
    assert torch.equal(found, cross_entropy(endpoint.bfloat16(), table.bfloat16(), targets, backend="reference"))


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_float32_is_left_to_the_reference() -> None:
    endpoint, table, targets = inputs(4, 30, 16)
    with pytest.raises(BackendError, match="for bfloat16 and float16"):
        cross_entropy(endpoint.float(), table.float(), targets, backend="triton")


@needs_triton
def test_widths_that_no_kernel_takes() -> None:
    endpoint, table, targets = inputs(4, 30, 12)
    with pytest.raises(BackendError, match="not 12"):
        cross_entropy(endpoint.half(), table.half(), targets, backend="triton")
    assert cross_entropy(endpoint.half(), table.half(), targets).isfinite()


GOOD = {"endpoint": torch.ones(2, 3), "table": torch.ones(5, 3), "targets": torch.tensor([1, 4])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"endpoint": torch.ones(2, 4)}, r"endpoint \[2, 4\] and table \[5, 3\]"),
        ({"table": torch.ones(1, 3)}, r"table \[1, 3\]; .* with an item"),
        ({"endpoint": torch.ones(2, 3, dtype=torch.float64)}, "expected one floating-point dtype"),
        ({"targets": torch.tensor([1])}, r"targets are torch.int64 \[1\]"),
        ({"targets": torch.tensor([0, 1])}, "expected ids from 1 to 4"),
        ({"targets": torch.tensor([1, 5])}, "expected ids from 1 to 4"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{**GOOD, **change})
    with pytest.raises(ValueError, match=message):
        sampled_cross_entropy(**{**GOOD, **change}, negatives=torch.tensor([1]))


def test_pairs_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"left_out's items are torch.int32 \[1\] on cpu; expected int64"):
        cross_entropy(**GOOD, left_out=Pairs(torch.tensor([0]), torch.tensor([1], dtype=torch.int32)))


def test_sampling_every_item_once_is_the_whole_sum() -> None:
    endpoint, table, targets = inputs(5, 40, 8)
    endpoint.requires_grad_()
    every = torch.arange(1, 41, device=DEVICE)
    loss, by_endpoint, _ = formula(endpoint.detach(), table, targets)
    for negatives in (every, every.flip(0).expand(5, 40)):
        found = sampled_cross_entropy(endpoint, table, targets, negatives)
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(found, endpoint)
        torch.testing.assert_close(grad, by_endpoint, rtol=1e-10, atol=1e-14)


def test_the_sampled_sum_is_right_on_average() -> None:
    endpoint, table, targets = inputs(1, 30, 8)
    weights = torch.rand(30, dtype=torch.float64, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)) + 0.1
    weights[int(targets) - 1] = 3  # drawn often, and left out each time
    q = weights / weights.sum()
    source = torch.Generator(DEVICE).manual_seed(2)
    negatives = 1 + torch.multinomial(q, 4000 * 50, replacement=True, generator=source).view(4000, 50)
    sums = []
    for row in negatives:
        loss = sampled_cross_entropy(endpoint, table, targets, row, q[row - 1].log())
        sums.append(float((loss + (endpoint * table[targets]).sum()).exp()))
    found = torch.tensor(sums, dtype=torch.float64)
    exact = float((endpoint @ table[1:].T).exp().sum())
    assert abs(float(found.mean()) - exact) < 5 * float(found.std()) / 4000**0.5


def test_sampled_shapes() -> None:
    for change, message in (
        ({"negatives": torch.ones(3, 2, dtype=torch.int64)}, r"negatives are \[3, 2\]"),
        ({"negatives": torch.tensor([1, 2]), "log_q": torch.zeros(3)}, r"log_q is \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled_cross_entropy(**GOOD, **change)


@pytest.mark.gpu
def test_a_graph_replays_and_no_matrix_is_allocated() -> None:
    endpoint, table, targets = inputs(512, 100_000, 128)
    leaves = [one.bfloat16().requires_grad_() for one in (endpoint, table)]

    def step() -> tuple[Tensor, ...]:
        loss = cross_entropy(*leaves, targets, backend="triton")
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expected = step()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 512 * 100_000  # the smallest matrix of scores has two bytes each
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for one in captured:
        one.fill_(torch.nan)
    graph.replay()
    for one, other in zip(captured, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_million_items_and_more_than_2_to_the_31_elements() -> None:
    n = (1 << 31) // 128 + 1000
    table = torch.zeros(n + 1, 128, dtype=torch.bfloat16, device=DEVICE)
    table[1:, 0] = (torch.arange(1, n + 1, device=DEVICE) % 7).to(torch.bfloat16)
    endpoint = torch.zeros(2, 128, dtype=torch.bfloat16, device=DEVICE)
    endpoint[:, 0] = 1
    targets = torch.tensor([n, 3], device=DEVICE)
    loss, _, by_table = results(endpoint, table, targets, "triton")
    scores = table[1:, 0].double()
    log_sum = scores.logsumexp(0)
    torch.testing.assert_close(loss.double(), (log_sum - scores[targets - 1]).mean(), rtol=1e-5, atol=0)
    expected = (scores[-2] - log_sum).exp()
    torch.testing.assert_close(by_table[-2, 0].double(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(by_table[-1, 0].double(), torch.tensor(-0.5, device=DEVICE).double(), rtol=1e-2, atol=0)

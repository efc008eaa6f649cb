from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fave_fast.ops import input_modulation
from fave_fast.ops.beside import Beside
from fave_fast.ops.cross_entropy import cross_entropy
from fave_fast.ops.packed import rows_of
from fave_fast.ops.table_gradient import TableGradient, shared

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ITEMS, D, B = 37, 16, 5
Part = Callable[[Tensor, TableGradient | None, str], Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def ids(*shape: int) -> Tensor:
    return torch.randint(1, ITEMS + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def rows(table: Tensor, gradient: TableGradient | None, backend: str) -> Tensor:
    return (rows_of(table, ids(B), gradient=gradient, backend=backend) * draw(B, D)).sum()


def embedded(table: Tensor, gradient: TableGradient | None, backend: str) -> Tensor:
    offsets = torch.tensor([0, 40, 41, 60, 61, 90], device=DEVICE)
    e = input_modulation(
        ids(90), table, draw(D), draw(D), draw(B, D), draw(B, D), 0.1, offsets=offsets, gradient=gradient,
        backend=backend,
    )  # fmt: skip
    return (e * draw(90, D)).sum()


def target(table: Tensor, gradient: TableGradient | None, backend: str) -> Tensor:
    if DEVICE == "cuda":  # the kernels' products are of 16 bits there
        with torch.autocast("cuda", torch.bfloat16):
            return 10 * cross_entropy(draw(B, D), table, ids(B), gradient=gradient, backend=backend)
    return 10 * cross_entropy(draw(B, D), table, ids(B), gradient=gradient, backend=backend)


def untold(table: Tensor, gradient: TableGradient | None, backend: str) -> Tensor:
    return (table[ids(7)] * draw(7, D)).sum()


def the_gradient(loss: Tensor, table: Tensor, **options: bool) -> Tensor:
    (result,) = torch.autograd.grad(loss, [table], **options)
    return result


@pytest.mark.parametrize("backend", ["reference", "triton", pytest.param("auto", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "parts", [[rows, embedded, target, untold], [target, rows], [embedded], [rows, rows], [target, target], [untold]]
)
def test_all_parts_and_nothing_else(parts: list[Part], backend: str) -> None:
    table = draw(ITEMS + 1, D).requires_grad_()
    wants = [the_gradient(part(table, None, backend), table) for part in parts]
    through, gradient = shared(table, Beside())
    loss = torch.stack([part(through, gradient, backend) for part in parts]).sum()
    # Up to four parts added in another order, each sum rounded to 24 bits; on a GPU L_tgt's part is rounded to bf16's 8
    # bits where nothing is shared.
    size = torch.stack(wants).abs().sum(0)
    eps = 2**-8 if DEVICE == "cuda" and target in parts else 2**-22
    for _ in range(2):  # what one pass left is not in the next one's
        got = the_gradient(loss, table, retain_graph=True)
        assert ((got - torch.stack(wants).sum(0)).abs() <= eps * size).all()
        assert (got[0] == 0).all()


def test_a_frozen_table_gets_none() -> None:
    table, weight = draw(ITEMS + 1, D), draw(D).requires_grad_()
    through, gradient = shared(table, Beside())
    (rows_of(through, ids(B), gradient=gradient) * weight).sum().backward()
    assert table.grad is None
    assert gradient.total(None) is None

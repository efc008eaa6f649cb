"""One gradient of a table whose rows several ops of a pass read.

Each op's own gradient would be as large as the table: filled with zeros, written in some rows, added to the others'. In
a step of 512 histories of Beauty that was five passes over 6 MB and as many launches in a row, 22 us (H200, 968886e).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fave_fast.ops.beside import Beside, Wait


class TableGradient:
    """Where the ops that were given it leave their parts of a table's gradient, in their backward passes."""

    def __init__(self, table: Tensor, behind: Beside) -> None:
        """`behind`: where the part that fills all of it may be computed until the others are there."""
        self.shape, self.dtype, self.device = table.shape, table.dtype, table.device
        self.behind = behind
        self._whole: tuple[Tensor, Wait] | None = None
        self._parts: list[Callable[[Tensor], object]] = []

    def empty(self) -> Tensor:
        """Memory for a part as large as the table."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def fill(self, whole: Tensor) -> None:
        """A part as large as the table, whose computation `behind` has begun."""
        made = self.behind.so_far()
        if self._whole is None:
            self._whole = whole, made
            return

        def add(total: Tensor) -> None:
            made()
            total.add_(whole)

        self.add(add)

    def add(self, part: Callable[[Tensor], object]) -> None:
        """A function that adds a part to the gradient, on the current stream."""
        self._parts.append(part)

    def total(self, rest: Tensor | None) -> Tensor | None:
        """All parts and `rest`, the gradient that autograd has of other ops, in the order in which they came."""
        filled, parts = self._whole, self._parts
        self._whole, self._parts = None, []
        if filled is None:
            if not parts:
                return rest
            whole = self.empty().zero_()
        else:
            whole, made = filled
            made()
        for part in parts:
            part(whole)
        return whole if rest is None else whole.add_(rest)


def shared(table: Tensor, behind: Beside) -> tuple[Tensor, TableGradient]:
    """The table [N + 1, D] for one pass's ops, and what those that know of it are to be given with it."""
    gradient = TableGradient(table, behind)
    through: Tensor = cast(Any, _Shared).apply(gradient, table)
    return through, gradient


class _Shared(torch.autograd.Function):
    """The table as it is; its gradient is there when all ops' backward passes have run."""

    @staticmethod
    def forward(ctx: Any, gradient: TableGradient, table: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, ctx.gradient.total(grads[0])

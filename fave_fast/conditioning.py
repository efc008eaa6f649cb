"""How x_t and the times reach the network: as in eq. (9), or so that the path can carry information.

At the paper's delta of 0.001, `add` leaves the network nearly nothing to see of x_t. The others are options beyond the
paper. All are affine in c = x_t + z (z of eq. 8), given the embedded history: a tangent of c gives that of E by the
linear part alone, which is what L_cons needs.

Shapes: B histories, D channels; `rows` stands for [B, L], or for the T rows of packed histories. `spread` takes
[B, ...] to something that broadcasts against [rows, ...].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fave_fast.config import ModelConfig

Spread = Callable[[Tensor], Tensor]


def to_positions(x: Tensor) -> Tensor:
    """The `spread` of left-padded histories: [B, D] -> [B, 1, D]."""
    return x[:, None, :]


class Conditioning(nn.Module):
    """Eq. (9): E = e_s + lambda * c, without weights of its own."""

    reads_lambda = True

    def features(self, c: Tensor) -> Tensor:
        """What of c [B, D] the rows get, linear in it; [B, ...]."""
        return c

    def change(self, embedded: Tensor, features: Tensor, lam: Tensor) -> Tensor:
        """E - e_s [rows, D], linear in `features`, which broadcast; embedded and lambda are [rows, D]."""
        return lam * features

    def forward(self, embedded: Tensor, c: Tensor, lam: Tensor, spread: Spread = to_positions) -> Tensor:
        """E [rows, D] of the embedded history and lambda [rows, D], and c [B, D]."""
        return embedded + self.change(embedded, spread(self.features(c)), lam)

    def tangent(self, embedded: Tensor, dc: Tensor, lam: Tensor, spread: Spread = to_positions) -> Tensor:
        """The derivative of `forward` along dc [B, D]."""
        return self.change(embedded, spread(self.features(dc)), lam)


class Gated(Conditioning):
    """Eq. (9) with a learned gate g [D]: E = e_s + g * lambda * c, g = 0 at first, for a delta that is not small."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(d))

    def change(self, embedded: Tensor, features: Tensor, lam: Tensor) -> Tensor:
        """As above."""
        return self.gate * lam * features


class ScaleAndShift(Conditioning):
    """E = e_s + g * (s * e_s + b) with (s, b) = W c and a learned gate g [D], 0 at first; lambda is not used.

    FiLM (Perez et al. 2018) with the gate of Peebles and Xie (2023).
    """

    reads_lambda = False

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(d))
        self.project = nn.Linear(d, 2 * d, bias=False)

    def features(self, c: Tensor) -> Tensor:
        """(s, b), [B, 2 D]."""
        result: Tensor = self.project(c)
        return result

    def change(self, embedded: Tensor, features: Tensor, lam: Tensor) -> Tensor:
        """As above."""
        scale, shift = features.chunk(2, dim=-1)
        return self.gate * (scale * embedded + shift)


class Token(Conditioning):
    """x_t as a token of its own, q + W c with a learned q [D], behind the newest item; lambda is not used.

    The endpoint is that token's last state, and a position's age counts from it.
    """

    reads_lambda = False

    def __init__(self, d: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(d))
        self.project = nn.Linear(d, d, bias=False)

    def features(self, c: Tensor) -> Tensor:
        """W c, [B, D]."""
        result: Tensor = self.project(c)
        return result

    def forward(self, embedded: Tensor, c: Tensor, lam: Tensor, spread: Spread = to_positions) -> Tensor:
        """E [B, L + 1, D] of left-padded histories [B, L, D]; the token is the last row."""
        return torch.cat((embedded, spread(self.query + self.features(c))), dim=1)

    def tangent(self, embedded: Tensor, dc: Tensor, lam: Tensor, spread: Spread = to_positions) -> Tensor:
        """The derivative of `forward` along dc [B, D]."""
        return torch.cat((torch.zeros_like(embedded), spread(self.features(dc))), dim=1)


def make_conditioning(config: ModelConfig) -> Conditioning:
    """The one that the configuration names."""
    if config.conditioning == "add":
        return Conditioning()
    return {"gate": Gated, "film": ScaleAndShift, "token": Token}[config.conditioning](config.d)

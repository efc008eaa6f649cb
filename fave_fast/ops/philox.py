"""The random numbers that kernels draw, in plain PyTorch: a counter-based generator, and normals from its words.

A word depends on the seed, the user, the age of the position (0 is the newest) and the channel, and on nothing else:
not on the batch, its order, its padding or the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of word * factor, both below 2^32: in halves, for int64 holds 63 bits."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def words(seed: Tensor, users: Tensor, ages: Tensor, d: int, stream: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011) words in [0, 2^32), one for each two channels.

    The counter is (channel // 8, age, user's lower and upper half), the key is the seed; the four words of a counter
    belong to its eight channels.

    Args:
        seed: int64 [1].
        users: int64, any shape.
        ages: integers of the same shape, below 2^32.
        d: channels, a multiple of 8.
        stream: 0 or 1, two independent sets of words.

    Returns:
        int64 [..., d / 2].
    """
    groups = torch.arange(d // 8, device=users.device) | (stream << 31)
    shape = (*users.shape, d // 8)
    counter = [
        part.expand(shape) for part in (groups, ages[..., None] & _LOW, users[..., None] & _LOW, users[..., None] >> 32)
    ]
    counter[3] = counter[3] & _LOW
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        high0, low0 = _product(counter[0], 0xD2511F53)
        high2, low2 = _product(counter[2], 0xCD9E8D57)
        counter = [high2 ^ counter[1] ^ key[0], low2, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    return torch.stack(counter, dim=-1).flatten(-2)


def normals(seed: Tensor, users: Tensor, ages: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """N(0, 1) by Box and Muller from the words of stream 0: [..., d], computed in `dtype`, float32 or float64.

    A word is two channels: its upper 20 bits are the radius, which ends at 5.4, and its lower 12 the angle. Any number
    of equally spaced angles has the normal's moments up to that number; the radius is what needs bits.
    """
    drawn = words(seed, users, ages, d, 0)
    radius = (-2 * torch.log(1 - ((drawn >> 12).to(dtype) + 0.5) * 2.0**-20)).sqrt()
    angle = (2 * math.pi) * (((drawn & 0xFFF).to(dtype) + 0.5) * 2.0**-12 - 0.5)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)


def dropout_factors(seed: Tensor, users: Tensor, ages: Tensor, d: int, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), p in steps of 2^-16: float64 [..., d], from the words of stream 1."""
    drawn = words(seed, users, ages, d, 1)
    below = min(round(p * 2**16), 2**16 - 1)
    kept = torch.stack((drawn & 0xFFFF, drawn >> 16), dim=-1).flatten(-2) >= below
    return kept.double().mul_(2**16 / (2**16 - below))

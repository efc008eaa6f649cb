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
    """Philox4x32-10 (Salmon et al. 2011) words in [0, 2^32), one for each channel.

    The counter is (channel // 4, age, user's lower and upper half), the key is the seed; the four words of a counter
    belong to its four channels.

    Args:
        seed: int64 [1].
        users: int64, any shape.
        ages: integers of the same shape, below 2^32.
        d: channels, a multiple of 4.
        stream: 0 or 1, two independent sets of words.

    Returns:
        int64 [..., d].
    """
    quads = torch.arange(d // 4, device=users.device) | (stream << 31)
    shape = (*users.shape, d // 4)
    counter = [
        part.expand(shape) for part in (quads, ages[..., None] & _LOW, users[..., None] & _LOW, users[..., None] >> 32)
    ]
    counter[3] = counter[3] & _LOW
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        high0, low0 = _product(counter[0], 0xD2511F53)
        high2, low2 = _product(counter[2], 0xCD9E8D57)
        counter = [high2 ^ counter[1] ^ key[0], low2, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    return torch.stack(counter, dim=-1).flatten(-2)


def normals(seed: Tensor, users: Tensor, ages: Tensor, d: int) -> Tensor:
    """N(0, 1) by Box and Muller from the words of stream 0: float64 [..., d].

    Each pair of channels takes the radius from the upper 23 bits of its first word and the angle from those of its
    second; the radius ends at 5.6.
    """
    uniform = (words(seed, users, ages, d, 0) >> 9).double().mul_(2.0**-23)
    radius = (-2 * torch.log(1 - uniform[..., 0::2])).sqrt()
    angle = (2 * math.pi) * (uniform[..., 1::2] - 0.5)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)


def dropout_factors(seed: Tensor, users: Tensor, ages: Tensor, d: int, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), from the words of stream 1: float64 [..., d]."""
    kept = words(seed, users, ages, d, 1) >= round(p * 2**32)
    return kept.double().div_(1 - p)

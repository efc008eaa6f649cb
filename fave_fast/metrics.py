"""HR, NDCG and MRR from ranks; coverage and intra-list diversity from lists. Per cent, except ILD."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

CUTOFFS = (5, 10, 20)


def rank_metrics(ranks: Tensor, cutoffs: Iterable[int] = CUTOFFS) -> dict[str, float]:
    """Means over users, in per cent, from the targets' ranks, int64 [U], counted from 1.

    With one target a user, HR@k = [rank <= k], NDCG@k = [rank <= k] / log2(rank + 1), MRR@k = [rank <= k] / rank.

    Raises:
        ValueError: there is no user.
    """
    if ranks.numel() == 0:
        raise ValueError("ranks is empty; expected the rank of at least one target")
    wide = ranks.double()
    result: dict[str, float] = {}
    for k in cutoffs:
        hit = (ranks <= k).double()
        result[f"HR@{k}"] = 100 * hit.mean().item()
        result[f"NDCG@{k}"] = 100 * (hit / torch.log2(wide + 1)).mean().item()
        result[f"MRR@{k}"] = 100 * (hit / wide).mean().item()
    return result


def coverage(lists: Tensor, num_items: int) -> float:
    """Share of the catalogue that occurs in any of the lists, int64 [U, K] (0 where a list ends early), in per cent."""
    shown = torch.unique(lists)
    return 100 * int((shown != 0).sum()) / num_items


def intra_list_diversity(lists: Tensor, embedding: Tensor) -> float:
    """ILD of the paper's Table 4: mean pairwise cosine distance between a list's items, averaged over users; 0 to 2.

    Lists with fewer than two items have no pair and are left out.

    Args:
        lists: int64 [U, K], 0 where a list ends early.
        embedding: [N + 1, D] item embeddings.

    Returns:
        The mean, or 0 if no list has two items.
    """
    total, count = 0.0, 0
    for part in torch.split(lists.to(embedding.device), 1024):
        real = (part != 0).double()
        units = F.normalize(embedding[part].double(), dim=-1) * real[..., None]
        n = real.sum(1)
        # The sum over pairs of cos = (|sum of unit vectors|^2 - sum of their squared lengths) / 2.
        cosines = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
        pairs = n * (n - 1)
        mean_distance = 1 - cosines[pairs > 0] / pairs[pairs > 0]
        total += mean_distance.sum().item()
        count += len(mean_distance)
    return total / count if count else 0.0

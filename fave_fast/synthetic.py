"""Interactions with planted structure, and the best score anything can reach on them.

Items fall into groups, one an interest. A user goes on from the last item met or, with probability `recall`, from the
one before it. From that item the interest stays with probability `stay`, and the next item is one of a few preferred
successors or, now and then, comes from the group's popularity; else the interest drifts to one of a few neighbouring
groups, and the next item is the bridge into it or comes from its popularity. No user meets an item twice: the
probabilities are scaled up over the items not yet seen.

Every item belongs to one group, so nothing is latent: p(next | history) is known exactly. A list S hits with
probability sum of p(i | history) over i in S, whatever made the list; the sum is largest for the k most probable items.
Its mean over the test users is therefore the best HR@k that any recommender can expect (the Bayes-optimal list).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fave_fast.data import IdMap, Interactions, Ints, Items, Split, history_exclusions
from fave_fast.errors import ConfigError

Floats = npt.NDArray[np.float64]

# Rows of [rows, N + 1] float64 at a time: 16 MB for 500 items.
_CHUNK = 4096


@dataclass(frozen=True)
class PlantedConfig:
    """What is planted. The defaults are sized for a small model and a minute on a CPU.

    Raises:
        ConfigError: a value outside its range, or histories that could exhaust a group and its neighbours.
    """

    users: int = 2500
    items: int = 400  # N
    interests: int = 20  # groups of N / interests items, give or take one
    min_length: int = 8  # a user's items, uniform from min_length to max_length, targets included
    max_length: int = 30
    stay: float = 0.6  # probability that the interest stays
    recall: float = 0.3  # probability of going on from the item before the last
    successors: int = 4  # preferred next items of an item, within its group
    decay: float = 0.7  # each successor against the one before
    background: float = 0.4  # share of the group's popularity while the interest stays
    neighbours: int = 3  # groups an interest can drift to, equally likely
    bridge: float = 0.5  # probability that a drift takes the bridge
    skew: float = 0.8  # popularity within a group falls as rank ** -skew

    def __post_init__(self) -> None:
        group = self.items // max(self.interests, 1)
        room = group * (1 + self.neighbours)
        for name, ok, expected in (
            ("users", self.users >= 1, "a whole number of at least 1"),
            ("interests", self.interests >= 2, "a whole number of at least 2"),
            ("items", group >= 2, f"at least 2 items for each of {self.interests} interests"),
            ("min_length", self.min_length >= 3, "at least 3: two targets and a history"),
            ("neighbours", 1 <= self.neighbours < self.interests, f"a whole number from 1 to {self.interests - 1}"),
            (
                "max_length",
                self.min_length <= self.max_length <= room,
                f"a whole number from {self.min_length} to {room}",
            ),
            ("successors", 1 <= self.successors < group, f"a whole number from 1 to {group - 1}"),
            ("stay", 0 < self.stay < 1, "a number between 0 and 1"),
            ("background", 0 < self.background <= 1, "a number above 0, up to 1"),
            ("bridge", 0 <= self.bridge < 1, "a number from 0 up to, not including, 1"),
            ("recall", 0 <= self.recall < 1, "a number from 0 up to, not including, 1"),
            ("decay", 0 < self.decay <= 1, "a number above 0, up to 1"),
            ("skew", 0 <= self.skew <= 3, "a number from 0 to 3"),
        ):
            if not ok:
                raise ConfigError(f"synthetic.{name} is {getattr(self, name)!r}; expected {expected}")


@dataclass(frozen=True, eq=False)
class Planted:
    """The structure behind a synthetic data set. Index 0 of items is padding."""

    config: PlantedConfig
    groups: Ints  # [N + 1], 0..G-1; -1 at the padding
    popularity: Floats  # [N + 1], sums to 1 in each group
    neighbours: Ints  # [G, neighbours]
    successors: Ints  # [N + 1, successors], the preferred first
    bridges: Ints  # [N + 1, neighbours], an item in each neighbouring group
    transitions: Floats  # [N + 1, N + 1], p(next | from) before seen items are left out; row 0: a user's first item

    def next_probabilities(self, history: npt.NDArray[np.integer]) -> Floats:
        """The exact p(next | history).

        Args:
            history: integer [n], items 1..N in the order they were met; may be empty.

        Returns:
            float64 [N + 1]: sums to 1; 0 at the padding and at the items of `history`.

        Raises:
            ValueError: `history` is not flat or holds something else than items 1..N, or leaves no item to go on to.
        """
        n = self.config.items
        if history.ndim != 1 or np.any((history < 1) | (history > n)):
            raise ValueError(f"history is {history!r}; expected a flat array of items from 1 to {n}")
        ends = np.array([len(history)])
        probabilities = self._rows(history.astype(np.int32), np.zeros(1, dtype=np.int64), ends)[0]
        if not probabilities.any():
            raise ValueError(f"history of {len(history)} items; expected one that leaves an item to go on to")
        scaled: Floats = probabilities / probabilities.sum()
        return scaled

    def _rows(self, items: Items, starts: Ints, ends: Ints) -> Floats:
        """p(next | items[start:end]) of each row up to its sum, float64 [B, N + 1]."""
        padded = np.append(items, 0)
        last = np.where(ends > starts, padded[ends - 1], 0)
        rows = self._weights(last, np.where(ends > starts + 1, padded[np.maximum(ends - 2, 0)], last))
        seen, offsets = history_exclusions(items, starts, ends)
        rows[np.repeat(np.arange(len(rows)), np.diff(offsets)), seen] = 0
        return rows

    def _weights(self, last: npt.NDArray[np.integer], before: npt.NDArray[np.integer]) -> Floats:
        recall = self.config.recall
        weights: Floats = (1 - recall) * self.transitions[last] + recall * self.transitions[before]
        return weights


def generate(config: PlantedConfig, seed: int) -> tuple[Planted, Interactions]:
    """A structure and the users' interactions drawn from it; the same seed gives the same.

    Returns:
        The structure, and `Interactions` called "synthetic", without times: user ids 1..U, item ids 1..N.
    """
    rng = np.random.default_rng(seed)
    planted = _plant(config, rng)
    lengths = rng.integers(config.min_length, config.max_length, size=config.users, endpoint=True)
    # In (0, 1]: see `_draw`.
    draws = 1 - rng.random((config.users, config.max_length))
    met = np.concatenate([_walk(planted, part) for part in np.split(draws, range(_CHUNK, len(draws), _CHUNK))])
    items = met[np.arange(config.max_length) < lengths[:, None]]
    return planted, Interactions(
        items=items,
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        item_ids=IdMap(np.arange(1, config.items + 1)),
        user_ids=IdMap(np.arange(1, config.users + 1)),
        times=None,
        name="synthetic",
        decisions=(),
    )


def _plant(config: PlantedConfig, rng: np.random.Generator) -> Planted:
    n = config.items
    groups = np.concatenate([[-1], rng.permutation(np.arange(n) % config.interests)])
    members = [np.flatnonzero(groups == group) for group in range(config.interests)]
    popularity = np.zeros(n + 1)
    for member in members:
        weights = np.arange(1, len(member) + 1) ** -config.skew
        popularity[rng.permutation(member)] = weights / weights.sum()
    others = [np.delete(np.arange(config.interests), group) for group in range(config.interests)]
    neighbours = np.stack([rng.choice(other, config.neighbours, replace=False) for other in others])
    successors = np.zeros((n + 1, config.successors), dtype=np.int64)
    bridges = np.zeros((n + 1, config.neighbours), dtype=np.int64)
    for item in range(1, n + 1):
        own = members[groups[item]]
        successors[item] = rng.choice(own[own != item], config.successors, replace=False)
        bridges[item] = [rng.choice(members[group]) for group in neighbours[groups[item]]]
    transitions = _transitions(config, groups, popularity, neighbours, successors, bridges)
    return Planted(config, groups, popularity, neighbours, successors, bridges, transitions)


def _transitions(
    config: PlantedConfig, groups: Ints, popularity: Floats, neighbours: Ints, successors: Ints, bridges: Ints
) -> Floats:
    drift = (1 - config.stay) / config.neighbours
    interest = config.stay * config.background * np.eye(config.interests)  # [G, G]
    np.put_along_axis(interest, neighbours, drift * (1 - config.bridge), axis=1)
    preference = config.decay ** np.arange(config.successors)
    preference *= config.stay * (1 - config.background) / preference.sum()
    table: Floats = interest[groups[:, None], groups] * popularity
    rows = np.arange(len(table))[:, None]
    table[rows, successors] += preference
    table[rows, bridges] += drift * config.bridge
    table[0] = popularity / config.interests
    return table


def _walk(planted: Planted, draws: Floats) -> Items:
    """Items met by each user, int32 [U, draws.shape[1]], one draw in (0, 1] each."""
    users = np.arange(len(draws))
    met = np.zeros(draws.shape, dtype=np.int32)
    unseen = np.ones((len(draws), planted.config.items + 1))
    for step in range(draws.shape[1]):
        last = met[:, max(step - 1, 0)]
        before = met[:, max(step - 2, 0)]
        met[:, step] = _draw(planted._weights(last, before) * unseen, draws[:, step])
        unseen[users, met[:, step]] = 0
    return met


def _draw(weights: Floats, draws: Floats) -> Ints:
    """One column of each row with probability in proportion to its weight.

    The first running sum that reaches a target in (0, total] belongs to a weight above 0, whatever the rounding.
    """
    sums = weights.cumsum(axis=1)
    columns: Ints = (sums >= draws[:, None] * sums[:, -1:]).argmax(axis=1)
    return columns


def best_hit_rate(planted: Planted, data: Interactions, split: Split, k: int) -> float:
    """The expected HR@k of the best possible recommender, in per cent: see the module's docstring.

    It is the mean over the test users of the sum of the k largest p(next | history), all items before the target being
    the history and seen items no candidates (the `filtered` protocol). The HR@k of the same lists on the targets that
    were drawn differs from it by chance.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    starts = data.offsets[np.searchsorted(data.offsets, split.test, side="right") - 1]
    total = 0.0
    for at in range(0, len(starts), _CHUNK):
        rows = planted._rows(data.items, starts[at : at + _CHUNK], split.test[at : at + _CHUNK])
        rows /= rows.sum(axis=1, keepdims=True)
        total += float(np.sort(rows, axis=1)[:, -k:].sum())
    return 100 * total / len(starts)

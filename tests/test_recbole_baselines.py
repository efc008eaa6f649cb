"""The ranking of RecBole's models is ours; with RecBole installed, that they train."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import recbole_baselines
from bench.recbole_baselines import MODELS, Baseline, Counts, convolved, masked, rank_all, ranks
from bench.summary import load_runs
from fave_fast.config import Config
from fave_fast.data import Interactions, load_interactions, split
from fave_fast.errors import InputError
from fave_fast.evaluate import Positions, ServedEndpoints, rank_targets
from fave_fast.model import FAVE

CONFIG = Config.from_dict({"model": {"d": 16, "blocks": 1, "source_block": 0, "max_length": 8}}, "test")
needs_recbole = pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="RecBole is not installed")


class OurScores(Baseline):
    """Scores of our network, rounded so that many are equal."""

    def scores(self, data: Interactions, starts: Positions, targets: Positions) -> Tensor:
        """As above."""
        assert isinstance(self.network, FAVE)
        endpoint = ServedEndpoints(self.network, CONFIG, "auto")(data, starts, targets)
        return endpoint @ self.network.item_embedding.weight.T


def test_ranks_are_those_of_our_ranking(tiny_log: Path) -> None:
    data = load_interactions(tiny_log)
    torch.manual_seed(0)
    model = FAVE(CONFIG.model, data.num_items).eval()
    with torch.no_grad():
        model.item_embedding.weight[9:12] = model.item_embedding.weight[8]  # equal scores
    targets = split(data, CONFIG.data).test
    baseline = OurScores(model, None, Counts(data.num_users + 1, data.num_items + 1), 8)
    filtered, raw, lists = rank_all(baseline, data, targets)
    want = rank_targets(model, CONFIG, data, targets)
    assert torch.equal(filtered, want.filtered)
    assert torch.equal(raw, want.raw)  # type: ignore[arg-type]
    for found, expected in zip(lists.tolist(), want.lists.tolist(), strict=True):  # type: ignore[union-attr]
        assert sorted(found) == sorted(expected) or {8, 9, 10, 11} & {*found, *expected}


def test_equal_scores_rank_the_lower_id_first() -> None:
    scores = torch.tensor([[9.0, 1.0, 2.0, 2.0, 2.0, -torch.inf]]).expand(4, -1)
    assert ranks(scores, torch.tensor([1, 2, 3, 4])).tolist() == [4, 1, 2, 3]


@pytest.mark.parametrize("kernel", [(1, 6), (3, 6), (8, 6), (8, 1)])
def test_convolutions_along_the_items_are_the_same(kernel: tuple[int, int]) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(1, 3, kernel).double()
    rows = torch.randn(2, 1, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(convolved(convolution, rows), convolution(rows), rtol=0, atol=1e-13)  # 48 products of 1


def test_masks_hide_items_and_say_which() -> None:
    rows = torch.arange(1, 21).repeat(2000, 1)
    rows[:, 15:] = 0
    changed, items, places = masked(rows, 0.2, 99)
    hides = changed == 99
    assert torch.equal(changed.masked_fill(hides, 0), rows.masked_fill(hides, 0))
    assert not hides[:, 15:].any()
    # 30,000 draws of probability 0.2: five standard deviations are 5 (0.2 0.8 / 30,000)^(1/2) = 0.012
    assert abs(hides[:, :15].float().mean().item() - 0.2) < 0.012
    assert items.shape == places.shape == (2000, 4)
    assert items.view(-1).shape == places.view(-1).shape  # which RecBole asks of them
    for row in range(200):
        last = hides[row].nonzero()[:, 0].tolist()[-4:]
        assert places[row].tolist() == [0] * (4 - len(last)) + last
        assert items[row].tolist() == [0] * (4 - len(last)) + [place + 1 for place in last]


@pytest.mark.skipif(importlib.util.find_spec("recbole") is not None, reason="RecBole is installed")
def test_without_recbole_it_says_so(tiny_log: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"RecBole cannot be imported .*: pip install recbole"):
        recbole_baselines.main(["--data", str(tiny_log), "default", "--out", str(tmp_path)])


@needs_recbole
def test_batches_are_padded_on_the_right(tiny_log: Path) -> None:
    data = load_interactions(tiny_log)
    baseline = Baseline.make("SASRec", data, CONFIG, torch.device("cpu"))
    starts = data.offsets[:3]
    targets = starts + np.array([1, 2, 2])
    batch: Any = baseline.batch(data, starts, targets, targets)
    for row, (start, target) in enumerate(zip(starts, targets, strict=True)):
        items = data.items[start:target].tolist()
        assert batch["item_id_list"][row].tolist() == items + [0] * (8 - len(items))
        assert batch["item_id"][row] == data.items[target]
    assert batch["item_length"].tolist() == [1, 2, 2]
    assert batch["user_id"].tolist() == [1, 2, 3]


@needs_recbole
def test_every_model_trains(tiny_log: Path, tmp_path: Path) -> None:
    small = ["model.d=16", "model.blocks=1", "model.source_block=0", "model.max_length=8", "train.epochs=2"]
    words = [word for one in small for word in ("--set", one)]
    command = ["--data", str(tiny_log), "default", *words, "--out", str(tmp_path), "--device", "cpu"]
    assert recbole_baselines.main([*command, "--commit", "abc"]) == 0
    assert [run["setting"] for run in load_runs(tmp_path)] == sorted(f"recbole-{name.lower()}" for name in MODELS)
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text())["test"]["chosen"]["filtered"]["HR@20"] > 0

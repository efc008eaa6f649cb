"""What `bench.diagnostics` says of flows whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import diagnostics
from bench.diagnostics import Asked, dependence, diagnose, distances, samples, steps, straightness
from fave_fast.config import Config, FlowConfig
from fave_fast.data import Interactions, load_interactions, split
from fave_fast.evaluate import rank_targets
from fave_fast.metrics import coverage, intra_list_diversity, rank_metrics
from fave_fast.model import FAVE, Prediction

CONFIG = Config.from_dict(
    {"model": {"d": 16, "blocks": 2, "heads": 2, "ffn_mult": 2, "max_length": 6, "delta": 0.0}}, "test"
)


class Known(FAVE):
    """f(x_t, t, r) = a x_t + b t, whatever the history."""

    a, b = 0.5, 0.0

    def forward(self, history: Tensor, x_t: Tensor, t: Tensor, r: Tensor, lam: Tensor) -> Prediction:
        """As above."""
        return Prediction(self.a * x_t + self.b * t[:, None], x_t)


@pytest.fixture(scope="module")
def data(tiny_log: Path) -> Interactions:
    """41 users, 24 items."""
    return load_interactions(tiny_log)


def asked(kind: type[FAVE], data: Interactions, config: Config = CONFIG) -> Asked:
    torch.manual_seed(0)
    model = kind(config.model, data.num_items).eval()
    return Asked.of(model, config, data, split(data, config.data).test)


@torch.no_grad()
def test_steps_of_a_known_flow(data: Interactions) -> None:
    """dx/dt = x / 2 - x_0 ends at (1 + h / 2)^n (-1) + 2 times x_0, h = 1 / n."""
    found = steps(asked(Known, data))
    for count in diagnostics.STEPS:
        end = 2 - (1 + 0.5 / count) ** count
        assert found[str(count)]["gap"] == pytest.approx(abs(end - 0.5) / 0.5, abs=1e-5)


@torch.no_grad()
def test_one_step_is_what_is_served(data: Interactions) -> None:
    one = asked(FAVE, data)
    want = rank_metrics(rank_targets(one.model, CONFIG, data, split(data, CONFIG.data).test, full=False).filtered)
    found = steps(one)["1"]
    assert (found["HR@20"], found["NDCG@20"]) == (want["HR@20"], want["NDCG@20"])
    ranked = rank_targets(one.model, CONFIG, data, split(data, CONFIG.data).test)
    assert ranked.lists is not None
    alone = samples(one)["1"]
    assert alone["NDCG@20"] == pytest.approx(want["NDCG@20"])
    assert alone["coverage@20"] == coverage(ranked.lists, data.num_items)
    assert alone["ild@20"] == pytest.approx(intra_list_diversity(ranked.lists, one.table))


def test_a_network_that_sees_no_flow_is_straight_and_deaf(data: Interactions) -> None:
    found: dict[str, Any] = diagnose(asked(FAVE, data).model, CONFIG, data, split(data, CONFIG.data).test)
    assert found["straightness"] == {"jvp": 0, "l_cons": 0}
    assert all(one["gap"] < 1e-5 for one in found["steps"].values())
    assert found["x_0"] == {
        "change": 0, "overlap": 1, "change, another user's": 0, "overlap, another user's": 1,
    }  # fmt: skip
    assert found["samples"]["16"] == found["samples"]["1"]


@torch.no_grad()
def test_another_draw_of_x_0_is_seen_where_it_is_read(data: Interactions) -> None:
    config = CONFIG.override({"model": {"conditioning": "token", "embedding_std": 1.0}, "flow": {"rho": 0.5}}, "test")
    one = asked(FAVE, data, config)
    found = dependence(one)
    assert found["change"] > 0.01
    assert 0 < found["overlap"] < 1
    more = samples(one)
    assert more["16"]["coverage@20"] >= more["1"]["coverage@20"]
    assert more["16"] != more["1"]
    assert straightness(one)["jvp"] > 0.01


@torch.no_grad()
def test_distances(data: Interactions) -> None:
    config = replace(CONFIG, flow=FlowConfig(rho=1.0))
    one = asked(FAVE, data, config)
    with torch.no_grad():
        one.table[1:] = torch.eye(data.num_items, 16)
    found = distances(one)
    last, x_1 = one.table[one.history[:, -1]], one.table[one.targets]
    assert found["anchor"] == pytest.approx((last - x_1).norm(dim=1).mean().item())
    assert found["anchor, cosine"] == pytest.approx(1 - (last * x_1).sum(1).mean().item(), abs=1e-6)
    assert found["gaussian"] == pytest.approx((16 + (x_1.norm(dim=1) ** 2).mean().item()) ** 0.5, rel=0.15)

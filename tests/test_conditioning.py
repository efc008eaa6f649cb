"""Other ways for x_t to reach the network than eq. (9)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fave_fast import checkpoint as checkpoints
from fave_fast.checkpoint import Checkpoint
from fave_fast.config import Config, FlowConfig, ModelConfig
from fave_fast.data import load_interactions
from fave_fast.engine import Recommender
from fave_fast.errors import BackendError, InputError
from fave_fast.flow import InferenceNoise, encode, one_step
from fave_fast.losses import ReferenceNetwork, stage1_objective
from fave_fast.model import FAVE, Prediction
from fave_fast.one_step import OneStep
from fave_fast.ops.encoder import EncoderWeights, InputPath, encode_ids
from fave_fast.train import Trainer

ITEMS = 24
OTHER = ["gate", "film", "token"]
MODEL = ModelConfig(d=16, blocks=2, heads=2, ffn_mult=2, max_length=6, delta=0.5)
HISTORY = torch.tensor([[0, 0, 3, 1, 3], [0, 0, 0, 0, 12], [5, 4, 3, 2, 1]])


def build(name: str, opened: bool = True) -> FAVE:
    """In fp64; with `opened`, gates are not at 0."""
    torch.manual_seed(0)
    model = FAVE(replace(MODEL, conditioning=name), ITEMS).double().eval()  # type: ignore[arg-type]
    if opened:
        with torch.no_grad():
            for weight in model.conditioning.parameters():
                weight += 0.5 * torch.randn_like(weight)
    return model


def points() -> tuple[torch.Tensor, ...]:
    """x_t, t, r, lambda."""
    draws = torch.Generator().manual_seed(1)
    x_t = torch.randn(3, 16, generator=draws, dtype=torch.float64)
    t = torch.rand(3, generator=draws, dtype=torch.float64)
    return x_t, t, torch.ones_like(t), torch.rand(3, 5, 16, generator=draws, dtype=torch.float64)


@torch.no_grad()
def test_add_is_equation_9_and_has_no_weights() -> None:
    model = build("add")
    assert not any("conditioning" in name for name in model.state_dict())
    x_t, t, r, lam = points()
    embedded = model.embed_history(HISTORY)
    want = embedded + lam * (x_t + model.time_features(t, r))[:, None, :]
    assert torch.equal(model.modulate(embedded, x_t, t, r, lam), want)
    for name in OTHER:  # and its other weights are the same from the same seed
        other = build(name, opened=False).state_dict()
        assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["gate", "film"])
def test_a_closed_gate_lets_nothing_through(name: str) -> None:
    closed, opened = build(name, opened=False), build(name)
    x_t, t, r, lam = points()
    embedded = closed.embed_history(HISTORY)
    assert torch.equal(closed.modulate(embedded, x_t, t, r, lam), embedded)
    opened.load_state_dict({**closed.state_dict(), "conditioning.gate": torch.ones(16)})
    c = x_t + opened.time_features(t, r)
    if name == "gate":
        want = embedded + lam * c[:, None]
    else:
        scale, shift = (c @ opened.conditioning.project.weight.T)[:, None].chunk(2, -1)  # type: ignore[union-attr]
        want = embedded * (1 + scale) + shift
    torch.testing.assert_close(opened.modulate(embedded, x_t, t, r, lam), want)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHER)
def test_the_endpoint_depends_on_x_t_and_not_on_padding(name: str) -> None:
    model = build(name)
    x_t, t, r, lam = points()
    endpoint = model(HISTORY, x_t, t, r, lam).endpoint
    assert ((model(HISTORY, -x_t, t, r, lam).endpoint - endpoint).norm(dim=1) > 1e-2).all()
    alone = model(HISTORY[:1, 2:], x_t[:1], t[:1], r[:1], lam[:1, 2:]).endpoint
    torch.testing.assert_close(alone, endpoint[:1], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHER)
def test_the_encoder_serves_it_by_its_reference_alone(name: str) -> None:
    model = build(name).float()
    flow = FlowConfig(rho=0.5)
    noise = InferenceNoise.draw(model, flow)
    weights, path = EncoderWeights.pack(model), InputPath.pack(model, flow, noise)
    ids, offsets = torch.tensor([3, 1, 3, 12, 5, 4, 3, 2, 1]), torch.tensor([0, 3, 4, 9])
    torch.testing.assert_close(encode_ids(weights, path, ids, offsets), encode(model, flow, noise, HISTORY.numpy()))
    for backend, reason in weights.beyond.items():
        assert reason == f"its kernel adds x_t as eq. (9) does, and the model has conditioning {name!r}"
        with pytest.raises(BackendError, match=re.escape(f"backend {backend!r} cannot run")):
            encode_ids(weights, path, ids, offsets, backend=backend)
    assert set(weights.beyond) == {"triton", "cpp", "pair", "tile"}
    with pytest.raises(InputError, match=f"conditioning '{name}'; expected 'add'"):
        OneStep(model, flow, noise, 5)


@pytest.fixture(scope="module", params=OTHER)
def trained(
    request: pytest.FixtureRequest, tiny_log: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """Both stages."""
    config = replace(tiny_config, model=replace(tiny_config.model, conditioning=request.param, delta=1.0))
    path = tmp_path_factory.mktemp("model") / "model.pt"
    Trainer(load_interactions(tiny_log), config, path).run()
    return checkpoints.load(path)


@torch.no_grad()
def test_training_moves_its_weights_and_the_engine_serves_them(trained: Checkpoint) -> None:
    name = trained.config.model.conditioning
    model = trained.build_model()
    for key, weight in model.conditioning.named_parameters():
        assert weight.abs().max() > (1e-3 if key == "gate" else 0)
    histories = [[101, 105, 103], [107], [103, 102, 101, 120, 119]]
    found = Recommender(trained).recommend(histories, k=5)
    numbers = [trained.item_ids.index(np.array(history)) + 1 for history in histories]
    noise = InferenceNoise.draw(model, trained.config.flow)
    for history, answer in zip(numbers, found, strict=True):
        ids = torch.from_numpy(history)[None]
        endpoint = one_step(model, ids, noise.prior(model, trained.config.flow, ids), noise.lambdas(ids))[0]
        scores = model.item_embedding.weight @ endpoint
        scores[[0, *history.tolist()]] = -torch.inf
        best = scores.topk(5)
        assert answer.items == [trained.item_ids.id_at(item - 1) for item in best.indices.tolist()], name
        assert answer.scores == pytest.approx(best.values.tolist(), rel=1e-5, abs=1e-6)
    alone = [Recommender(trained).recommend([history], k=5)[0].items for history in histories]
    assert alone == [answer.items for answer in found]


def test_stage_1_from_the_anchor(tiny_config: Config) -> None:
    """x_t at t is between the masked embedding of an item of the history and the target's."""

    class Asked(ReferenceNetwork):
        def predict(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> Prediction:
            self.asked = x_t, t
            return super().predict(x_t, t, r)

    model, targets = build("add"), torch.tensor([4, 5, 6])
    config = tiny_config.override({"flow": {"prior_stage1": "anchor", "rho": 1.0}, "loss": {"beta": 0}}, "test")
    network = Asked(model, HISTORY, torch.Generator().manual_seed(3))
    stage1_objective(network, config, targets, torch.Generator().manual_seed(3))
    x_t, t = network.asked
    table = model.item_embedding.weight
    for row, history in enumerate(HISTORY.tolist()):
        x_0 = (x_t[row] - t[row] * table[targets[row]]) / (1 - t[row])
        assert min((x_0 - table[item]).norm() for item in set(history) - {0}) < 1e-9

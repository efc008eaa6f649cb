"""The peers that `bench.quality` trains."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import quality
from bench.experiment import Options, Run, perform
from bench.methods import METHODS, diffurec_objective
from fave_fast import checkpoint as checkpoints
from fave_fast.config import Config
from fave_fast.data import load_interactions, split
from fave_fast.evaluate import rank_targets
from fave_fast.losses import ReferenceNetwork
from fave_fast.metrics import rank_metrics
from fave_fast.model import FAVE, Prediction

NEVER = time.monotonic() + 1e6


class Asked(ReferenceNetwork):
    """Keeps what it is asked."""

    def predict(self, x_t: Tensor, t: Tensor, r: Tensor) -> Prediction:
        """As always."""
        self.asked = x_t, t, r
        self.answer = super().predict(x_t, t, r)
        return self.answer


def test_diffurec_predicts_the_target_from_its_diffusion() -> None:
    torch.manual_seed(0)
    config = Config.from_dict({"model": {"d": 16, "blocks": 1, "source_block": 0, "max_length": 3}}, "test")
    model = FAVE(config.model, 9).eval()
    targets = torch.tensor([1, 4, 9, 2])
    network = Asked(model, torch.tensor([[0, 3, 5], [1, 2, 3], [0, 0, 7], [9, 8, 7]]), None)
    losses = diffurec_objective(network, config, targets, torch.Generator().manual_seed(5))
    draws = torch.Generator().manual_seed(5)
    step, noise = torch.randint(32, (4,), generator=draws), torch.randn(4, 16, generator=draws)
    signal = (1 - torch.linspace(0.1 / 32 + 0.01, 20 / 32 + 0.01, 32, dtype=torch.float64)).cumprod(0)[step, None]
    table = model.item_embedding.weight
    x_t, t, r = network.asked
    torch.testing.assert_close(x_t, (signal.sqrt() * table[targets] + (1 - signal).sqrt() * noise).float())
    assert (32 * t).tolist() == step.tolist()
    assert r.tolist() == [1, 1, 1, 1]
    scores = network.answer.endpoint @ table[1:].T
    torch.testing.assert_close(losses.total, F.cross_entropy(scores, targets - 1))


@pytest.mark.parametrize("name", ["fmrec-style", "diffurec-style"])
def test_samples_are_the_same_in_each_evaluation_and_no_draw_of_training(name: str, tiny_log: Path) -> None:
    config = Config.from_dict({"model": {"d": 16, "blocks": 1, "source_block": 0, "delta": 0.5}}, "test")
    data = load_interactions(tiny_log)
    torch.manual_seed(0)
    model = FAVE(config.model, data.num_items).eval()
    targets = split(data, config.data).val
    before = torch.get_rng_state()
    ranks = []
    for _ in range(2):
        found = rank_targets(model, config, data, targets, batch_size=16, full=False, sampler=METHODS[name].sampler)
        ranks.append(found.filtered)
    assert torch.equal(*ranks)
    assert torch.equal(before, torch.get_rng_state())
    other = replace(config, flow=replace(config.flow, seed=1))
    found = rank_targets(model, other, data, targets, batch_size=16, full=False, sampler=METHODS[name].sampler)
    assert not torch.equal(found.filtered, ranks[0])


@pytest.fixture(scope="module")
def trained(
    tiny_log: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """All peers and ours."""
    folder = tmp_path_factory.mktemp("peers")
    options = Options("cpu", "fp32", "auto", torch.get_num_threads(), True, folder)
    runs = quality.plan(
        [("log", "default")], {name: quality.SETTINGS[name] for name in ("preset", *quality.PEERS)}, [], [0]
    )
    runs = [replace(run, config=replace(run.config, train=replace(tiny_config.train, epochs_stage2=0))) for run in runs]
    runs = [shrunk(run, tiny_config) for run in runs]
    groups = quality.grouped(runs, {("log", runs[0].config.data): load_interactions(tiny_log)}, options)
    results = [result for group in groups for result in perform(group, NEVER)]
    return folder, {result["setting"]: result for result in results}


def shrunk(run: Run, small: Config) -> Run:
    """The run with a network of the sizes of `small`, whose other choices are its own."""
    sizes = {name: getattr(small.model, name) for name in ("d", "blocks", "heads", "ffn_mult", "max_length")}
    return replace(run, config=replace(run.config, model=replace(run.config.model, **sizes)))


def test_peers_are_trained_and_judged_their_own_way(
    trained: tuple[Path, dict[str, dict[str, Any]]], tiny_log: Path
) -> None:
    folder, results = trained
    data = load_interactions(tiny_log)
    assert {name: result["method"] for name, result in results.items()} == {
        "preset": "fave", "sasrec": "fave", "diffurec-style": "diffurec-style", "fmrec-style": "fmrec-style",
    }  # fmt: skip
    first_losses = {result["curve"][0]["loss"] for result in results.values()}
    assert len(first_losses) == 3, "FMRec's objective is stage 1; the others have their own"
    for name, result in results.items():
        assert result["finished"]
        kept = checkpoints.load(folder / f"log.{name}.0.pt")
        config, sampler = kept.config, METHODS[result["method"]].sampler
        for targets, want in (
            (split(data, config.data).val, result["validation"]["chosen"]),
            (split(data, config.data).test, result["test"]["chosen"]["filtered"]),
        ):
            found = rank_targets(kept.build_model(), config, data, targets, full=False, sampler=sampler)
            assert rank_metrics(found.filtered) == want


def test_sasrec_knows_no_flow(trained: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, _ = trained
    model = checkpoints.load(folder / "log.sasrec.0.pt").build_model()
    history, draws = torch.tensor([[0, 3, 5], [1, 2, 3]]), torch.Generator().manual_seed(0)
    answers = []
    for _ in range(2):
        x, t = torch.randn(2, model.config.d, generator=draws), torch.rand(2, generator=draws)
        lam = model.draw_lambda((2, 3, model.config.d), history.device, draws)
        answers.append(model(history, x, t, t, lam).endpoint)
    assert torch.equal(*answers)
    assert model.config.attention == "causal"

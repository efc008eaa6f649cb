from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import figures
from bench.diagnostics import diagnose
from bench.figures import project, swept
from fave_fast import checkpoint as checkpoints
from fave_fast.config import preset
from fave_fast.data import load_interactions, split
from fave_fast.errors import InputError
from fave_fast.flow import euler


@pytest.fixture(scope="module")
def drawn(tiny_log: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of one checkpoint, taken twice."""
    folder = tmp_path_factory.mktemp("figures")
    command = ["--ckpt", str(tiny_checkpoint), str(tiny_checkpoint), "--data", str(tiny_log), "--device", "cpu"]
    assert figures.main([*command, "--projection", "pca", "--out", str(folder)]) == 0
    return folder


def test_figures_of_checkpoints(drawn: Path, tiny_log: Path, tiny_checkpoint: Path) -> None:
    pictures = {path.name for path in drawn.iterdir()} - {"diagnostics.json"}
    assert pictures == {"trajectories.png", "priors.png", "diagnostics.png"}
    assert all((drawn / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    found = json.loads((drawn / "diagnostics.json").read_text())
    kept, data = checkpoints.load(tiny_checkpoint), load_interactions(tiny_log)
    assert found["after"] == diagnose(kept.build_model(), kept.config, data, split(data, kept.config.data).test)
    assert found["before"] == found["after"]


@torch.no_grad()
def test_a_path_ends_where_euler_does(tiny_log: Path, tiny_checkpoint: Path) -> None:
    trained = figures.Trained.load(tiny_checkpoint, load_interactions(tiny_log), str(tiny_log), torch.device("cpu"))
    rows = torch.tensor([0, 5, 7])
    x_0 = trained.asked.prior("gaussian")[rows]
    path = figures.path_of(trained, rows, x_0, 4)
    history = trained.asked.history[rows]
    assert torch.equal(path[0], x_0)
    assert torch.equal(path[-1], euler(trained.model, history, x_0, trained.asked.noise().lambdas(history), 4))


def test_the_plane_keeps_what_lies_in_it() -> None:
    """Points of a plane have their distances in their two principal components."""
    angles = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
    flat = torch.stack((angles.cos(), angles.sin()), 1)
    turned = flat @ torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64)).Q.T
    found = torch.from_numpy(project(3 * turned, "pca"))
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(flat, flat))


def run(setting: str, seed: int, ndcg: float, **changes: Any) -> dict[str, Any]:
    values = {section: {key: value} for name, value in changes.items() for section, key in [name.split("__")]}
    config = preset("beauty").override(values, "test").to_dict()
    figures_of = {"filtered": {"NDCG@20": ndcg}, "ild@20": 0.5}
    return {
        "dataset": "beauty", "preset": "beauty", "setting": setting, "seed": seed, "method": "fave", "finished": True,
        "config": config, "test": {"chosen": figures_of, "last stage": figures_of},
    }  # fmt: skip


def test_a_sweep_takes_the_runs_that_differ_in_one_key() -> None:
    usual = preset("beauty").loss.alpha
    assert usual != 4.0
    runs = [
        run("preset", 0, 6.0), run("preset", 1, 8.0), run("alpha-4", 0, 5.0, loss__alpha=4.0),
        run("alpha-usual", 0, 6.0, loss__alpha=usual), run("rho-1", 0, 3.0, flow__rho=1.0),
        run("both", 0, 1.0, loss__alpha=4.0, flow__rho=1.0), run("token", 0, 1.0, model__conditioning="token"),
    ]  # fmt: skip
    assert swept(runs) == {"beauty": {"alpha": {usual: [6.0], 4.0: [5.0]}, "rho": {0.75: [6.0], 1.0: [3.0]}}}
    apart = [run("preset", 0, 6.0), run("preset", 1, 8.0), run("alpha-4", 2, 5.0, loss__alpha=4.0)]
    assert swept(apart) == {"beauty": {"alpha": {usual: [6.0, 8.0], 4.0: [5.0]}}}
    assert [name for name, _ in figures.sweeps(runs)] == ["sweeps-beauty"]
    assert [name for name, _ in figures.diversity(runs)] == ["diversity-beauty"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--ckpt with --data, or --runs, are needed"),
        (["--ckpt", "CKPT", "CKPT"], "--ckpt with --data, or --runs, are needed"),
        (["--ckpt", "CKPT", "none.pt", "--data", "LOG"], "none.pt: cannot read the checkpoint"),
        (["--ckpt", "CKPT", "CKPT", "--data", "none.csv"], "none.csv: "),
        (["--runs", "none"], "none: no such folder"),
    ],
)
def test_bad_usage(
    options: list[str], message: str, tiny_log: Path, tiny_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [{"CKPT": str(tiny_checkpoint), "LOG": str(tiny_log)}.get(word, word) for word in options]
    with pytest.raises((InputError, SystemExit)) as error:
        figures.main([*words, "--out", str(tmp_path)])
    said = capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value)
    assert message in said

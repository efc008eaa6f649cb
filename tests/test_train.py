from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fave_fast import checkpoint as checkpoints
from fave_fast import train
from fave_fast.config import Config, dump_yaml
from fave_fast.data import IdMap, Interactions, Windows, load_interactions
from fave_fast.errors import CheckpointError, InputError
from fave_fast.steps import FusedSteps, Steps
from fave_fast.train import Outcome, Trainer, epoch_batches

CLOCK = {"seconds", "samples_per_second"}


@pytest.fixture(scope="module")
def data(tiny_log: Path) -> Interactions:
    return load_interactions(tiny_log)


@pytest.fixture(scope="module")
def whole(data: Interactions, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Outcome]:
    """A run that nothing interrupted."""
    trainer = Trainer(data, tiny_config, tmp_path_factory.mktemp("whole") / "model.pt", seed=3)
    return trainer, trainer.run()


def metrics(trainer: Trainer) -> list[dict[str, Any]]:
    """The metrics file without what the clock says."""
    lines = [json.loads(line) for line in trainer.metrics_path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_run(trainer: Trainer, outcome: Outcome, whole: tuple[Trainer, Outcome]) -> None:
    assert metrics(trainer) == metrics(whole[0])
    kept, expected = checkpoints.load(trainer.out), whole[1].checkpoint
    assert_equal_weights(dict(kept.weights), dict(expected.weights))
    assert_equal_weights(trainer.model.state_dict(), whole[0].model.state_dict())
    for name in ("best", "best_stage", "best_epoch"):
        assert getattr(outcome.progress, name) == getattr(whole[1].progress, name)
    assert {**kept.facts, "seconds": 0} == {**expected.facts, "seconds": 0}


def interrupt_after(trainer: Trainer, steps: int) -> None:
    """Let the run be interrupted while it takes its step number `steps`."""
    step, taken = trainer._train_step, 0

    def counted(numbers: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == steps:
            trainer.interrupt()
        return step(numbers)

    trainer._train_step = counted  # type: ignore[method-assign]


def scripted(trainer: Trainer, scores: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let validation return `scores` one by one; the weights that were judged come into the list returned."""
    left, judged = iter(scores), []

    def validate() -> dict[str, float]:
        judged.append(train._copy(trainer.model))
        return {"HR@20": 50.0, "NDCG@20": next(left)}

    trainer.validate = validate  # type: ignore[method-assign]
    return judged


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(0, 1), (0, 2), (1, 1), (2, 1), (3, 2), (1, 0), (2, 0)],
    ids=["first-step", "mid-epoch", "second-epoch", "stage2", "stage2-second-epoch", "epoch-end", "stage-end"],
)
def test_resume_equals_uninterrupted(
    whole: tuple[Trainer, Outcome], data: Interactions, tiny_config: Config, tmp_path: Path, epochs: int, steps: int
) -> None:
    per_epoch = -(-len(whole[0].windows) // tiny_config.train.batch_size)
    assert per_epoch > 2, "or the interruption would not be in the middle"
    first = Trainer(data, tiny_config, tmp_path / "model.pt", seed=3)
    interrupt_after(first, epochs * per_epoch + steps)
    assert first.run().interrupted
    assert checkpoints.load(first.out).build_model() is not None
    torch.manual_seed(99)
    second = Trainer(data, tiny_config, tmp_path / "model.pt", seed=3)
    second.resume()
    assert_same_run(second, second.run(), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model.pt.metrics.jsonl"]


def test_resume_between_epochs(
    whole: tuple[Trainer, Outcome], data: Interactions, tiny_config: Config, tmp_path: Path
) -> None:
    """Interrupted again and again: while each evaluation runs, so that each part trains one whole epoch."""
    interruptions = 0
    while True:
        trainer = Trainer(data, tiny_config, tmp_path / "model.pt", seed=3)
        if interruptions:
            trainer.resume()
        validate = trainer.validate

        def interrupted(trainer: Trainer = trainer, validate: Any = validate) -> dict[str, float]:
            trainer.interrupt()
            return validate()

        trainer.validate = interrupted  # type: ignore[method-assign]
        outcome = trainer.run()
        if not outcome.interrupted:
            break
        interruptions += 1
    assert interruptions == tiny_config.train.epochs + tiny_config.train.epochs_stage2
    assert_same_run(trainer, outcome, whole)


def test_resume_from_a_periodic_state_drops_later_metrics(
    whole: tuple[Trainer, Outcome], data: Interactions, tiny_config: Config, tmp_path: Path
) -> None:
    """A kill after the state was written: metrics lines written since are written again, not twice."""
    often = replace(tiny_config, train=replace(tiny_config.train, checkpoint_seconds=1e-9))
    trainer = Trainer(data, often, tmp_path / "model.pt", seed=3)
    interrupt_after(trainer, 2)
    trainer.run()
    trainer.metrics_path.write_text('{"epoch": 1}\n')
    again = Trainer(data, often, tmp_path / "model.pt", seed=3)
    again.resume()
    again.run()
    assert metrics(again) == metrics(whole[0])


def test_stages_2_after_a_stage_1_in_common(
    whole: tuple[Trainer, Outcome], data: Interactions, tiny_config: Config
) -> None:
    """Several runs that share stage 1 have the bits of runs from the beginning, and write no file."""
    first = Trainer(data, tiny_config.stage1(), None, seed=3)
    with pytest.raises(ValueError, match="not of this run's stage 1 at its end"):
        Trainer(data, tiny_config, None, seed=3).start_stage2(first.state())
    first.run()
    state = first.state()
    with pytest.raises(ValueError, match="not of this run's stage 1 at its end"):
        Trainer(data, tiny_config, None, seed=4).start_stage2(state)
    for values in ({"loss": {"gamma": 0.0}}, {"flow": {"p_end": 1.0}, "train": {"lr_stage2": 0.1}}, {}):
        trainer = Trainer(data, tiny_config.override(values, "test"), None, seed=3)
        trainer.start_stage2(state)
        outcome = trainer.run()
        same = trainer.model.blocks[0].qkv.weight.equal(whole[0].model.blocks[0].qkv.weight)
        assert same == (not values)
    assert [{name: line[name] for name in line.keys() - CLOCK} for line in trainer.curve] == metrics(whole[0])
    assert_equal_weights(trainer.model.state_dict(), whole[0].model.state_dict())
    assert_equal_weights(dict(outcome.checkpoint.weights), dict(whole[1].checkpoint.weights))


@pytest.mark.gpu
def test_same_bits_on_a_gpu_whole_or_resumed(data: Interactions, tiny_config: Config, tmp_path: Path) -> None:
    """Steps replayed from a graph and steps launched alternate differently in a run that was interrupted."""
    many = replace(tiny_config, train=replace(tiny_config.train, batch_size=16, epochs=3))
    runs = []
    for name, steps in (("whole", 10**9), ("again", 10**9), ("resumed", 17)):
        options = {"seed": 3, "device": torch.device("cuda"), "dtype": torch.bfloat16, "backend": "triton"}
        trainer = Trainer(data, many, tmp_path / name, **options)
        interrupt_after(trainer, steps)
        outcome = trainer.run()
        if outcome.interrupted:
            trainer = Trainer(data, many, tmp_path / name, **options)
            trainer.resume()
            outcome = trainer.run()
        assert trainer._kind is FusedSteps
        runs.append((trainer, outcome))
    for trainer, outcome in runs[1:]:
        assert_same_run(trainer, outcome, runs[0])


def test_a_state_without_a_newer_key_resumes(data: Interactions, tiny_config: Config, tmp_path: Path) -> None:
    """A key that the configuration got since then has its default, where this run has it, too."""
    first = Trainer(data, tiny_config, tmp_path / "model.pt")
    interrupt_after(first, 1)
    first.run()
    state = first.state()
    del state.plain["run"]["config"]["train"]["weight_decay"]
    checkpoints.write_envelope(first.resume_path, train._RESUME_KIND, state.plain, state.tensors)
    Trainer(data, tiny_config, tmp_path / "model.pt").resume()
    other = replace(tiny_config, train=replace(tiny_config.train, weight_decay=0.1))
    with pytest.raises(CheckpointError, match="another config"):
        Trainer(data, other, tmp_path / "model.pt").resume()


def test_resume_refuses_another_run(data: Interactions, tiny_config: Config, tmp_path: Path) -> None:
    out = tmp_path / "model.pt"
    trainer = Trainer(data, tiny_config, out)
    with pytest.raises(CheckpointError, match=r"model\.pt\.resume: cannot read"):
        trainer.resume()
    interrupt_after(trainer, 1)
    trainer.run()
    with pytest.raises(CheckpointError, match="another seed"):
        Trainer(data, tiny_config, out, seed=1).resume()
    other = replace(tiny_config, train=replace(tiny_config.train, lr=0.02))
    with pytest.raises(CheckpointError, match="another config"):
        Trainer(data, other, out).resume()
    with pytest.raises(CheckpointError, match="another data"):
        Trainer(replace(data, items=data.items[::-1].copy()), tiny_config, out).resume()
    with pytest.raises(CheckpointError, match="another dtype"):
        Trainer(data, tiny_config, out, dtype=torch.bfloat16).resume()
    content = trainer.resume_path.read_bytes()
    trainer.resume_path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        Trainer(data, tiny_config, out).resume()
    trainer.resume_path.write_bytes(out.read_bytes())
    with pytest.raises(CheckpointError, match="expected a fave_fast training state"):
        Trainer(data, tiny_config, out).resume()


def test_same_seed_same_weights(
    whole: tuple[Trainer, Outcome], data: Interactions, tiny_config: Config, tmp_path: Path
) -> None:
    again = Trainer(data, tiny_config, tmp_path / "a.pt", seed=3)
    assert_same_run(again, again.run(), whole)
    other = Trainer(data, tiny_config, tmp_path / "b.pt", seed=4)
    other.run()
    assert not torch.equal(other.model.item_embedding.weight, again.model.item_embedding.weight)


def test_metrics_lines(whole: tuple[Trainer, Outcome], tiny_config: Config) -> None:
    lines = [json.loads(line) for line in whole[0].metrics_path.read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    names = {"stage", "epoch", "loss", "lr", *CLOCK} | {
        f"val_filtered_{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in (5, 10, 20)
    }
    assert all(line.keys() == names for line in lines)
    assert all(isinstance(value, (int, float)) and np.isfinite(value) for line in lines for value in line.values())
    best = whole[1].progress
    chosen = max(lines, key=lambda line: line["val_filtered_NDCG@20"])  # the first of equal ones, as in training
    assert (chosen["stage"], chosen["epoch"]) == (best.best_stage, best.best_epoch)
    assert chosen["val_filtered_NDCG@20"] == best.best == whole[1].checkpoint.facts["best_validation_ndcg20_filtered"]


def test_learning_rate_is_cut_once_then_the_stage_ends(data: Interactions, tiny_config: Config, tmp_path: Path) -> None:
    config = replace(tiny_config, train=replace(tiny_config.train, epochs=50, epochs_stage2=0, patience=2))
    trainer = Trainer(data, config, tmp_path / "model.pt")
    judged = scripted(trainer, [5.0, 4.0, 4.5, 5.0, 4.0])  # equal is no improvement
    weights_after_cut: list[dict[str, torch.Tensor]] = []
    step = trainer._train_step

    def watched(numbers: Any) -> torch.Tensor:
        if len(judged) == 3 and not weights_after_cut:
            weights_after_cut.append(train._copy(trainer.model))
        return step(numbers)

    trainer._train_step = watched  # type: ignore[method-assign]
    outcome = trainer.run()
    lr = config.train.lr
    assert [line["lr"] for line in metrics(trainer)] == [lr, lr, lr, lr / 10, lr / 10]
    assert_equal_weights(weights_after_cut[0], judged[0])
    assert (outcome.progress.best_stage, outcome.progress.best_epoch) == (1, 1)


def test_best_weights_are_kept_and_stage2_begins_from_them(
    data: Interactions, tiny_config: Config, tmp_path: Path
) -> None:
    trainer = Trainer(data, tiny_config, tmp_path / "model.pt")
    judged = scripted(trainer, [3.0, 1.0, 2.0, 2.5])
    trainer.run()
    kept = checkpoints.load(trainer.out)
    assert_equal_weights(dict(kept.weights), judged[0])
    assert (kept.facts["best_stage"], kept.facts["best_epoch"]) == (1, 1)
    name = "item_embedding.weight"
    assert not torch.equal(judged[1][name], judged[0][name]), "stage 1 moves the items"
    for weights in judged[2:]:
        assert torch.equal(weights[name], judged[0][name]), "stage 2 does not"
        assert not torch.equal(weights["blocks.0.qkv.weight"], judged[0]["blocks.0.qkv.weight"])


def test_stage2_weights_are_kept_where_better(data: Interactions, tiny_config: Config, tmp_path: Path) -> None:
    trainer = Trainer(data, tiny_config, tmp_path / "model.pt")
    judged = scripted(trainer, [1.0, 2.0, 2.0, 3.0])
    trainer.run()
    kept = checkpoints.load(trainer.out)
    assert_equal_weights(dict(kept.weights), judged[3])
    assert (kept.facts["best_stage"], kept.facts["best_epoch"]) == (2, 2)


def test_evaluates_at_the_end_whatever_the_interval(data: Interactions, tiny_config: Config, tmp_path: Path) -> None:
    config = replace(tiny_config, train=replace(tiny_config.train, epochs=3, epochs_stage2=0, evaluate_every=2))
    trainer = Trainer(data, config, tmp_path / "model.pt")
    trainer.run()
    assert [line["epoch"] for line in metrics(trainer)] == [2, 3]


def test_loss_that_is_no_number(data: Interactions, tiny_config: Config, tmp_path: Path) -> None:
    config = replace(tiny_config, train=replace(tiny_config.train, lr=1e30))
    with pytest.raises(InputError, match=r"the loss became (nan|inf) in stage 1, epoch 1; expected .* train\.lr"):
        Trainer(data, config, tmp_path / "model.pt").run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lr", [1e-3, 1e30])
def test_no_steps_are_left_behind_a_run(
    data: Interactions, tiny_config: Config, lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several ranks a step's graphs hold NCCL's exchanges, and NCCL does not end before them."""
    made: list[weakref.ref[Steps]] = []

    def make(trainer: Trainer, make: Callable[[Trainer], Steps] = Trainer._make_steps) -> Steps:
        steps = make(trainer)
        made.append(weakref.ref(steps))
        return steps

    monkeypatch.setattr(Trainer, "_make_steps", make)
    config = replace(tiny_config, train=replace(tiny_config.train, lr=lr, epochs=1, epochs_stage2=1))
    trainer = Trainer(data, config, None)
    with contextlib.suppress(InputError):  # the loss became nan
        trainer.run()
    assert len(made) == (2 if trainer.progress.finished else 1)
    assert [steps() for steps in made] == [None] * len(made)


def test_global_time_split_trains(tiny_log: Path, tiny_config: Config, tmp_path: Path) -> None:
    rows = [line.split(",") for line in tiny_log.read_text().splitlines()]
    # Stamps by place in the history, not by user: else the last users alone would have targets.
    seen: dict[str, int] = {}
    lines = []
    for user, item, _ in rows[1:]:
        seen[user] = seen.get(user, 0) + 1
        lines.append(f"{user},{item},{seen[user]}\n")
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(lines))
    values = {"data": {"split": "global-time", "val_fraction": 0.2, "test_fraction": 0.2}, "train": {"epochs": 1}}
    trainer = Trainer(load_interactions(path, keep_times=True), tiny_config.override(values, "test"), tmp_path / "m.pt")
    facts = trainer.run().checkpoint.facts
    assert facts["protocol"].startswith("global-time")
    assert facts["best_epoch"] >= 1


def test_bf16_trains_and_keeps_fp32_weights(data: Interactions, tiny_config: Config, tmp_path: Path) -> None:
    trainer = Trainer(data, tiny_config, tmp_path / "model.pt", dtype=torch.bfloat16)
    weights = trainer.run().checkpoint.weights
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in weights.values())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 7), st.booleans(), st.integers(0, 3))
def test_epoch_batches(lengths: list[int], size: int, grouped: bool, seed: int) -> None:
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = IdMap(np.arange(1, 2))
    data = Interactions(np.ones(offsets[-1], dtype=np.int32), offsets, ids, ids, None, "made", ())
    windows = Windows(offsets, offsets[1:])
    values = {"train": {"batch_size": size, "group_by_length": grouped}, "model": {"max_length": 5}}
    config = Config.from_dict(values, "test")
    batches = epoch_batches(data, windows, config, (seed, 1, 0))
    assert sorted(number for batch in batches for number in batch.tolist()) == list(range(len(windows)))
    rest = len(windows) % size
    sizes = sorted(map(len, batches))
    assert sizes == ([rest] if rest else []) + [size] * (len(windows) // size)
    again = epoch_batches(data, windows, config, (seed, 1, 0))
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]


def test_epochs_differ(whole: tuple[Trainer, Outcome]) -> None:
    trainer = whole[0]
    orders = {
        tuple(np.concatenate(epoch_batches(trainer.data, trainer.windows, trainer.config, seed)).tolist())
        for seed in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))
    }
    assert len(orders) == 4


def started(log: Path, config: Config, out: Path) -> subprocess.Popen[str]:
    settings = out.with_name("settings.yaml")
    settings.write_text(dump_yaml(config))
    command = [sys.executable, "-m", "fave_fast.train", "--data", log, "--config", settings, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def endless(tiny_log: Path, tiny_config: Config, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A training command that would take very long, after its first epoch."""
    schedule = replace(tiny_config.train, epochs=10**6, patience=10**6)
    process = started(tiny_log, replace(tiny_config, train=schedule), tmp_path / "model.pt")
    assert process.stderr is not None
    try:
        assert any(line.startswith("stage 1 epoch   1") for line in iter(process.stderr.readline, ""))
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_ctrl_c(endless: subprocess.Popen[str], tmp_path: Path) -> None:
    endless.send_signal(signal.SIGINT)
    _, errors = endless.communicate(timeout=120)
    assert endless.returncode == 130
    assert "Traceback" not in errors
    assert "--resume" in errors.splitlines()[-1]
    assert checkpoints.load(tmp_path / "model.pt").facts["best_epoch"] >= 1
    assert (tmp_path / "model.pt.resume").exists()
    assert list(tmp_path.glob(".*.part")) == []


DIES = """
import os, signal, sys
from pathlib import Path
from fave_fast import train
left, replace = int(sys.argv.pop(1)), Path.replace
def dying(self, target):
    global left
    if Path(target).name == "model.pt":
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = dying
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("write", [1, 2])
def test_kill_while_a_checkpoint_is_written(tiny_log: Path, tiny_config: Config, tmp_path: Path, write: int) -> None:
    """The worst moment: all of the new file is written and the old one not yet replaced."""
    config = replace(tiny_config, train=replace(tiny_config.train, epochs=1, epochs_stage2=0))
    (tmp_path / "settings.yaml").write_text(dump_yaml(config))
    out = tmp_path / "model.pt"
    options = ["--data", tiny_log, "--config", tmp_path / "settings.yaml", "--out", out]
    done = subprocess.run([sys.executable, "-c", DIES, str(write), *options], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if write == 1:
        assert not out.exists()
    else:
        assert checkpoints.load(out).facts["best_epoch"] == 1

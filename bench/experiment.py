"""Training and testing runs of `bench.quality`, those with one stage 1 together: what one process does at a time."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bench.diagnostics import diagnose
from bench.methods import METHODS
from fave_fast import checkpoint as checkpoints
from fave_fast.checkpoint import Checkpoint
from fave_fast.config import Config
from fave_fast.data import Interactions
from fave_fast.evaluate import evaluate
from fave_fast.losses import OBJECTIVES
from fave_fast.model import DTYPES
from fave_fast.sketch import CHANNELS
from fave_fast.train import Outcome, Trainer, resolve_steps


@dataclass(frozen=True)
class Run:
    """One row of a table before means are taken."""

    dataset: str
    preset: str
    setting: str
    config: Config
    seed: int
    method: str = "fave"  # of `bench.methods`

    @property
    def name(self) -> str:
        return f"{self.dataset}.{self.setting}.{self.seed}"


@dataclass(frozen=True)
class Options:
    """What all runs of a call have in common."""

    device: str
    dtype: str
    backend: str
    threads: int  # of a process, on the CPU
    test: bool
    checkpoints: Path | None  # a folder to keep them in

    def identity(self, run: Run) -> dict[str, Any]:
        """What must be equal for a file to hold this run's result."""
        return {"method": run.method, "config": run.config.to_dict(), "dtype": self.dtype, "backend": self.backend}


@dataclass(frozen=True)
class Group:
    """Runs of one method with one stage 1: what a process takes at a time."""

    data: Interactions
    runs: tuple[Run, ...]
    options: Options


def perform(group: Group, deadline: float) -> Iterator[dict[str, Any]]:
    """Train and test the runs of a group; a result each. What `deadline` cuts off is not `finished`."""
    torch.set_num_threads(group.options.threads)
    started = time.monotonic()
    stage1 = _trainer(group, group.runs[0].config.stage1())
    _train(stage1, deadline)
    state = stage1.state()
    before = _diagnosed(group, stage1) if stage1.progress.finished else None
    shared = time.monotonic() - started
    for run in group.runs:
        started = time.monotonic()
        trainer, outcome = stage1, None
        if stage1.progress.finished:
            trainer = _trainer(group, run.config)
            trainer.start_stage2(state)
            outcome = _train(trainer, deadline)
        result = _result(group, run, trainer, outcome)
        if result["finished"]:
            _keep_stages(group, run, stage1, trainer)
            last = before if trainer.progress.stage == 1 else _diagnosed(group, trainer)
            result["diagnostics"] = None if before is None else {"stage 1": before, "last stage": last}
        yield result | {"wall_seconds": {"stage 1": shared, "rest": time.monotonic() - started}}


def _trainer(group: Group, config: Config) -> Trainer:
    options = group.options
    return Trainer(
        group.data,
        config,
        None,
        seed=group.runs[0].seed,
        device=torch.device(options.device),
        dtype=DTYPES[options.dtype],
        backend=options.backend,
        method=METHODS[group.runs[0].method],
    )


def _train(trainer: Trainer, deadline: float) -> Outcome:
    timer = threading.Timer(max(deadline - time.monotonic(), 0), trainer.interrupt)
    timer.daemon = True
    timer.start()
    with contextlib.redirect_stderr(io.StringIO()):  # several processes' lines would mingle; the curve has them
        outcome = trainer.run()
    timer.cancel()
    return outcome


def _diagnosed(group: Group, trainer: Trainer) -> dict[str, Any] | None:
    """What `bench.diagnostics` says of the present stage's best weights; None of a method without a flow of ours."""
    if not group.options.test or METHODS[group.runs[0].method].objectives is not OBJECTIVES:
        return None
    model = _of_stage(trainer).build_model().to(trainer.device)
    return diagnose(model, trainer.config, group.data, trainer.split.test)


def _of_stage(trainer: Trainer) -> Checkpoint:
    """The best weights of the stage that it is in."""
    return replace(trainer.make_checkpoint(), weights=trainer.stage_weights)


def _keep_stages(group: Group, run: Run, *trainers: Trainer) -> None:
    """Checkpoints of each stage's best weights, before and after stage 2, beside the chosen one."""
    folder = group.options.checkpoints
    if folder is not None:
        for trainer in trainers:
            checkpoints.save(_of_stage(trainer), folder / f"{run.name}.stage{trainer.progress.stage}.pt")


def _result(group: Group, run: Run, trainer: Trainer, outcome: Outcome | None) -> dict[str, Any]:
    options, device = group.options, trainer.device
    facts = trainer.make_checkpoint().facts if outcome is None else outcome.checkpoint.facts
    result = {
        "dataset": run.dataset,
        "preset": run.preset,
        "setting": run.setting,
        "seed": run.seed,
        **options.identity(run),
        "steps": resolve_steps(device, trainer.dtype, options.backend, run.config.model.d).__name__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": options.threads,
        "data": {name: facts[name] for name in ("users", "items", "interactions", "protocol", "decisions")},
        "finished": outcome is not None and trainer.progress.finished,
        "seconds": trainer.progress.seconds,
        "curve": trainer.curve,
    }
    if outcome is None or not trainer.progress.finished:
        return result
    choices = {"chosen": outcome.checkpoint, "last stage": _of_stage(trainer)}
    lines = {"chosen": (facts["best_stage"], facts["best_epoch"]), "last stage": _best_of_last_stage(trainer)}
    if options.checkpoints is not None:
        checkpoints.save(outcome.checkpoint, options.checkpoints / f"{run.name}.pt")
    judged = _figures(group, device, outcome.checkpoint, "val")
    return result | {
        "stage": {name: stage for name, (stage, _) in lines.items()},
        "epoch": {name: epoch for name, (_, epoch) in lines.items()},
        "validation": {name: _validation(trainer, *line) for name, line in lines.items()},
        "validation_raw": judged["raw"],
        "validation_sketched": judged["sketched"],
        "test": _test(group, device, choices, lines) if options.test else None,
    }


def _best_of_last_stage(trainer: Trainer) -> tuple[int, int]:
    lines = [line for line in trainer.curve if line["stage"] == trainer.progress.stage]
    best = max(lines, key=lambda line: line["val_filtered_NDCG@20"])  # of equal ones the first, as in training
    return best["stage"], best["epoch"]


def _validation(trainer: Trainer, stage: int, epoch: int) -> dict[str, float]:
    (line,) = (line for line in trainer.curve if (line["stage"], line["epoch"]) == (stage, epoch))
    prefix = "val_filtered_"
    return {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}


def _test(
    group: Group, device: torch.device, choices: dict[str, Checkpoint], lines: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Test figures of each choice of weights, in fp32 as they are judged in training."""

    chosen = _figures(group, device, choices["chosen"], "test")
    same = lines["chosen"] == lines["last stage"]
    last = chosen if same else _figures(group, device, choices["last stage"], "test")
    return {"chosen": chosen, "last stage": last}


def _figures(group: Group, device: torch.device, model: Checkpoint, name: Literal["val", "test"]) -> dict[str, Any]:
    sampler, backend = METHODS[group.runs[0].method].sampler, group.options.backend
    return evaluate(model, group.data, name, device=device, backend=backend, sampler=sampler, sketch=CHANNELS)

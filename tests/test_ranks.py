from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fave_fast import checkpoint as checkpoints
from fave_fast import cli, evaluate, flow, ranks, steps, train
from fave_fast.config import Config, dump_yaml
from fave_fast.data import Windows, load_interactions, split
from fave_fast.errors import DataError, FailedElsewhere, InputError
from fave_fast.evaluate import rank_targets
from fave_fast.model import FAVE
from fave_fast.ranks import Ranks
from fave_fast.sketch import HistorySketch
from fave_fast.steps import FusedSteps, ReferenceSteps
from fave_fast.train import Trainer, epoch_batches

SOON = 120  # seconds, far more than anything here takes
CLOCK = {"seconds", "samples_per_second"}
STILL = {"model": {"d": 16, "blocks": 2, "heads": 2, "ffn_mult": 2, "max_length": 8, "dropout": 0.0}}


def environment(number: int, count: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in names.items()}}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def work(connection: Connection) -> None:
    """The life of a member of a crew."""
    torch.set_num_threads(1)
    while True:
        try:
            variables, function, arguments = connection.recv()
        except EOFError:
            return
        os.environ.update(variables)
        try:
            if function is command:  # which joins by itself
                result = function(*arguments)
            else:
                with ranks.joined() as joined:
                    result = function(joined, *arguments)
            connection.send((True, result))
        except (Exception, SystemExit) as error:
            connection.send((False, error))


def command(name: str, words: list[str]) -> tuple[str, str]:
    """What a command of the package prints to stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = COMMANDS[name].main(words)
        except SystemExit as exit:
            return out.getvalue(), f"{errors.getvalue()}{exit.code}"
    assert code == 0
    return out.getvalue(), errors.getvalue()


COMMANDS: dict[str, Any] = {"train": train, "evaluate": evaluate}


class Crew:
    """Three processes, of which as many as are asked for join for one function and part again."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._members = []
        for _ in range(3):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def outcomes(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """Of function(ranks, *arguments) on each rank: whether it returned, and what it returned or raised."""
        port = free_port()
        for number, (_, connection) in enumerate(self._members[:count]):
            connection.send((environment(number, count, port), function, arguments))
        outcomes = []
        for _, connection in self._members[:count]:
            assert connection.poll(SOON)
            outcomes.append(connection.recv())
        return outcomes

    def run(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(ranks, *arguments) returns on each rank."""
        outcomes = self.outcomes(count, function, *arguments)
        for good, result in outcomes:
            if not good:
                raise result
        return [result for _, result in outcomes]

    def close(self) -> None:
        for process, _ in self._members:
            process.kill()


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    made = Crew()
    yield made
    made.close()


@given(st.integers(1, 9), st.integers(1, 40))
def test_shares(count: int, total: int) -> None:
    """Each window belongs to one rank, and the shares are those of the windows."""
    taken: list[int] = []
    parts = []
    for number in range(count):
        rows, part = Ranks(number, count).share(total)
        mine = list(range(total))[rows]
        assert mine, "every rank has something to compute"
        parts.append(part)
        if part:
            assert part == len(mine) / total
            taken += mine
    assert sorted(taken) == list(range(total))
    assert sum(parts) == pytest.approx(1, abs=count * 2**-53)  # one rounding a share


class Drawn:
    """Random numbers of a rank's rows as they are in the whole batch, in place of PyTorch's."""

    def __init__(self, rows: slice, total: int, longest: int) -> None:
        self.rows, self.total, self.longest, self.calls = rows, total, longest, 0
        self._make = {name: getattr(torch, name) for name in ("rand", "randn", "randint")}

    def __enter__(self) -> None:
        torch.rand = lambda *size, **_: self._like("rand", size)
        torch.randn = lambda *size, **_: self._like("randn", size)
        torch.randint = self._items
        flow.stage2_times = self._times

    def __exit__(self, *_: object) -> None:
        for name, make in self._make.items():
            setattr(torch, name, make)
        flow.stage2_times = TIMES

    def _whole(self, name: str, *arguments: Any) -> Tensor:
        self.calls += 1
        result: Tensor = self._make[name](*arguments, generator=torch.Generator().manual_seed(self.calls))
        return result

    def _like(self, name: str, size: tuple[Any, ...]) -> Tensor:
        _, *others = size[0] if isinstance(size[0], tuple) else size
        if len(others) == 2:  # [B, L, D]
            return self._whole(name, (self.total, self.longest, others[1]))[self.rows, self.longest - others[0] :]
        return self._whole(name, (self.total, *others))[self.rows]

    def _items(self, low: int, high: int, size: tuple[int, ...], **_: Any) -> Tensor:
        if len(size) == 1:  # packed: whose rows these are is not known here
            return torch.full(size, low)
        return self._whole("randint", low, high, (self.total, self.longest))[self.rows, self.longest - size[1] :]

    def _times(self, count: int, p_end: float, device: torch.device, generator: Any = None) -> tuple[Tensor, Tensor]:
        t, u, end = (self._whole("rand", (self.total,))[self.rows] for _ in range(3))
        return t, torch.where(end < p_end, torch.ones_like(t), t + u * (1 - t))


TIMES = flow.stage2_times


def one_step(
    here: Ranks, log: Path, values: dict[str, Any], stage: int, total: int, kind: Any = ReferenceSteps
) -> tuple[float, list[Tensor]]:
    """The loss of a batch, and the weights after a step of descent along its clipped gradient.

    Descent is Adam's with an epsilon that drowns the gradient's size, for fused steps take no other optimiser.
    """
    data, config = load_interactions(log), Config.from_dict({**STILL, **values}, "test")
    torch.manual_seed(0)
    model = FAVE(config.model, data.num_items).double().train()
    model.item_embedding.weight.requires_grad_(stage == 1)
    descent = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], 1e3, eps=1e3)
    windows = Windows(data.offsets, split(data, config.data).train_end)
    starts, targets = windows.positions(np.random.default_rng(0).permutation(len(windows))[:total])
    longest = min(int((targets - starts).max()), config.model.max_length)
    with Drawn(here.share(total)[0], total, longest):
        loss = kind(data, config, model, descent, stage, torch.float64, ranks=here).take(starts, targets, 0)
    return float(here.mean(loss)), [one.detach() for one in model.parameters()]


def assert_one_rank_s(
    crew: Crew, log: Path, values: dict[str, Any], stage: int, total: int, kind: type[ReferenceSteps] | type[FusedSteps]
) -> None:
    loss, weights = one_step(ranks.ALONE, log, values, stage, total, kind)
    # What differs is the order of sums in fp64. From the weights to a gradient and back there are some 100 of them (two
    # blocks, forward and backward, value and tangent), of at most 120 terms (histories x positions, channels): 12,000
    # roundings of 2^-53, at the worst all of one sign.
    tolerance = 12_000 * 2**-53
    for count in (2, 3):
        for theirs, moved in crew.run(count, one_step, log, values, stage, total, kind):
            assert theirs == pytest.approx(loss, rel=tolerance)
            for got, want in zip(moved, weights, strict=True):
                assert float((got - want).norm()) <= tolerance * max(1.0, float(want.norm()))


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        (1, {"train": {"clip": 0.01}}),
        (1, {"train": {"clip": 1e9}, "loss": {"beta": 3.0}}),
        (1, {"loss": {"beta": 0.0}}),
        (1, {"loss": {"source": "dense", "reduction": "sum"}}),
        (2, {"train": {"clip": 1e9}, "loss": {"gamma": 5.0}}),
        (2, {"flow": {"tangent": "learned"}, "loss": {"alpha": 0.0}}),
    ],
    ids=["clipped", "sampled-source", "no-source", "dense-source", "consistency", "learned-tangent"],
)
@pytest.mark.parametrize("total", [2, 7])
def test_a_step_of_several_ranks_is_one_rank_s(
    crew: Crew, tiny_log: Path, stage: int, values: dict[str, Any], total: int
) -> None:
    """A batch that the ranks cannot share evenly, and one that has no window for the third."""
    assert_one_rank_s(crew, tiny_log, values, stage, total, ReferenceSteps)


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        (1, {"train": {"clip": 0.01}}),
        (1, {"train": {"clip": 1e9}, "loss": {"beta": 3.0}}),
        (1, {"loss": {"beta": 0.0}}),
        (1, {"loss": {"source": "dense"}}),
        (2, {"train": {"clip": 1e9}, "loss": {"gamma": 5.0}}),
    ],
    ids=["clipped", "sampled-source", "no-source", "dense-source", "consistency"],
)
@pytest.mark.parametrize("total", [2, 7])
def test_a_fused_step_of_several_ranks_is_one_rank_s(
    crew: Crew, tiny_log: Path, stage: int, values: dict[str, Any], total: int
) -> None:
    undrawn = {"delta": 0.0, "embedding_dropout": 0.0}  # what fused steps draw they draw by history of a batch
    values = {**values, "model": {**STILL["model"], **undrawn}}
    assert_one_rank_s(crew, tiny_log, values, stage, total, FusedSteps)


def ranked(here: Ranks, checkpoint: Path, log: Path, batch_size: int, full: bool) -> list[Tensor | None]:
    kept = checkpoints.load(checkpoint)
    data = evaluate.translate(load_interactions(log), kept, str(log))
    model = kept.build_model()
    targets = split(data, kept.config.data).test
    sketch = HistorySketch.of(model.item_embedding.weight, 8) if full else None
    found = rank_targets(model, kept.config, data, targets, full=full, batch_size=batch_size, ranks=here, sketch=sketch)
    return [found.filtered, found.raw, found.lists, found.sketched]


@pytest.mark.parametrize(("batch_size", "full"), [(7, True), (7, False), (512, True)])
def test_evaluation_is_the_same_for_any_number_of_ranks(
    crew: Crew, tiny_checkpoint: Path, tiny_log: Path, batch_size: int, full: bool
) -> None:
    """Six uneven batches, and a single one, which leaves ranks without any."""
    [alone] = crew.run(1, ranked, tiny_checkpoint, tiny_log, batch_size, full)
    for count in (2, 3):
        for found in crew.run(count, ranked, tiny_checkpoint, tiny_log, batch_size, full):
            for got, want in zip(found, alone, strict=True):
                assert got is want is None or torch.equal(got, want)


def trained(
    here: Ranks, log: Path, config: Config, out: Path, interrupt: tuple[int, int] | None, resume: bool
) -> dict[str, Any]:
    """A run, which rank and step `interrupt` names end; what came of it, and which windows were taken."""
    seen: list[tuple[list[int], list[int]]] = []
    gather = steps.gather_histories

    def gathered(items: Any, starts: Any, targets: Any, longest: int) -> Any:
        seen.append((starts.tolist(), targets.tolist()))
        return gather(items, starts, targets, longest)

    trainer = Trainer(load_interactions(log), config, out, seed=3, ranks=here)
    if resume:
        trainer.resume()
    step, taken = trainer._train_step, 0

    def counted(numbers: Any) -> Tensor:
        nonlocal taken
        taken += 1
        if (here.number, taken) == interrupt:
            trainer.interrupt()
        return step(numbers)

    trainer._train_step = counted  # type: ignore[method-assign]
    steps.gather_histories = gathered
    try:
        outcome = trainer.run()
    finally:
        steps.gather_histories = gather
    curve = [{name: value for name, value in line.items() if name not in CLOCK} for line in trainer.curve]
    weights = list(trainer.model.state_dict().values())
    return {"seen": seen, "taken": taken, "curve": curve, "weights": weights, "interrupted": outcome.interrupted}


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    """Batches of 21 of the log's windows: the last one of an epoch is uneven."""
    return replace(tiny_config, train=replace(tiny_config.train, batch_size=21))


@pytest.fixture(scope="module")
def whole(crew: Crew, tiny_log: Path, config: Config, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A run by two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    results = crew.run(2, trained, tiny_log, config, folder / "model.pt", None, False)
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", "model.pt.metrics.jsonl"]
    lines = [json.loads(line) for line in (folder / "model.pt.metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    return results


def assert_equal_runs(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in results:
        assert result["curve"] == expected["curve"]
        assert all(map(torch.equal, result["weights"], expected["weights"]))


def test_ranks_have_the_same_weights_and_share_the_windows_of_one(
    whole: list[dict[str, Any]], tiny_log: Path, config: Config
) -> None:
    assert_equal_runs(whole, whole[0])
    data = load_interactions(tiny_log)
    windows = Windows(data.offsets, split(data, config.data).train_end)
    batches = [
        windows.positions(numbers)
        for stage in (1, 2)
        for epoch in (0, 1)
        for numbers in epoch_batches(data, windows, config, (3, stage, epoch))
    ]
    assert len(batches) == whole[0]["taken"] == whole[1]["taken"]
    for number, (starts, targets) in enumerate(batches):
        parts = [result["seen"][number] for result in whole]
        together = sorted((start, target) for part in parts for start, target in zip(*part, strict=True))
        assert together == sorted(zip(starts.tolist(), targets.tolist(), strict=True))


@pytest.mark.parametrize("interrupt", [(1, 2), (0, 9)], ids=["rank-1-at-once", "rank-0-in-stage-2"])
def test_one_rank_s_interruption_ends_all_and_resumes_to_the_same_bits(
    crew: Crew, whole: list[dict[str, Any]], tiny_log: Path, config: Config, tmp_path: Path, interrupt: tuple[int, int]
) -> None:
    begun = crew.run(2, trained, tiny_log, config, tmp_path / "model.pt", interrupt, False)
    heard = interrupt[1] + 1  # a step later
    assert [(one["interrupted"], one["taken"]) for one in begun] == [(True, heard)] * 2
    ended = crew.run(2, trained, tiny_log, config, tmp_path / "model.pt", None, True)
    assert_equal_runs(ended, whole[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model.pt.metrics.jsonl"]


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_ranks_resumes(
    crew: Crew, whole: list[dict[str, Any]], tiny_log: Path, config: Config, tmp_path: Path, count: int
) -> None:
    out = tmp_path / "model.pt"
    crew.run(2, trained, tiny_log, config, out, (0, 2), False)
    ended = crew.run(count, trained, tiny_log, config, out, None, True)
    assert [one["taken"] for one in ended] == [whole[0]["taken"] - 3] * count
    assert_equal_runs(ended, ended[0])
    assert [line["epoch"] for line in ended[0]["curve"]] == [1, 2, 1, 2]


def fails(here: Ranks, number: int) -> None:
    with here.together():
        if here.number == number:
            raise InputError("no such file")


def test_an_error_of_one_rank_is_one_of_all(crew: Crew) -> None:
    outcomes = crew.outcomes(3, fails, 1)
    assert [(good, type(error)) for good, error in outcomes] == [
        (False, FailedElsewhere), (False, InputError), (False, FailedElsewhere),
    ]  # fmt: skip
    assert [str(error) for _, error in outcomes] == [
        "rank 1: no such file", "no such file", "rank 1: no such file",
    ]  # fmt: skip


DIES = """
import os, signal, sys, threading
from fave_fast import cli, ranks

def main(_):
    with ranks.joined() as here:
        here.ask_any(False)()
        if here.number == 0:
            threading.Event().wait()  # as for a GPU
        if here.number == 2 and sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if here.number == 2:
            raise ValueError("no memory")
        here.ask_any(False)()

cli.run(main)
"""


@pytest.mark.parametrize(("how", "code"), [("killed", -signal.SIGKILL), ("raises", 1)])
def test_the_death_of_a_rank_ends_the_others(how: str, code: int) -> None:
    """One that waits for something else and one that waits for the dead."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIES, how],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(number, 3, port)},
        )
        for number in range(3)
    ]
    try:
        said = [process.communicate(timeout=SOON)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1, code]
    for number in (0, 1):
        assert (
            said[number].splitlines()[-1].startswith(f"error: rank 2 of 3 ended before the run did, so rank {number}")
        )
        assert "Traceback" not in said[number]
    assert ("ValueError: no memory" in said[2]) == (how == "raises")


def test_each_rank_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert cli.resolve_device("auto") == torch.device("cuda")
    for name, value in environment(1, 3, 0).items():
        monkeypatch.setenv(name, value)
    assert cli.resolve_device("auto") == cli.resolve_device("cuda") == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)] * 2
    assert cli.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r"'cuda:0' for several ranks; expected cuda"):
        cli.resolve_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"rank 2 of this machine has no GPU of its own: there are 2"):
        cli.resolve_device("auto")


def test_ctrl_c(tiny_log: Path, tiny_config: Config, tmp_path: Path) -> None:
    """Through torchrun, which hands the signal on."""
    schedule = replace(tiny_config.train, epochs=10**6, patience=10**6)
    (tmp_path / "settings.yaml").write_text(dump_yaml(replace(tiny_config, train=schedule)))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    options = ["--data", tiny_log, "--config", tmp_path / "settings.yaml", "--out", tmp_path / "model.pt"]
    process = subprocess.Popen(
        [sys.executable, *launch, "-m", "fave_fast.train", *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        assert any(line.startswith("stage 1 epoch   1") for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SOON)
    finally:
        process.kill()
    assert [line for line in errors.splitlines() if "--resume" in line] == [
        f"interrupted: {tmp_path / 'model.pt'} is usable as it is; --resume with the same options goes on"
    ]
    assert checkpoints.load(tmp_path / "model.pt").facts["best_epoch"] >= 1
    assert (tmp_path / "model.pt.resume").exists()


def test_evaluate_s_figures_are_one_process_s_and_printed_once(
    crew: Crew, tiny_checkpoint: Path, tiny_log: Path
) -> None:
    words = ["--ckpt", str(tiny_checkpoint), "--data", str(tiny_log), "--json", "--batch-size", "7"]
    [(alone, _)] = crew.run(1, command, "evaluate", words)
    (first, _), *others = crew.run(3, command, "evaluate", words)
    assert {**json.loads(first), "seconds": 0} == {**json.loads(alone), "seconds": 0}
    assert others == [("", "")] * 2


def test_bad_usage_is_said_once(crew: Crew, tmp_path: Path) -> None:
    files = ["--data", str(tmp_path / "no.csv"), "--out", str(tmp_path / "model.pt")]
    (_, first), *others = crew.run(2, command, "train", [*files, "--frobnicate"])
    assert first == "python -m fave_fast.train: error: unrecognized arguments: --frobnicate (see --help)\n2"
    assert others == [("", "2")]
    outcomes = crew.outcomes(2, command, "train", files)
    assert [type(error) for _, error in outcomes] == [DataError, FailedElsewhere]
    assert str(outcomes[0][1]).startswith(f"{tmp_path / 'no.csv'}: cannot read the log")


def test_another_rank_s_error_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(_: Any) -> int:
        raise FailedElsewhere("rank 0: no such file")

    with pytest.raises(SystemExit) as ended:
        cli.run(failing)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "")

"""Both stages of training, resumable at any step; `python -m fave_fast.train`.

Stage 1 builds the manifold from a Gaussian prior; stage 2 starts from its best weights, freezes the item embeddings and
consolidates the flow into one step from the anchor. The model is judged as it is served (one step, eq. 25) on the
validation targets, `filtered` NDCG@20, and the best weights of both stages are what the checkpoint holds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from fave_fast import __version__, cli
from fave_fast import checkpoint as checkpoints
from fave_fast.checkpoint import Checkpoint
from fave_fast.config import PRESETS, Config, load_yaml, preset
from fave_fast.data import (
    Interactions,
    Split,
    Windows,
    history_exclusions,
    split,
    training_popularity,
)
from fave_fast.errors import CheckpointError, ConfigError, InputError
from fave_fast.evaluate import Sampler, ServedEndpoints, rank_targets, target_starts
from fave_fast.files import check_writable, replacing
from fave_fast.losses import OBJECTIVES, Objective
from fave_fast.metrics import rank_metrics
from fave_fast.model import DTYPES, FAVE
from fave_fast.ops.rank_count import OP as RANK_COUNT
from fave_fast.profiling import Trace
from fave_fast.ranks import ALONE, Ranks, joined
from fave_fast.steps import FusedSteps, ReferenceSteps, Steps, steps_for

STAGES = (1, 2)
_RESUME_KIND = "fave_fast training state"
_SAMPLE_USERS = 5
_SELECTION = "NDCG@20"
_SAVE_SHARE = 10  # between epochs the state is written once in this many times what writing it took
_WARM_STEPS = 10  # not traced: kernels are compiled and steps captured
_SHOW_SECONDS = 0.5  # between two looks at the loss for the progress bar

_logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimiser, all that resuming needs."""

    stage: int = 1
    epoch: int = 0  # of the stage, counted from 0
    step: int = 0  # of the epoch: batches done
    loss: float = 0.0  # summed over them
    best: float = -math.inf  # validation NDCG@20, filtered, over both stages
    best_stage: int = 0
    best_epoch: int = 0
    stage_best: float = -math.inf
    waiting: int = 0  # evaluations since the stage's last best
    lr_cut: bool = False
    seconds: float = 0.0
    finished: bool = False


@dataclass(frozen=True)
class Method:
    """What the stages minimise, and how the model answers when it is judged: as in the paper, unless a peer is."""

    objectives: tuple[Objective, Objective] = OBJECTIVES
    sampler: Sampler = ServedEndpoints


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    checkpoint: Checkpoint
    progress: Progress
    interrupted: bool


@dataclass(frozen=True)
class State:
    """A run between two steps: what resuming needs beside the data, the configuration and the seed."""

    plain: dict[str, Any]  # JSON's types
    tensors: dict[str, Tensor]


class Trainer:
    """One run over one data set. Only this class and the engine hold state.

    `out` is the checkpoint to write; the state for --resume and the metrics lie beside it. None writes no file. Several
    ranks train the same model and share each batch; all read the state, the first one writes.
    """

    def __init__(
        self,
        data: Interactions,
        config: Config,
        out: Path | None,
        *,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        tensorboard: Callable[[str, float, int], None] | None = None,
        ranks: Ranks = ALONE,
        after_step: Callable[[], None] = lambda: None,
        method: Method = Method(),
    ) -> None:
        self.data, self.config, self.seed = data, config, seed
        self.out = None if out is None else check_writable(out)
        self.device = device or torch.device("cpu")
        self.dtype, self.backend, self.tensorboard, self._after_step = dtype, backend, tensorboard, after_step
        self.ranks, self.method = ranks, method
        self._writes = out is not None and ranks.first
        self._kind = resolve_steps(self.device, dtype, backend, config.model.d)
        self.split: Split = split(data, config.data)
        self.windows = Windows(data.offsets, self.split.train_end)
        self.progress = Progress()
        torch.manual_seed(seed)
        self.model = FAVE(config.model, data.num_items).to(self.device)
        if ranks.number:  # the same weights, but draws of its own
            torch.manual_seed(step_seed(seed, ranks.number))
        self.best_weights = _copy(self.model)
        self.stage_weights = self.best_weights
        self.optimiser = self._make_optimiser(config.train.lr)
        self._steps: Steps | None = None
        self._asked = False  # to end, here
        self.interrupted = False  # by what all ranks agreed on
        self._answers: deque[Callable[[], list[bool]]] = deque()  # of what was asked, to come
        self.curve: list[dict[str, Any]] = []  # an object an evaluation, as in the metrics file
        self._saved_at, self._saving_took = time.monotonic(), 0.0
        self._last: dict[str, float] = {}  # loss and speed of the epoch that ended last

    @property
    def resume_path(self) -> Path:
        """The state for --resume lives beside the checkpoint while the run is unfinished."""
        return self._beside(".resume")

    @property
    def metrics_path(self) -> Path:
        """One JSON line an evaluation."""
        return self._beside(".metrics.jsonl")

    def _beside(self, ending: str) -> Path:
        if self.out is None:
            raise ValueError("this run writes no file")
        return self.out.with_name(self.out.name + ending)

    def run(self) -> Outcome:
        """Train from where the run stands to the end, or to the first interruption."""
        # A launcher may hand on a signal that each process has got itself, and kills who takes too long.
        with _on_interrupt(self.interrupt, first_only=self.ranks.count == 1):
            try:
                while not self.progress.finished and not self.interrupted:
                    self._run_epoch()
                    if not self.interrupted:
                        self._end_epoch()
            finally:
                self._steps = None  # NCCL does not come to an end while a graph holds exchanges of it
        if self.interrupted:
            self._save_state()
        elif self._writes:
            self.resume_path.unlink(missing_ok=True)
        result = self.make_checkpoint()
        self._save(result)
        return Outcome(result, self.progress, self.interrupted)

    def interrupt(self) -> None:
        """End `run` after the step under way, or the one after it; any thread may call it, on any rank."""
        self._asked = True

    def _agree(self, due: bool, *, now: bool = False) -> bool:
        """Whether all ranks are to write the state, which is `due` by the first one's clock; `interrupted` likewise.

        Several ranks hear the answer a step later unless they want it `now`: the exchange goes on during the step.
        """
        self._answers.append(self.ranks.ask_any(self._asked, due and self.ranks.first))
        left, save = 0 if now or self.ranks.count == 1 else 1, False
        while len(self._answers) > left:
            interrupted, saves = self._answers.popleft()()
            self.interrupted, save = self.interrupted or interrupted, save or saves
            left = 0 if self.interrupted else left
        return save

    def _save(self, checkpoint: Checkpoint) -> None:
        with self.ranks.together():
            if self._writes and self.out is not None:
                checkpoints.save(checkpoint, self.out)

    def _stage_epochs(self) -> int:
        return self.config.train.epochs if self.progress.stage == 1 else self.config.train.epochs_stage2

    def _make_optimiser(self, lr: float) -> torch.optim.Adam:
        self._steps = None  # made for another one
        return make_optimiser(self.model, lr, self.config.train.weight_decay, captured=self._kind is FusedSteps)

    def _make_steps(self) -> Steps:
        options = self.data, self.config, self.model, self.optimiser, self.progress.stage, self.dtype, self.backend
        objective = self.method.objectives[self.progress.stage - 1]
        return self._kind(*options, ranks=self.ranks, objective=objective)

    def _run_epoch(self) -> None:
        progress = self.progress
        batches = epoch_batches(self.data, self.windows, self.config, (self.seed, progress.stage, progress.epoch))
        done = progress.step
        # In float64 a sum of float32 losses is exact, and the same wherever the run was interrupted.
        total = torch.full((), progress.loss, dtype=torch.float64, device=self.device)
        started, samples = time.perf_counter(), 0
        label = f"stage {progress.stage}, epoch {progress.epoch + 1} of at most {self._stage_epochs()}"
        shows = sys.stderr.isatty() and self.ranks.first
        with tqdm(total=len(batches), initial=done, desc=label, unit="batch", disable=not shows, leave=False) as bar:
            shown = started
            for numbers in batches[done:]:
                total += self._train_step(numbers)
                self._after_step()
                progress.step += 1
                samples += len(numbers)
                bar.update()
                now = time.perf_counter()
                # Reading the loss makes the host wait. Of several ranks it is this one's.
                if now - shown > _SHOW_SECONDS and not bar.disable:
                    bar.set_postfix_str(
                        f"loss {float(total) / progress.step:.4f}, {samples / (now - started):,.0f} samples/s"
                    )
                    shown = now
                due = self._agree(time.monotonic() - self._saved_at > self.config.train.checkpoint_seconds)
                if self.interrupted:
                    break
                if due:
                    progress.loss = float(self.ranks.mean(total))
                    progress.seconds += time.perf_counter() - started
                    started, samples = time.perf_counter(), 0
                    self._save_state()
        loss = float(self.ranks.mean(total))  # the device is done, and the clock may be read
        elapsed = time.perf_counter() - started
        progress.seconds += elapsed
        if progress.step > done:
            progress.loss = loss
            with self.ranks.together():
                self._log_epoch(progress.loss / progress.step, samples / elapsed)

    def _train_step(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        progress = self.progress
        if self._steps is None:
            self._steps = self._make_steps()
        if not self.model.training:
            self.model.train()
        starts, positions = self.windows.positions(numbers)
        place = progress.stage, progress.epoch, progress.step
        seed = step_seed(self.seed, *place, *([self.ranks.number] if self.ranks.number else []))
        return self._steps.take(starts, positions, seed)

    def _log_epoch(self, loss: float, rate: float) -> None:
        progress = self.progress
        if not math.isfinite(loss):
            raise InputError(
                f"the loss became {loss} in stage {progress.stage}, epoch {progress.epoch + 1}; "
                f"expected a finite number: lower train.lr ({self.config.train.lr})"
            )
        self._last = {"loss": loss, "samples_per_second": rate}

    def _end_epoch(self) -> None:
        progress = self.progress
        progress.epoch, progress.step, progress.loss = progress.epoch + 1, 0, 0.0
        ended = progress.epoch >= self._stage_epochs()
        if ended or progress.epoch % self.config.train.evaluate_every == 0:
            ended = self._evaluate() or ended
        if ended:
            self._end_stage()
        # The state has several times the model's size: an epoch may take less than writing it.
        if self._agree(time.monotonic() - self._saved_at > _SAVE_SHARE * self._saving_took, now=True):
            self._save_state()

    def _evaluate(self) -> bool:
        """Judge the weights on validation; cut the learning rate or end the stage when they stopped improving."""
        progress = self.progress
        metrics = self.validate()
        score = metrics[_SELECTION]
        self._log_metrics(metrics)
        if score > progress.stage_best:
            progress.stage_best, progress.waiting = score, 0
            self.stage_weights = _copy(self.model)
            if score > progress.best:
                progress.best, progress.best_stage, progress.best_epoch = score, progress.stage, progress.epoch
                self.best_weights = self.stage_weights
                self._save(self.make_checkpoint())
            return False
        progress.waiting += 1
        if progress.waiting < self.config.train.patience:
            return False
        if progress.lr_cut:
            return True
        progress.lr_cut, progress.waiting = True, 0
        self.model.load_state_dict(self.stage_weights)
        for group in self.optimiser.param_groups:
            group["lr"] /= 10  # a tensor in place: the captured steps read it
        return False

    def _end_stage(self) -> None:
        progress = self.progress
        if progress.stage == 2 or self.config.train.epochs_stage2 == 0:
            progress.finished = True
            return
        self._begin_stage2()
        self.model.load_state_dict(self.stage_weights)
        progress.stage, progress.epoch, progress.waiting, progress.lr_cut = 2, 0, 0, False
        progress.stage_best = -math.inf
        self.optimiser = self._make_optimiser(self.config.train.lr_stage2)

    def _begin_stage2(self) -> None:
        self.model.item_embedding.weight.requires_grad_(False)  # stage 2 moves the flow, not the space

    def validate(self) -> dict[str, float]:
        """Filtered metrics on the validation targets: answers as `method` has them, in fp32."""
        self.model.eval()
        state = torch.get_rng_state()
        ranking = rank_targets(
            self.model, self.config, self.data, self.split.val, full=False, backend=self.backend, ranks=self.ranks,
            sampler=self.method.sampler,
        )  # fmt: skip
        torch.set_rng_state(state)
        return rank_metrics(ranking.filtered)

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        progress = self.progress
        line = {
            "stage": progress.stage,
            "epoch": progress.epoch,
            "seconds": round(progress.seconds, 3),
            "lr": self._lr(),
            **self._last,
            **{f"val_filtered_{name}": value for name, value in metrics.items()},
        }
        self.curve.append(line)
        if self._writes:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(_json_lines([line]))
        mark = " (best)" if metrics[_SELECTION] > progress.best else ""
        cli.say(
            f"stage {progress.stage} epoch {progress.epoch:3d}: loss {line['loss']:.4f}, "
            f"{line['samples_per_second']:,.0f} samples/s, validation HR@20 {metrics['HR@20']:.2f} "
            f"NDCG@20 {metrics['NDCG@20']:.2f}{mark}"
        )
        if self.tensorboard is not None:
            number = progress.epoch + (self.config.train.epochs if progress.stage == 2 else 0)
            for name, value in line.items():
                self.tensorboard(name, float(value), number)

    def _lr(self) -> float:
        lr = self.optimiser.param_groups[0]["lr"]
        # A captured step's is float32 and would show as 0.0010000000474974513.
        return float(f"{lr.item():.7g}") if isinstance(lr, Tensor) else lr

    def make_checkpoint(self) -> Checkpoint:
        """The best weights so far (the present ones before the first evaluation) with all that serving needs."""
        progress, data = self.progress, self.data
        weights = self.best_weights if progress.best > -math.inf else _copy(self.model)
        users = np.linspace(0, len(self.split.test) - 1, min(_SAMPLE_USERS, len(self.split.test))).astype(np.int64)
        targets = self.split.test[users]
        starts = target_starts(data, targets)
        sample_items, sample_offsets = history_exclusions(data.items, starts, targets)
        owners = np.searchsorted(data.offsets, targets, side="right") - 1
        facts = {
            "dataset": data.name,
            "users": data.num_users,
            "items": data.num_items,
            "interactions": data.num_interactions,
            "protocol": self.split.description,
            "decisions": [*data.decisions, *self.split.decisions],
            "fave_fast": __version__,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "best_validation_ndcg20_filtered": progress.best if math.isfinite(progress.best) else None,
            "best_stage": progress.best_stage,
            "best_epoch": progress.best_epoch,
            "seconds": round(progress.seconds, 3),
        }
        return Checkpoint(
            config=self.config,
            weights=weights,
            item_ids=data.item_ids,
            user_ids=data.user_ids,
            popularity=torch.from_numpy(training_popularity(data, self.split)),
            facts=facts,
            sample_users=torch.from_numpy(owners),
            sample_items=torch.from_numpy(sample_items),
            sample_offsets=torch.from_numpy(sample_offsets),
        )

    def _save_state(self) -> None:
        if self.out is None:
            return
        started = time.monotonic()
        state = self.state()
        with self.ranks.together():
            if self._writes:
                checkpoints.write_envelope(self.resume_path, _RESUME_KIND, state.plain, state.tensors)
        self._saved_at = time.monotonic()
        self._saving_took = self._saved_at - started

    def state(self) -> State:
        """Where the run stands, asked by all ranks at once; its tensors are those that training changes, no copies."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best_weights.items()}
        tensors |= {f"stage/{name}": value for name, value in self.stage_weights.items()}
        state = self.optimiser.state_dict()
        for index, values in state["state"].items():
            tensors |= {f"optimiser/{index}/{name}": value for name, value in values.items()}
        tensors["rng"] = self.ranks.stacked(torch.get_rng_state())
        if self.device.type == "cuda":
            tensors["rng_cuda"] = self.ranks.stacked(torch.cuda.get_rng_state(self.device))
        progress = asdict(self.progress)
        for name in ("best", "stage_best"):
            progress[name] = progress[name] if math.isfinite(progress[name]) else None  # JSON knows no infinity
        plain = {
            "run": self._identity(),
            "progress": progress,
            "lr": float(self.optimiser.param_groups[0]["lr"]),
            "last": self._last,
            "curve": self.curve,
        }
        return State(plain, tensors)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be the same run."""
        content = hashlib.sha256(self.data.items.tobytes() + self.data.offsets.tobytes()).hexdigest()
        dtype = str(self.dtype).removeprefix("torch.")
        return {"config": self.config.to_dict(), "data": content, "seed": self.seed, "dtype": dtype}

    def resume(self) -> None:
        """Take up the run whose state lies beside the checkpoint.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another data set, configuration or seed.
        """
        plain, tensors = checkpoints.read_envelope(self.resume_path, _RESUME_KIND)
        there = plain["run"] | {"config": _completed(plain["run"]["config"])}
        for name, value in self._identity().items():
            if there.get(name) != value:
                raise CheckpointError(
                    f"{self.resume_path}: belongs to a run with another {name}; expected the options of that run"
                )
        self._restore(State(plain, tensors))
        if self._writes:
            with replacing(self.metrics_path) as part:
                part.write_text(_json_lines(self.curve), encoding="utf-8")

    def start_stage2(self, state: State) -> None:
        """Begin stage 2 where a run of `config.stage1()` ended: at the bits of a run from the beginning.

        Raises:
            ValueError: the state is of a run over another data set, with another seed, say, or an unfinished one.
        """
        expected = {**self._identity(), "config": self.config.stage1().to_dict()}
        if state.plain["run"] != expected or not state.plain["progress"]["finished"]:
            raise ValueError("the state is not of this run's stage 1 at its end")
        self._restore(state)
        self.progress.finished = False
        self._end_stage()

    def _restore(self, state: State) -> None:
        plain, tensors = state.plain, state.tensors
        known = {name: value for name, value in plain["progress"].items() if value is not None}
        self.progress = Progress(**known)
        self._last, self.curve = plain["last"], list(plain["curve"])
        if self.progress.stage == 2:
            self._begin_stage2()

        def group(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(group("model/"))
        self.best_weights, self.stage_weights = group("best/"), group("stage/")
        self.optimiser = self._make_optimiser(plain["lr"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in group("optimiser/").items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict({"state": moments, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self._restore_draws(tensors)

    def _restore_draws(self, tensors: dict[str, Tensor]) -> None:
        number, before = self.ranks.number, len(tensors["rng"])
        if before != self.ranks.count:
            _logger.warning(
                "%d ranks go on with a run of %d: its windows are the same, what is drawn for them is not",
                self.ranks.count, before,
            )  # fmt: skip
        if number >= before:
            progress = self.progress
            torch.manual_seed(step_seed(self.seed, number, progress.stage, progress.epoch, progress.step))
            return
        torch.set_rng_state(tensors["rng"][number].clone())  # a row of a larger tensor crashes torch 2.13
        if "rng_cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng_cuda"][number].clone(), self.device)

    def start_afresh(self) -> None:
        """Forget an earlier run's metrics and state at the same place."""
        if self._writes:
            self.metrics_path.unlink(missing_ok=True)
            self.resume_path.unlink(missing_ok=True)


def resolve_steps(
    device: torch.device, dtype: torch.dtype, backend: str, d: int
) -> type[ReferenceSteps] | type[FusedSteps]:
    """How a training of a model of D = `d` with these options takes its steps.

    Raises:
        BackendError: the backend cannot run here, in a step or in an evaluation.
    """
    RANK_COUNT.resolve(backend, device, torch.float32)  # before an epoch is spent, not after
    return steps_for(device, dtype, backend, d)


def step_seed(*numbers: int) -> int:
    """Of generators, for step (seed, stage, epoch, step), say: below 2^63, and unlike for any other numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1


def make_optimiser(model: FAVE, lr: float, weight_decay: float, captured: bool = False) -> torch.optim.Adam:
    """Adam over what is not frozen; `captured`: its learning rate and steps lie where a captured step reads them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = torch.tensor(lr, device=trained[0].device) if captured else lr
    return torch.optim.Adam(trained, rate, weight_decay=weight_decay, fused=True, capturable=captured)


def _completed(config: object) -> object:
    """A stored configuration with the defaults of keys that are newer; as it is where it is none of ours."""
    try:
        return Config.from_dict(config, _RESUME_KIND).to_dict()
    except ConfigError:
        return config


def _json_lines(values: Sequence[object]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def _copy(model: FAVE) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def epoch_batches(
    data: Interactions, windows: Windows, config: Config, seed: Sequence[int]
) -> list[npt.NDArray[np.int64]]:
    """One epoch's window numbers in batches, the same for the same seed.

    With `train.group_by_length`, windows are sorted by length inside shuffled groups of 64 batches and the batches
    shuffled again: padding goes from 66 % of Beauty's positions to 3 %, while batches still differ every epoch.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(windows))
    size = config.train.batch_size
    if config.train.group_by_length:
        for group in np.split(order, range(64 * size, len(order), 64 * size)):
            starts, targets = windows.positions(group)
            lengths = np.minimum(targets - starts, config.model.max_length)
            group[:] = group[np.argsort(lengths, kind="stable")]  # a view: sorts in place, with little beside it
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if config.train.group_by_length:
        batches = [batches[index] for index in generator.permutation(len(batches))]
    return batches


@contextlib.contextmanager
def _on_interrupt(callback: Callable[[], None], first_only: bool) -> Iterator[None]:
    """Call `callback` at Ctrl-C (or SIGTERM); with `first_only`, the second Ctrl-C acts as always."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        callback()
        if first_only:
            signal.signal(number, previous[signal.Signals(number)])

    try:
        for number in previous:
            signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tensorboard(folder: str | None) -> Callable[[str, float, int], None] | None:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the package tensorboard: pip install 'fave-fast[tensorboard]'") from None
    writer = SummaryWriter(folder)
    return lambda name, value, step: writer.add_scalar(name, value, step)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.Parser("train", "Train FAVE on an interaction log, both stages.")
    parser.add_argument("--data", required=True, metavar="FILE", help="interaction log")
    parser.add_argument("--out", required=True, metavar="FILE", help="checkpoint to write")
    parser.add_argument("--preset", default="default", choices=list(PRESETS), help="settings to start from")
    parser.add_argument("--config", metavar="FILE", help="YAML laid over the preset")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, help="of every random number of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run interrupted at --out")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="also write TensorBoard events there")
    cli.add_log_options(parser)
    cli.add_run_options(parser, "bf16 runs products in bf16 and keeps weights in fp32")
    cli.add_profile_option(parser)
    with joined() as ranks:
        with ranks.together():
            arguments = parser.parse_args(argv)
            trace = Trace(arguments.profile if ranks.first else None, "train", skip=_WARM_STEPS)
            trainer = _prepare(arguments, ranks, trace)
        with trace:
            outcome = trainer.run()
        cli.say_decisions(trace.notes())
        return _report(outcome, arguments.out)


def _prepare(arguments: argparse.Namespace, ranks: Ranks, trace: Trace) -> Trainer:
    """The trainer at the place where its run is to begin."""
    out = check_writable(arguments.out)
    if out.resolve() == Path(arguments.data).resolve():
        raise InputError(f"{out}: is the log; expected another file to write to")
    device = cli.resolve_device(arguments.device)
    config = preset(arguments.preset)
    if arguments.config is not None:
        config = load_yaml(arguments.config, config)
    writer = _tensorboard(arguments.tensorboard) if ranks.first else None
    data = cli.load_log(arguments, config.data)
    trainer = Trainer(
        data,
        config,
        out,
        seed=arguments.seed,
        device=device,
        dtype=DTYPES[arguments.dtype],
        backend=arguments.backend,
        tensorboard=writer,
        ranks=ranks,
        after_step=trace.step,
    )
    cli.say_decisions(trainer.split.decisions)
    cli.say(
        f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, {data.num_interactions:,} interactions; "
        f"{len(trainer.windows):,} training windows; {trainer.split.description}"
    )
    if ranks.count > 1:
        cli.say(f"{ranks.count} ranks share each batch of {config.train.batch_size}")
    if arguments.resume:
        trainer.resume()
        cli.say(f"resuming at stage {trainer.progress.stage}, epoch {trainer.progress.epoch + 1}")
    else:
        trainer.start_afresh()
    return trainer


def _report(outcome: Outcome, out: str) -> int:
    progress = outcome.progress
    if outcome.interrupted:
        cli.say(f"interrupted: {out} is usable as it is; --resume with the same options goes on")
        return 130
    cli.say(
        f"{out}: best validation NDCG@20 {progress.best:.2f} (filtered), stage {progress.best_stage}, "
        f"epoch {progress.best_epoch}; {progress.seconds:.0f} s of training"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)

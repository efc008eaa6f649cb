"""The paper's tables from our own runs: each data set, setting and seed trained, chosen on validation, tested.

`python -m bench.quality --data beauty.npz beauty --data ml-100k.npz ml-100k --seeds 0 1 2 3 4 --out FOLDER` writes one
JSON a run; `python -m bench.quality --summarise FOLDER` makes one of them and prints a Markdown table. Runs that differ
in stage 2 alone share their stage 1, which gives each the bits that it would have by itself (`Trainer.start_stage2`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.experiment import Group, Options, Run, perform
from bench.methods import METHODS
from bench.summary import SUMMARY, load_runs, markdown, read_run, summarise
from bench.workers import Report, run_all
from fave_fast import cli, env
from fave_fast.config import PRESETS, preset
from fave_fast.data import Interactions, split
from fave_fast.errors import InputError
from fave_fast.evaluate import KINDS
from fave_fast.files import replacing
from fave_fast.model import DTYPES
from fave_fast.train import resolve_steps

Overrides = Mapping[str, Any]

# The paper's Table 2. Each changes one thing: without stage 2 the model is still served from the anchor prior.
ABLATIONS: dict[str, Overrides] = {
    "without-stage-2": {"train": {"epochs_stage2": 0}},
    "without-l-cons": {"loss": {"gamma": 0.0}},
    "without-l-match": {"loss": {"match": 0.0}},
    "gaussian-prior": {"flow": {"prior": "gaussian"}},
}
# Peers on the same network, with the preset's sizes, dropouts and schedule. They have no stage 2.
_ONE_STAGE = {"epochs_stage2": 0}
PEERS: dict[str, Overrides] = {
    "sasrec": {
        "model": {"attention": "causal", "delta": 0.0},
        "loss": {"rec": 0.0, "beta": 0.0},
        "train": _ONE_STAGE,
    },
    "diffurec-style": {"method": "diffurec-style", "flow": {"prior": "gaussian"}, "train": _ONE_STAGE},
    "fmrec-style": {"method": "fmrec-style", "flow": {"prior": "gaussian"}, "train": _ONE_STAGE},
}
# Ways for x_t to carry information (`fave_fast/conditioning.py`), and where the path begins in the two stages: in noise
# and then in the anchor, as in the paper, or in one of them throughout.
_WAYS: dict[str, dict[str, Any]] = {
    "gate": {"conditioning": "gate", "delta": 1.0},
    "film": {"conditioning": "film"},
    "token": {"conditioning": "token"},
}
_STARTS: dict[str, dict[str, Any]] = {
    "": {},
    "-from-noise": {"flow": {"prior": "gaussian"}},
    "-from-anchor": {"flow": {"prior_stage1": "anchor"}},
}
CONDITIONINGS: dict[str, Overrides] = {
    way + start: {"model": model, **flow} for way, model in _WAYS.items() for start, flow in _STARTS.items()
}
# The paper's figure 5: one weight at a time around the preset.
_SWEPT = {
    "loss.alpha": (0.1, 0.2, 0.5, 1.0, 2.0, 4.0),
    "loss.beta": (0.0, 0.1, 0.2, 0.5, 1.0),
    "loss.gamma": (0.0, 0.01, 0.1, 1.0),
    "flow.rho": (0.25, 0.5, 0.75, 1.0),
}
SWEEPS: dict[str, Overrides] = {
    f"{key}-{value:g}": {section: {key: value}}
    for section, key, values in ((*name.split("."), values) for name, values in _SWEPT.items())
    for value in values
}
# L_tgt's softmax over all items, as eq. (12), and without the history's, as filtered rankings are.
_TARGETS: dict[str, Overrides] = {
    "all-items": {"loss": {"target": "all"}},
    "unseen": {"loss": {"target": "unseen"}},
}
SETTINGS: dict[str, Overrides] = {"preset": {}, **_TARGETS, **ABLATIONS, **PEERS, **CONDITIONINGS, **SWEEPS}
_NOT_OF_THE_CONFIG = ("only", "method")


def read_settings(path: Path) -> dict[str, Overrides]:
    """Named settings from a YAML file: a mapping of names to what is laid over the preset.

    The key `only` of a setting names the data sets that it is for, `method` one of `bench.methods`.

    Raises:
        InputError: the file cannot be read or is no such mapping. Keys of the configuration are checked later.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the settings: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: expected a mapping of names to settings")
    for name, values in found.items():
        if not isinstance(name, str) or re.fullmatch(r"[\w.-]+", name) is None:
            raise InputError(f"{path}: setting {name!r}; expected a name of letters, digits, '.', '_' and '-'")
        if not isinstance(values, dict):
            raise InputError(f"{path}: setting {name!r} is {values!r}; expected a mapping of sections to values")
        only = values.get("only", [])
        if not isinstance(only, list) or not all(isinstance(one, str) for one in only):
            raise InputError(f"{path}: setting {name!r}: only is {only!r}; expected a list of data sets")
        if values.get("method", "fave") not in METHODS:
            expected = ", ".join(METHODS)
            raise InputError(f"{path}: setting {name!r}: method is {values['method']!r}; expected one of {expected}")
    return found


def read_changes(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options such as `train.lr=0.002` as a nested mapping.

    Raises:
        InputError: another form.
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        found = re.fullmatch(r"(\w+)\.(\w+)=(.+)", text)
        try:
            value = yaml.safe_load(found[3]) if found else None
        except yaml.YAMLError:
            value = None
        if found is None or value is None:
            raise InputError(f"--set {text!r}; expected SECTION.KEY=VALUE, as in train.lr=0.002")
        changes.setdefault(found[1], {})[found[2]] = value
    return changes


def plan(
    datasets: Sequence[tuple[str, str]], settings: Mapping[str, Overrides], texts: Sequence[str], seeds: Sequence[int]
) -> list[Run]:
    """All runs, every data set and setting of a seed before the next seed: a call that is cut short has whole tables.

    Args:
        datasets: names and presets.
        settings: by name.
        texts: of `--set`, laid over the presets; settings come on top.
        seeds: of the runs.

    Raises:
        ConfigError: a setting that the configuration refuses.
    """
    changes = read_changes(texts)
    runs = []
    for seed, (dataset, base), (setting, values) in itertools.product(seeds, datasets, settings.items()):
        if dataset not in values.get("only", [dataset]):
            continue
        own = {name: part for name, part in values.items() if name not in _NOT_OF_THE_CONFIG}
        config = preset(base).override(changes, "--set").override(own, f"setting {setting}")
        runs.append(Run(dataset, base, setting, config, seed, values.get("method", "fave")))
    return runs


def grouped(runs: Sequence[Run], data: Mapping[tuple[str, Any], Interactions], options: Options) -> list[Group]:
    """Runs of one data set, seed, method and stage 1 together, in the order of each group's first."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.dataset, run.seed, run.method, run.config.stage1()), []).append(run)
    return [Group(data[some[0].dataset, some[0].config.data], tuple(some), options) for some in groups.values()]


def _is_done(folder: Path, run: Run, options: Options) -> bool:
    path = folder / f"{run.name}.json"
    try:
        found = read_run(path)
    except FileNotFoundError:
        return False
    for name, value in options.identity(run).items():
        if found[name] != value:
            raise InputError(f"{path}: holds a run with another {name}; expected another --out or setting name")
    return bool(found["finished"] and (found["test"] is not None or not options.test))


def commit() -> str | None:
    """The checkout's commit, `+` behind it where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpus(device: torch.device) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be in a process: one of the GPUs that `device` means."""
    if device.type != "cuda":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    return every if device.index is None else [every[device.index]]


def _load(arguments: argparse.Namespace, runs: Sequence[Run]) -> dict[tuple[str, Any], Interactions]:
    """Each data set under each `data` section that a run has; a bad one is found here, before any training."""
    paths = {Path(path).stem: path for path, _ in arguments.data}
    result: dict[tuple[str, Any], Interactions] = {}
    for run in runs:
        key = run.dataset, run.config.data
        if key not in result:
            log = argparse.Namespace(**{**vars(arguments), "data": paths[run.dataset]})
            result[key] = cli.load_log(log, run.config.data)
            split(result[key], run.config.data)
    return result


def _seconds(text: str) -> float:
    """An argparse type: a length of time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a number of seconds above 0, at most 1e6")
    return value


def _parser() -> cli.Parser:
    parser = cli.Parser("quality", "Train and test every data set, setting and seed; a JSON each.")
    parser.prog = "python -m bench.quality"
    parser.add_argument(
        "--data", nargs=2, action="append", metavar=("FILE", "PRESET"), help="log and its preset; again"
    )
    parser.add_argument("--setting", nargs="+", metavar="NAME", help=f"{', '.join(SETTINGS)} or one of --settings")
    parser.add_argument("--settings", metavar="FILE", type=Path, help="YAML of named settings; without --setting, all")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="over the presets: train.lr=0.002, say"
    )
    parser.add_argument("--seeds", nargs="+", type=cli.whole_number(0), default=[0, 1, 2, 3, 4], help="of the runs")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where the JSON files go; finished runs are kept")
    parser.add_argument("--jobs", type=cli.whole_number(1), default=1, help="processes at once")
    parser.add_argument("--seconds", type=_seconds, default=3600.0, help="begin no run that cannot end within them")
    parser.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="DATASET=SECONDS",
        help="what a run takes, before one has ended",
    )
    parser.add_argument("--no-test", action="store_true", help="validation only: for choosing settings")
    parser.add_argument("--checkpoints", metavar="FOLDER", type=Path, help="also keep each run's checkpoint there")
    parser.add_argument("--commit", help="of the code, where it is no checkout")
    parser.add_argument("--summarise", metavar="FOLDER", type=Path, help="only: sum up the runs in there")
    cli.add_log_options(parser)
    cli.add_run_options(parser, "of training; tests are in fp32")
    return parser


def _chosen_settings(arguments: argparse.Namespace, parser: cli.Parser) -> dict[str, Overrides]:
    known, names = dict(SETTINGS), arguments.setting
    if arguments.settings is not None:
        found = read_settings(arguments.settings)
        known |= found
        names = names or list(found)
    names = names or ["preset"]
    for name in names:
        if name not in known:
            parser.error(f"--setting {name!r}; expected one of {', '.join(known)}")
    return {name: known[name] for name in names}


def _datasets(arguments: argparse.Namespace, parser: cli.Parser) -> list[tuple[str, str]]:
    datasets = [(Path(path).stem, base) for path, base in arguments.data or ()]
    if not datasets or arguments.out is None:
        parser.error("--data and --out, or --summarise, are needed")
    for path, base in arguments.data:
        if base not in PRESETS:
            parser.error(f"--data {path} {base}; expected one of the presets {', '.join(PRESETS)}")
    if len({name for name, _ in datasets}) < len(datasets):
        parser.error("--data: two files of one name; expected different ones")
    return datasets


def _expectations(texts: Sequence[str], parser: cli.Parser) -> dict[str, float]:
    result = {}
    for text in texts:
        found = re.fullmatch(r"(.+)=(\d+(?:\.\d*)?)", text)
        if found is None:
            parser.error(f"--expect {text!r}; expected DATASET=SECONDS, as in beauty=60")
        result[found[1]] = float(found[2])
    return result


def make_folder(path: Path) -> Path:
    """The folder, made where it was not.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot make the folder: {error.strerror}") from None
    return path


def _summarise(folder: Path) -> int:
    summary = summarise(load_runs(folder))
    with replacing(folder / SUMMARY) as part:
        part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(markdown(summary))
    return 0


def _execute(
    groups: list[Group], arguments: argparse.Namespace, expected: dict[str, float], gpus: list[str], deadline: float
) -> Report:
    measured: dict[str, float] = {}
    common = {
        "commit": arguments.commit or commit(),
        "command": "python -m bench.quality " + shlex.join(sys.argv[1:]),
        "versions": env.versions(),
        "jobs": arguments.jobs,
    }

    def on_result(group: Group, result: dict[str, Any]) -> None:
        write_run(arguments.out, {**common, **result})

    def on_end(group: Group, seconds: float) -> None:
        dataset = group.runs[0].dataset
        measured[dataset] = max(measured.get(dataset, 0.0), seconds)

    def known(group: Group) -> float | None:
        dataset = group.runs[0].dataset
        return measured.get(dataset, expected.get(dataset))

    return run_all(
        groups, perform, arguments.jobs, deadline, expected=known, on_result=on_result, on_end=on_end, gpus=gpus
    )


def write_run(folder: Path, result: dict[str, Any]) -> None:
    """A run's file, and a line about it."""
    name = f"{result['dataset']}.{result['setting']}.{result['seed']}"
    with replacing(folder / f"{name}.json") as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    cli.say(_line(name, result))


def _line(name: str, result: dict[str, Any]) -> str:
    if not result["finished"]:
        return f"{name}: cut after {result['seconds']:.0f} s of training"
    validation = result["validation"]["chosen"]
    words = f"{name}: {result['seconds']:.0f} s of training, stage {result['stage']['chosen']}, validation "
    words += f"HR@20 {validation['HR@20']:.2f} NDCG@20 {validation['NDCG@20']:.2f}"
    raw = result["validation_raw"]
    words += f" (raw {raw['HR@20']:.2f} {raw['NDCG@20']:.2f})"
    if result["test"] is not None:
        for kind in KINDS:
            figures = result["test"]["chosen"][kind]
            words += f"; test {kind} {figures['HR@20']:.2f} {figures['NDCG@20']:.2f}"
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 1 some runs did not end."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.seconds
    if arguments.summarise is not None:
        return _summarise(arguments.summarise)
    datasets = _datasets(arguments, parser)
    expected = _expectations(arguments.expect, parser)
    device = cli.resolve_device(arguments.device)
    threads = max(torch.get_num_threads() // arguments.jobs, 1)
    options = Options(
        device.type, arguments.dtype, arguments.backend, threads, not arguments.no_test, arguments.checkpoints
    )
    runs = plan(datasets, _chosen_settings(arguments, parser), arguments.set, arguments.seeds)
    for d in {run.config.model.d for run in runs}:
        resolve_steps(device, DTYPES[arguments.dtype], arguments.backend, d)
    data = _load(arguments, runs)
    for folder in (arguments.out, arguments.checkpoints):
        if folder is not None:
            make_folder(folder)
    left = [run for run in runs if not _is_done(arguments.out, run, options)]
    cli.say(f"{len(runs)} runs, {len(runs) - len(left)} of them done before; {arguments.jobs} at once")
    report = _execute(grouped(left, data, options), arguments, expected, _gpus(device), deadline)
    for group, reason in report.failed:
        cli.say(f"failed: {', '.join(run.name for run in group.runs)}: {reason}")
    for group in report.not_started:
        cli.say(f"not begun, for want of time: {', '.join(run.name for run in group.runs)}")
    unfinished = [run.name for run in left if not _is_done(arguments.out, run, options)]
    cli.say(
        f"{len(runs) - len(unfinished)} of {len(runs)} runs are done; "
        f"python -m bench.quality --summarise {arguments.out} sums them up"
    )
    return 1 if unfinished else 0


if __name__ == "__main__":
    cli.run(main)

"""What the runs of `bench.quality` say together: means and 95 % intervals over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fave_fast.config import Config
from fave_fast.errors import ConfigError, InputError
from fave_fast.evaluate import KINDS

VALIDATION = ("HR@20", "NDCG@20")
TEST = tuple(f"{kind} {name}@{k}" for kind in KINDS for name in ("HR", "NDCG") for k in (10, 20))
LISTS = ("coverage@20", "ild@20")
# Of `bench.diagnostics`: where it lies, and its head in a table.
FLOW = {
    "NDCG@20, 1 step": ("steps", "1", "NDCG@20"),
    "NDCG@20, 30 steps": ("steps", "30", "NDCG@20"),
    "gap of 30": ("steps", "30", "gap"),
    "JVP": ("straightness", "jvp"),
    "anchor to target": ("distance", "anchor"),
    "another's anchor": ("distance", "anchor of another user"),
    "noise to target": ("distance", "gaussian"),
    "another draw": ("x_0", "change"),
    "another's x_0": ("x_0", "change, another user's"),
    "ILD, 1 sample": ("samples", "1", "ild@20"),
    "ILD, 16": ("samples", "16", "ild@20"),
    "coverage, 1 sample": ("samples", "1", "coverage@20"),
    "coverage, 16": ("samples", "16", "coverage@20"),
    "NDCG@20, 16": ("samples", "16", "NDCG@20"),
}
SAME = ("method", "config", "dtype", "backend", "steps", "data")  # in all runs of one name
SUMMARY = "summary.json"


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean of `values`, and half the length of its 95 % interval by Student's t, None of a single value."""
    from scipy.special import stdtrit

    count = len(values)
    half = None
    if count > 1:
        half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    return {"mean": statistics.fmean(values), "half": half, "seeds": count}


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """The objects of all runs in `folder`.

    Raises:
        InputError: no folder, no runs, a file that is no run, or runs of one name that differ in more than the seed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that bench.quality wrote")
    runs = [_load(path) for path in sorted(folder.glob("*.json")) if path.name != SUMMARY]
    if not runs:
        raise InputError(f"{folder}: no runs; expected files that bench.quality wrote")
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        other = first.setdefault(run["key"], run)
        for name in SAME:
            if run[name] != other[name]:
                raise InputError(f"{folder / run['file']}: its {name} is not that of {other['file']}; expected one")
    return runs


def read_run(path: Path) -> dict[str, Any]:
    """The object of a run; one of an earlier version with what it does not name as that was then.

    Raises:
        FileNotFoundError: no such file.
        InputError: it cannot be read, or is no run.
    """
    try:
        run = {"method": "fave", **json.loads(path.read_text(encoding="utf-8"))}
        if {"dataset", "setting", "seed", "finished", *SAME} <= run.keys():
            return {**run, "config": Config.from_dict(run["config"], str(path)).to_dict()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, ConfigError):
        pass
    raise InputError(f"{path}: expected a run that bench.quality wrote")


def _load(path: Path) -> dict[str, Any]:
    run = read_run(path)
    return {**run, "file": path.name, "key": (run["dataset"], run["setting"])}


def figures(run: dict[str, Any], weights: str) -> dict[str, float]:
    """Everything that a table shows of one run, by name."""
    result = {f"validation {name}": run["validation"][weights][name] for name in VALIDATION}
    if run["test"] is not None:
        test = run["test"][weights]
        result |= {f"{kind} {name}": test[kind][name] for kind, name in map(str.split, TEST) if kind in test}
        result |= {name: test[name] for name in LISTS}
    return result


def flow_figures(run: dict[str, Any], stage: str) -> dict[str, float]:
    """What `FLOW` names of a run's diagnostics, after `stage 1` or the `last stage`; nothing where it has none."""
    result = {}
    for name, path in FLOW.items():
        found = (run.get("diagnostics") or {}).get(stage)
        for key in path:
            found = None if found is None else found.get(key)
        if found is not None:
            result[name] = found
    return result


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One object with a row for each data set, setting and choice of weights.

    `chosen` weights are the best on validation, `last stage` the best of the last stage where stage 1's were better.
    `rows` have `figures`, name to `interval`; and, beside the setting `preset` of the same data set, `differences` from
    it, seed by seed: seeds shared, much of the chance cancels. `flows`: what `FLOW` names, for each stage.
    """
    whole = [run for run in runs if run["finished"]]
    rows, flows = [], []
    for key in dict.fromkeys(run["key"] for run in whole):
        group = [run for run in whole if run["key"] == key]
        rows.append(_row(key, "chosen", group, whole))
        flows += [
            {
                "dataset": key[0],
                "setting": key[1],
                "weights": stage,
                "figures": _intervals(flow_figures(run, stage) for run in group),
            }
            for stage in ("stage 1", "last stage")
        ]
        if any(run["stage"]["chosen"] != run["stage"]["last stage"] for run in group):
            rows.append(_row(key, "last stage", group, whole))
    return {
        "commits": sorted({run["commit"] or "unknown" for run in whole}),
        "devices": sorted({run["device"] for run in whole}),
        "rows": rows,
        "flows": [flow for flow in flows if flow["figures"]],
        "left_out": [run["file"] for run in runs if not run["finished"]],
    }


def _row(
    key: tuple[str, str], weights: str, group: list[dict[str, Any]], whole: list[dict[str, Any]]
) -> dict[str, Any]:
    dataset, setting = key
    base = {run["seed"]: run for run in whole if run["key"] == (dataset, "preset")}
    pairs = [(run, base[run["seed"]]) for run in group if setting != "preset" and run["seed"] in base]
    return {
        "dataset": dataset,
        "setting": setting,
        "weights": weights,
        "seeds": sorted(run["seed"] for run in group),
        "of_stage_2": sum(run["stage"][weights] == 2 for run in group),
        "seconds": interval([run["seconds"] for run in group]),
        "figures": _intervals(figures(run, weights) for run in group),
        "differences": _intervals(_difference(figures(a, weights), figures(b, weights)) for a, b in pairs),
    }


def _intervals(found: Iterable[dict[str, float]]) -> dict[str, Any]:
    every = list(found)
    names = [name for name in every[0] if all(name in one for one in every)] if every else []
    return {name: interval([one[name] for one in every]) for name in names}


def _difference(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: a[name] - b[name] for name in a if name in b}


def markdown(summary: dict[str, Any]) -> str:
    """The rows as Markdown tables: figures, and differences from the preset."""
    names = list(dict.fromkeys(name for row in summary["rows"] for name in row["figures"]))
    lines = _table(summary["rows"], "figures", names)
    compared = [row for row in summary["rows"] if row["differences"]]
    if compared:
        lines += ["", "Differences from `preset`, seed by seed:", "", *_table(compared, "differences", names)]
    if summary["flows"]:
        lines += ["", "What the flow does, by the best weights of each stage:", "", *_flow_table(summary["flows"])]
    if summary["left_out"]:
        lines += ["", f"Left out, for they did not end: {', '.join(summary['left_out'])}."]
    return "\n".join([*lines, "", f"Commits: {', '.join(summary['commits'])}. On: {', '.join(summary['devices'])}."])


def _table(rows: Sequence[dict[str, Any]], what: str, names: Sequence[str]) -> list[str]:
    head = ["data", "setting", "weights", "seeds", "of stage 2", "seconds", *names]
    lines = [f"| {' | '.join(head)} |", f"|---|---|---|{'---:|' * (len(head) - 3)}"]
    for row in rows:
        cells = [row["dataset"], row["setting"], row["weights"], str(len(row["seeds"])), str(row["of_stage_2"])]
        cells += [f"{row['seconds']['mean']:.0f}"]
        cells += [
            _cell(row[what][name], 3 if name.startswith("ild") else 2) if name in row[what] else "" for name in names
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _flow_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ["data", "setting", "weights", *FLOW]
    lines = [f"| {' | '.join(head)} |", f"|---|---|---|{'---:|' * len(FLOW)}"]
    for row in rows:
        found = row["figures"]
        digits = [2 if "NDCG" in name or "coverage" in name else 3 for name in FLOW]
        cells = [_cell(found[name], count) if name in found else "" for name, count in zip(FLOW, digits, strict=True)]
        lines.append(f"| {' | '.join([row['dataset'], row['setting'], row['weights'], *cells])} |")
    return lines


def _cell(found: dict[str, Any], digits: int) -> str:
    return f"{found['mean']:.{digits}f}" + ("" if found["half"] is None else f" ± {found['half']:.{digits}f}")

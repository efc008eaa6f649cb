"""Figures of results, from their files alone: `python bench/plot.py [FILE ...] [--out FOLDER]`.

Without FILE, the latest run of each suite and machine kind of `bench/results`. Every figure names its machine and
commit.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench import record
from bench.measure import HOST
from bench.record import ResultsError, Run

Row = dict[str, Any]
OURS, PEER_COLOURS = "#c1121f", ("#003049", "#669bbc", "#588157", "#bc6c25", "#7f5539", "#6d597a", "#8d99ae", "#b5838d")


def size(row: Row, name: str) -> int | None:
    """A row's B, N, L, K or threads, from its case: "B 64, N 12101, ..."."""
    found = re.search(rf"\b{name} (\d+)", row["case"]) or re.search(rf"(\d+) {name}\b", row["case"])
    return int(found.group(1)) if found else None


def rest(row: Row, name: str) -> str:
    """The case without one of its sizes."""
    return ", ".join(part for part in row["case"].split(", ") if not re.fullmatch(rf"{name} \d+|\d+ {name}", part))


def lines(rows: Iterable[Row], name: str) -> dict[str, list[Row]]:
    """Rows by contender, each ascending by the size called `name`; of two of one size the later."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        at = size(row, name)
        if at is not None:
            found.setdefault(row["who"], {})[at] = row
    return {who: [by_size[at] for at in sorted(by_size)] for who, by_size in found.items()}


def colour(who: str, ours: bool, contenders: Sequence[str]) -> str:
    """Ours red, a peer the same colour in a whole figure."""
    return OURS if ours else PEER_COLOURS[contenders.index(who) % len(PEER_COLOURS)]


def curves(axes: Axes, rows: Sequence[Row], name: str, value: Callable[[Row], float] | None = None) -> None:
    """A log-log line for each contender: the median, and as a band its 20th to 80th percentile."""
    groups = lines(rows, name)
    peers = [who for who, some in groups.items() if not some[0]["ours"]]
    styles = iter(("-", "--", ":", "-.") * 3)
    for who, some in sorted(groups.items(), key=lambda item: not item[1][0]["ours"]):
        x = [size(row, name) or 0 for row in some]
        y = [value(row) if value else row["us"]["median"] for row in some]
        ours = some[0]["ours"]
        axes.plot(
            x, y, next(styles) if ours else "-", marker="o", markersize=4, linewidth=2.2 if ours else 1.3,
            color=colour(who, ours, peers), label=who, zorder=3 if ours else 2,
        )  # fmt: skip
        if value is None:
            low, high = ([row["us"][at] for row in some] for at in ("p20", "p80"))
            axes.fill_between(x, low, high, color=colour(who, ours, peers), alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_ylim()
    if high < 4 * low:  # or what hardly changes would look as if it did
        axes.set_ylim((low * high) ** 0.5 / 2, (low * high) ** 0.5 * 2)
    axes.grid(which="major", alpha=0.3)


def titled(figure: Figure, title: str, run: Run) -> None:
    """What, where and when."""
    where = run["machine"]["gpu"] or f"{run['machine']['cpu']}, {run['machine']['threads']} threads"
    changed = " with changes" if run.get("clean") is False else ""
    quick = "\nQUICK: no measurement" if run.get("quick") else ""
    commit = f"commit {(run['commit'] or 'unknown')[:10]}{changed}"
    figure.suptitle(f"{title}\n{where}, {run['date']}, {commit}{quick}", fontsize=10)


def latency(run: Run) -> Iterator[tuple[str, Figure]]:
    """Latency against batch, users a second, and one step against many."""
    requests = [row for row in run["rows"] if row["op"] == "request"]
    if not requests:
        return
    cases = sorted({rest(row, "B") for row in requests})
    beforehand = run.get("measured_beforehand_ms", {})
    figure, panels = plt.subplots(1, len(cases), figsize=(6.5 * len(cases), 5), squeeze=False, sharey=True)
    for axes, case in zip(panels[0], cases, strict=True):
        curves(axes, [row for row in requests if rest(row, "B") == case], "B")
        for (who, by_batch), marker in zip(beforehand.items(), ("x", "+"), strict=False):
            axes.plot(
                [int(b) for b in by_batch], [1e3 * ms for ms in by_batch.values()], marker, color="grey",
                label=f"{who}: measured beforehand", markersize=7,
            )  # fmt: skip
        axes.set(title=case, xlabel="histories in a request")
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("microseconds, host to host (median, band p20 to p80)")
    titled(figure, "A request: histories to exact top-20 lists", run)
    yield "latency", figure

    figure, panels = plt.subplots(1, len(cases), figsize=(6.5 * len(cases), 5), squeeze=False, sharey=True)
    for axes, case in zip(panels[0], cases, strict=True):
        curves(
            axes, [row for row in requests if rest(row, "B") == case], "B",
            lambda row: 1e6 * (size(row, "B") or 0) / row["us"]["median"],
        )  # fmt: skip
        for row in run["rows"]:
            if row["op"] == "saturated" and row["case"].endswith("4 callers") and case in rest(row, "B"):
                at = size(row, "B") or 0
                axes.plot(at, 1e6 * at / row["us"]["median"], "*", color=OURS, markersize=11, zorder=4)
        axes.plot([], [], "*", color=OURS, markersize=11, linestyle="none", label="ours, 4 callers at once")
        axes.set(title=case, xlabel="histories in a request")
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("users a second")
    titled(figure, "Throughput, one caller after the other", run)
    yield "users-per-second", figure
    yield from steps(run, requests, beforehand)


def bars(axes: Axes, values: Sequence[tuple[str, float, bool, bool]], title: str, what: str) -> None:
    """Horizontal bars in milliseconds, log scale, the slowest below: (who, ms, ours, measured beforehand)."""
    ordered = sorted(values, key=lambda value: -value[1])
    for at, (_, ms, ours, before) in enumerate(ordered):
        axes.barh(
            at, ms, color="white" if before else OURS if ours else PEER_COLOURS[1],
            edgecolor="grey" if before else "none", hatch="///" if before else None,
        )  # fmt: skip
        axes.text(ms * 1.1, at, f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}", va="center", fontsize=7)
    axes.set(xscale="log", xlabel=what)
    axes.set_xlim(min(value[1] for value in ordered) / 2, max(value[1] for value in ordered) * 3)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=9)
    axes.set_yticks(range(len(ordered)), [value[0] for value in ordered], fontsize=7)


def steps(run: Run, requests: Sequence[Row], beforehand: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """One step against 30 and 32, at the smallest and the largest batch."""
    wanted = [row for row in requests if "steps" in row["who"] or row["ours"] or row["who"].startswith("PyTorch")]
    case = min((rest(row, "B") for row in wanted), key=lambda one: ("as in" in one, one))
    some = [row for row in wanted if rest(row, "B") == case]
    batches = sorted({size(row, "B") or 0 for row in some})
    batches = batches[:1] + batches[-1:] if len(batches) > 1 else batches
    figure, panels = plt.subplots(1, len(batches), figsize=(6.5 * len(batches), 4), squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        values = [
            (
                row["who"] + ("" if "steps" in row["who"] else ", one step"),
                row["us"]["median"] / 1e3,
                row["ours"],
                False,
            )
            for row in some
            if size(row, "B") == batch
        ]
        # Read from a file, the batch is text.
        before = {who: {int(at): ms for at, ms in by_batch.items()} for who, by_batch in beforehand.items()}
        values += [(who, by_batch[batch], False, True) for who, by_batch in before.items() if batch in by_batch]
        bars(axes, values, f"B {batch}, {case}", "milliseconds a request (hatched: measured beforehand)")
    titled(figure, "One step against 30 and 32 of the same network", run)
    yield "steps", figure


def topk(run: Run) -> Iterator[tuple[str, Figure]]:
    """Time against N, with the floor, a panel for each batch and a figure for each clock."""
    rows = [row for row in run["rows"] if row["op"] == "score_topk" and "excluded" not in row["who"]]
    for clock in dict.fromkeys(row["clock"] for row in rows):
        some = [row for row in rows if row["clock"] == clock]
        batches = sorted({size(row, "B") or 0 for row in some})
        figure, panels = plt.subplots(1, len(batches), figsize=(4.6 * len(batches), 4.6), squeeze=False, sharey=True)
        for axes, batch in zip(panels[0], batches, strict=True):
            mine = [row for row in some if size(row, "B") == batch]
            curves(axes, mine, "N")
            floors = {size(row, "N") or 0: row["floor_us"] for row in mine if "floor_us" in row}
            if floors:
                axes.plot(sorted(floors), [floors[n] for n in sorted(floors)], "k:", label="floor: bytes or products")
            axes.set(title=f"B = {batch}", xlabel="items in the catalogue")
            axes.legend(fontsize=7)
        panels[0][0].set_ylabel(f"microseconds ({clock})")
        titled(figure, "Exact top-20 of the whole catalogue", run)
        yield "topk" + {HOST: "-host"}.get(clock, "-" + clock.split()[1] if "L2" in clock else ""), figure


def training(run: Run) -> Iterator[tuple[str, Figure]]:
    """A step of either stage, or whatever else the rows are: bars for each case."""
    cases = list(dict.fromkeys(row["case"] for row in run["rows"]))
    if not cases:
        return
    figure, panels = plt.subplots(1, len(cases), figsize=(4.4 * len(cases), 4), squeeze=False)
    for axes, case in zip(panels[0], cases, strict=True):
        rows = [row for row in run["rows"] if row["case"] == case]
        values = [(row["who"], row["us"]["median"] / 1e3, row["ours"], False) for row in rows]
        bars(axes, values, case, "milliseconds a step")
    titled(figure, "A training step" if run["suite"] == "training" else "A step on the CPU", run)
    yield run["suite"], figure


def step_on_cpu(run: Run) -> Iterator[tuple[str, Figure]]:
    """The CPU's step beside its peers, bars for each case."""
    yield from training({**run, "rows": [row for row in run["rows"] if row["op"] == "step"]})


def growth(run: Run) -> Iterator[tuple[str, Figure]]:
    """Time and memory against each size, log-log."""
    axis_rows: dict[str, list[Row]] = {"N": [], "B": [], "L": [], "K": [], "threads": []}
    for axis, some in axis_rows.items():
        others = [row for row in run["rows"] if size(row, axis) is not None]
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in others:
            groups.setdefault((row["op"], rest(row, axis)), []).append(row)
        sizes = {key: len({size(row, axis) for row in group}) for key, group in groups.items()}
        for (op, fixed), group in groups.items():
            # Fewer than another group's are those that a measurement of another size was made with.
            if sizes[op, fixed] > 1 and sizes[op, fixed] == max(n for (other, _), n in sizes.items() if other == op):
                some += [{**row, "who": f"{op}: {fixed}"} for row in group]
    axes_there = [axis for axis, some in axis_rows.items() if some]
    if not axes_there:
        return
    words = {
        "N": "items in the catalogue, N",
        "B": "histories, B",
        "L": "items of a history, L",
        "K": "length of a list, K",
        "threads": "threads",
    }
    figure, panels = plt.subplots(2, len(axes_there), figsize=(4.6 * len(axes_there), 7.5), squeeze=False)
    for (above, below), axis in zip(panels.T, axes_there, strict=True):
        curves(above, axis_rows[axis], axis)
        above.set(xlabel=words[axis], ylabel="microseconds")
        above.legend(fontsize=7)
        with_memory = [row for row in axis_rows[axis] if row.get("peak_bytes")]
        curves(below, with_memory, axis, lambda row: row["peak_bytes"] / 2**20)
        below.set(xlabel=words[axis], ylabel="MiB: catalogue, weights, call")
        floors = {size(row, axis) or 0: row["floor_us"] for row in axis_rows[axis] if "floor_us" in row and axis == "N"}
        if floors:
            above.plot(sorted(floors), [floors[at] for at in sorted(floors)], "k:", label="floor")
            above.legend(fontsize=7)
    titled(figure, "How time and memory grow, one size at a time", run)
    yield "growth", figure


def pareto(run: Run) -> Iterator[tuple[str, Figure]]:
    """NDCG@20 against the time of a request: up and to the left is better."""
    rows = [row for row in run["rows"] if "ndcg@20" in row]
    batches = sorted({size(row, "B") or 0 for row in rows})
    if not batches:
        return
    figure, panels = plt.subplots(1, len(batches), figsize=(5.6 * len(batches), 4.4), squeeze=False, sharey=True)
    for axes, batch in zip(panels[0], batches, strict=True):
        mine = sorted((row for row in rows if size(row, "B") == batch), key=lambda row: row["us"]["median"])
        named: set[str] = set()
        for row in mine:
            where, who = (row["us"]["median"] / 1e3, row["ndcg@20"]), row["who"].partition(", ")[0]
            axes.plot(
                *where, "*" if row["ours"] else "o", color=OURS if row["ours"] else PEER_COLOURS[1],
                markersize=14 if row["ours"] else 7, linestyle="none", label=None if who in named else who,
            )  # fmt: skip
            named.add(who)
            steps_taken = re.search(r"(\d+)( Euler)? step", row["who"])
            if steps_taken:
                axes.annotate(steps_taken.group(1), where, fontsize=8, xytext=(6, 6), textcoords="offset points")
        levels = [row["ndcg@20"] for row in mine]
        middle, reach = (max(levels) + min(levels)) / 2, max(0.5, 0.7 * (max(levels) - min(levels)))
        axes.set_ylim(middle - reach, middle + reach)  # less than a point is chance
        axes.legend(fontsize=7)
        axes.set(xscale="log", title=mine[0]["case"], xlabel="milliseconds a request (host to host)")
        axes.title.set_fontsize(9)
        axes.margins(x=0.2)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("NDCG@20, filtered, per cent")
    titled(figure, "What more steps buy (numbers: steps)", run)
    yield "pareto", figure


def quality(run: Run) -> Iterator[tuple[str, Figure]]:
    """NDCG@20 of each setting with its 95 % interval over seeds, a panel for each data set."""
    rows = [row for row in run["summary"]["rows"] if "filtered NDCG@20" in row["figures"]]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    if not datasets:
        return
    figure, panels = plt.subplots(1, len(datasets), figsize=(5.6 * len(datasets), 4), squeeze=False)
    for axes, dataset in zip(panels[0], datasets, strict=True):
        mine = [row for row in rows if row["dataset"] == dataset]
        found = [row["figures"]["filtered NDCG@20"] for row in mine]
        axes.errorbar(
            [one["mean"] for one in found], range(len(mine)), xerr=[one["half"] or 0 for one in found], fmt="o",
            color=OURS, capsize=4,
        )  # fmt: skip
        counts = [len(row["seeds"]) for row in mine]
        seeds = [f"{count} seed{'s' * (count > 1)}" for count in counts]
        names = [f"{row['setting']}, {row['weights']} ({many})" for row, many in zip(mine, seeds, strict=True)]
        axes.set_yticks(range(len(mine)), names, fontsize=7)
        axes.set(xlabel="NDCG@20, filtered, per cent")
        axes.set_title(dataset, fontsize=9)
        axes.margins(y=0.2)
        axes.grid(axis="x", alpha=0.3)
    titled(figure, "Quality on test targets", run)
    yield "quality", figure


FIGURES: dict[str, Callable[[Run], Iterator[tuple[str, Figure]]]] = {
    "latency": latency,
    "topk": topk,
    "steps": pareto,
    "quality": quality,
    "training": training,
    "cpu": step_on_cpu,
    "growth": growth,
}


def draw(runs: Iterable[Run], folder: Path) -> list[Path]:
    """Every figure of `runs` as a PNG file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for run in runs:
        if run["suite"] not in FIGURES:
            continue
        for name, figure in FIGURES[run["suite"]](run):
            path = folder / f"{run['date']}-{run['machine']['kind']}-{name}.png"
            figure.tight_layout()
            figure.savefig(path, dpi=110)
            plt.close(figure)
            paths.append(path)
    return paths


def latest(runs: Iterable[Run]) -> list[Run]:
    """The last run of each suite, machine kind and dtype, with what runs of the same commit have beside it."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["suite"], run["machine"]["kind"], run.get("dtype"), run.get("quick")), []).append(run)
    found = []
    for group in groups.values():
        alike = [run for run in group if run["commit"] == group[-1]["commit"]]
        rows = {(row["op"], row["case"], row["clock"], row["who"]): row for run in alike for row in run["rows"]}
        found.append({**group[-1], "rows": list(rows.values())})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="bench/plot.py", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="files of results")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER", help="default: bench/results")
    arguments = parser.parse_args(argv)
    try:
        runs = [run for file in arguments.files for run in record.read(file)]
        runs = runs or list(record.stored(record.RESULTS))
        paths = draw(latest(runs), arguments.out)
    except (ResultsError, OSError) as error:
        print(f"bench/plot.py: error: {error}", file=sys.stderr)
        return 2
    if not paths:
        print("bench/plot.py: nothing to draw; expected runs of bench/run.py in FILE or bench/results", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

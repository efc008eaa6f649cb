"""The paper's figures 3, 4 and 5, and what stage 2 does to the flow, from our own runs.

`python -m bench.figures --data FILE --ckpt before.pt after.pt --out FOLDER` draws, of two checkpoints of one run
(`bench.quality --checkpoints` keeps `.stage1.pt` and `.stage2.pt`), trajectories (figure 3), priors beside targets
(figure 4) and the diagnostics, which it also writes as JSON; `--runs FOLDER` draws the sweeps (figure 5) and diversity
against quality (table 4) from the JSON files of `bench.quality`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.diagnostics import STEPS, Asked, diagnose
from bench.plot import OURS, PEER_COLOURS
from bench.summary import interval, load_runs
from fave_fast import checkpoint as checkpoints
from fave_fast import cli
from fave_fast.checkpoint import Checkpoint
from fave_fast.config import preset
from fave_fast.data import Interactions, split
from fave_fast.errors import InputError
from fave_fast.evaluate import translate
from fave_fast.files import replacing
from fave_fast.flow import euler
from fave_fast.model import FAVE

Points = npt.NDArray[np.float64]  # [P, 2]
NOISE, GROUND = PEER_COLOURS[1], "#bbbbbb"
SWEPT = {"alpha": "loss", "beta": "loss", "gamma": "loss", "rho": "flow"}


def project(rows: Tensor, how: str) -> Points:
    """Rows [P, D] of length 1 on a plane, by t-SNE or by their two principal components.

    Raises:
        InputError: t-SNE without the package that has it.
    """
    units = F.normalize(rows.double().cpu(), dim=-1)
    if how == "pca":
        centred = units - units.mean(0)
        _, _, axes = torch.linalg.svd(centred, full_matrices=False)
        return (centred @ axes[:2].T).numpy()
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise InputError("--projection tsne needs the package scikit-learn: pip install 'fave-fast[bench]'") from None
    perplexity = min(30.0, (len(units) - 1) / 3)
    found: Points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(units.numpy())
    return found


@dataclass(frozen=True)
class Trained:
    """A checkpoint's model with a log's test users."""

    name: str
    checkpoint: Checkpoint
    data: Interactions
    asked: Asked

    @property
    def model(self) -> FAVE:
        """In evaluation mode."""
        return self.asked.model

    def diagnose(self) -> dict[str, Any]:
        """On the test targets."""
        config = self.checkpoint.config
        return diagnose(self.model, config, self.data, split(self.data, config.data).test)

    @classmethod
    def load(cls, path: Path, data: Interactions, log: str, device: torch.device) -> Trained:
        """The checkpoint at `path`, whose items the log `data` must have."""
        checkpoint = checkpoints.load(path)
        model, config = checkpoint.build_model().to(device), checkpoint.config
        data = translate(data, checkpoint, log)
        return cls(path.stem, checkpoint, data, Asked.of(model, config, data, split(data, config.data).test))


@torch.no_grad()
def path_of(trained: Trained, users: Tensor, x_0: Tensor, steps: int) -> Tensor:
    """The Euler steps [steps + 1, S, D] from x_0 [S, D] for some of the users, the start included."""
    history, noise = trained.asked.history[users], trained.asked.noise()
    points: list[Tensor] = []
    euler(trained.model, history, x_0, noise.lambdas(history), steps, on_step=points.append)
    return torch.stack([x_0, *points])


def trajectories(before: Trained, after: Trained, how: str, users: int = 6) -> Figure:
    """Figure 3: from noise in 30 steps before stage 2, and from the anchor in 30 and in one after it.

    The users are those of evenly spread test targets whose lists hit the target, so that there is something to see.
    """
    rows = _hits(after, users)
    paths = [
        ("before, from noise, 30 steps", path_of(before, rows, before.asked.prior("gaussian")[rows], 30)),
        ("after, from the anchor, 30 steps", path_of(after, rows, after.asked.prior("anchor")[rows], 30)),
        ("after, from the anchor, 1 step", path_of(after, rows, after.asked.prior("anchor")[rows], 1)),
    ]
    table, targets = after.asked.table, after.asked.table[after.asked.targets[rows]]
    rest = table[1 :: max(1, len(table) // 500)]
    # One projection for all, so that what is the same lies at the same place: stage 2 leaves the items where they are.
    lengths = [path.shape[0] * len(rows) for _, path in paths]
    *lines, ends, items = np.split(
        project(torch.cat((*(path.flatten(0, 1) for _, path in paths), targets, rest)), how),
        np.cumsum([*lengths, len(targets)]),
    )
    figure, panels = plt.subplots(1, len(paths), figsize=(5 * len(paths), 5), squeeze=False, sharex=True, sharey=True)
    for axes, (title, _), line in zip(panels[0], paths, lines, strict=True):
        axes.scatter(*items.T, s=4, color=GROUND, label="items of the catalogue", zorder=1)
        for user, points in enumerate(line.reshape(-1, len(rows), 2).transpose(1, 0, 2)):
            hue = PEER_COLOURS[user % len(PEER_COLOURS)]
            axes.plot(*points.T, "-o", color=hue, markersize=2.5, linewidth=1, zorder=2)
            axes.plot(*points[0], "s", color=hue, markersize=6, zorder=3)
            axes.plot(*points[-1], "o", color=hue, markersize=7, zorder=3)
            axes.plot(*ends[user], "*", color=hue, markersize=13, markeredgecolor="black", zorder=4)
        axes.set_title(title, fontsize=10)
        _bare(axes)
    panels[0][1].set_xlabel("users whose list of 20 holds the target")
    for mark, words in (("s", "x_0"), ("o", "end"), ("*", "target")):
        panels[0][0].plot([], [], mark, color="black", linestyle="none", label=words)
    panels[0][0].legend(fontsize=7)
    return figure


def _hits(trained: Trained, count: int) -> Tensor:
    """Rows of users whose served list holds the target; the first ones where there are too few."""
    asked = trained.asked
    lists = asked.lists(asked.one_step(asked.prior()))[1]
    found = (lists == asked.targets[:, None]).any(1).nonzero()[:, 0]
    found = found if len(found) >= count else torch.arange(min(count, len(lists)), device=lists.device)
    return found[torch.linspace(0, len(found) - 1, min(count, len(found))).long().to(found.device)]


def priors(trained: Trained, how: str, users: int = 400) -> Figure:
    """Figure 4: noise, anchors and targets on a plane; and how far each prior is from its own target."""
    asked = trained.asked
    rows = torch.linspace(0, len(asked.history) - 1, min(users, len(asked.history))).long().to(asked.table.device)
    groups = {
        "Gaussian noise": (asked.prior("gaussian"), NOISE),
        "anchor": (asked.prior("anchor"), OURS),
        "target": (asked.table[asked.targets], "black"),
    }
    plane = project(torch.cat([found[rows] for found, _ in groups.values()]), how)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    for at, (name, (_, hue)) in enumerate(groups.items()):
        left.scatter(*plane[at * len(rows) : (at + 1) * len(rows)].T, s=8, color=hue, alpha=0.6, label=name)
    left.legend(fontsize=8)
    left.set_title("rows of length 1", fontsize=10)
    _bare(left)
    x_1 = asked.table[asked.targets]
    anchor = groups["anchor"][0]
    shown = {
        "Gaussian noise": groups["Gaussian noise"],
        "anchor": groups["anchor"],
        "anchor of another user": (anchor.roll(1, 0), PEER_COLOURS[3]),
    }
    for name, (x_0, hue) in shown.items():
        apart = 1 - F.cosine_similarity(x_0, x_1, dim=-1).cpu().numpy()
        right.hist(apart, bins=40, range=(0, 2), density=True, histtype="step", color=hue, label=name, linewidth=1.6)
    right.set(xlabel="cosine distance of x_0 to the target", ylabel="density over users")
    right.legend(fontsize=8)
    return figure


def diagnostics(found: dict[str, dict[str, Any]]) -> Figure:
    """Quality and gap against steps, straightness, what x_0 decides, and samples; for checkpoints by name."""
    figure, panels = plt.subplots(2, 3, figsize=(14, 7.5))
    hues = dict(zip(found, (NOISE, OURS, *PEER_COLOURS[2:]), strict=False))
    (quality, gap, straight), (distance, x_0, samples) = panels
    for name, one in found.items():
        steps = list(map(str, STEPS))
        quality.plot(STEPS, [one["steps"][at]["NDCG@20"] for at in steps], "o-", color=hues[name], label=name)
        gap.plot(STEPS, [one["steps"][at]["gap"] for at in steps], "o-", color=hues[name], label=name)
        counts = [int(count) for count in one["samples"]]
        many = list(one["samples"].values())
        samples.plot([row["ild@20"] for row in many], [row["NDCG@20"] for row in many], "o-", color=hues[name])
        for count, row in zip(counts, many, strict=True):
            samples.annotate(str(count), (row["ild@20"], row["NDCG@20"]), fontsize=8, xytext=(4, 3 * count),
                             textcoords="offset points", color=hues[name])  # fmt: skip
    for axes, what in ((quality, "NDCG@20, filtered, per cent"), (gap, "end's distance from one step's, relative")):
        axes.set(xscale="log", xlabel="Euler steps", ylabel=what)
        axes.set_xticks(STEPS, list(map(str, STEPS)))
        axes.minorticks_off()
    # What is chance or rounding is not to look like a difference.
    for axes, least in ((quality, 1.0), (samples, 1.0)):
        _widened(axes.get_ylim, axes.set_ylim, least)
    _widened(samples.get_xlim, samples.set_xlim, 0.05)
    gap.set_ylim(0, max(0.01, gap.get_ylim()[1]))
    samples.set(xlabel="ILD@20", ylabel="NDCG@20 (numbers: samples a user)")
    quality.legend(fontsize=8)
    _grouped(straight, hues, {name: {"||JVP|| / ||f||": one["straightness"]["jvp"]} for name, one in found.items()})
    _grouped(distance, hues, {name: one["distance"] for name, one in found.items()}, "distance of x_0 to the target")
    changes = ("change", "change, another user's")
    _grouped(
        x_0, hues, {name: {at: one["x_0"][at] for at in changes} for name, one in found.items()},
        "relative change of the endpoint\nfor another x_0",
    )  # fmt: skip
    x_0.set_ylim(0, max(0.01, x_0.get_ylim()[1]))
    return figure


def _widened(get: Callable[[], tuple[float, float]], change: Callable[[float, float], object], least: float) -> None:
    """An axis' limits about their middle, `least` apart at least."""
    low, high = get()
    middle, reach = (low + high) / 2, max(high - low, least) / 2
    change(middle - reach, middle + reach)


def _grouped(axes: Axes, hues: dict[str, str], values: dict[str, dict[str, float]], what: str = "") -> None:
    """Bars side by side for each thing."""
    things = list(next(iter(values.values())))
    width = 0.8 / len(values)
    for at, (name, one) in enumerate(values.items()):
        places = np.arange(len(things)) + (at - (len(values) - 1) / 2) * width
        bars = axes.bar(places, [one[thing] for thing in things], width, color=hues[name], label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(things)), [thing.replace(" of ", "\nof ").replace(", ", ",\n") for thing in things])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel(what)
    axes.margins(y=0.15)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def swept(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[float, list[float]]]]:
    """By data set and key of `SWEPT`: each value's NDCG@20 on test, filtered, by the last stage's best weights.

    A run counts for a key if it is the preset but for that key, so that the preset itself counts for all. Values are
    compared over the seeds that all of them have; where they have none in common, each over its own.
    """
    result: dict[str, dict[str, dict[float, list[float]]]] = {}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        if run["finished"] and run["test"] is not None and run["method"] == "fave":
            groups.setdefault((run["dataset"],), []).append(run)
    for (dataset,), some in groups.items():
        base = next((run["config"] for run in some if run["setting"] == "preset"), None)
        base = base or preset(some[0]["preset"]).to_dict()
        for key, section in SWEPT.items():
            found: dict[float, dict[int, float]] = {}
            for run in some:
                alike = {**run["config"], section: {**run["config"][section], key: base[section][key]}}
                if alike == base:  # of two runs of a seed, the setting and the preset, one counts
                    value = run["config"][section][key]
                    found.setdefault(value, {})[run["seed"]] = run["test"]["last stage"]["filtered"]["NDCG@20"]
            if len(found) > 1:
                common = set.intersection(*map(set, found.values()))
                by_value = {
                    value: [ndcg for seed, ndcg in found[value].items() if not common or seed in common]
                    for value in sorted(found)
                }
                result.setdefault(dataset, {})[key] = by_value
    return result


def sweeps(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """Figure 5, one for each data set: NDCG@20 against alpha, beta, gamma and rho: seeds, their mean and its interval.

    Two seeds have none: theirs would be twelve times as wide as they lie apart.
    """
    for dataset, keys in swept(runs).items():
        figure, panels = plt.subplots(1, len(keys), figsize=(4 * len(keys), 3.6), squeeze=False, sharey=True)
        for axes, (key, by_value) in zip(panels[0], keys.items(), strict=True):
            found = [interval(values) for values in by_value.values()]
            axes.errorbar(
                range(len(by_value)), [one["mean"] or 0.0 for one in found],
                yerr=[one["half"] or 0 if one["seeds"] > 2 else 0 for one in found], fmt="o-", color=OURS, capsize=4,
            )  # fmt: skip
            for at, values in enumerate(by_value.values()):
                axes.plot([at] * len(values), values, "_", color=OURS, alpha=0.6)
            axes.set_xticks(range(len(by_value)), [f"{value:g}" for value in by_value])
            axes.set_xlabel(f"{key} ({' or '.join(map(str, sorted({len(one) for one in by_value.values()})))} seeds)")
            axes.grid(alpha=0.3)
        panels[0][0].set_ylabel("NDCG@20, filtered, per cent")
        figure.suptitle(f"{dataset}: test; each seed, mean, and 95 % intervals of three seeds or more", fontsize=10)
        yield f"sweeps-{dataset}", figure


def diversity(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """Table 4 as a figure for each data set: NDCG@20 against ILD@20 of the filtered lists, with intervals over seeds.

    By the last stage's best weights: settings that differ in stage 2 alone often have the same chosen ones, of stage 1.
    """
    whole = [run for run in runs if run["finished"] and run["test"] is not None]
    for dataset in dict.fromkeys(run["dataset"] for run in whole):
        figure, axes = plt.subplots(figsize=(7.5, 4.5))
        settings = list(dict.fromkeys(run["setting"] for run in whole if run["dataset"] == dataset))
        for setting, hue in zip(settings, plt.colormaps["viridis"](np.linspace(0, 0.9, len(settings))), strict=True):
            some = [
                run["test"]["last stage"] for run in whole if (run["dataset"], run["setting"]) == (dataset, setting)
            ]
            x = interval([one["ild@20"] for one in some])
            y = interval([one["filtered"]["NDCG@20"] for one in some])
            style = {"fmt": "*", "color": OURS} if setting == "preset" else {"fmt": "o", "color": hue}
            name = f"{setting} ({len(some)})"
            axes.errorbar(x["mean"], y["mean"], y["half"] or 0, x["half"] or 0, label=name, lw=1, capsize=2, **style)
        title = f"{dataset}: test, 95 % intervals (in brackets: seeds)"
        axes.set(xlabel="ILD@20", ylabel="NDCG@20, filtered, per cent", title=title)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.tight_layout()
        yield f"diversity-{dataset}", figure


def of_checkpoints(arguments: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """The figures of two checkpoints; writes `diagnostics.json`."""
    device = cli.resolve_device(arguments.device)
    first = checkpoints.load(arguments.ckpt[0])
    data = cli.load_log(arguments, first.config.data)
    before, after = (Trained.load(path, data, arguments.data, device) for path in arguments.ckpt)
    told = f"before: {before.name}, after: {after.name}"
    makers: list[tuple[str, Callable[[], Figure]]] = [
        ("trajectories", lambda: trajectories(before, after, arguments.projection)),
        ("priors", lambda: priors(after, arguments.projection)),
    ]
    for name, make in makers:
        with torch.no_grad():
            figure = make()
        figure.suptitle(f"{first.facts['dataset']}, {told} ({arguments.projection})", fontsize=9)
        yield name, figure
    found = {"before": before.diagnose(), "after": after.diagnose()}
    files = {name: path.name for name, path in zip(found, arguments.ckpt, strict=True)}
    with replacing(arguments.out / "diagnostics.json") as part:
        part.write_text(json.dumps({"checkpoints": files, **found}, indent=1) + "\n", encoding="utf-8")
    figure = diagnostics(found)
    figure.suptitle(f"{first.facts['dataset']}, {told}", fontsize=9)
    yield "diagnostics", figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.Parser("figures", "Figures 3, 4 and 5 of the paper, and what stage 2 does, from our runs.")
    parser.prog = "python -m bench.figures"
    parser.add_argument("--ckpt", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="checkpoints of one run")
    parser.add_argument("--data", metavar="FILE", help="the log that they were trained on")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="JSON files of bench.quality")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where PNG files go")
    parser.add_argument("--projection", choices=("tsne", "pca"), default="tsne", help="to the plane; default: tsne")
    cli.add_log_options(parser)
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:0; default: a GPU if any")
    arguments = parser.parse_args(argv)
    if (arguments.ckpt is None) != (arguments.data is None) or (arguments.ckpt or arguments.runs) is None:
        parser.error("--ckpt with --data, or --runs, are needed")
    runs = None if arguments.runs is None else load_runs(arguments.runs)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{arguments.out}: cannot make the folder: {error.strerror}") from None
    drawn = [] if arguments.ckpt is None else [of_checkpoints(arguments)]
    drawn += [] if runs is None else [sweeps(runs), diversity(runs)]
    for some in drawn:
        for name, figure in some:
            path = arguments.out / f"{name}.png"
            figure.tight_layout()
            figure.savefig(path, dpi=120)
            plt.close(figure)
            print(path)
    return 0


if __name__ == "__main__":
    cli.run(main)

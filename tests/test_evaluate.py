from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from fave_fast import checkpoint as checkpoints
from fave_fast import evaluate
from fave_fast.checkpoint import Checkpoint
from fave_fast.data import Interactions, load_interactions, split
from fave_fast.errors import DataError
from fave_fast.evaluate import rank_targets, translate
from fave_fast.flow import InferenceNoise, encode
from fave_fast.metrics import coverage, intra_list_diversity, rank_metrics
from fave_fast.model import FAVE
from fave_fast.ops import Exclusions
from fave_fast.ops.registry import why_no_extension
from fave_fast.sketch import HistorySketch

CPU = torch.device("cpu")
KEYS = {"dataset", "split", "users", "items", "protocol", "filtered", "raw", "coverage@20", "ild@20", "seconds"}
FIGURES = ("filtered", "raw", "coverage@20", "ild@20")
SAME = {2: [9, 17], 4: [5]}  # items that get equal embeddings


@pytest.fixture(scope="module")
def data(tiny_log: Path) -> Interactions:
    return load_interactions(tiny_log)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    """Random weights, the same everywhere, with items that tie exactly."""
    trained = checkpoints.load(tiny_checkpoint)
    config = replace(trained.config, model=replace(trained.config.model, embedding_std=1.0))
    torch.manual_seed(0)
    weights = FAVE(config.model, len(trained.item_ids)).state_dict()
    for item, others in SAME.items():
        weights["item_embedding.weight"][others] = weights["item_embedding.weight"][item].clone()
    return replace(trained, config=config, weights=weights)


def brute_force(
    checkpoint: Checkpoint, data: Interactions, targets: np.ndarray
) -> tuple[list[int], list[int], list[list[int]]]:
    """Filtered ranks, raw ranks and filtered lists of 20, each user alone, all scores at once, in fp64.

    Equal embeddings get the very same score. The scores that the package ranks are these rounded to fp32, which moves
    each by 2^-24 of itself at most; the assertion makes sure that this can neither swap two items nor make them equal,
    and fp64's own rounding is far below.
    """
    model = checkpoint.build_model().double()
    noise = InferenceNoise.draw(model, checkpoint.config.flow)
    filtered, raw, lists = [], [], []
    for target in targets.tolist():
        user = int(np.searchsorted(data.offsets, target, side="right")) - 1
        history = data.items[data.offsets[user] : target].astype(np.int64)
        with torch.no_grad():
            recent = history[None, -checkpoint.config.model.max_length :]
            endpoint = encode(model, checkpoint.config.flow, noise, recent)[0]
            score = (model.item_embedding.weight @ endpoint).tolist()
        for item, others in SAME.items():
            for other in others:
                score[other] = score[item]
        distinct = np.unique(score[1:])
        assert np.diff(distinct).min() > 2**-23 * np.abs(distinct).max()
        order = sorted(range(1, data.num_items + 1), key=lambda item: (-score[item], item))
        wanted = int(data.items[target])
        seen = set(history.tolist())
        raw.append(order.index(wanted) + 1)
        filtered.append([item for item in order if item not in seen or item == wanted].index(wanted) + 1)
        best = [item for item in order if item not in seen][:20]
        lists.append(best + [0] * (20 - len(best)))
    return filtered, raw, lists


@pytest.mark.parametrize("name", ["val", "test"])
def test_ranking_equals_brute_force(checkpoint: Checkpoint, data: Interactions, name: Literal["val", "test"]) -> None:
    parts = split(data, checkpoint.config.data)
    targets = parts.val if name == "val" else parts.test
    starts = evaluate.target_starts(data, targets)
    assert (targets - starts).min() == (1 if name == "val" else 2), "short histories are among them"
    model = checkpoint.build_model().double()
    filtered, raw, lists = brute_force(checkpoint, data, targets)
    assert filtered != raw
    assert min(map(min, lists)) == 0, "lists that end early are among them"
    for batch_size in (1, 7, 512):
        found = rank_targets(model, checkpoint.config, data, targets, batch_size=batch_size)
        assert found.filtered.tolist() == filtered
        assert found.raw is not None
        assert found.raw.tolist() == raw
        assert found.lists is not None
        assert found.lists.tolist() == lists
    quick = rank_targets(model, checkpoint.config, data, targets, full=False, backend="reference")
    assert quick.filtered.tolist() == filtered
    assert quick.raw is None
    assert quick.lists is None
    result = evaluate.evaluate(checkpoint, data, name, device=CPU, dtype=torch.float64, batch_size=5)
    assert result["filtered"] == rank_metrics(torch.tensor(filtered))
    assert result["raw"] == rank_metrics(torch.tensor(raw))
    assert result["coverage@20"] == coverage(torch.tensor(lists), data.num_items)
    assert result["ild@20"] == intra_list_diversity(torch.tensor(lists), model.item_embedding.weight)
    assert (result["split"], result["users"], result["items"]) == (name, 40, 24)


def test_sketched_ranks_are_those_of_the_wider_products(checkpoint: Checkpoint, data: Interactions) -> None:
    """In fp64, each user alone, all scores at once, none of which is as near to the target's as its rounding."""
    model = checkpoint.build_model().double()
    with torch.no_grad():  # no ties here
        model.item_embedding.weight[1:] *= torch.linspace(0.9, 1.1, data.num_items, dtype=torch.float64)[:, None]
    sketch = HistorySketch.of(model.item_embedding.weight, 8, k=5)
    noise = InferenceNoise.draw(model, checkpoint.config.flow)
    targets = split(data, checkpoint.config.data).test
    expected = []
    for start, target in zip(evaluate.target_starts(data, targets).tolist(), targets.tolist(), strict=True):
        history = data.items[start:target].astype(np.int64)
        endpoint = encode(model, checkpoint.config.flow, noise, history[None, -checkpoint.config.model.max_length :])
        query = sketch.queries(endpoint, Exclusions.from_lists([history.tolist()]))
        scores = (sketch.table @ query[0])[1:]
        ahead = scores - scores[data.items[target] - 1]
        assert ahead.abs().sort().values[1] > 1e-12 * scores.abs().max()
        expected.append(1 + int((ahead > 0).sum()))
    for batch_size in (7, 512):
        found = rank_targets(model, checkpoint.config, data, targets, batch_size=batch_size, sketch=sketch)
        assert found.sketched is not None
        assert found.sketched.tolist() == expected
        assert found.raw is not None
        assert found.raw.tolist() != expected


@pytest.mark.skipif(why_no_extension() is not None, reason=str(why_no_extension()))
def test_the_backend_in_cpp(checkpoint: Checkpoint, data: Interactions) -> None:
    """In float32, whose rounding is far below the distance of these scores."""
    targets = split(data, checkpoint.config.data).test
    filtered, _, lists = brute_force(checkpoint, data, targets)
    found = rank_targets(checkpoint.build_model(), checkpoint.config, data, targets, backend="cpp")
    assert found.filtered.tolist() == filtered
    assert found.lists is not None
    assert found.lists.tolist() == lists


def test_a_target_in_the_history_stays_a_candidate(checkpoint: Checkpoint, data: Interactions) -> None:
    start, end = data.offsets[:2].tolist()
    items = data.items.copy()
    items[end - 1] = items[start]
    repeated = replace(data, items=items)
    targets = np.array([end - 1])
    filtered, raw, _ = brute_force(checkpoint, repeated, targets)
    found = rank_targets(checkpoint.build_model().double(), checkpoint.config, repeated, targets)
    assert found.filtered.tolist() == filtered
    assert found.raw is not None
    assert found.raw.tolist() == raw


def test_all_items_equal_rank_by_id(checkpoint: Checkpoint, data: Interactions) -> None:
    """One column for all items: every score of a user is the same number, whatever its rounding."""
    weights = {name: value.clone() for name, value in checkpoint.weights.items()}
    weights["item_embedding.weight"][1:] = 0
    equal = replace(checkpoint, weights=weights)
    targets = split(data, checkpoint.config.data).test
    found = rank_targets(equal.build_model(), equal.config, data, targets)
    assert found.raw is not None
    assert found.raw.tolist() == data.items[targets].tolist()


def test_splits_differ(checkpoint: Checkpoint, data: Interactions) -> None:
    found = {
        name: evaluate.evaluate(checkpoint, data, name, device=CPU)  # type: ignore[arg-type]
        for name in ("val", "test")
    }
    assert all(f"{name} target ranked among the whole catalogue" in found[name]["protocol"] for name in found)
    assert any(found["val"][figure] != found["test"][figure] for figure in FIGURES)


def test_json_is_one_object(tiny_checkpoint: Path, tiny_log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ckpt", str(tiny_checkpoint), "--data", str(tiny_log)]
    assert evaluate.main([*options, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result.keys() == KEYS
    names = {f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in (5, 10, 20)}
    assert result["filtered"].keys() == result["raw"].keys() == names
    assert (result["dataset"], result["split"], result["users"], result["items"]) == ("log", "test", 40, 24)
    assert evaluate.main([*options, "--json", "--split", "val", "--batch-size", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "val"
    assert evaluate.main(options) == 0
    shown = capsys.readouterr().out
    assert all(f"{figure:.2f}" in shown for figure in result["filtered"].values())
    assert result["protocol"] in shown
    assert "sketched" not in shown
    assert evaluate.main([*options, "--json", "--sketch", "16"]) == 0
    with_sketch = json.loads(capsys.readouterr().out)
    assert with_sketch.keys() == KEYS | {"sketched"}
    assert all(with_sketch[figure] == result[figure] for figure in FIGURES)
    assert "sketched: they are, pushed down by a sketch of 16 channels" in with_sketch["protocol"]
    assert evaluate.main([*options, "--sketch", "16"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("sketched "))
    order = [f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in (5, 10, 20)]
    assert row.split()[1:] == [f"{with_sketch['sketched'][name]:.2f}" for name in order]


def test_validation_figures_are_those_of_training(tiny_checkpoint: Path, tiny_log: Path) -> None:
    """The best validation score written while training is what evaluating the checkpoint finds."""
    kept = checkpoints.load(tiny_checkpoint)
    result = evaluate.evaluate(kept, load_interactions(tiny_log), "val", device=CPU)
    assert result["filtered"]["NDCG@20"] == kept.facts["best_validation_ndcg20_filtered"]


def test_items_are_matched_by_id(checkpoint: Checkpoint, tiny_log: Path, tmp_path: Path) -> None:
    """A part of the log numbers its items otherwise; the checkpoint's numbers count."""
    lines = tiny_log.read_text().splitlines()
    part = tmp_path / "part.csv"
    part.write_text("\n".join(line for line in lines if line.split(",")[1] != "101") + "\n")
    log = load_interactions(part)
    assert log.num_items == checkpoint.facts["items"] - 1
    found = translate(log, checkpoint, "part.csv")
    assert found.num_items == checkpoint.facts["items"]
    assert found.item_ids.take(found.items - 1) == log.item_ids.take(log.items - 1)


def test_unknown_items_are_refused(checkpoint: Checkpoint, tiny_log: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.csv"
    path.write_text(tiny_log.read_text() + "1,777,9999\n")
    with pytest.raises(DataError, match=r"more\.csv: 1 of its 25 items are not in the checkpoint \(777, say\)"):
        translate(load_interactions(path), checkpoint, "more.csv")

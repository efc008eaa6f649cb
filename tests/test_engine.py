from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from fave_fast import checkpoint as checkpoints
from fave_fast import infer
from fave_fast.checkpoint import Checkpoint
from fave_fast.data import IdMap, load_interactions
from fave_fast.engine import ItemId, Recommendation, Recommender
from fave_fast.errors import BackendError, DataError, InputError

ITEMS = list(range(101, 125))
HISTORIES: list[list[ItemId]] = [
    [101],
    [103, 102, 101],
    [124, 101, 124, 110, 105, 101],
    list(range(105, 120)),  # longer than the model reads
    [999, 104, "nothing"],  # two unknown
    [],
    [999],
]


@pytest.fixture(scope="module")
def kept(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def recommender(kept: Checkpoint) -> Recommender:
    return Recommender(kept)


def lines(path: Path | str, *, text: bool = False) -> list[dict[str, Any]]:
    content = str(path) if text else Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def as_lines(users: Sequence[ItemId], answers: Sequence[Recommendation]) -> list[dict[str, Any]]:
    rows = []
    for user, answer in zip(users, answers, strict=True):
        row: dict[str, Any] = {"user": user, "items": answer.items, "scores": answer.scores}
        rows.append(row | ({"fallback": "popular"} if answer.popular else {}))
    return rows


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "histories.jsonl"
    rows = [{"user": f"u{at}", "history": history} for at, history in enumerate(HISTORIES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


USERS = [f"u{at}" for at in range(len(HISTORIES))]


def assert_close(found: Recommendation, expected: Recommendation) -> None:
    """Equal lists, and scores within one step of fp32.

    The model runs in fp64, whose rounding is far below fp32's; a score is rounded to fp32 once, so that two ways of
    computing it can differ only by which of two neighbours is the nearest: 2^-23 of its size.
    """
    assert (found.items, found.unknown, found.popular) == (expected.items, expected.unknown, expected.popular)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=2**-23, atol=0)


def test_an_answer_depends_on_its_history_alone(kept: Checkpoint) -> None:
    """Not on batch size, order or the padding that longer neighbours bring."""
    wide = Recommender(kept, dtype=torch.float64)
    alone = [wide.recommend([history], 7)[0] for history in HISTORIES]
    for batch_size in (1, 2, 512):
        for found, expected in zip(wide.recommend(HISTORIES, 7, batch_size=batch_size), alone, strict=True):
            assert_close(found, expected)
    for found, expected in zip(wide.recommend(HISTORIES[::-1], 7), alone[::-1], strict=True):
        assert_close(found, expected)


def test_only_the_last_items_are_read_but_all_are_excluded(kept: Checkpoint) -> None:
    wide = Recommender(kept, dtype=torch.float64)
    long, length = HISTORIES[3], kept.config.model.max_length
    (whole,) = wide.recommend([long], 24, exclude_history=False)
    (cut,) = wide.recommend([long[-length:]], 24, exclude_history=False)
    assert_close(whole, cut)
    (answer,) = wide.recommend([long], 24)
    assert sorted(answer.items) == sorted(set(ITEMS) - set(long))


def test_history_and_denied_items_are_left_out(recommender: Recommender) -> None:
    deny = [102, 110, 777]
    for history, answer in zip(HISTORIES, recommender.recommend(HISTORIES, 24, deny=deny), strict=True):
        assert sorted(answer.items) == sorted(set(ITEMS) - set(history) - set(deny))
        assert answer.scores == sorted(answer.scores, reverse=True)
        assert len(answer.scores) == len(answer.items)
    for answer in recommender.recommend(HISTORIES, 24, exclude_history=False):
        assert sorted(answer.items) == ITEMS
    for answer in recommender.recommend(HISTORIES, 5, deny=ITEMS):
        assert (answer.items, answer.scores) == ([], [])


def test_leaving_out_changes_no_order(recommender: Recommender) -> None:
    (everything,) = recommender.recommend([HISTORIES[1]], 24, exclude_history=False)
    (answer,) = recommender.recommend([HISTORIES[1]], 24, deny=[110])
    assert answer.items == [item for item in everything.items if item not in (101, 102, 103, 110)]
    assert recommender.recommend([HISTORIES[1]], 3)[0].items == recommender.recommend([HISTORIES[1]], 24)[0].items[:3]


def test_k_beyond_the_catalogue(recommender: Recommender) -> None:
    for answer in recommender.recommend(HISTORIES, 10**9, exclude_history=False):
        assert sorted(answer.items) == ITEMS


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_index_elsewhere_finds_the_same_items(kept: Checkpoint, device: str) -> None:
    """Its inner products, in fp64 from endpoints in fp64, have the lists' order; scores as `assert_close` has them."""
    recommender = Recommender(kept, device=device, dtype=torch.float64)
    recommender.remove_items([110])
    histories = [*HISTORIES[:3], HISTORIES[4]]
    endpoints, own = recommender.encode(histories)
    embeddings = recommender.embeddings()
    assert embeddings.shape == (25, kept.config.model.d)
    assert embeddings.isfinite().all(1).tolist() == [item != 110 for item in [0, *ITEMS]]
    assert own.offsets.tolist() == [0, 1, 4, 9, 10]
    assert own.ids.tolist() == [1, 3, 2, 1, 24, 1, 24, 5, 1, 4], "numbers of what is known"
    scores = (endpoints @ embeddings.T).nan_to_num(-torch.inf)[:, 1:]
    for row, answer in zip(scores, recommender.recommend(histories, 23, exclude_history=False), strict=True):
        best = row.argsort(descending=True)[:23].cpu()
        assert [ITEMS[place] for place in best.tolist()] == answer.items
        np.testing.assert_allclose(answer.scores, row.cpu()[best], rtol=2**-23, atol=0)
    before = recommender.recommend(histories)
    embeddings.zero_()
    assert recommender.recommend(histories) == before, "a copy"
    assert len(recommender.encode([])[0]) == 0
    with pytest.raises(InputError, match="history 1 has no item of the catalogue"):
        recommender.encode([[101], [110, "x"], []])


def test_unknown_items_are_skipped_and_counted(recommender: Recommender) -> None:
    (with_unknown,) = recommender.recommend([HISTORIES[4]], 24)
    (without,) = recommender.recommend([[104]], 24)
    assert with_unknown == without._replace(unknown=2)


def test_no_known_item_gets_the_most_popular(recommender: Recommender, kept: Checkpoint) -> None:
    counts = dict(zip(kept.item_ids.ids, kept.popularity[1:].tolist(), strict=True))
    order = sorted(counts, key=lambda item: (-counts[item], item))
    empty, unknown = recommender.recommend([[], [999, "x"]], 6)
    assert empty == Recommendation(order[:6], [counts[item] for item in order[:6]], 0, True)
    assert unknown == empty._replace(unknown=2)
    (denied,) = recommender.recommend([[]], 6, deny=order[:2])
    assert denied.items == order[2:8]


def test_ids_as_numbers_and_texts(recommender: Recommender, kept: Checkpoint) -> None:
    assert recommender.recommend([["103", "102"]]) == recommender.recommend([[103, 102]])
    names = {item: f"é{item}" for item in ITEMS}  # in the same order, so at the same places
    named = Recommender(replace(kept, item_ids=IdMap.from_ids(names.values())))
    (found,) = named.recommend([["é103", "é102"]])
    (expected,) = recommender.recommend([[103, 102]])
    assert found == expected._replace(items=[names[int(item)] for item in expected.items])


def test_more_samples_equal_brute_force(kept: Checkpoint) -> None:
    """An item's score is its best over the draws of consecutive seeds, equal scores by lower number."""
    random = replace(kept, config=replace(kept.config, flow=replace(kept.config.flow, lambda_at_inference="sample")))
    random = replace(random, config=replace(random.config, flow=replace(random.config.flow, rho=0.5)))
    recommender, history = Recommender(random), HISTORIES[2]
    drawn = [recommender.recommend([history], 24, seed=seed)[0] for seed in (7, 8, 9)]
    best: dict[ItemId, float] = {}
    for answer in drawn:
        for item, score in zip(answer.items, answer.scores, strict=True):
            best[item] = max(score, best.get(item, -np.inf))
    order = sorted(best, key=lambda item: (-best[item], item))
    (found,) = recommender.recommend([history], 24, n_samples=3, seed=7)
    assert (found.items, found.scores) == (order, [best[item] for item in order])
    (short,) = recommender.recommend([history], 4, n_samples=3, seed=7)
    assert (short.items, short.scores) == (found.items[:4], found.scores[:4])
    assert recommender.recommend([history], 24, seed=7)[0] == drawn[0]
    assert drawn[0].scores != drawn[1].scores
    assert recommender.recommend([history]) == recommender.recommend([history], seed=random.config.flow.seed)


@pytest.mark.parametrize("options", [{"k": 0}, {"batch_size": 0}, {"n_samples": 0}, {"k": -3}])
def test_options_below_one(recommender: Recommender, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"{next(iter(options))} is .*; expected a whole number of at least 1"):
        recommender.recommend([[101]], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("item", [1.5, True, None, [101], ""])
def test_an_item_that_is_no_id(recommender: Recommender, item: Any) -> None:
    with pytest.raises(InputError, match="neither a whole number nor text"):
        recommender.recommend([[101, item]])


def test_backend_by_name(kept: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Recommender(kept, backend="reference").recommend(HISTORIES)
    for found, expected in zip(Recommender(kept).recommend(HISTORIES), reference, strict=True):
        # Scores differ by rounding, far less than these neighbours do: fewer than 2^8 roundings follow one another in
        # two blocks of 16 channels, each of at most 2^-24 of what is largest there.
        assert found == expected._replace(scores=found.scores)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=2**-16 * max(map(abs, expected.scores)))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="triton"):
        Recommender(kept, device="cpu", backend="triton")


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_numbered_histories_get_the_same_lists(kept: Checkpoint, dtype: torch.dtype, exclude: bool) -> None:
    recommender = Recommender(kept, dtype=dtype)
    numbers = [recommender.catalogue.numbers(history) for history in HISTORIES[:4]]
    ids, offsets = np.concatenate(numbers).astype(np.int32), np.cumsum([0, *map(len, numbers)])
    scores, items = recommender.best_items(ids, offsets, 24, exclude)
    for at, answer in enumerate(recommender.recommend(HISTORIES[:4], 24, exclude)):
        count = len(answer.items)
        assert (recommender.catalogue.ids(items[at, :count]), scores[at, :count].tolist()) == (
            answer.items,
            answer.scores,
        )
        assert not items[at, count:].any()


def test_numbered_histories_that_do_not_fit(recommender: Recommender) -> None:
    ids, offsets = np.array([1, 2, 3], np.int32), np.array([0, 1, 3])
    for arguments, message in (
        ((ids, offsets, 0), "k is 0; expected a whole number of at least 1"),
        ((ids, np.array([0, 0, 3])), "a history has no items"),
        ((ids.astype(np.int64), offsets), "ids are int64 and offsets int64; expected int32 and int64"),
        ((ids, offsets.astype(np.int32)), "ids are int32 and offsets int32; expected int32 and int64"),
    ):
        with pytest.raises(InputError, match=message):
            recommender.best_items(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_each_batch_says_how_long_it_took(kept: Checkpoint, dtype: torch.dtype) -> None:
    recommender, heard = Recommender(kept, dtype=dtype), []
    recommender.on_step = lambda encoder, topk: heard.append((encoder, topk))
    recommender.recommend(HISTORIES[:4], batch_size=2)
    assert len(heard) == 2
    recommender.recommend(HISTORIES[:1], n_samples=3)
    assert len(heard) == 5
    assert min(map(min, heard)) > 0


def test_no_histories(recommender: Recommender) -> None:
    assert recommender.recommend([]) == []


def test_safetensors_serves_the_same(kept: Checkpoint, recommender: Recommender, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    checkpoints.export_safetensors(kept, tmp_path / "model.safetensors")
    again = Recommender(checkpoints.import_safetensors(tmp_path / "model.safetensors"))
    assert again.recommend(HISTORIES) == recommender.recommend(HISTORIES)


def test_lines_in_lines_out(
    tiny_checkpoint: Path, requests: Path, recommender: Recommender, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--ckpt", str(tiny_checkpoint), "--input", str(requests), "--output", str(out)]
    assert infer.main([*options, "--topk", "5"]) == 0
    assert lines(out) == as_lines(USERS, recommender.recommend(HISTORIES, 5))
    assert [row["user"] for row in lines(out) if row.get("fallback") == "popular"] == ["u5", "u6"]
    said = capsys.readouterr()
    assert said.out == ""
    assert "7 users" in said.err
    if Path("/proc/self/stat").exists():
        assert said.err.count("note: the first answer was there") == 1
    assert "3 unknown items skipped" in said.err
    assert "2 histories without a known item got the most popular" in said.err
    assert infer.main([*options, "--include-seen", "--samples", "2", "--seed", "4"]) == 0
    expected = recommender.recommend(HISTORIES, 20, exclude_history=False, n_samples=2, seed=4)
    assert lines(out) == as_lines(USERS, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["histories.jsonl", "out.jsonl"]


def test_stdin_to_stdout(
    tiny_checkpoint: Path,
    requests: Path,
    recommender: Recommender,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = b"\n  \n" + requests.read_bytes().rstrip()  # blank lines, and no end of line at the end
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert infer.main(["--ckpt", str(tiny_checkpoint), "--input", "-"]) == 0
    assert lines(capsys.readouterr().out, text=True) == as_lines(USERS, recommender.recommend(HISTORIES))


@pytest.mark.parametrize("user", [5, "fünf", 2**70])
def test_parquet_equals_lines(tiny_checkpoint: Path, tmp_path: Path, user: ItemId) -> None:
    path = tmp_path / "h.jsonl"
    rows = [{"user": user, "history": [101, 102]}, {"user": 6, "history": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--ckpt", str(tiny_checkpoint), "--input", str(path), "--output"]
    for name in ("out.jsonl", "out.parquet"):
        assert infer.main([*options, str(tmp_path / name)]) == 0
    table, expected = pl.read_parquet(tmp_path / "out.parquet"), lines(tmp_path / "out.jsonl")
    assert table["user"].to_list() == ([5, 6] if user == 5 else [str(user), "6"])
    assert table["items"].to_list() == [row["items"] for row in expected]
    assert table["scores"].to_list() == [row["scores"] for row in expected]
    assert table["popular"].to_list() == ["fallback" in row for row in expected]


def test_a_log_equals_its_histories(
    tiny_checkpoint: Path, tiny_log: Path, recommender: Recommender, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer.main(["--ckpt", str(tiny_checkpoint), "--input", str(tiny_log)]) == 0
    grouped: dict[int, list[ItemId]] = {}
    for line in tiny_log.read_text().splitlines()[1:]:
        user, item, _ = map(int, line.split(","))
        grouped.setdefault(user, []).append(item)
    users = sorted(grouped)
    expected = as_lines(users, recommender.recommend([grouped[user] for user in users]))
    assert lines(capsys.readouterr().out, text=True) == expected


def test_a_jsonl_log_is_told_from_histories(
    tiny_checkpoint: Path, tiny_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    pl.read_csv(tiny_log).write_ndjson(path)
    outputs = []
    for name in (path, tiny_log):
        assert infer.main(["--ckpt", str(tiny_checkpoint), "--input", str(name)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_deny_file(tiny_checkpoint: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deny = tmp_path / "deny.txt"
    deny.write_text("110\n\n 102 \nnothing\n")
    assert infer.main(["--ckpt", str(tiny_checkpoint), "--input", str(requests), "--deny", str(deny)]) == 0
    said = capsys.readouterr()
    assert not {102, 110} & {item for row in lines(said.out, text=True) for item in row["items"]}
    assert "2 items denied, 1 unknown ones ignored" in said.err


BAD_LINES = [
    b"{",
    b"[1]",
    b'{"user": 1}',
    b'{"user": 1, "history": 101}',
    b'{"user": 1, "history": [1.5]}',
    b'{"user": true, "history": []}',
    b'{"user": 1, "history": [""]}',
    b'{"user": "\\ud800", "history": []}',
    b'{"user": "\xff", "history": []}',
    b"[" * 10**5,
]


def test_skip_bad_counts(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h.jsonl"
    path.write_bytes(b"\n".join([*BAD_LINES, b'{"user": 1, "history": [101]}', b"nonsense"]))
    assert infer.main(["--ckpt", str(tiny_checkpoint), "--input", str(path), "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert [row["user"] for row in lines(said.out, text=True)] == [1]
    assert f"{len(BAD_LINES) + 1} bad lines skipped" in said.err
    for number in (*range(1, len(BAD_LINES) + 1), len(BAD_LINES) + 2):
        assert said.err.count(f"skipped: {path}:{number}: ") == 1


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(line: bytes) -> None:
    good = b'{"user": 1, "history": [101]}'
    found = infer.read_requests([good, b"", line], "h.jsonl", None)
    assert next(found) == infer.Request(1, [101])
    with pytest.raises(DataError, match=r"^h\.jsonl:3: .*expected"):
        next(found)


def test_table_without_input(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main(["--ckpt", str(tiny_checkpoint), "--topk", "4"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("p50", "p95", "p99", "top-4", "24 items"))
    assert out.count("next:") == 5


def test_sample_requests_are_test_histories(recommender: Recommender, tiny_log: Path) -> None:
    data = load_interactions(tiny_log)
    found = infer.sample_requests(recommender)
    assert len(found) == 5
    for request in found:
        user = data.user_ids.ids.index(request.user)
        assert request.history == data.item_ids.take(data.history(user)[:-1] - 1)


def test_a_dtype_goes_by_its_name(tiny_checkpoint: Path) -> None:
    by_name = Recommender.from_pretrained(tiny_checkpoint, dtype="bf16").recommend([[101, 102]])
    assert by_name == Recommender.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).recommend([[101, 102]])
    with pytest.raises(InputError, match="dtype is 'int8'; expected one of fp32, bf16"):
        Recommender.from_pretrained(tiny_checkpoint, dtype="int8")

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import polars as pl
import pytest

from fave_fast import bulk
from fave_fast import checkpoint as checkpoints
from fave_fast.engine import Recommender
from fave_fast.errors import DataError, InputError

PATIENCE = 60.0  # seconds until a test gives up


def write(path: Path, users: list[object], histories: list[list[object] | None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"user": users, "history": histories, "more": [0.5] * len(users)}).write_parquet(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two partitions and an empty one; files of other tools are none."""
    folder = tmp_path / "in"
    write(folder / "day=1" / "a.parquet", [1, 2, 3], [[101, 103], [], [999, 105]])
    write(folder / "day=2" / "a.parquet", [4, 5, 6, 7, 8], [[102], None, [101, 104], [110], [124, 111, 112]])
    pl.DataFrame(schema={"user": pl.Int64, "history": pl.List(pl.Int64)}).write_parquet(folder / "none.parquet")
    (folder / "_staging").mkdir()
    (folder / "_staging" / "b.parquet").write_text("being written")
    (folder / "_SUCCESS").write_text("")
    return folder


@pytest.fixture
def options(tiny_checkpoint: Path, source: Path, tmp_path: Path) -> bulk.Options:
    return bulk.Options(str(tiny_checkpoint), str(source), str(tmp_path / "out"), k=5, batch_size=2)


def tree(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_lists_are_those_of_the_engine(options: bulk.Options, source: Path) -> None:
    options = replace(options, deny=("104", "never"), exclude_history=False)
    assert bulk.run(options, bulk.here) == bulk.Count(users=8, unknown=1, popular=2)
    recommender = Recommender.from_pretrained(options.ckpt)
    for name in ("day=1/a.parquet", "day=2/a.parquet", "none.parquet"):
        asked, found = pl.read_parquet(source / name), pl.read_parquet(Path(options.output) / name)
        assert found.schema == {
            "user": pl.Int64,
            "items": pl.List(pl.Int64),
            "scores": pl.List(pl.Float32),
            "popular": pl.Boolean,
        }
        assert found["user"].to_list() == asked["user"].to_list()
        histories = [history or [] for history in asked["history"].to_list()]
        expected = recommender.recommend(histories, 5, False, deny=["104"])
        assert found["items"].to_list() == [answer.items for answer in expected]
        assert found["scores"].to_list() == [answer.scores for answer in expected]
        assert found["popular"].to_list() == [answer.popular for answer in expected]
    assert sorted(tree(options.output)) == [
        "_SUCCESS",
        "_done/day=1/a.parquet.json",
        "_done/day=2/a.parquet.json",
        "_done/none.parquet.json",
        "_job.json",
        "day=1/a.parquet",
        "day=2/a.parquet",
        "none.parquet",
    ]


def test_texts_stay_texts(options: bulk.Options, source: Path, tmp_path: Path) -> None:
    kept = checkpoints.load(options.ckpt)
    names = [*(str(number) for number in range(101, 124)), "x"]
    path = tmp_path / "texts.pt"
    checkpoints.save(replace(kept, item_ids=kept.item_ids.from_ids(names)), path)
    write(source / "texts.parquet", ["a", "b"], [["x", "101"], ["102"]])
    bulk.run(replace(options, ckpt=str(path)), bulk.here)
    for name, users in (("texts.parquet", pl.String), ("none.parquet", pl.Int64), ("day=1/a.parquet", pl.Int64)):
        schema = pl.read_parquet(Path(options.output) / name).schema
        assert (schema["user"], schema["items"]) == (users, pl.List(pl.String))


def run_and_die(options: bulk.Options, call: int) -> None:
    """The job in a process that is killed when its n-th file, written whole, is about to take its place."""
    real, calls = Path.replace, 0

    def dying(path: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, target)

    Path.replace = dying  # type: ignore[method-assign, assignment]
    bulk.run(options, bulk.here)


def test_killed_at_any_moment_and_started_again_it_ends_as_if_nothing_had_been(
    options: bulk.Options, tmp_path: Path, processes: ForkServerContext
) -> None:
    bulk.run(options, bulk.here)
    expected = tree(options.output)
    for call in range(1, len(expected) + 1):
        again = replace(options, output=str(tmp_path / f"killed-{call}"))
        process = processes.Process(target=run_and_die, args=(again, call))
        process.start()
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        left = tree(again.output)
        whole = {name: content for name, content in left.items() if not Path(name).name.startswith(".")}
        assert (len(whole), len(left)) == (call - 1, call)
        assert all(expected[name] == content for name, content in whole.items())
        bulk.run(again, bulk.here)
        assert tree(again.output) == expected


def test_what_is_done_is_not_done_again(
    options: bulk.Options, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = bulk.run(options, bulk.here)
    worked: list[str] = []

    def noting(options: bulk.Options, left: list[bulk.Partition]) -> list[bulk.Count]:
        worked.extend(partition.name for partition in left)
        return list(bulk.here(options, left))

    assert bulk.run(options, noting) == first
    assert worked == []
    assert "3 of 3 partitions are done already" in capsys.readouterr().err
    write(source / "day=1" / "a.parquet", [1], [[103]])  # changed
    (source / "day=2" / "a.parquet").unlink()
    (Path(options.output) / "none.parquet").unlink()
    assert bulk.run(options, noting) == bulk.Count(users=1)
    assert worked == ["day=1/a.parquet", "none.parquet"]
    assert sorted(tree(options.output)) == [
        "_SUCCESS",
        "_done/day=1/a.parquet.json",
        "_done/none.parquet.json",
        "_job.json",
        "day=1/a.parquet",
        "none.parquet",
    ]


BAD_PARTITIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no parquet": (lambda path: path.write_text("hello"), "not a readable parquet file"),
    "columns": (
        lambda path: pl.DataFrame({"user": [1]}).write_parquet(path),
        "has the columns user; expected user and",
    ),
    "flat": (lambda path: write(path, [1], [101]), "history is Int64; expected lists of whole numbers or of text"),  # type: ignore[list-item]
    "floats": (lambda path: write(path, [1], [[1.5]]), r"history is List(Float64); expected lists of whole"),
    "null": (
        lambda path: write(path, [1, 2, 3, 4], [[], None, [101, None], [102]]),
        "rows 3 to 4: a history holds an id that is",
    ),
    "text": (lambda path: write(path, [1, 2, 3], [["a"], ["b"], [""]]), "rows 3 to 3: a history holds an id that is"),
}


@pytest.mark.parametrize("case", BAD_PARTITIONS)
def test_a_bad_partition_is_named_and_the_others_stay_done(case: str, options: bulk.Options, source: Path) -> None:
    make, message = BAD_PARTITIONS[case]
    path = source / "z.parquet"
    make(path)
    with pytest.raises(DataError) as caught:
        bulk.run(options, bulk.here)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    done = tree(options.output)
    assert "none.parquet" in done
    assert not any("z.parquet" in name or name == bulk.SUCCESS for name in done)
    path.unlink()
    assert bulk.run(options, bulk.here).users == 8


def test_jobs_do_not_mix(options: bulk.Options, source: Path, tmp_path: Path) -> None:
    bulk.run(options, bulk.here)
    before = tree(options.output)
    for other, what in ((replace(options, k=6), "k"), (replace(options, deny=("101",), dtype="bf16"), "deny, dtype")):
        with pytest.raises(InputError, match=f"holds lists made with another {what}; expected a new folder"):
            bulk.run(other, bulk.here)
    assert tree(options.output) == before
    for output, message in (
        (source, "is the input folder, or lies in it"),
        (source / "lists", "is the input folder, or lies in it"),
        (source.parent, "is not empty and holds no _job.json"),
        (Path(options.ckpt), "cannot be the output"),
    ):
        with pytest.raises(InputError, match=message):
            bulk.run(replace(options, output=str(output)), bulk.here)
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "holds no parquet file"), (tmp_path / "none", "no such folder")):
        with pytest.raises(InputError, match=message):
            bulk.run(replace(options, input=str(folder)), bulk.here)


def test_the_command(
    options: bulk.Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--ckpt", options.ckpt, "--input", options.input, "--output", options.output, "--topk", "5"]
    assert bulk.main([*command, "--device", "cpu"]) == 0
    assert "8 users in" in capsys.readouterr().err
    with pytest.raises(InputError, match="--workers is 2 without --ray"):
        bulk.main([*command, "--workers", "2"])
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"ray is not installed; expected pip install 'fave-fast\[ray\]'"):
        bulk.main([*command, "--ray", "local"])


@pytest.mark.slow
def test_over_ray_the_output_is_the_same(options: bulk.Options, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from fave_fast.bulk_ray import over_ray

    expected = bulk.run(options, bulk.here)
    spread = replace(options, output=str(tmp_path / "spread"))
    assert bulk.run(spread, over_ray("local", 2)) == expected
    assert tree(spread.output) == tree(options.output)
    (source / "z.parquet").write_text("hello")
    with pytest.raises(DataError, match=r"z\.parquet: not a readable parquet file"):
        bulk.run(spread, over_ray("local", 2))

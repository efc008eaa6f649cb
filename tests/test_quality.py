from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import quality
from bench.diagnostics import diagnose
from bench.experiment import Group, Options, Run, perform
from bench.summary import interval, load_runs, markdown, summarise
from fave_fast import checkpoint as checkpoints
from fave_fast.config import Config, preset
from fave_fast.data import load_interactions, split
from fave_fast.errors import ConfigError, InputError
from fave_fast.evaluate import evaluate, rank_targets
from fave_fast.metrics import rank_metrics
from fave_fast.sketch import CHANNELS
from fave_fast.train import Trainer

NEVER = time.monotonic() + 1e6
OPTIONS = Options("cpu", "fp32", "auto", torch.get_num_threads(), True, None)


def small(config: Config) -> list[str]:
    """`--set` for a model as small as `config`'s."""
    values = config.to_dict()
    keys = [("model", name) for name in ("d", "blocks", "heads", "ffn_mult", "max_length")]
    keys += [("train", name) for name in ("batch_size", "lr", "lr_stage2", "epochs", "epochs_stage2")]
    return [word for section, key in keys for word in ("--set", f"{section}.{key}={values[section][key]}")]


def runs_of(config: Config, *settings: str, seed: int = 0) -> tuple[Run, ...]:
    return tuple(
        Run("log", "default", name, config.override(quality.SETTINGS[name], "test"), seed) for name in settings
    )


@pytest.fixture(scope="module")
def folder(tiny_log: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of two settings and two seeds, two processes at once."""
    place = tmp_path_factory.mktemp("quality")
    code = quality.main([
        "--data", str(tiny_log), "default", *small(tiny_config), "--setting", "preset", "without-l-cons",
        "--seeds", "0", "3", "--jobs", "2", "--device", "cpu", "--out", str(place / "runs"),
        "--checkpoints", str(place / "kept"), "--commit", "abc",
    ])  # fmt: skip
    assert code == 0
    return place


def test_a_run_is_what_train_and_evaluate_say(folder: Path, tiny_log: Path, tmp_path: Path) -> None:
    names = {f"log.{setting}.{seed}" for setting in ("preset", "without-l-cons") for seed in (0, 3)}
    kept = {path.name for path in (folder / "kept").iterdir()}
    assert kept == {f"{name}{part}" for name in names for part in (".pt", ".stage1.pt", ".stage2.pt")}
    assert {path.stem for path in (folder / "runs").iterdir()} == names
    data = load_interactions(tiny_log)
    threads = torch.get_num_threads()
    for name in sorted(names):
        run = json.loads((folder / "runs" / f"{name}.json").read_text())
        torch.set_num_threads(run["threads"])  # they decide how sums are split up
        config = Config.from_dict(run["config"], name)
        assert config.loss.gamma == (0 if "l-cons" in name else 0.1)
        trainer = Trainer(data, config, tmp_path / f"{name}.pt", seed=run["seed"])
        outcome = trainer.run()
        said = [json.loads(line) for line in trainer.metrics_path.read_text().splitlines()]
        clock = ("seconds", "samples_per_second")
        without = [[{k: v for k, v in line.items() if k not in clock} for line in one] for one in (said, run["curve"])]
        assert without[0] == without[1]
        facts = outcome.checkpoint.facts
        assert (run["stage"]["chosen"], run["epoch"]["chosen"]) == (facts["best_stage"], facts["best_epoch"])
        assert run["validation"]["chosen"]["NDCG@20"] == facts["best_validation_ndcg20_filtered"]
        kept = checkpoints.load(folder / "kept" / f"{name}.pt")
        last = replace(outcome.checkpoint, weights=trainer.stage_weights)
        assert run["diagnostics"]["last stage"] == diagnose(
            last.build_model(), config, data, split(data, config.data).test
        )
        stages = [checkpoints.load(folder / "kept" / f"{name}.stage{stage}.pt") for stage in (1, 2)]
        assert stages[0].config.train.epochs_stage2 == 0
        for which, checkpoint in (
            ("chosen", outcome.checkpoint), ("chosen", kept), ("last stage", last), ("last stage", stages[1])
        ):  # fmt: skip
            want = evaluate(checkpoint, data, "test", device=trainer.device, sketch=CHANNELS)
            assert {**run["test"][which], "seconds": 0} == {**want, "seconds": 0}
        model = last.build_model()
        targets = split(data, config.data).val
        want = rank_metrics(rank_targets(model, config, data, targets, full=False).filtered)
        assert run["validation"]["last stage"] == want
        want = evaluate(kept, data, "val", device=trainer.device, sketch=CHANNELS)
        assert (run["validation_raw"], run["validation_sketched"]) == (want["raw"], want["sketched"])
        assert run["stage"]["last stage"] == 2
        assert run["commit"] == "abc"
        assert run["versions"]["torch"] is not None
        assert run["finished"]
    torch.set_num_threads(threads)


def test_done_runs_are_kept(
    folder: Path, tiny_log: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (folder / "runs").iterdir()}
    command = ["--data", str(tiny_log), "default", *small(tiny_config), "--seeds", "0", "--device", "cpu"]
    assert quality.main([*command, "--no-test", "--out", str(folder / "runs")]) == 0
    assert "1 runs, 1 of them done before" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (folder / "runs").iterdir()} == before
    with pytest.raises(InputError, match=r"log\.preset\.0\.json: holds a run with another config; expected another"):
        quality.main([*command, "--set", "loss.alpha=3", "--out", str(folder / "runs")])
    with pytest.raises(InputError, match="holds a run with another dtype"):
        quality.main([*command, "--dtype", "bf16", "--out", str(folder / "runs")])


def test_summary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quality.main(["--summarise", str(folder / "runs")]) == 0
    table = capsys.readouterr().out
    summary = json.loads((folder / "runs" / "summary.json").read_text())
    runs = {path.stem: json.loads(path.read_text()) for path in (folder / "runs").glob("log.*")}
    row = next(row for row in summary["rows"] if (row["setting"], row["weights"]) == ("without-l-cons", "chosen"))
    a, b = (runs[f"log.without-l-cons.{seed}"]["test"]["chosen"]["raw"]["HR@20"] for seed in (0, 3))
    found = row["figures"]["raw HR@20"]
    assert (row["seeds"], found["seeds"]) == ([0, 3], 2)
    assert found["mean"] == (a + b) / 2
    # 12.706 is Student's t for 97.5 % and one degree of freedom, tan(0.475 pi).
    assert found["half"] == pytest.approx(math.tan(0.475 * math.pi) * abs(a - b) / 2, abs=1e-9)
    base = [runs[f"log.preset.{seed}"]["test"]["chosen"]["raw"]["HR@20"] for seed in (0, 3)]
    assert row["differences"]["raw HR@20"]["mean"] == pytest.approx((a + b - sum(base)) / 2, abs=1e-9)
    head, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    cells = dict(zip(head, next(line for line in lines if line[1:3] == ["without-l-cons", "chosen"]), strict=True))
    assert (cells["data"], cells["seeds"]) == ("log", "2")
    assert cells["raw HR@20"] == f"{found['mean']:.2f} ± {found['half']:.2f}"
    assert "Commits: abc. On: cpu." in table
    flow = next(row for row in summary["flows"] if (row["setting"], row["weights"]) == ("without-l-cons", "last stage"))
    gaps = [runs[f"log.without-l-cons.{seed}"]["diagnostics"]["last stage"]["steps"]["30"]["gap"] for seed in (0, 3)]
    assert flow["figures"]["gap of 30"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert "| log | without-l-cons | stage 1 |" in table


def test_interval() -> None:
    """The textbook's t for four degrees of freedom is 2.776."""
    found = interval([10.0, 12.0, 14.0, 16.0, 18.0])
    assert found["mean"] == 14
    assert found["half"] == pytest.approx(2.776 * math.sqrt(10 / 5), rel=2e-4)
    assert interval([3.0]) == {"mean": 3.0, "half": None, "seeds": 1}


def test_validation_only_looks_at_no_test_target(
    tiny_log: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(model: Any, data: Any, split: str, **options: Any) -> Any:
        assert split == "val", "a test target was looked at"
        return evaluate(model, data, "val", **options)

    monkeypatch.setattr("bench.experiment.evaluate", looked)
    group = Group(load_interactions(tiny_log), runs_of(tiny_config, "preset"), replace(OPTIONS, test=False))
    (result,) = perform(group, NEVER)
    assert result["finished"]
    assert result["test"] is None
    assert result["validation_raw"]["HR@20"] <= result["validation"]["chosen"]["HR@20"]
    named = {**result, "commit": None, "key": ("log", "preset"), "file": "x"}
    assert "validation NDCG@20" in markdown(summarise([named]))


def test_what_the_time_cuts_is_not_finished(tiny_log: Path, tiny_config: Config, tmp_path: Path) -> None:
    long = replace(tiny_config, train=replace(tiny_config.train, epochs=10**6, patience=10**6))
    results = list(perform(Group(load_interactions(tiny_log), runs_of(long, "preset", "without-l-cons"), OPTIONS), 0.0))
    assert [(one["setting"], one["finished"]) for one in results] == [("preset", False), ("without-l-cons", False)]
    for one in results:
        (tmp_path / f"{one['setting']}.json").write_text(json.dumps({**one, "commit": None}))
    summary = summarise(load_runs(tmp_path))
    assert summary["rows"] == []
    assert summary["left_out"] == ["preset.json", "without-l-cons.json"]


def test_what_cannot_end_is_said_and_is_no_success(
    tiny_log: Path, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(tiny_log), "default", *small(tiny_config), "--seeds", "1", "--device", "cpu"]
    assert quality.main([*command, "--out", str(tmp_path), "--seconds", "9", "--expect", "log=10"]) == 1
    assert "not begun, for want of time: log.preset.1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ablations_change_what_table_2_says() -> None:
    base = preset("beauty")
    changed = {name: base.override(values, name) for name, values in quality.ABLATIONS.items()}
    assert changed["without-stage-2"].train.epochs_stage2 == 0
    assert changed["without-l-cons"].loss.gamma == 0
    assert changed["without-l-match"].loss == replace(base.loss, match=0.0)
    assert changed["gaussian-prior"].flow.prior == "gaussian"
    runs = quality.plan([("beauty", "beauty")], {"preset": {}, **quality.ABLATIONS}, [], [0, 1])
    assert [run.seed for run in runs] == [0] * 5 + [1] * 5
    groups = quality.grouped(runs, {("beauty", base.data): None}, OPTIONS)  # type: ignore[dict-item]
    assert [[run.setting for run in group.runs] for group in groups[:2]] == [
        ["preset", "without-stage-2", "without-l-cons", "without-l-match"],
        ["gaussian-prior"],
    ]


def test_sweeps_and_conditionings_change_what_their_names_say() -> None:
    base = preset("ml-100k").to_dict()
    for name, values in {**quality.SWEEPS, **quality.CONDITIONINGS}.items():
        changed = preset("ml-100k").override(values, name).to_dict()
        found = {
            f"{section}.{key}": value
            for section, part in changed.items()
            for key, value in part.items()
            if value != base[section][key]
        }
        if name in quality.SWEEPS:
            key, value = name.split("-")
            section = "flow" if key == "rho" else "loss"
            assert changed[section][key] == float(value)
            assert set(found) <= {f"{section}.{key}"}
        else:
            assert found.pop("model.conditioning") == name.split("-")[0]
            assert found.pop("model.delta", 1.0) == 1.0
            assert found == {
                "noise": {"flow.prior": "gaussian"}, "anchor": {"flow.prior_stage1": "anchor"}, name: {},
            }[name.split("-from-")[-1]]  # fmt: skip


def test_a_run_of_an_earlier_version_is_read(folder: Path, tmp_path: Path) -> None:
    run = json.loads((folder / "runs" / "log.preset.0.json").read_text())
    old = json.loads(json.dumps({name: value for name, value in run.items() if name != "method"}))
    del old["config"]["model"]["conditioning"]
    (tmp_path / "log.preset.0.json").write_text(json.dumps(old))
    (found,) = load_runs(tmp_path)
    assert {name: found[name] for name in run} == run


def test_settings_are_laid_over_set_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("a: {train: {lr: 0.5}}\nb: {only: [steam], loss: {alpha: 7}}\n")
    settings = quality.read_settings(path)
    runs = quality.plan([("x", "beauty"), ("steam", "steam")], settings, ["train.lr=1e-3", "loss.beta=9"], [4])
    assert [run.name for run in runs] == ["x.a.4", "steam.a.4", "steam.b.4"]
    assert [(run.config.train.lr, run.config.loss.alpha, run.config.loss.beta) for run in runs] == [
        (0.5, preset("beauty").loss.alpha, 9.0), (0.5, preset("steam").loss.alpha, 9.0), (0.001, 7.0, 9.0),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"setting a: unknown key 'train\.rate'"):
        quality.plan([("x", "beauty")], {"a": {"train": {"rate": 1}}}, [], [0])


BAD: list[tuple[list[str], str]] = [
    ([], "error: --data and --out, or --summarise, are needed"),
    (["--data", "LOG", "beuty"], "expected one of the presets default, ml-100k"),
    (["--data", "LOG", "beauty", "--data", "LOG", "beauty"], "--data: two files of one name"),
    (
        ["--data", "LOG", "beauty", "--setting", "no"],
        "--setting 'no'; expected one of preset, all-items, unseen, without-stage-2",
    ),
    (["--data", "LOG", "beauty", "--set", "lr=3"], "--set 'lr=3'; expected SECTION.KEY=VALUE"),
    (["--data", "LOG", "beauty", "--set", "train.lr=-1"], "--set: train.lr is -1.0; expected"),
    (["--data", "LOG", "beauty", "--expect", "log"], "--expect 'log'; expected DATASET=SECONDS"),
    (["--data", "LOG", "beauty", "--seconds", "inf"], "'inf' given; expected a number of seconds above 0"),
    (["--data", "FOLDER/none.npz", "beauty"], "none.npz: "),
    (["--data", "LOG", "beauty", "--data", "FOLDER/none.npz", "beauty"], "none.npz: "),
    (["--data", "LOG", "beauty", "--settings", "FOLDER/none.yaml"], "none.yaml: cannot read the settings"),
    (["--data", "LOG", "beauty", "--settings", "FOLDER/list.yaml"], "list.yaml: expected a mapping of names"),
    (["--data", "LOG", "beauty", "--settings", "FOLDER/name.yaml"], "setting 'a/b'; expected a name of letters"),
    (["--data", "LOG", "beauty", "--settings", "FOLDER/only.yaml"], "only is 'beauty'; expected a list of data sets"),
    (["--data", "LOG", "beauty", "--settings", "FOLDER/method.yaml"], "method is 'caser'; expected one of fave, fmrec"),
    (["--data", "LOG", "beauty", "--device", "cpu", "--backend", "triton"], "triton"),
    (["--summarise", "FOLDER/none"], "none: no such folder"),
    (["--summarise", "FOLDER/empty"], "empty: no runs"),
    (["--summarise", "FOLDER/foreign"], "x.json: expected a run that bench.quality wrote"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_told_before_any_training(
    tiny_log: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(quality, "run_all", lambda *_, **__: pytest.fail("training began"))
    files = {
        "list.yaml": "- 1\n",
        "name.yaml": "a/b: {}\n",
        "only.yaml": "a: {only: beauty}\n",
        "method.yaml": "a: {method: caser}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.json").write_text("{}")
    words = [word.replace("LOG", str(tiny_log)).replace("FOLDER", str(tmp_path)) for word in options]
    if "--data" in words:
        words += ["--out", str(tmp_path / "out")]
    with pytest.raises((InputError, SystemExit)) as error:
        quality.main(words)
    said = str(error.value)
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
        said = capsys.readouterr().err
    assert message in said
    assert "\n" not in said.strip()
    assert not (tmp_path / "out").exists()


def test_runs_of_one_name_must_agree(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "runs").glob("log.*"):
        run: dict[str, Any] = json.loads(path.read_text())
        if path.name == "log.preset.3.json":
            run["config"]["train"]["lr"] = 7.0
        (tmp_path / path.name).write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"log\.preset\.3\.json: its config is not that of log\.preset\.0\.json"):
        load_runs(tmp_path)

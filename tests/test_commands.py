"""Bad input: exit code 2, one telling line, and nothing left behind."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fave_fast import checkpoint as checkpoints
from fave_fast import cli, evaluate, export, infer, train
from fave_fast.config import Config, dump_yaml

COMMANDS = {"train": train.main, "evaluate": evaluate.main, "infer": infer.main, "export": export.main}
HEADER = "user_id,item_id,timestamp\n"


@pytest.fixture(autouse=True)
def _as_users_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def place(tiny_checkpoint: Path, tiny_log: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad files; nothing may be written there, so all tests share it."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny_checkpoint.read_bytes()
    content = torch.load(tiny_checkpoint, weights_only=True)
    (folder / "model.pt").write_bytes(model)
    (folder / "truncated.pt").write_bytes(model[: len(model) // 2])
    at = model.index(content["tensors"]["weights/item_embedding.weight"].numpy().tobytes())
    (folder / "damaged.pt").write_bytes(model[: at + 99] + bytes([model[at + 99] ^ 1]) + model[at + 100 :])
    torch.save({**content, "version": checkpoints.FORMAT_VERSION + 1}, folder / "newer.pt")
    content["plain"]["facts"]["users"] = 10**6
    torch.save(content, folder / "edited.pt")
    torch.save({"weight": torch.ones(2)}, folder / "foreign.pt")
    torch.save(Path("anything"), folder / "pickle.pt")
    (folder / "text.pt").write_text("hello\n")
    (folder / "folder").mkdir()
    log = tiny_log.read_text()
    files = {
        "log.csv": log,
        "empty.csv": "",
        "header.csv": HEADER,
        "columns.csv": "a,b\n1,2\n",
        "bad-row.csv": log + "1,101\n",
        "bad-time.csv": log + "1,101,noon\n",
        "log.xyz": log,
        "other.csv": log + "1,777,99999\n",
        "short.csv": HEADER + "1,101,1\n1,102,2\n2,101,1\n",
        "no-times.csv": "user_id,item_id\n1,101\n1,102\n1,103\n",
        "damaged.csv.gz": "not gzip",
        "damaged.parquet": "not parquet",
        "key.yaml": "train:\n  learning_rate: 0.1\n",
        "section.yaml": "trian: {}\n",
        "type.yaml": "train: {epochs: 1.5}\n",
        "range.yaml": "model: {dropout: 1.0}\n",
        "heads.yaml": "model: {d: 10, heads: 4}\n",
        "syntax.yaml": "train: [1\n",
        "list.yaml": "- 1\n",
        "core.yaml": "data: {min_count: 1000}\n",
        "time.yaml": "data: {split: global-time}\n",
        "lr.yaml": dump_yaml(replace(tiny_config, train=replace(tiny_config.train, lr=1e30))),
        "h.jsonl": '{"user": 1, "history": [101]}\n',
        "empty.jsonl": "\n \n",
        "deny.txt": "101\n",
    }
    bad_lines = {
        "json": "{",
        "deep": "[" * 10**5,
        "object": "[]",
        "history": '{"user": 1}',
        "user": '{"history": []}',
        "list": '{"user": 1, "history": "101"}',
        "bool": '{"user": 1, "history": [true]}',
        "float": '{"user": 1, "history": [1.5]}',
        "nested": '{"user": 1, "history": [[101]]}',
        "null": '{"user": null, "history": []}',
        "text": '{"user": 1, "history": [""]}',
        "surrogate": '{"user": "\\ud800", "history": []}',
    }
    files |= {f"bad-{name}.jsonl": files["h.jsonl"] + line + "\n" for name, line in bad_lines.items()}
    files["first-deep.jsonl"] = bad_lines["deep"] + "\n"
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "bytes.jsonl").write_bytes(b'{"user": 1, "history": []}\n{"user": "\xff", "history": []}\n')
    (folder / "bytes.csv").write_bytes(log.encode() + b"1,\xff,9\n")
    (folder / "bytes.txt").write_bytes(b"\xff\n")
    (folder / "bytes.yaml").write_bytes(b"\xff\n")
    return folder


TRAIN = "train --data log.csv --out new.pt"
EVALUATE = "evaluate --ckpt model.pt --data log.csv"
INFER = "infer --ckpt model.pt --input h.jsonl --output out.jsonl"
EXPORT = "export --ckpt model.pt --output new"

CASES = [
    # checkpoints
    ("evaluate --ckpt none.pt --data log.csv", r"none\.pt: cannot read the checkpoint: No such file"),
    ("infer --ckpt none.pt", r"none\.pt: cannot read the checkpoint: No such file"),
    ("infer --ckpt folder", r"folder: is a folder; expected a checkpoint file"),
    ("infer --ckpt text.pt", r"text\.pt: not a checkpoint; expected"),
    ("infer --ckpt foreign.pt", r"foreign\.pt: not written by fave_fast; expected"),
    ("infer --ckpt pickle.pt", r"pickle\.pt: holds more than tensors and plain values, none of which was run"),
    ("infer --ckpt truncated.pt --input h.jsonl --output out.jsonl", r"truncated\.pt: truncated: .*expected"),
    ("infer --ckpt damaged.pt", r"damaged\.pt: .*damaged"),
    ("infer --ckpt edited.pt", r"edited\.pt: .*does not match its SHA-256"),
    ("evaluate --ckpt newer.pt --data log.csv", r"newer\.pt: written in format version \d+; .*upgrade"),
    ("infer", r"--ckpt FILE is missing; expected a checkpoint, or --demo"),
    ("evaluate --data log.csv", r"required: --ckpt"),
    # logs
    ("train --out new.pt", r"required: --data"),
    ("train --data log.csv", r"required: --out"),
    ("train --data none.csv --out new.pt", r"none\.csv: cannot read the log: No such file"),
    ("train --data empty.csv --out new.pt", r"empty\.csv: the file is empty; expected an interaction log"),
    ("train --data header.csv --out new.pt", r"header\.csv: no rows; expected"),
    ("train --data columns.csv --out new.pt", r"columns\.csv: no user column among 'a', 'b'; expected"),
    ("train --data folder --out new.pt", r"folder: a directory; expected a file"),
    ("train --data bad-row.csv --out new.pt", r"bad-row\.csv: line \d+: found 2 fields; expected"),
    ("train --data bad-time.csv --out new.pt", r"bad-time\.csv: line \d+: .*'noon'; expected"),
    ("train --data bytes.csv --out new.pt", r"bytes\.csv: line \d+: .*not UTF-8"),
    ("train --data log.xyz --out new.pt", r"log\.xyz: unknown ending '\.xyz'; expected"),
    ("train --data damaged.csv.gz --out new.pt", r"damaged\.csv\.gz: damaged gzip"),
    ("train --data damaged.parquet --out new.pt", r"damaged\.parquet: not readable as parquet"),
    ("train --data short.csv --out new.pt", r"short: the split leaves no validation targets .*expected longer"),
    (f"{TRAIN} --format npz", r"log\.csv: not an \.npz file; expected"),
    (f"{TRAIN} --format word", r"--format: invalid choice: 'word'"),
    (f"{TRAIN} --user-column who", r"log\.csv: no user column .*expected who"),
    ("evaluate --ckpt model.pt --data other.csv", r"other\.csv: 1 of its 25 items are not in the checkpoint \(777"),
    ("evaluate --ckpt model.pt --data short.csv", r"short: the split leaves no"),
    ("evaluate --ckpt model.pt --data empty.csv", r"empty\.csv: the file is empty"),
    ("infer --ckpt model.pt --input empty.csv --output out.jsonl", r"empty\.csv: the file is empty"),
    ("infer --ckpt model.pt --input folder --output out.jsonl", r"folder: a directory; expected a file"),
    ("infer --ckpt model.pt --input none.jsonl --output out.jsonl", r"none\.jsonl: cannot read the log"),
    # configurations
    (f"{TRAIN} --preset none", r"--preset: invalid choice: 'none' \(choose from .*beauty"),
    (f"{TRAIN} --config none.yaml", r"none\.yaml: cannot read the configuration: No such file"),
    (f"{TRAIN} --config folder", r"folder: cannot read the configuration"),
    (f"{TRAIN} --config key.yaml", r"key\.yaml: unknown key 'train\.learning_rate'; expected one of .*lr"),
    (f"{TRAIN} --config section.yaml", r"section\.yaml: unknown key 'trian'; expected one of .*train"),
    (f"{TRAIN} --config type.yaml", r"type\.yaml: train\.epochs is 1\.5; expected a whole number"),
    (f"{TRAIN} --config range.yaml", r"range\.yaml: model\.dropout is 1\.0; expected"),
    (f"{TRAIN} --config heads.yaml", r"heads\.yaml: model\.d is 10; expected a multiple of"),
    (f"{TRAIN} --config syntax.yaml", r"syntax\.yaml: not YAML"),
    (f"{TRAIN} --config list.yaml", r"list\.yaml: the configuration is \[1\]; expected a mapping"),
    (f"{TRAIN} --config bytes.yaml", r"bytes\.yaml: not YAML"),
    (f"{TRAIN} --config core.yaml", r"log\.csv: the 1000-core is empty; expected"),
    (
        "train --data no-times.csv --out new.pt --config time.yaml",
        r"no-times\.csv: .*no timestamp column; expected one",
    ),
    (f"{TRAIN} --config lr.yaml", r"the loss became (nan|inf) in stage 1, epoch 1; expected .*train\.lr \(1e\+30\)"),
    # options
    (f"{TRAIN} --epochs 3", r"unrecognized arguments: --epochs 3"),
    (f"{TRAIN} --see 3", r"unrecognized arguments: --see 3"),
    (f"{TRAIN} --seed x", r"--seed: 'x' given; expected a whole number of at least 0"),
    (f"{TRAIN} --seed -1", r"--seed: '-1' given; expected a whole number of at least 0"),
    (f"{TRAIN} --seed 99999999999999999999", r"--seed: '9+' given; expected"),
    (f"{TRAIN} --device nonsense", r"--device is 'nonsense'; expected auto, cpu, cuda or cuda:N"),
    (f"{TRAIN} --device meta", r"--device is 'meta'; expected auto, cpu, cuda or cuda:N"),
    (f"{EVALUATE} --device cuda:99", r"--device is 'cuda:99'; this machine has \d+ CUDA devices"),
    (f"{TRAIN} --dtype fp8", r"--dtype: invalid choice: 'fp8' \(choose from .*bf16"),
    (f"{TRAIN} --backend triton --device cpu", r"backend 'triton' cannot run"),
    (f"{EVALUATE} --backend triton --device cpu", r"backend 'triton' cannot run"),
    (f"{INFER} --backend triton --device cpu", r"backend 'triton' cannot run"),
    (f"{INFER} --backend fast", r"--backend: invalid choice: 'fast'"),
    (f"{EVALUATE} --split train", r"--split: invalid choice: 'train'"),
    (f"{EVALUATE} --batch-size 0", r"--batch-size: '0' given; expected a whole number of at least 1"),
    (f"{INFER} --topk 0", r"--topk: '0' given; expected a whole number of at least 1"),
    (f"{INFER} --topk -1", r"--topk: '-1' given; expected a whole number of at least 1"),
    (f"{INFER} --topk x", r"--topk: 'x' given; expected a whole number of at least 1"),
    (f"{INFER} --batch-size 1.5", r"--batch-size: '1\.5' given; expected"),
    (f"{INFER} --samples 0", r"--samples: '0' given; expected"),
    (f"{TRAIN} --resume", r"new\.pt\.resume: cannot read the checkpoint: No such file"),
    # where results go
    ("train --data log.csv --out none/new.pt", r"none/new\.pt: the folder none does not exist"),
    ("train --data log.csv --out folder", r"folder: is a folder; expected a file name to write to"),
    ("train --data log.csv --out ./log.csv", r"log\.csv: is the log; expected another file"),
    ("infer --ckpt model.pt --input h.jsonl --output none/o.jsonl", r"o\.jsonl: the folder none does not exist"),
    ("infer --ckpt model.pt --input h.jsonl --output folder", r"folder: is a folder; expected a file name"),
    ("infer --ckpt model.pt --input h.jsonl --output ./h.jsonl", r"h\.jsonl: is the file of --input; expected another"),
    ("infer --ckpt model.pt --input h.jsonl --output model.pt", r"model\.pt: is the file of --ckpt; expected another"),
    ("infer --ckpt model.pt --output out.jsonl", r"--output without --input; expected both, or neither"),
    # histories
    *(
        (f"infer --ckpt model.pt --input bad-{name}.jsonl --output out.{ending}", rf"bad-{name}\.jsonl:2: .*{words}")
        for ending in ("jsonl", "parquet")
        for name, words in {
            "json": r"not JSON; expected",
            "deep": r"not JSON; expected",
            "object": r'expected an object with "user" and "history"',
            "history": r'expected an object with "user" and "history"',
            "user": r'expected an object with "user" and "history"',
            "list": r"history is '101'; expected a list",
            "bool": r"holds True; expected whole numbers or text",
            "float": r"holds 1\.5; expected whole numbers or text",
            "nested": r"holds \[101\]; expected whole numbers or text",
            "null": r"user is None; expected a whole number or text",
            "text": r"holds ''; expected",
            "surrogate": r"user is '\\ud800'; expected",
        }.items()
    ),
    ("infer --ckpt model.pt --input first-deep.jsonl --output out.jsonl", r"first-deep\.jsonl:1: not JSON; expected"),
    ("infer --ckpt model.pt --input bytes.jsonl --output out.jsonl", r"bytes\.jsonl:2: not UTF-8; expected"),
    ("infer --ckpt model.pt --input empty.jsonl --output out.jsonl", r"empty\.jsonl: is empty; expected"),
    (f"{INFER} --deny none.txt", r"none\.txt: cannot read the denied items: No such file"),
    (f"{INFER} --deny folder", r"folder: cannot read the denied items"),
    (f"{INFER} --deny bytes.txt", r"bytes\.txt: not UTF-8; expected"),
    # exports
    ("export --ckpt model.pt", r"required: --output"),
    ("export --ckpt none.pt --output new", r"none\.pt: cannot read the checkpoint: No such file"),
    ("export --ckpt model.pt --output .", r"is not empty; expected a new folder"),
    ("export --ckpt model.pt --output log.csv", r"log\.csv: is a file; expected a new folder"),
    ("export --ckpt model.pt --output none/new", r"none/new: the folder .*none does not exist"),
    (f"{EXPORT} --format onnx", r"--format: invalid choice: 'onnx'"),
    (f"{EXPORT} --batch-size 0", r"--batch-size: '0' given; expected a whole number of at least 1"),
    (f"{EXPORT} --batch-size all", r"--batch-size: 'all' given; expected"),
    (f"{EXPORT} --exclusions -1", r"--exclusions: '-1' given; expected a whole number of at least 0"),
    (f"{EXPORT} --length 9", r"length is 9; expected 1 to 8, the longest history that the model reads"),
    (f"{EXPORT} --topk 0", r"--topk: '0' given; expected"),
    (f"{EXPORT} --device cuda:99", r"--device is 'cuda:99'; this machine has \d+ CUDA devices"),
]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command line, run as `python -m` runs it."""
    name, *options = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as ended:
        cli.run(COMMANDS[name])
    return ended.value.code


@pytest.mark.parametrize(("command", "told"), CASES, ids=[command for command, _ in CASES])
def test_bad_input(
    command: str, told: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = snapshot(place)
    assert run(command, monkeypatch) == 2
    said = capsys.readouterr()
    assert said.out == ""
    *others, last = said.err.splitlines()
    assert re.search("error: .*" + told, last), said.err
    assert all(line.startswith("note: ") or "training windows" in line for line in others), said.err
    assert snapshot(place) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [TRAIN, EVALUATE, INFER])
def test_cuda_without_a_device(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test_bad_input(f"{command} --device cuda", "this machine has 0 CUDA devices", place, monkeypatch, capsys)


def test_a_failed_run_leaves_the_old_output(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    out = tmp_path / "out.jsonl"
    out.write_text("before\n")
    assert run(f"infer --ckpt model.pt --input bad-json.jsonl --batch-size 1 --output {out}", monkeypatch) == 2
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.jsonl", "before\n")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{name} --help", monkeypatch) == 0
    assert f"python -m fave_fast.{name}" in capsys.readouterr().out


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: object) -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli.run(interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", ["infer", "evaluate", "train", "serve", "bulk"])
def test_a_command_starts_without_what_only_compiling_needs(name: str) -> None:
    """Importing torch._dynamo takes longer than importing torch."""
    code = f"import sys, fave_fast.{name}; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell")
def test_a_process_knows_its_age() -> None:
    code = "from fave_fast import cli; print(cli.process_seconds())"
    started = time.perf_counter()
    age = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert 0 < age < time.perf_counter() - started + 0.02  # the system counts in hundredths


def test_as_a_module(place: Path) -> None:
    def module(*options: str, **more: object) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "fave_fast.infer", *options]
        return subprocess.run(command, cwd=place, capture_output=True, check=False, **more)  # type: ignore[call-overload, no-any-return]

    bad = module("--ckpt", "none.pt")
    assert (bad.returncode, bad.stdout) == (2, b"")
    assert bad.stderr == b"error: none.pt: cannot read the checkpoint: No such file or directory\n"
    good = module("--ckpt", "model.pt", "--input", "-", input=b'{"user": "\xc3\xa9", "history": [101]}\n')
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith('{"user": "é", "items": ['.encode())

"""The bench works: its suites run at tiny sizes, refuse wrong results, and their files are read, compared and drawn.

No time is asserted anywhere.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import check, counters, cpu, growth, plot, record, run, sampling, startup, suites, verify
from bench.measure import HOST, WARM, Row, Time
from bench.sampling import DiffuRec, FMRec, Lists
from bench.steps import STEPS
from fave_fast.config import ModelConfig
from fave_fast.model import FAVE
from fave_fast.ops import Exclusions, score_topk

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelConfig(d=16, blocks=1, heads=2, ffn_mult=1, max_length=6, source_block=-1)


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds and half a gigabyte."""
    monkeypatch.setattr(record, "ceilings", lambda device: {"bytes": 1e10, "fp32": 1e11})


@pytest.fixture
def model() -> FAVE:
    torch.manual_seed(0)
    return FAVE(TINY, 30).double().eval()


@pytest.fixture
def history() -> torch.Tensor:
    return torch.tensor([[0, 0, 3, 1, 4, 2], [5, 9, 2, 6, 5, 3]])


# The samplers


@torch.no_grad()
def test_one_euler_step_is_the_networks_prediction(model: FAVE, history: torch.Tensor) -> None:
    torch.manual_seed(1)
    found = FMRec(model, steps=1)(history)
    torch.manual_seed(1)
    z = torch.randn(2, 16, dtype=torch.float64)
    lam = model.config.delta * (1 + torch.randn(2, 6, 16, dtype=torch.float64))
    want = model(history, z, torch.full((2,), 1e-3), torch.ones(2), lam).endpoint
    torch.testing.assert_close(found, want)


@torch.no_grad()
def test_euler_of_a_constant_prediction_ends_there(model: FAVE, history: torch.Tensor) -> None:
    sampler = FMRec(model)
    constant = torch.arange(16.0, dtype=torch.float64).expand(2, -1)
    sampler.predictions = lambda _: lambda *_: constant  # type: ignore[method-assign]
    torch.testing.assert_close(sampler(history), constant)  # z + 30 (c - z) / 30


@torch.no_grad()
def test_reverse_diffusion_of_a_constant_prediction_ends_there(model: FAVE, history: torch.Tensor) -> None:
    sampler = DiffuRec(model)
    asked: list[float] = []
    constant = torch.ones(2, 16, dtype=torch.float64)

    def predict(number: int, x: torch.Tensor) -> torch.Tensor:
        asked.append(float(sampler.times[number]))
        return constant

    sampler.predictions = lambda _: predict  # type: ignore[method-assign]
    torch.testing.assert_close(sampler(history), constant)
    assert asked == [step / 32 for step in reversed(range(32))]


def test_the_posterior_is_that_of_the_forward_process() -> None:
    kept, carried, noise = sampling.posterior(32)
    assert kept[0] == pytest.approx(1)
    assert carried[0] == pytest.approx(0)
    assert noise[0] == pytest.approx(0)
    # x_t = sqrt(s_t) x_0 on average, so the mean of x_{t-1} given both must be sqrt(s_{t-1}) x_0.
    beta = torch.linspace(0.1 / 32 + 0.01, 20 / 32 + 0.01, 32, dtype=torch.float64)
    signal = (1 - beta).cumprod(0)
    for t in range(1, 32):
        assert kept[t] + carried[t] * float(signal[t].sqrt()) == pytest.approx(float(signal[t - 1].sqrt()))


@torch.no_grad()
def test_lists_hold_no_item_of_the_history_and_no_padding(model: FAVE, history: torch.Tensor) -> None:
    table = model.item_embedding.weight.detach()
    scores, items = Lists(FMRec(model, steps=2), table, 20)(history)
    assert scores.isfinite().all()
    for row, best in zip(history.tolist(), items.tolist(), strict=True):
        assert not set(best) & {0, *row}


# What must hold before a time is taken


def test_incomplete_lists_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, table = torch.randn(3, 16, generator=generator), torch.randn(50, 16, generator=generator)
    exclude = Exclusions(torch.tensor([7, 8, 9, 1]), torch.tensor([0, 3, 3, 4]))
    scores, items = score_topk(queries, table, 5, exclude)
    verify.lists_are_complete(queries, table, exclude, scores, items)
    second = score_topk(queries, table, 6, exclude)
    with pytest.raises(AssertionError, match="lacks an item"):
        verify.lists_are_complete(queries, table, exclude, second[0][:, 1:], second[1][:, 1:])
    with pytest.raises(AssertionError, match="inner product"):
        verify.lists_are_complete(queries, table, exclude, scores + 1e-3, items)


def test_a_red_check_prints_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: object) -> None:
        raise AssertionError("2 endpoints are not the network's")

    monkeypatch.setattr(suites, "step_is_right", wrong)
    assert run.main(["--suite", "latency", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "bench/run.py: the check failed, so nothing was timed: 2 endpoints are not the network's\n"
    assert not list(tmp_path.iterdir())


# The suites, at tiny sizes


def rows_are_sound(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        assert 0 < row["us"]["p20"] <= row["us"]["median"] <= row["us"]["p80"] <= row["us"]["p99"]


def test_latency_is_measured_beside_its_peers_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--suite", "latency", "--quick", "--batch", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(command) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    [path] = tmp_path.glob("*.json")
    [found] = record.read(path)
    assert found == last
    assert found["suite"] == "latency"
    assert found["quick"] is True
    contenders = {row["who"].split(",")[0]: row["ours"] for row in found["rows"] if row["op"] == "request"}
    assert contenders == {"fave_fast fp32": True, "PyTorch eager fp32": False, "FMRec": False, "DiffuRec": False}
    rows_are_sound(found)
    assert {"torch", "numpy"} <= found["versions"].keys()
    assert found["machine"]["kind"] in path.name
    drawn = sorted(one.name.removeprefix(f"{path.stem}-") for one in tmp_path.glob("*.png"))
    assert drawn == ["latency.png", "steps.png", "users-per-second.png"]


def test_more_steps_are_measured_beside_the_one(tmp_path: Path, tiny_checkpoint: Path, tiny_log: Path) -> None:
    options = ["--ckpt", str(tiny_checkpoint), "--data", str(tiny_log), "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(["--suite", "steps", "--quick", "--batch", "2", *options]) == 0
    [path] = tmp_path.glob("*.json")
    [found] = record.read(path)
    rows_are_sound(found)
    assert [row["ours"] for row in found["rows"]] == [True, *[False] * len(STEPS)]
    assert all(0 < row["ndcg@20"] < 100 for row in found["rows"])


def test_quality_is_trained_summed_up_and_drawn(tmp_path: Path, tiny_log: Path) -> None:
    options = ["--data", str(tiny_log), "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(["--suite", "quality", "--quick", *options]) == 0
    [path] = tmp_path.glob("*.json")
    [found] = record.read(path)
    assert found["quick"]
    assert {(row["setting"], tuple(row["seeds"])) for row in found["summary"]["rows"]} == {("preset", (0,))}
    assert [one.name.removeprefix(f"{path.stem}-") for one in tmp_path.glob("*.png")] == ["quality.png"]


def test_topk_runs_as_a_file_of_the_checkout_and_names_who_is_absent(tmp_path: Path) -> None:
    options = ["--suite", "topk", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows_are_sound(found)
    for name, package in (("FAISS", "faiss"), ("FlashInfer", "flashinfer")):
        assert (name in found["absent"]) is (importlib.util.find_spec(package) is None)
    assert [one.name.split("-topk")[1] for one in tmp_path.glob("*.png")] == ["-host.png"]


def test_a_step_on_the_cpu_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "SECONDS", 0.0)
    monkeypatch.setattr(cpu, "absent", lambda *packages: dict.fromkeys(packages, "not installed"))
    path = tmp_path / "found.json"
    assert cpu.main(["--case", "B 1, 9 items", "--items", "300", "--threads", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["threads"] == 1
    assert {row["case"] for row in found["rows"]} == {"B 1, 9 items, N 300"}
    assert [row["who"] for row in found["rows"] if row["op"] == "step"] == [
        who.format(dtype) for dtype in ("fp32", "bf16") for who in ("cpp {}", "cpp {}, bytes", "PyTorch eager {}")
    ]
    said = capsys.readouterr()
    assert "openvino: not installed" in said.out
    assert "{" not in said.out
    monkeypatch.setattr(cpu, "rows", lambda *asked: iter(()))
    assert cpu.main([]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {**found, "threads": cpu.THREADS, "rows": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "B 2"], "argument --case: invalid choice: 'B 2' (choose from "),
        (["--threads", "0"], "argument --threads: '0' given; expected a whole number of at least 1"),
    ],
)
def test_bad_usage_of_the_cpu_bench_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cpu.main(arguments)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m bench.cpu: error: {message}")
    assert said.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="commands say no times")
def test_startup_is_measured_beside_pytorchs_own(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert startup.main(["--ckpt", str(tiny_checkpoint), "--repeats", "1", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    [alone, whole] = found["rounds_s"][0]
    assert found["more_s"] == pytest.approx(whole - alone, abs=1e-3)


def test_startup_says_why_there_was_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ended without an answer:\nwhy"):
        startup.seconds_to_first_answer([sys.executable, "-c", "print('why')"])


def test_growth_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("N", 300), ("LISTS", (1, 7)), ("CATALOGUES", (200, 400)), ("CHECK", 1 << 60)):
        monkeypatch.setattr(growth, name, value)
    arguments = ["--axis", "K", "--axis", "N", "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]
    assert growth.main(arguments) == 0
    [path] = tmp_path.glob("*.json")
    [found] = record.read(path)
    assert [row["case"] for row in found["rows"]] == ["B 1, N 300, K 1", "B 1, N 300, K 7"]
    assert found["absent"].keys() == {"N 200", "N 400"}  # for which there is no memory, says the patched figure
    assert [one.name for one in plot.draw([found], tmp_path)] == [f"{path.stem}-growth.png"]


def test_the_pytest_benchmarks_run_from_the_checkout() -> None:
    options = ["-q", "--benchmark-disable", "-k", "score_topk or infer", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "bench", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "latency", "--data", "nothere.csv"], "nothere.csv: is no file; expected a log of interactions"),
        (["--suite", "steps"], "--ckpt FILE and one --data FILE are what the suite steps needs"),
        (["--suite", "quality"], "--data is missing; expected the logs to train on"),
        (["--suite", "topk", "--device", "tpu"], "--device is 'tpu'; expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments) == 2
    assert capsys.readouterr().err == f"bench/run.py: error: {message}\n"


# Files of results


def a_run(ours: float = 10.0, peers: tuple[float, ...] = (20.0, 40.0), **more: Any) -> dict[str, Any]:
    rows = [Row("op", "B 1", "cpp", Time(ours, ours, ours, ours), clock=HOST)]
    rows += [Row("op", "B 1", f"peer {at}", Time(us, us, us, us), clock=HOST) for at, us in enumerate(peers)]
    return record.Recorder("topk", ["python"], on_gpu=False).finish(rows, {}, **more)


def test_only_a_loss_against_every_peer_is_worse(tmp_path: Path) -> None:
    stored = a_run()
    same = check.compare(a_run(ours=11.4), stored)
    assert check.worse(same) == {}
    assert check.worse(check.compare(a_run(peers=(10.0, 40.0)), stored)) == {}  # a peer became faster
    lost = check.worse(check.compare(a_run(ours=12.0), stored))
    assert lost == {(("op", "B 1", HOST), "cpp"): pytest.approx(1.2)}
    assert check.worse(check.compare(a_run(ours=24.0, peers=(40.0, 80.0)), stored)) == lost  # a slower machine


def test_check_compares_with_the_stored_run_of_the_same_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, now = tmp_path / "results", tmp_path / "now"
    other = copy.deepcopy(a_run(ours=1.0))
    other["machine"]["kind"] = "another"
    record.append(other, results)
    record.append(a_run(ours=1.0, quick=True), results)
    path = record.append(a_run(ours=12.0), now)
    command = [str(path), "--results", str(results)]
    assert check.main(command) == 2
    assert "nothing stored to compare with" in capsys.readouterr().err
    assert check.main([*command, "--store"]) == 0
    record.append(a_run(ours=13.0), now)
    assert check.main(command) == 0
    record.append(a_run(ours=20.0), now)
    assert check.main(command) == 1
    assert "WORSE" in capsys.readouterr().out
    assert check.main([*command, "--store"]) == 1
    assert len(list(record.stored(results))) == 3


def test_check_reads_pytest_benchmarks_file(tmp_path: Path) -> None:
    machine = record.machine(on_gpu=False)

    def benchmark(who: str) -> dict[str, Any]:
        row = Row("op", "B 1", who, Time(10, 9, 20, 1000), clock="wall clock")
        return {"stats": {}, "extra_info": record.plain(row, {})}

    value = {
        "machine_info": {"fave_fast": {"machine": machine, "commit": "abc", "clean": True}},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [benchmark("fave_fast"), benchmark("PyTorch")],
    }
    path = tmp_path / "out.json"
    path.write_text(json.dumps(value))
    [found] = check.read(path)
    assert list(check.ratios(found).values()) == [1.0]
    assert found["rows"][0]["us"] == {"median": 10, "p20": 9, "p80": 20, "p99": 1000}
    del value["machine_info"]["fave_fast"]
    path.write_text(json.dumps(value))
    with pytest.raises(record.ResultsError, match="not of this bench"):
        check.read(path)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"runs": [{"suite": "topk"}]}'])
def test_other_files_are_no_results(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    assert check.main([str(path)]) == 2
    assert plot.main([str(path)]) == 2
    assert capsys.readouterr().err.count(str(path)) == 2
    assert list(record.stored(tmp_path)) == []
    monkeypatch.setattr(record, "file_for", lambda run, folder: path)
    with pytest.raises(record.ResultsError):
        record.append(a_run(), tmp_path)
    assert path.read_text() == text


def test_a_floor_of_bytes_needs_more_than_a_cache_holds() -> None:
    limits, time = {"bytes": 1e12, "fp32": 1e12}, Time(1, 1, 1, 1)
    small = Row("op", "B 1", "cpp", time, floor_bytes=1 << 20, floor_operations=2_000_000, clock=HOST)
    large = Row("op", "B 1", "cpp", time, floor_bytes=1 << 30, clock=HOST)
    assert record.plain(small, limits)["floor_us"] == 2.0
    assert record.plain(large, limits)["floor_us"] == pytest.approx((1 << 30) / 1e6)
    million_on_a_gpu = Row("op", "B 1", "triton", time, floor_bytes=256_000_256, clock=WARM)
    assert record.plain(million_on_a_gpu, {"bytes": 4.35e12, "bf16": 740e12})["floor_us"] == pytest.approx(58.851)


# Nsight's counters

HEAD = (
    '"ID","Process ID","Kernel Name","CC","dram__bytes.sum.per_second","gpu__time_duration.sum",'
    '"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",'
    '"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",'
    '"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"'
)
UNITS = '"","","","","byte/second","nsecond","%","%","inst","inst","inst"'


def test_counters_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.csv"
    lines = [
        "==PROF== Connected to process 7",
        HEAD,
        UNITS,
        '"0","7","_encode(int*)","9.0","1,200,000,000,000","130,000","30.5","41.5","0.5","2.75","9.0"',
        '"1","7","scan","9.0","4,100,000,000,000","70,000","93.1","11","3.5","2","1"',
        "==PROF== Disconnected",
    ]
    path.write_text("\n".join(lines))
    encode, scan = counters.read(path)
    assert (encode.name, encode.us, encode.gigabytes_per_second) == ("_encode", pytest.approx(130), pytest.approx(1200))
    assert (encode.stall, encode.stall_cycles, encode.tensor_percent) == ("long_scoreboard", 2.75, 41.5)
    assert encode.l2_percent is None
    assert encode.meaning == "waits for data from L2 or memory"
    assert scan.meaning == "limited by the memory; waits for the other warps of its block"
    assert counters.main([str(path), "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:4] == ["_encode", "1", "130.0", "1200"]
    assert json.loads(out[-1])[1]["memory_percent"] == 93.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== The user does not have permission", "The user does not have permission"),
        ("", 'expected a line that begins with "ID"'),
        (f"{HEAD}\n{UNITS}\n", "no kernel was profiled"),
    ],
)
def test_a_file_without_counters_says_what_is_wrong(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step.csv"
    path.write_text(text)
    assert counters.main([str(path)]) == 2
    assert message in capsys.readouterr().err


def test_profile_sh_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    script = str(ROOT / "bench" / "profile.sh")
    for arguments in (["nsys"], ["perf", "step"], ["ncu", "everything"]):
        done = subprocess.run(["bash", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "bench/profile.sh nsys PART" in done.stderr
    assert not list(tmp_path.iterdir())

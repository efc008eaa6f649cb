"""A whole step on the CPU, item ids to the top 20, beside PyTorch, ONNX Runtime and OpenVINO; `python -m bench.cpu`.

Wall-clock time of one call after another, Python included. A step of ours is one call into C++, and with the table in
bytes the two ops one after the other. Peers that are not installed are listed as absent. They get histories padded to
the longest of the batch, which is all they can take.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.measure import HOST, Row, Time, shown
from bench.peers import absent, version
from fave_fast import _C, cli
from fave_fast.config import FlowConfig, ModelConfig
from fave_fast.files import check_writable, replacing
from fave_fast.flow import InferenceNoise, one_step
from fave_fast.graphs import Histories
from fave_fast.model import DTYPES, FAVE
from fave_fast.ops import score_topk
from fave_fast.ops.byte_table import ByteTable
from fave_fast.ops.encoder import EncoderWeights, InputPath, encode_ids
from fave_fast.ops.step_cpu import NativeStep, TimedLists

THREADS, K, LENGTH = 2, 20, 50
ITEMS = (12_101, 1_000_000)
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino")  # of the peers
MOST_ITEMS = 10**5  # of a catalogue that batches are asked of
SECONDS = 0.7  # of repeats, for each row


def beauty_like(batch: int) -> list[int]:
    """Lengths from 3 to 50 with the mean of Amazon Beauty's histories, 8."""
    drawn = 2 + np.random.default_rng(0).geometric(1 / 6.1, batch)
    return np.clip(drawn, 3, LENGTH).tolist()


CASES = {
    "B 1, 50 items": [LENGTH],
    "B 1, 9 items": [9],
    "B 64, 50 items": [LENGTH] * 64,
    "B 64, Beauty's lengths": beauty_like(64),
}


def time_us(call: Callable[[], object]) -> Time:
    for _ in range(3):
        call()
    begin, times = time.perf_counter(), []
    while len(times) < 10 or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return Time.of(times)


class Step(nn.Module):
    """What a peer runs: padded ids [B, L] to scores and ids [B, K]."""

    def __init__(self, model: FAVE, flow: FlowConfig) -> None:
        super().__init__()
        self.model, self.flow, self.noise = model, flow, InferenceNoise.draw(model, flow)

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        prior = self.noise.prior(self.model, self.flow, history)
        endpoint = one_step(self.model, history, prior, self.noise.lambdas(history))
        scores, columns = (endpoint @ self.model.item_embedding.weight[1:].T).topk(K)
        return scores, columns + 1


def padded(ids: Tensor, lengths: list[int]) -> Tensor:
    grid = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, part in zip(grid, ids.split(lengths), strict=True):
        row[len(row) - len(part) :] = part
    return grid


class Ours:
    """A model of the paper's size with its packed forms."""

    def __init__(self, items: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.flow = FlowConfig()
        self.model = FAVE(ModelConfig(embedding_std=1.0), items).to(dtype).eval()
        self.table = self.model.item_embedding.weight.detach()
        self.weights = EncoderWeights.pack(self.model)
        self.path = InputPath.pack(self.model, self.flow, InferenceNoise.draw(self.model, self.flow))
        self.table_bytes = ByteTable.pack(self.table)
        step = NativeStep.of(self.weights, self.path, "cpp")
        assert step is not None
        self.native = step

    def step(self, histories: Histories) -> TimedLists:
        return self.native(*histories, K, exclude=False)

    def endpoints(self, ids: Tensor, offsets: Tensor, backend: str = "cpp") -> Tensor:
        return encode_ids(self.weights, self.path, ids, offsets, backend=backend)

    def lists(self, endpoints: Tensor, table_bytes: ByteTable | None, backend: str = "cpp") -> tuple[Tensor, Tensor]:
        return score_topk(endpoints, self.table, K, table_bytes=table_bytes, backend=backend)

    def check(self, ids: Tensor, offsets: Tensor) -> None:
        """Endpoints at most twice as wrong as PyTorch's; lists of both scans and of one call equal, and complete."""
        double = copy.deepcopy(self.model).double()
        noise = InferenceNoise.draw(self.model, self.flow)
        exact_noise = InferenceNoise(*(getattr(noise, n).double() for n in ("keep", "anchor", "gaussian", "lam")))
        exact_path = InputPath.pack(double, self.flow, exact_noise)
        exact = encode_ids(EncoderWeights.pack(double), exact_path, ids, offsets, backend="reference")
        found = self.endpoints(ids, offsets)
        usual = self.endpoints(ids, offsets, "reference")
        if not (found - exact).norm() <= 2 * (usual - exact).norm():
            raise AssertionError("the endpoints are not the network's")
        scores, items = self.lists(found, None)
        certified = self.lists(found, self.table_bytes)
        if not (torch.equal(scores, certified[0]) and torch.equal(items, certified[1])):
            raise AssertionError("the certified lists are not the plain ones")
        whole = self.step(numbered(ids, offsets))
        if not (np.array_equal(scores.numpy(), whole.scores) and np.array_equal(items.numpy(), whole.items)):
            raise AssertionError("the lists of one call are not those of two")
        part = found[:4]
        every = part.double() @ self.table[1:].double().T
        bound = (self.table.shape[1] + 1) * 2.0**-24 * part.double().norm(dim=1) * self.table.double().norm(dim=1).max()
        if (every.scatter(1, items[:4] - 1, -torch.inf).amax(1) > scores[:4, -1].double() + 2 * bound).any():
            raise AssertionError("a list lacks an item")


def numbered(ids: Tensor, offsets: Tensor) -> Histories:
    return Histories(ids.int().numpy(), offsets.numpy())


def rows(cases: Mapping[str, list[int]], catalogues: Sequence[int], threads: int = THREADS) -> Iterator[Row]:
    """Ours in both dtypes and PyTorch for every catalogue, the largest for single histories only; then the others."""
    torch.set_num_threads(threads)
    for case, lengths in cases.items():
        for name in DTYPES:
            for items in catalogues:
                if items <= MOST_ITEMS or len(lengths) == 1:
                    yield from ours(name, items, case, lengths)
                    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        for case, lengths in cases.items():
            yield from peers(case, lengths, catalogues[0], threads, Path(folder))


def ours(name: str, items: int, case: str, lengths: list[int]) -> Iterator[Row]:
    model = Ours(items, DTYPES[name])
    ids = torch.randint(1, items + 1, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    model.check(ids, offsets)
    case, histories = f"{case}, N {items}", numbered(ids, offsets)
    yield Row("step", case, f"cpp {name}", time_us(lambda: model.step(histories)), clock=HOST)
    yield Row(
        "step", case, f"cpp {name}, bytes",
        time_us(lambda: model.lists(model.endpoints(ids, offsets), model.table_bytes)), clock=HOST,
    )  # fmt: skip
    yield Row("encode_ids", case, f"cpp {name}", time_us(lambda: model.endpoints(ids, offsets)), clock=HOST)
    endpoints = model.endpoints(ids, offsets)
    yield Row("score_topk", case, f"cpp {name}", time_us(lambda: model.lists(endpoints, None)), clock=HOST)
    yield Row(
        "score_topk", case, f"cpp {name}, bytes", time_us(lambda: model.lists(endpoints, model.table_bytes)), clock=HOST
    )
    yield Row(
        "step", case, f"PyTorch eager {name}", time_us(eager(Step(model.model, model.flow), padded(ids, lengths))),
        clock=HOST,
    )  # fmt: skip
    share = model.table_bytes.fallback_share
    if share > 0:
        print(f"{case}: {share:.1%} of the rows took the plain scan", file=sys.stderr)


def eager(step: Step, grid: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return step(grid)

    return call


@torch.no_grad()
def export(step: Step, grid: Tensor, path: Path) -> None:
    """The step as an ONNX file, for histories of this shape.

    The least of 200 calls of either peer was 0.81 to 1.07 times that on what the TorchScript exporter wrote.
    """
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # which tell each node that they fold, and what is not there
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's own code
        torch.onnx.export(step, (grid,), path, input_names=["ids"], dynamo=True, verbose=False)


def peers(case: str, lengths: list[int], items: int, threads: int, folder: Path) -> Iterator[Row]:
    """ONNX Runtime and OpenVINO, each as it comes, on one exported network."""
    if absent("onnx", "onnxscript"):
        return
    model = Ours(items, torch.float32)
    grid = padded(torch.randint(1, items + 1, (sum(lengths),), generator=torch.Generator().manual_seed(1)), lengths)
    step, path = Step(model.model, model.flow).eval(), folder / f"{len(lengths)}-{sum(lengths)}.onnx"
    export(step, grid, path)
    with torch.no_grad():
        expected = step(grid)[0].numpy()
    ids, case = grid.numpy(), f"{case}, N {items}"
    if not absent("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"ids": ids})[0], expected, rtol=1e-3, atol=1e-3)
        yield Row("step", case, "ONNX Runtime", time_us(lambda: session.run(None, {"ids": ids})), clock=HOST)
        del session
    if not absent("openvino"):
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(path, "CPU", settings).create_infer_request()
        found = next(iter(request.infer([ids]).values()))
        np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.05 * float(np.abs(expected).max()))
        yield Row("step", case, "OpenVINO", time_us(lambda: request.infer([ids])), clock=HOST)


def processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _parser() -> cli.Parser:
    parser = cli.Parser("cpu", "A step on the CPU, item ids to the top 20, beside PyTorch, ONNX Runtime and OpenVINO.")
    parser.prog, parser.formatter_class = "python -m bench.cpu", argparse.HelpFormatter
    parser.add_argument(
        "--case", choices=CASES, action="append", metavar="CASE", help=f"may repeat (default: {_quoted(CASES)})"
    )
    parser.add_argument(
        "--items", type=cli.whole_number(1), action="append", metavar="N",
        help=f"size of the catalogue, beyond {MOST_ITEMS:,} for single histories only; may repeat, and peers are given "
        f"the first (default: {_quoted(ITEMS)})",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=cli.whole_number(1), default=THREADS, help=f"of ours and of its peers (default: {THREADS})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go (default: stdout's last line)")
    return parser


def _quoted(values: Iterable[object]) -> str:
    return ", ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.json is not None:
        check_writable(arguments.json)
    chosen = {case: lengths for case, lengths in CASES.items() if case in (arguments.case or CASES)}
    cpu = processor()
    found = shown(rows(chosen, arguments.items or ITEMS, arguments.threads), cpu)
    for who, reason in absent(*PACKAGES).items():
        print(f"{who}: {reason}")
    facts = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "instruction_sets": _C.instruction_sets(),
        "compiler": _C.compiler,
        "versions": {package: version(package) for package in ("torch", *PACKAGES)},
        "rows": [row.as_dict(cpu) for row in found],
    }
    if arguments.json is None:
        print(json.dumps(facts))
        return 0
    with replacing(arguments.json) as part:
        part.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.run(main)

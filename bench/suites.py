"""The suites of `bench/run.py`: each yields rows, ours and the peers' of one run, and says which peers are absent."""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import cpu as cpu_bench
from bench import score_topk as topk_bench
from bench.latency import full_length, padded, random_checkpoint, real, step_of
from bench.measure import COLD, HOST, WARM, Row, Time, host_us, time_us
from bench.peers import (
    Answer,
    Captured,
    Eager,
    OnePass,
    absent,
    compiled,
    faiss_flat,
    faiss_ivf,
    overlap,
    why_no_faiss_gpu,
)
from bench.sampling import DiffuRec, FMRec, Lists
from bench.verify import answers_are_the_steps, step_is_right
from fave_fast.config import Config
from fave_fast.data import Interactions, load_interactions
from fave_fast.engine import Recommender
from fave_fast.graphs import Histories, Step
from fave_fast.model import DTYPES, FAVE
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.byte_table import ByteTable

K, LENGTH, D = 20, 50, 128
LEAST_APPROXIMATE = 50_000  # items, for an approximate index
_PLACES = {"cpu": "CPU", "cuda": "GPU"}
LEAST_OVERLAP = 0.7  # of a peer's lists in 16 bits with ours: near-ties change places, and a wrong network shares none
MODES = ("default", "reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Options:
    """What a run was asked for."""

    device: torch.device
    dtype: str
    batches: tuple[int, ...]
    items: tuple[int, ...]
    compiled: tuple[str, ...]  # modes of torch.compile
    logs: tuple[Path, ...] = ()
    seconds: float = 1.0  # of repeats, for each row that the host times
    backend: str = "auto"
    absent: dict[str, str] = field(default_factory=dict)  # filled in: who is not measured, and why
    say: Callable[[str], None] = print

    @property
    def on_gpu(self) -> bool:
        """Whether the rows are a GPU's."""
        return self.device.type == "cuda"

    def data(self) -> dict[str, Interactions]:
        """The logs by name."""
        return {path.stem: load_interactions(path) for path in self.logs}


Suite = Callable[[Options], Iterator[Row]]
Asked = dict[str, tuple[list[Histories], tuple[Any, Any]]]  # requests by case, and our answer to the first


# One request: histories on the host to lists on the host.


def latency(options: Options) -> Iterator[Row]:
    """`Recommender.best_items` and what else answers such requests, one after the other; then many callers."""
    logs = {name: Histories(log.items, log.offsets) for name, log in options.data().items()}
    for items in options.items:
        checkpoint = random_checkpoint(items)
        recommender = Recommender(
            checkpoint, device=options.device, dtype=DTYPES[options.dtype], backend=options.backend
        )
        model = checkpoint.build_model().to(options.device, DTYPES[options.dtype]).eval()
        step = step_of(model, options.backend)
        seconds = recommender.warmup(K, sorted(options.batches))
        for batch in options.batches:
            cases = {f"{LENGTH} items": full_length(batch, items)}
            cases |= {f"as in {name}": real(batch, *log) for name, log in logs.items() if log.ids.max() <= items}
            asked: Asked = {}
            for name, requests in cases.items():
                case = f"B {batch}, N {items}, {name}"
                for request in requests[:2]:
                    step_is_right(model, step, request, K)
                    answers_are_the_steps(recommender, step, request, K)
                who = f"fave_fast {options.dtype}"
                yield _requests(case, who, _engine(recommender, requests), options, seconds)
                if options.on_gpu:
                    yield from _on_the_device(step, case, requests[0])
                asked[case] = requests, recommender.best_items(*requests[0], K)
            yield from _peers(model, batch, asked, options)
        yield from _saturated(recommender, items, logs, options)
        del recommender, model, step
        _empty()


def _engine(recommender: Recommender, requests: list[Histories]) -> Callable[[int], object]:
    return lambda at: recommender.best_items(*requests[at % len(requests)], K)


def _requests(
    case: str, who: str, call: Callable[[int], object], options: Options, prepared: float | None = None
) -> Row:
    least = 20 if options.seconds >= 0.1 else 2
    return Row("request", case, who, host_us(call, options.seconds, least), clock=HOST, prepared_s=prepared)


def _on_the_device(step: Step, case: str, request: Histories) -> Iterator[Row]:
    """The same kernels without the host: what of a request is the device's."""
    ids, offsets = (torch.from_numpy(part).to(step.table.device) for part in request)
    exclude = Exclusions(ids, offsets)
    plan = step.plan(len(offsets) - 1)
    for clock in (COLD, WARM):
        spent = time_us(lambda: step(ids, offsets, exclude, K, plan=plan), 50, clock=clock)
        yield Row("step", case, f"fave_fast {step.backend}", spent, clock=clock)


@dataclass(frozen=True)
class _Peer:
    """One peer, not made yet."""

    who: str
    make: Callable[[], tuple[Answer, float | None]]
    same_answer: bool = True  # as ours, but for rounding
    fixed: bool = False  # takes histories of the longest length alone; others are padded to the longest of a batch


def _peers(model: FAVE, batch: int, asked: Asked, options: Options) -> Iterator[Row]:
    """Each peer is made once and gets the requests of all cases."""
    narrow = {case: [padded(one, LENGTH).numpy() for one in requests] for case, (requests, _) in asked.items()}
    wide = {case: [np.pad(one, ((0, 0), (LENGTH - one.shape[1], 0))) for one in some] for case, some in narrow.items()}
    for peer in _contenders(model, batch, options):
        grids = wide if peer.fixed else narrow
        try:
            answer, prepared = peer.make()
            shares = [overlap(answer(some[0]), asked[case][1]) for case, some in grids.items()]
        except Exception as error:  # a compiler or a library may fail in ways of its own; the others go on
            lines = str(error).splitlines() or [""]
            options.absent[f"{peer.who}, B {batch}"] = f"{type(error).__name__}: {lines[0][:200]}"
            continue
        if peer.same_answer and min(shares) < LEAST_OVERLAP:
            reason = f"not timed: its lists share {min(shares):.0%} of their items with ours"
            options.absent[f"{peer.who}, B {batch}"] = reason
            continue
        for case, some in grids.items():
            ask = lambda at, answer=answer, some=some: answer(some[at % len(some)])  # noqa: E731
            yield _requests(case, peer.who, ask, options, prepared)
        del answer, ask
        torch._dynamo.reset()
        _empty()


def _contenders(model: FAVE, batch: int, options: Options) -> Iterator[_Peer]:
    flow, table = Config().flow, model.item_embedding.weight.detach()
    one_pass = Lists(OnePass(model, flow), table, K).eval()
    yield _Peer(f"PyTorch eager {options.dtype}", lambda: (Eager(one_pass, options.device), None))
    if options.on_gpu:
        yield _Peer(f"PyTorch in a CUDA graph {options.dtype}", lambda: _timed(one_pass, batch), fixed=True)
    for mode in options.compiled:
        make = functools.partial(compiled, model, flow, K, LENGTH, mode, batch)
        yield _Peer(f"torch.compile {mode}", make, fixed=True)
    for name, sampler in (("FMRec, 30 steps", FMRec(model)), ("DiffuRec, 32 steps", DiffuRec(model))):
        lists = Lists(sampler, table, K).eval()
        yield _Peer(f"{name}, eager", lambda lists=lists: (Eager(lists, options.device), None), same_answer=False)
        if options.on_gpu:
            graph = functools.partial(_timed, lists, batch)
            yield _Peer(f"{name}, in a CUDA graph", graph, same_answer=False, fixed=True)


def _timed(step: torch.nn.Module, batch: int) -> tuple[Answer, float]:
    started = time.perf_counter()
    answer = Captured(step, batch, LENGTH)
    return answer, time.perf_counter() - started


def _saturated(recommender: Recommender, items: int, logs: dict[str, Histories], options: Options) -> Iterator[Row]:
    """Users a second when 1 and 4 threads ask for one batch after the other; the row's time is that of one batch."""
    for batch in options.batches:
        cases = {f"{LENGTH} items": full_length(batch, items)}
        cases |= {f"as in {name}": real(batch, *log) for name, log in logs.items() if log.ids.max() <= items}
        for name, requests in cases.items():
            for callers in (1, 4):
                each = _share(recommender, requests, callers, options.seconds)
                case = f"B {batch}, N {items}, {name}, {callers} callers"
                yield Row("saturated", case, f"fave_fast {options.dtype}", Time(each, each, each, each), clock=HOST)


def _share(recommender: Recommender, requests: list[Histories], callers: int, seconds: float) -> float:
    """Microseconds a batch, all callers together."""
    counts = [0] * callers
    until = time.perf_counter() + seconds

    def ask(caller: int) -> None:
        at = caller
        while time.perf_counter() < until:
            recommender.best_items(*requests[at % len(requests)], K)
            counts[caller] += 1
            at += 1

    started = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1e6 * (time.perf_counter() - started) / sum(counts)


# The exact top K alone.


def topk(options: Options) -> Iterator[Row]:
    """Exact top 20 of random catalogues: ours, a product and topk, FlashInfer, FAISS."""
    options.absent.update(absent("faiss", "flashinfer"))
    reason = why_no_faiss_gpu() if options.on_gpu else None
    if reason is not None:
        options.absent["FAISS on a GPU"] = reason
    for items in options.items:
        batches = options.batches if not options.on_gpu else _gpu_batches(items, options.batches)
        rows = _gpu_topk(items, batches, options) if options.on_gpu else _cpu_topk(items, batches, options)
        yield from rows
        _empty()


def _gpu_batches(items: int, batches: Sequence[int]) -> Sequence[int]:
    return [batch for batch in batches if batch * items <= 6 * 10**9]  # scores of a peer: 12 GB in 16 bits


def _gpu_topk(items: int, batches: Sequence[int], options: Options) -> Iterator[Row]:
    table = topk_bench.catalogue(items)
    table_bytes = topk_bench.packed(table)
    for clock in (COLD, WARM):
        for batch in batches:
            yield from topk_bench.measure(batch, table, clock, table_bytes)
    yield from _faiss(table, batches, f"N {items}, bfloat16", options, "cuda" if why_no_faiss_gpu() is None else "cpu")


def _cpu_topk(items: int, batches: Sequence[int], options: Options) -> Iterator[Row]:
    dtype = DTYPES[options.dtype]
    source = torch.Generator().manual_seed(0)
    table = torch.randn(items + 1, D, generator=source).to(dtype)
    started = time.perf_counter()
    packed = ByteTable.pack(table)
    seconds = time.perf_counter() - started
    for batch in batches:
        queries = torch.randn(batch, D, generator=source).to(dtype)
        signs = queries.sign(), table.sign()  # sums are exact in any order
        want = score_topk(*signs, K, backend="reference")
        found = score_topk(*signs, K, backend=options.backend)
        if not (torch.equal(want[0], found[0]) and torch.equal(want[1], found[1])):
            raise AssertionError(f"lists of {batch} rows among {items} items are not the reference's")
        plain = score_topk(queries, table, K, backend=options.backend)
        certified = score_topk(queries, table, K, table_bytes=packed, backend=options.backend)
        if not (torch.equal(plain[0], certified[0]) and torch.equal(plain[1], certified[1])):
            raise AssertionError("the certified lists are not the plain ones")
        case = f"B {batch}, N {items}, {str(dtype).removeprefix('torch.')}"
        floor = {"floor_bytes": (items + batch) * D * dtype.itemsize, "floor_operations": 2 * batch * items * D}
        for who, table_bytes in (("cpp", None), ("cpp, bytes", packed)):
            spent = host_us(
                lambda _, q=queries, b=table_bytes: score_topk(q, table, K, table_bytes=b, backend=options.backend),  # type: ignore[misc]
                options.seconds,
            )
            yield Row(
                "score_topk", case, who, spent, **floor, clock=HOST, prepared_s=None if table_bytes is None else seconds
            )
        spent = host_us(lambda _, q=queries: (q @ table[1:].T).topk(K), options.seconds)  # type: ignore[misc]
        yield Row("score_topk", case, "torch.mm + topk", spent, **floor, clock=HOST)
    yield from _faiss(table, batches, f"N {items}, {str(dtype).removeprefix('torch.')}", options, "cpu")


def _faiss(table: torch.Tensor, batches: Sequence[int], case: str, options: Options, device: str) -> Iterator[Row]:
    """FAISS's flat index and an approximate one, queries and lists on the host, as it takes and gives them.

    Random vectors, as here, are the worst case of an approximate index: their neighbours lie in no few cells.
    """
    if absent("faiss"):
        return
    if table.nbytes > 2 << 30:
        options.absent[f"FAISS, {case}"] = "not asked: its copy would take more than 2 GiB"
        return
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    made: list[tuple[str, Callable[[], Any], int]] = [
        (f"flat, {_PLACES[device]}", lambda: faiss_flat(table, device), 0)
    ]
    if len(table) > LEAST_APPROXIMATE:
        cells = round(4 * len(table) ** 0.5)
        made.append((f"IVF of {cells} cells", lambda: faiss_ivf(table, cells), cells))
    for name, make, cells in made:
        started = time.perf_counter()
        index = make()
        seconds = time.perf_counter() - started
        for searched in (cells // 64, cells // 8) if cells else (0,):
            if searched:
                index.nprobe = searched
            who = f"FAISS {name}" + (f", {searched} searched" if searched else "")
            for batch in batches:
                yield from _searched(index, table, batch, case, who, options, seconds, exact=cells == 0)
    if table.is_cuda:
        for batch in batches:
            asked = _queries(batch)

            # On the same clock: from queries on the host to lists on the host.
            def ours(_: int, asked: np.ndarray = asked) -> object:
                best = score_topk(torch.from_numpy(asked).to(table.device, table.dtype), table, K)
                return best[0].cpu(), best[1].cpu()

            yield Row("score_topk", f"B {batch}, {case}", "triton", host_us(ours, options.seconds), clock=HOST)


def _queries(batch: int) -> np.ndarray:
    """Float32 that bf16 holds exactly."""
    return torch.randn(batch, D, generator=torch.Generator().manual_seed(2)).bfloat16().float().numpy()


def _searched(
    index: Any, table: torch.Tensor, batch: int, case: str, who: str, options: Options, seconds: float, exact: bool
) -> Iterator[Row]:
    asked = _queries(batch)
    scores, items = score_topk(torch.from_numpy(asked).to(table.device, table.dtype), table, K)
    found = index.search(asked, K)
    shared = overlap((found[0], found[1] + 1), (scores.cpu().numpy(), items.cpu().numpy()))
    if exact and shared < LEAST_OVERLAP:
        options.absent[f"{who}, {case}"] = f"not timed: its lists share {shared:.0%} of their items with ours"
        return
    spent = host_us(lambda _: index.search(asked, K), options.seconds, least=5)
    recall = None if exact else shared
    yield Row("score_topk", f"B {batch}, {case}", who, spent, clock=HOST, prepared_s=seconds, recall=recall)


# Training, the CPU, quality.


def training(options: Options) -> Iterator[Row]:
    """A step of either stage; the row's time is that of one step, its percentiles those of whole rounds of steps."""
    from bench import training as training_bench

    yield from training_bench.rows(
        options.logs[0] if options.logs else None, options.seconds, options.device, options.absent
    )


def cpu(options: Options) -> Iterator[Row]:
    """A whole step on the CPU in both dtypes, beside PyTorch, ONNX Runtime and OpenVINO: `bench/cpu.py`."""
    options.absent.update(absent(*cpu_bench.PACKAGES))
    cases = {name: lengths for name, lengths in cpu_bench.CASES.items() if len(lengths) in options.batches}
    yield from cpu_bench.rows(cases, options.items)


SUITES: dict[str, Suite] = {"latency": latency, "topk": topk, "training": training, "cpu": cpu}


def _empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

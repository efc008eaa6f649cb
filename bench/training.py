"""A training step of either stage: microseconds, and device memory at its peak.

`python -m bench.training [--data FILE [--preset NAME ...]]`, meant for a GPU. Case `L 50` is B = 512 histories of 50
items, 12,101 items, four blocks, dropout 0.3, bf16; case `Beauty` the full batches of an epoch of its log, the network
the same, and with the name of a preset the same log by the preset's network. A step is
everything from the windows' places on the host to changed weights; times are wall-clock over rounds of steps, the
device waited for at the end of each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cpu import processor
from bench.measure import Row, Time
from fave_fast import dual, losses
from fave_fast.config import Config, preset
from fave_fast.data import IdMap, Interactions, Windows, load_interactions, split
from fave_fast.fused import Network
from fave_fast.model import FAVE, Prediction
from fave_fast.ops import pack_windows
from fave_fast.steps import FusedSteps, ReferenceSteps, Steps
from fave_fast.train import epoch_batches, make_optimiser

B, L, N = 512, 50, 12_101
CLOCK = "wall clock, over rounds of steps"
PEERS = ("torch.func.jvp", "compiled dual", "torch.compile")
Batch = tuple[np.ndarray, np.ndarray]


def full_length(n: int = N) -> tuple[Interactions, Config, list[Batch]]:
    """Random histories of L items before each target."""
    generator = np.random.default_rng(0)
    users = 4 * B
    items = generator.integers(1, n + 1, users * (L + 1)).astype(np.int32)
    offsets = np.arange(users + 1) * (L + 1)
    ids = IdMap(np.arange(1, n + 1))
    data = Interactions(items, offsets, ids, IdMap(np.arange(users)), None, "random", ())
    starts = offsets[:-1].reshape(-1, B)
    return data, Config(), [(part, part + L) for part in starts]


def real(path: Path, config: Config) -> tuple[Interactions, Config, list[Batch]]:
    """The full batches of an epoch of Beauty."""
    data = load_interactions(path)
    windows = Windows(data.offsets, split(data, config.data).train_end)
    numbers = epoch_batches(data, windows, config, (0, 1, 0))
    return data, config, [windows.positions(part) for part in numbers if len(part) == B]


def make(kind: str, stage: int, data: Interactions, config: Config, device: torch.device) -> Steps:
    torch.manual_seed(0)
    model = FAVE(config.model, data.num_items).to(device).train()
    model.item_embedding.weight.requires_grad_(stage == 1)
    fused = kind.startswith("fused")
    dtype = torch.float32 if kind.endswith("fp32") else torch.bfloat16
    options = data, config, model, make_optimiser(model, 1e-3, 0.0, captured=fused), stage, dtype
    if fused:
        return FusedSteps(*options, backend="triton", capture=kind != "fused, no graph")
    return ReferenceSteps(*options)


def jvp(
    model: FAVE, history: Tensor, x_t: Tensor, t: Tensor, r: Tensor, lam: Tensor, v: Tensor
) -> tuple[Prediction, Tensor]:
    embedded = model.embed_history(history)

    def endpoint_of(x_t: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        prediction = model.encode(model.modulate(embedded, x_t, t, r, lam), model.present(history), forward_mode=True)
        return prediction.endpoint, prediction.source

    with sdpa_kernel(SDPBackend.MATH):
        result: Any = torch.func.jvp(
            endpoint_of, (x_t, t, r), (v, torch.ones_like(t), torch.zeros_like(r)), has_aux=True
        )
    return Prediction(result[0], result[2]), result[1]


def measure(steps: Steps, batches: list[Batch], seconds: float) -> tuple[Time, int | None]:
    """A step's time, over rounds of all batches, and bytes at the peak.

    None for captured steps, whose memory the allocator does not count, and on a CPU.
    """
    on_gpu = torch.cuda.is_available()
    captured = isinstance(steps, FusedSteps) and steps.capture
    # Twice over what is to be timed: once to compile, once to capture.
    for _ in range(2 if on_gpu else 1):
        for seed, batch in enumerate(batches):
            steps.take(*batch, seed)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun, times = time.perf_counter(), []
    while not times or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        for seed, batch in enumerate(batches):
            loss = steps.take(*batch, seed)
        float(loss)  # the device is done
        times.append(1e6 * (time.perf_counter() - started) / len(batches))
    return Time.of(times), torch.cuda.max_memory_allocated() if on_gpu and not captured else None


def check() -> None:
    """No time counts unless the fused losses and their gradients equal the reference's in fp64, by twice its error."""
    config = Config.from_dict({"model": {"dropout": 0, "embedding_dropout": 0}}, "bench")
    data, _, batches = full_length()
    starts, ends = (torch.from_numpy(part[:64]).cuda() for part in batches[0])
    ends = torch.minimum(ends, starts + torch.arange(1, 65, device="cuda").clamp_max(L))
    torch.manual_seed(0)
    model = FAVE(config.model, N).cuda().train()
    items = torch.from_numpy(data.items).cuda()
    packed = pack_windows(items, starts, ends, L, 4096, 40)
    x, v = torch.randn(2, 64, 128, device="cuda")
    t = torch.rand(64, device="cuda")
    lam = 0.01 * torch.randn(4096, 128, device="cuda")
    grid = torch.arange(L - 1, -1, -1, device="cuda")
    rows = packed.offsets[1:65, None] - 1 - grid
    history = torch.where(grid < (ends - starts)[:, None], packed.ids[rows.clamp_min(0)], 0)

    def everything(kind: str) -> list[Tensor]:
        wide = torch.float64 if kind == "oracle" else torch.float32
        model.to(wide)
        inputs = [one.to(wide) for one in (x, t, (1 + t) / 2)]
        if kind == "fused":
            network = Network(model, packed, torch.tensor([1], device="cuda"), torch.bfloat16, lam=lam)
            prediction, tangent = network.predict_with_tangent(*inputs, v)
        else:
            grid_lam = lam[rows.clamp_min(0)].to(wide)
            with torch.autocast("cuda", torch.bfloat16, enabled=kind != "oracle"):
                prediction, tangent = dual.predict(model, history, *inputs, grid_lam, v.to(wide))
        loss = prediction.endpoint.square().sum() + prediction.source.to(wide).square().sum() + tangent.square().sum()
        leaves = [one for name, one in model.named_parameters() if not name.startswith("history_decoder")]
        return [prediction.endpoint, prediction.source, tangent, *torch.autograd.grad(loss, leaves)]

    want = everything("oracle")
    errors = {
        kind: [((a.double() - b).norm() / b.norm()).item() for a, b in zip(everything(kind), want, strict=True)]
        for kind in ("fused", "reference")
    }
    print("relative errors against fp64, fused / reference:")
    print(", ".join(f"{a:.1e}/{b:.1e}" for a, b in zip(*errors.values(), strict=True)))
    if not max(errors["fused"]) <= 2 * max(errors["reference"]):
        raise AssertionError("the fused network differs from the reference")


def profile(steps: Steps, batch: Batch, times: int = 5) -> str:
    """The kernels of a step and what each takes."""
    for _ in range(3):
        steps.take(*batch, 0)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            steps.take(*batch, 0)
        torch.cuda.synchronize()
    events = [one for one in profiled.key_averages() if one.self_device_time_total > 0]
    spent = sorted(events, key=lambda event: -event.self_device_time_total)
    total, count = sum(one.self_device_time_total for one in spent) / times, sum(one.count for one in spent) // times
    lines = [
        f"  {one.self_device_time_total / times:8.1f} us x{one.count / times:5.1f}  {one.key[:70]}"
        for one in spent[:90]
    ]
    return "\n".join([f"{count} kernels, {total:.0f} us of the device", *lines])


def cases(
    data: Path | None, presets: Sequence[str] = ()
) -> Iterator[tuple[str, tuple[Interactions, Config, list[Batch]]]]:
    """The paper's network, four blocks and 50 items; and the presets' networks."""
    yield "L 50", full_length()
    if data is not None:
        yield "Beauty", real(data, Config())
        for name in presets:
            yield name, real(data, preset(name))


def rows(
    data: Path | None,
    seconds: float,
    device: torch.device,
    absent: dict[str, str],
    only: Sequence[str] | None = None,
    presets: Sequence[str] = (),
) -> Iterator[Row]:
    """Every case, stage and contender; who cannot run is entered in `absent` with its reason.

    On a CPU, where nothing of the fused path runs, smaller batches through the reference network.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        check()
    else:
        absent["fused"] = "its steps are captured in CUDA graphs, and this is a CPU"

    def row(case: str, stage: int, who: str, steps: Steps, batches: list[Batch]) -> Iterator[Row]:
        case = f"B {len(batches[0][0])}, {case}, stage {stage}"
        if only is not None and who not in only:
            return
        started = time.perf_counter()
        try:
            spent, memory = measure(steps, batches, seconds)
        except Exception as error:  # a peer that does not run says so
            absent[f"{who}, {case}"] = f"{type(error).__name__}: {str(error)[:300]}"
            return
        seconds_before = time.perf_counter() - started - seconds
        named = who if on_gpu or who in PEERS else f"fave_fast {who}"
        yield Row("training_step", case, named, spent, clock=CLOCK, prepared_s=seconds_before, peak_bytes=memory)

    made = list(cases(data, presets)) if on_gpu else [("L 50", full_length())]
    kinds = ("fused", "fused, no graph", "eager", "fused, fp32", "eager, fp32") if on_gpu else ("eager", "eager, fp32")
    for case, (log, config, batches) in made:
        for stage in (1, 2):
            for who in kinds:
                some = batches if who == "fused" or who == "fused, fp32" else batches[:8]
                yield from row(case, stage, who, make(who, stage, log, config, device), _some(some, device))
    if on_gpu:
        log, config, batches = full_length(1_000_000)
        yield from row("L 50, N 1000000", 1, "fused", make("fused", 1, log, config, device), batches)
    log, config, batches = made[0][1]
    explicit, plain = losses.predict_with_tangent, "eager" if on_gpu else "eager, fp32"
    forms: dict[str, Callable[..., Any]] = {"torch.func.jvp": jvp, "compiled dual": torch.compile(dual.predict)}
    for who, form in forms.items():
        losses.predict_with_tangent = form
        try:
            yield from row("L 50", 2, who, make(plain, 2, log, config, device), _some(batches, device))
        finally:
            losses.predict_with_tangent = explicit
    steps = make(plain, 1, log, config, device)
    assert isinstance(steps, ReferenceSteps)
    steps.model.forward = torch.compile(steps.model.forward)
    yield from row("L 50", 1, "torch.compile", steps, _some(batches, device))


def _some(batches: list[Batch], device: torch.device) -> list[Batch]:
    """All of them, on a CPU the first users of one."""
    return batches if device.type == "cuda" else [(batches[0][0][:32], batches[0][1][:32])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="Beauty's log")
    parser.add_argument("--preset", action="append", default=[], help="the network of this preset on that log, too")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each timing")
    parser.add_argument("--only", help="leave out who is not among these, a / between two")
    parser.add_argument("--profile", action="store_true", help="list the kernels of steps launched one by one instead")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.profile:
        for case, (log, config, batches) in cases(arguments.data, arguments.preset):
            for stage in (1, 2):
                for who in ("fused, no graph", "eager"):
                    print(f"{case}, stage {stage}, {who}:")
                    print(profile(make(who, stage, log, config, device), batches[0]), flush=True)
        return
    absent: dict[str, str] = {}
    found = []
    only = arguments.only and arguments.only.split("/")
    for row in rows(arguments.data, arguments.seconds, device, absent, only, arguments.preset):
        found.append(row)
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:6.2f} GiB"
        print(f"{row.case:28} {row.who:24} {row.time.median:10.0f} us a step {peak}", flush=True)
    for who, reason in absent.items():
        print(f"{who}: {reason}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    print(json.dumps({"device": where, "rows": [row.as_dict(where) for row in found]}))


if __name__ == "__main__":
    main()

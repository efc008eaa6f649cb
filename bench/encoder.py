"""The encoder beside PyTorch in bf16, eager and compiled; `python -m bench.encoder`."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.measure import COLD, WARM, Row, shown, time_us
from fave_fast.config import FlowConfig, ModelConfig
from fave_fast.flow import InferenceNoise
from fave_fast.model import FAVE
from fave_fast.ops.encoder import OP, EncoderWeights, InputPath, Plan, encode, encode_ids

ITEMS = 12_101
LENGTH = 50
BATCHES = (1, 64, 128, 256, 512, 4096)
COMPILED = (512,)
BEAUTY = (128, 256, 512, 4096, 16_384)
SMALL = (1, 8, 16, 32, 64)  # batches of the kernels for Hopper
SMALL_LENGTHS = (9, 50)


def operations(lengths: Tensor, config: ModelConfig) -> int:
    """Floating-point operations of histories of `lengths`, the last block's as if only the newest row were answered."""
    d, n = config.d, lengths.double()
    dense = (4 + 2 * config.ffn_mult) * d * d
    whole = n * dense + 2 * n * n * d
    last = 2 * n * d * d + (dense - 2 * d * d) + 2 * n * d
    return int(2 * ((config.blocks - 1) * whole + last).sum())


def beauty_like(batch: int) -> Tensor:
    """Lengths from 3 to 50 with the mean of Amazon Beauty's histories, 8."""
    drawn = 2 + np.random.default_rng(0).geometric(1 / 6.1, batch)
    return torch.from_numpy(np.clip(drawn, 3, LENGTH)).cuda()


def offsets_of(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))


class Bench:
    """One model, its packed weights, and the same model in float64."""

    def __init__(self, peers: bool) -> None:
        torch.manual_seed(0)
        self.peers = peers
        self.flow = FlowConfig()
        self.model = FAVE(ModelConfig(), ITEMS).cuda().bfloat16().eval()
        self.weights = EncoderWeights.pack(self.model)
        self.path = InputPath.pack(self.model, self.flow, InferenceNoise.draw(self.model, self.flow))
        self.oracle = EncoderWeights.pack(copy.deepcopy(self.model).double())

    def backends(self, *wanted: str) -> list[str]:
        """Those of them that run here."""
        refusals = OP.refusals(torch.device("cuda"), torch.bfloat16)
        return [backend for backend in wanted if refusals[backend] is None]

    def check(self, e: Tensor, offsets: Tensor, got: Tensor) -> None:
        """At most twice the error of eager bf16, against float64."""
        want = encode(self.oracle, e.double(), offsets, backend="reference")
        usual = encode(self.weights, e, offsets, backend="reference")
        if not (got - want).norm() <= 2 * (usual - want).norm():
            raise AssertionError(f"{len(got)} endpoints are not the network's")

    def row(
        self, case: str, who: str, call: Callable[[], object], lengths: Tensor, graph: bool = True, clock: str = COLD
    ) -> Row:
        count, size = operations(lengths, self.model.config), self.weights.matrices.nbytes
        return Row("encoder", case, who, time_us(call, 25, graph, clock), size, count, clock)

    def uniform(self, batch: int) -> Iterator[Row]:
        """All histories of the longest length: from E, from ids, and PyTorch from E."""
        lengths = torch.full((batch,), LENGTH, device="cuda")
        offsets, case = offsets_of(lengths), f"B {batch}, L {LENGTH}"
        e = torch.randn(batch * LENGTH, self.model.config.d, device="cuda").bfloat16()
        ids = torch.randint(1, ITEMS + 1, (batch * LENGTH,), device="cuda")
        out = torch.empty(batch, e.shape[1], dtype=e.dtype, device="cuda")
        yield self.row(case, "triton, E", lambda: encode(self.weights, e, offsets, out=out, backend="triton"), lengths)
        for backend in self.backends("triton", "tile"):
            self.check(e, offsets, encode(self.weights, e, offsets, backend=backend))
            call = partial(encode_ids, self.weights, self.path, ids, offsets, out=out, backend=backend)
            yield self.row(case, f"{backend}, ids", call, lengths)
        if not self.peers:
            return
        grid, present = e.view(batch, LENGTH, -1), torch.ones(batch, LENGTH, dtype=torch.bool, device="cuda")
        with torch.no_grad():
            # Without a graph, as plain PyTorch is run; and with one, which spares it the launches.
            yield self.row(case, "eager", lambda: self.model.encode(grid, present).endpoint, lengths, graph=False)
            yield self.row(case, "eager in a graph", lambda: self.model.encode(grid, present).endpoint, lengths)
            if batch in COMPILED:
                compiled = torch.compile(self.model.encode, mode="reduce-overhead")
                yield self.row(case, "compile reduce-overhead", lambda: compiled(grid, present), lengths, graph=False)

    def small(self, batch: int, length: int) -> Iterator[Row]:
        """The kernels for Hopper beside Triton's, from ids, with a cold L2 cache and with the last run's."""
        lengths = torch.full((batch,), length, device="cuda")
        offsets, case = offsets_of(lengths), f"B {batch}, L {length}"
        e = torch.randn(batch * length, self.model.config.d, device="cuda").bfloat16()
        ids = torch.randint(1, ITEMS + 1, (batch * length,), device="cuda")
        out = torch.empty(batch, e.shape[1], dtype=e.dtype, device="cuda")
        for backend in self.backends("cpp", "pair", "triton"):
            self.check(e, offsets, encode(self.weights, e, offsets, backend=backend))
            name = "cluster" if backend == "cpp" else backend
            call = partial(encode_ids, self.weights, self.path, ids, offsets, out=out, backend=backend)
            yield self.row(case, f"{name}, ids", call, lengths)
            yield self.row(case, f"{name}, ids, warm L2", call, lengths, clock=WARM)

    def beauty(self, batch: int) -> Iterator[Row]:
        """Histories as short as Beauty's, planned, from ids."""
        lengths = beauty_like(batch)
        offsets, case = offsets_of(lengths), f"B {batch}, mean L {lengths.double().mean():.1f}"
        ids = torch.randint(1, ITEMS + 1, (int(offsets[-1]),), device="cuda")
        out = torch.empty(batch, self.model.config.d, dtype=torch.bfloat16, device="cuda")
        plan = Plan.of(lengths).trimmed()
        for backend in self.backends("triton", "tile"):
            call = partial(encode_ids, self.weights, self.path, ids, offsets, plan=plan, out=out, backend=backend)
            yield self.row(case, f"{backend}, ids, planned", call, lengths)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("small", "uniform", "beauty"), help="which groups of batches")
    parser.add_argument("--no-peers", action="store_true", help="leave PyTorch out")
    arguments = parser.parse_args(argv)
    gpu, bench = torch.cuda.get_device_name(), Bench(peers=not arguments.no_peers)
    groups = {
        "small": [bench.small(batch, length) for batch in SMALL for length in SMALL_LENGTHS],
        "uniform": [bench.uniform(batch) for batch in BATCHES],
        "beauty": [bench.beauty(batch) for batch in BEAUTY],
    }
    chosen = [group for name, some in groups.items() if name in (arguments.only or groups) for group in some]
    rows = shown(itertools.chain.from_iterable(chosen), gpu)
    print(json.dumps({"gpu": gpu, "rows": [row.as_dict(gpu) for row in rows]}))


if __name__ == "__main__":
    main()

"""input_modulation beside PyTorch, eager and compiled; `python -m bench.input_modulation`.

Floors count the gathered row, E, and lambda where it is given, at two bytes a channel, although a small catalogue's
rows come from the L2 cache. What is written is half of that and more, and would fit into the cache: before each call it
is full of writes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn import functional as F

from bench.measure import DIRTY, Row, shown, time_us
from fave_fast.config import ModelConfig
from fave_fast.model import FAVE
from fave_fast.ops.input_modulation import (
    Drawn,
    Draws,
    Times,
    constant_time_features,
    input_modulation,
    input_modulation_dual,
)

D, LENGTH, ITEMS, DELTA = 128, 50, 12_101, 0.001
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Inputs:
    """One batch of full histories: padded [B, L] and packed are the same memory."""

    model: FAVE
    history: Tensor
    offsets: Tensor
    x_t: Tensor
    dx_t: Tensor
    t: Tensor
    r: Tensor
    lam: Tensor
    draws: Draws
    z: Tensor

    @classmethod
    def make(cls, count: int) -> Inputs:
        source = torch.Generator("cuda").manual_seed(0)
        torch.manual_seed(0)
        config = ModelConfig(d=D, blocks=2, max_length=LENGTH, embedding_dropout=0.0)
        model = FAVE(config, ITEMS).to("cuda", DTYPE)
        history = torch.randint(1, ITEMS + 1, (count, LENGTH), device="cuda", generator=source)
        x_t, dx_t = torch.randn(2, count, D, device="cuda", generator=source).to(DTYPE)
        x_t = x_t.clone().requires_grad_()
        t, u = torch.rand(2, count, device="cuda", generator=source)
        lam = model.draw_lambda((count, LENGTH, D), torch.device("cuda"), source).to(DTYPE)
        draws = Draws(torch.tensor([1], device="cuda"), torch.arange(count, device="cuda"))
        offsets = torch.arange(count + 1, device="cuda") * LENGTH
        z = constant_time_features(model)
        return cls(model, history, offsets, x_t, dx_t, t, t + u * (1 - t), lam, draws, z)

    @property
    def parameters(self) -> list[Tensor]:
        embedding = self.model.time_embedding
        return [
            self.model.item_embedding.weight, self.model.embedding_norm.weight, self.model.embedding_norm.bias,
            embedding.hidden.weight, embedding.hidden.bias, embedding.out.weight, embedding.out.bias,
        ]  # fmt: skip

    def ours(self, lam: str, z: str, packed: bool, dual: bool, **options: object) -> tuple[Tensor, ...]:
        ids = self.history.view(-1) if packed else self.history
        chosen = {"constant": DELTA, "drawn": Drawn(DELTA), "given": self.lam.view(-1, D) if packed else self.lam}[lam]
        weight, norm_weight, norm_bias, *times = self.parameters
        time = self.z if z == "given" else Times(self.t, self.r, *times)
        options |= {"offsets": self.offsets if packed else None, "draws": self.draws, "backend": "triton"}
        arguments = (ids, weight, norm_weight, norm_bias, self.x_t)
        if dual:
            return input_modulation_dual(*arguments, self.dx_t, time, chosen, **options)  # type: ignore[arg-type]
        return (input_modulation(*arguments, time, chosen, **options),)  # type: ignore[arg-type]

    def lambda_of(self, kind: str) -> Tensor | float:
        if kind == "drawn":
            return self.model.draw_lambda(tuple(self.lam.shape), self.lam.device, None).to(DTYPE)
        return self.lam if kind == "given" else DELTA

    def plain(self, lam: str, z: str, dual: bool) -> tuple[Tensor, ...]:
        """The network's own code; its tangent written out, for torch.compile loses one through torch.func.jvp."""
        embedded, chosen = self.model.embed_history(self.history), self.lambda_of(lam)
        if not dual:
            features = self.z.to(DTYPE) if z == "given" else self.model.time_features(self.t, self.r)
            return (embedded + chosen * (self.x_t + features)[:, None],)
        first, dfirst = self.time_dual(self.t)
        second, dsecond = self.time_dual(self.r - self.t)
        value = embedded + chosen * (self.x_t + first + second)[:, None]
        return value, chosen * (self.dx_t + dfirst - dsecond)[:, None]

    def time_dual(self, t: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.model.time_embedding
        exponents = torch.arange(D // 2, device=t.device) / (D // 2)
        frequencies = embedding.scale * 10_000.0**-exponents
        angles = t[:, None] * frequencies
        waves = torch.cat((angles.cos(), angles.sin()), -1).to(DTYPE)
        dwaves = torch.cat((-angles.sin() * frequencies, angles.cos() * frequencies), -1).to(DTYPE)
        h, dh = embedding.hidden(waves), F.linear(dwaves, embedding.hidden.weight)
        s = h.sigmoid()
        return embedding.out(h * s), F.linear(s * (1 + h * (1 - s)) * dh, embedding.out.weight)

    def trained(self, forward: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        values = forward()
        wanted = [*self.parameters, self.x_t]
        grads = [self.lam] * len(values)  # any tensor of E's shape
        return torch.autograd.grad(values, wanted, [g.view_as(v) for g, v in zip(grads, values, strict=True)])


def check(inputs: Inputs) -> None:
    """Ours at most twice as far from float64 as the network's own code in bfloat16."""
    wide = FAVE(inputs.model.config, ITEMS).to("cuda").double()
    wide.load_state_dict({name: value.double() for name, value in inputs.model.state_dict().items()})
    with torch.no_grad():
        some = slice(0, 64)
        parts = (inputs.x_t[some].double(), inputs.t[some].double(), inputs.r[some].double(), inputs.lam[some].double())
        exact = wide.modulate(wide.embed_history(inputs.history[some]), *parts)
        ours, plain = inputs.ours("given", "computed", False, False)[0][some], inputs.plain("given", "computed", False)
        errors = [(value.double() - exact).norm().item() for value in (ours, plain[0][some])]
    if not errors[0] <= 2 * errors[1]:
        raise AssertionError(f"error {errors[0]}, PyTorch's {errors[1]}")


def forward(inputs: Inputs, who: str, lam: str, z: str, packed: bool = False, dual: bool = False) -> Row:
    count = len(inputs.history)
    case = f"B {count}, lambda {lam}, z {z}" + (", packed" if packed else "") + (", dual" if dual else "")
    rows = count * LENGTH
    size = rows * (8 + 2 * D * (2 + dual + (lam == "given")))
    with torch.no_grad():
        if who == "triton":
            shape = (rows, D) if packed else (count, LENGTH, D)
            values = [torch.empty(shape, device="cuda", dtype=DTYPE) for _ in range(1 + dual)]
            space = torch.empty(2, count, D, device="cuda")
            options = {"out": tuple(values), "workspace": space} if dual else {"out": values[0], "workspace": space[0]}
            time = time_us(lambda: inputs.ours(lam, z, packed, dual, **options), clock=DIRTY)
        else:
            plain = torch.compile(inputs.plain, dynamic=False) if who == "torch.compile" else inputs.plain
            time = time_us(lambda: plain(lam, z, dual), repeats=20, clock=DIRTY)
    return Row("input_modulation", case, who, time, floor_bytes=size, clock=DIRTY)


def training(inputs: Inputs, who: str, packed: bool = False, dual: bool = False) -> Row:
    count = len(inputs.history)
    case = f"B {count}, forward and backward" + (", packed" if packed else "") + (", dual" if dual else "")
    # Forward as above; backward reads E's gradient and the row, and writes and reads the row's gradient.
    size = count * LENGTH * (16 + 2 * D * (6 + 2 * dual)) + 2 * ITEMS * D
    plain = torch.compile(inputs.plain, dynamic=False) if who == "torch.compile" else inputs.plain

    def call() -> tuple[Tensor, ...]:
        return inputs.ours("drawn", "computed", packed, dual) if who == "triton" else plain("drawn", "computed", dual)

    time = time_us(lambda: inputs.trained(call), repeats=20, clock=DIRTY)
    return Row("input_modulation", case, who, time, floor_bytes=size, clock=DIRTY)


def measurements() -> Iterator[Row]:
    """Ours and eager first: the compiler takes longest."""
    inputs = Inputs.make(4096)
    check(inputs)
    for lam, z, packed in itertools.product(("constant", "given", "drawn"), ("given", "computed"), (False, True)):
        yield forward(inputs, "triton", lam, z, packed)
    for packed in (False, True):
        yield forward(inputs, "triton", "drawn", "computed", packed, dual=True)
        for dual in (False, True):
            yield training(inputs, "triton", packed, dual)
    for dual in (False, True):
        yield forward(inputs, "eager", "drawn", "computed", dual=dual)
        yield training(inputs, "eager", dual=dual)
    yield forward(inputs, "eager", "constant", "given")
    yield forward(inputs, "eager", "given", "computed")
    for count in (1, 512):
        small = Inputs.make(count)
        for who in ("triton", "eager"):
            yield forward(small, who, "constant", "given")
            yield training(small, who)
    # A pool of compiling processes takes longer to start than these few kernels to compile.
    inductor.compile_threads = 1
    yield forward(inputs, "torch.compile", "drawn", "computed")
    yield training(inputs, "torch.compile")
    yield forward(inputs, "torch.compile", "constant", "given")
    yield forward(inputs, "torch.compile", "drawn", "computed", dual=True)


def main() -> None:
    gpu = torch.cuda.get_device_name()
    rows = shown(measurements(), gpu)
    print(json.dumps({"gpu": gpu, "rows": [row.as_dict(gpu) for row in rows]}))


if __name__ == "__main__":
    main()

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fave_fast.config import Config, ModelConfig
from fave_fast.losses import ReferenceNetwork, stage1_objective
from fave_fast.model import FAVE, Dropout, HistoryDecoder, Prediction

ITEMS = 11
BASE = ModelConfig(
    d=8, blocks=3, heads=2, ffn_mult=2, max_length=6, dropout=0.0, embedding_dropout=0.0, delta=0.3, embedding_std=1.0
)
HISTORY = torch.tensor([[0, 0, 3, 1, 3, 7], [0, 0, 0, 0, 0, 11], [5, 4, 3, 2, 1, 6]])
VARIANTS = [
    BASE,
    replace(BASE, norm="layer"),
    replace(BASE, position="none"),
    replace(BASE, attention="causal"),
    replace(BASE, norm="layer", position="none", attention="causal"),
    replace(BASE, source_block=0),
    replace(BASE, source_block=-1),
    replace(BASE, blocks=1, source_block=-1),
]


def build(config: ModelConfig, seed: int = 0) -> FAVE:
    """An fp64 model in which no gain is 1 and no bias 0, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = FAVE(config, ITEMS).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.item_embedding.weight[0] = 0
    return model


def inputs(history: torch.Tensor, d: int = BASE.d) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows, length = history.shape
    x_t = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    t = torch.rand(rows, generator=generator, dtype=torch.float64) / 2
    lam = 0.3 + 0.3 * torch.randn(rows, length, d, generator=generator, dtype=torch.float64)
    return x_t, t, t + 0.3, lam


def reference(model: FAVE, items: list[int], x_t: np.ndarray, t: float, r: float, lam: np.ndarray) -> list[np.ndarray]:
    """The forward of one unpadded history in numpy: [endpoint, E_u]."""
    config, n, d = model.config, len(items), model.config.d
    w = {name: value.numpy() for name, value in model.state_dict().items()}

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * w[name + ".weight"] + w[name + ".bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        if config.norm == "layer":
            return layer_norm(x, name)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[name + ".weight"]

    def time(value: float) -> np.ndarray:
        angles = np.array([config.time_scale * value * 10_000.0 ** (-i / (d // 2)) for i in range(d // 2)])
        waves = np.concatenate((np.cos(angles), np.sin(angles)))
        hidden = w["time_embedding.hidden.weight"] @ waves + w["time_embedding.hidden.bias"]
        return w["time_embedding.out.weight"] @ (hidden / (1 + np.exp(-hidden))) + w["time_embedding.out.bias"]

    h = layer_norm(w["item_embedding.weight"][items], "embedding_norm") + lam * (x_t + time(t) + time(r - t))
    size = d // config.heads
    source = h[-1]
    for block in range(config.blocks):
        name = f"blocks.{block}."
        qkv = norm(h, name + "attention_norm") @ w[name + "qkv.weight"].T
        attended = np.zeros((n, d))
        for head in range(config.heads):
            q, k, v = (qkv[:, part * d + head * size :][:, :size].copy() for part in range(3))
            if config.position == "rotary":
                for x in (q, k):
                    for i in range(n):
                        for c in range(size // 2):
                            angle = (n - 1 - i) * 10_000.0 ** (-c / (size // 2))
                            pair = complex(x[i, c], x[i, c + size // 2]) * complex(math.cos(angle), math.sin(angle))
                            x[i, c], x[i, c + size // 2] = pair.real, pair.imag
            for i in range(n):
                seen = i + 1 if config.attention == "causal" else n
                weights = np.exp([q[i] @ k[j] / math.sqrt(size) for j in range(seen)])
                attended[i, head * size : (head + 1) * size] = weights @ v[:seen] / weights.sum()
        h = h + attended @ w[name + "attention_out.weight"].T
        hidden = norm(h, name + "ffn_norm") @ w[name + "ffn_in.weight"].T
        gelu = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        h = h + gelu @ w[name + "ffn_out.weight"].T
        if block == range(config.blocks)[config.source_block]:
            source = h[-1]
    return [norm(h[-1:], "final_norm")[0], source]


def run(model: FAVE, history: torch.Tensor, *rest: torch.Tensor) -> Prediction:
    with torch.no_grad():
        return model(history, *rest)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.norm}-{c.position}-{c.attention}-{c.source_block}")
def test_forward_equals_the_equations(config: ModelConfig) -> None:
    model = build(config)
    x_t, t, r, lam = inputs(HISTORY)
    got = run(model, HISTORY, x_t, t, r, lam)
    # fp64 throughout leaves ~1e3 roundings of 1e-16 on values of order 1, and 999 * 1e-16 in an angle. The rotary
    # tables alone are fp32: angles up to 5 are off by at most 5 * 2 * 2^-24 = 6e-7, logits by 10 times that.
    tolerance = 1e-5 if config.position == "rotary" else 1e-11
    for row, items in enumerate(HISTORY.tolist()):
        items = [item for item in items if item]
        expected = reference(
            model, items, x_t[row].numpy(), float(t[row]), float(r[row]), lam[row, -len(items) :].numpy()
        )
        for tensor, want in zip((got.endpoint, got.source), expected, strict=True):
            np.testing.assert_allclose(tensor[row].numpy(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("field", ["norm", "position", "attention", "source_block"])
def test_every_choice_matters(field: str) -> None:
    other = replace(
        BASE, **{field: {"norm": "layer", "position": "none", "attention": "causal", "source_block": 0}[field]}
    )
    model, changed = build(BASE), build(other)
    changed.load_state_dict(model.state_dict(), strict=False)
    first, second = (run(m, HISTORY, *inputs(HISTORY)) for m in (model, changed))
    part = "source" if field == "source_block" else "endpoint"
    # Far above the 1e-5 by which the equations may be missed.
    assert (getattr(first, part)[2] - getattr(second, part)[2]).abs().max() > 1e-3


@pytest.mark.parametrize("config", VARIANTS[:4], ids=["rms", "layer", "none", "causal"])
def test_padding_and_neighbours_change_nothing(config: ModelConfig) -> None:
    model = build(config)
    x_t, t, r, lam = inputs(HISTORY)
    together = run(model, HISTORY, x_t, t, r, lam)
    for row in range(len(HISTORY)):
        n = int((HISTORY[row] != 0).sum())
        one = slice(row, row + 1)
        for pad in (0, 1, 9):
            history = torch.cat((torch.zeros(1, pad, dtype=torch.int64), HISTORY[one, -n:]), 1)
            noise = torch.cat((torch.full((1, pad, config.d), 7.0, dtype=torch.float64), lam[one, -n:]), 1)
            alone = run(model, history, x_t[one], t[one], r[one], noise)
            # The same sums in another order: some 1e3 roundings of 1e-16 on values of order 1 to 10.
            torch.testing.assert_close(alone.endpoint, together.endpoint[one], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(alone.source, together.source[one], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("position", ["rotary", "none"])
def test_last_position_alone_equals_the_full_block(position: str) -> None:
    model = build(replace(BASE, position=position))
    h = torch.randn(3, 6, BASE.d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = (HISTORY != 0)[:, None, None, :]
    ages = torch.arange(5.0, -1.0, -1.0)
    angles = ages[:, None] * 10_000.0 ** -(torch.arange(2) / 2)
    rotary = (angles.cos(), angles.sin()) if position == "rotary" else None
    with torch.no_grad():
        full, last = (model.blocks[0](h, mask, rotary, only) for only in (False, True))
    assert last.shape == (3, 1, BASE.d)
    torch.testing.assert_close(last, full[:, -1:], rtol=1e-12, atol=1e-12)  # ~1e2 roundings of 1e-16, values below 10


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_row_without_items_is_finite_and_harms_no_other(attention: str) -> None:
    model = build(replace(BASE, attention=attention))
    history = torch.cat((torch.zeros(1, 6, dtype=torch.int64), HISTORY))
    got = model(history, *inputs(history))
    assert got.endpoint.isfinite().all()
    assert got.source.isfinite().all()
    got.endpoint[1:].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    rest = [part[1:] for part in inputs(history)]
    torch.testing.assert_close(got.endpoint[1:], model(HISTORY, *rest).endpoint, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_bf16_stays_near_fp64(mode: str) -> None:
    config = replace(BASE, d=32, heads=4)
    narrow = build(config).bfloat16() if mode == "cast" else build(config).float()
    wide = copy.deepcopy(narrow).double()
    args = [part.bfloat16().double() for part in inputs(HISTORY, config.d)]
    # From t = 0 to r = 1: exact in bf16, as is their difference.
    args[1], args[2] = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    want = run(wide, HISTORY, *args).endpoint
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        got = run(narrow, HISTORY, *(part.to(narrow.item_embedding.weight.dtype) for part in args)).endpoint
    # Relative roundoff is 2^-9. About ten roundings a block (two norms, q, k, v, weights, three products, two sums) and
    # five outside, linearly added and let grow by the square root of 3 blocks: 35 * 1.7 * 2^-9 = 0.12 of the norm.
    assert ((got.double() - want).norm(dim=1) / want.norm(dim=1)).max() < 0.12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_embedding_keeps_its_angles_in_every_dtype(dtype: torch.dtype) -> None:
    d, scale = 32, 999.0
    embedding = build(replace(BASE, d=d)).time_embedding.to(dtype)
    times = torch.tensor([0.0, 0.25, 0.75, 1.0])
    angles = times.double()[:, None] * scale * 10_000.0 ** -(torch.arange(d // 2, dtype=torch.float64) / (d // 2))
    waves = torch.cat((angles.cos(), angles.sin()), 1)
    seen: list[torch.Tensor] = []
    embedding.hidden.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embedding(times.to(dtype))
    # Angles in fp32 are off by at most 999 * 3 * 2^-24 = 2e-4; the waves are then rounded to `dtype`: 2^-9 in bf16.
    torch.testing.assert_close(seen[0].double(), waves, rtol=0, atol=2e-4 + torch.finfo(dtype).eps)


def test_padding_row_stays_zero_through_a_step() -> None:
    torch.manual_seed(0)
    model = FAVE(BASE, ITEMS)
    assert not model.item_embedding.weight[0].any()
    before = model.item_embedding.weight.detach().clone()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    network = ReferenceNetwork(model, HISTORY, None)
    stage1_objective(network, Config(model=BASE), torch.tensor([1, 2, 3]), None).total.backward()
    optimiser.step()
    assert not model.item_embedding.weight[0].any()
    assert (model.item_embedding.weight[1:] != before[1:]).all()


def test_draw_lambda_has_mean_and_deviation_delta() -> None:
    count = 200_000
    drawn = build(BASE).draw_lambda((count,), torch.device("cpu"), torch.Generator().manual_seed(0))
    # Six standard errors: delta / sqrt(n) of a mean, delta / sqrt(2 n) of a deviation.
    assert abs(drawn.mean().item() - 0.3) < 6 * 0.3 / math.sqrt(count)
    assert abs(drawn.std().item() - 0.3) < 6 * 0.3 / math.sqrt(2 * count)


def test_dropout_drops_the_share_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    layer, count = Dropout(0.3), 100_000
    x = torch.full((count,), 2.0)
    out = layer(x)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 2 / 0.7), rtol=1e-6, atol=0)  # a few of 2^-24
    assert abs(kept.double().mean().item() - 0.7) < 6 * math.sqrt(0.21 / count)  # six binomial deviations
    assert torch.equal(layer.eval()(x), x)


def test_history_decoder_at_some_items_equals_the_dense_outputs() -> None:
    torch.manual_seed(0)
    decoder = HistoryDecoder(8, ITEMS).double()
    source = torch.randn(4, 8, dtype=torch.float64)
    items = torch.randint(1, ITEMS + 1, (4, 5))
    dense = decoder(source)
    assert dense.shape == (4, ITEMS)
    # Sums of 8 products in two orders: 8 * 1e-16 on values of order 1.
    torch.testing.assert_close(decoder.at(source, items), dense.gather(1, items - 1), rtol=1e-14, atol=1e-14)

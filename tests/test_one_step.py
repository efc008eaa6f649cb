"""`OneStep` and its compiled form against `flow.encode` and the reference of `score_topk`."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fave_fast.compiled import CompiledOneStep
from fave_fast.config import FlowConfig, ModelConfig
from fave_fast.flow import InferenceNoise, encode
from fave_fast.model import FAVE
from fave_fast.one_step import OneStep
from fave_fast.ops import Exclusions, score_topk

ITEMS, K = 70, 9
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0)


class Case:
    """A model, its noise and its one step, and the same in float64."""

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        flow: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        k: int = K,
        length: int | None = None,
        items: int = ITEMS,
    ) -> None:
        torch.manual_seed(0)
        config = ModelConfig(**{"d": 16, "blocks": 2, "heads": 2, "max_length": 7, "delta": 0.3, **(model or {})})
        self.flow = FlowConfig(**(flow or {}))
        self.model = FAVE(config, items).eval().to(device, dtype)
        with torch.no_grad():
            self.model.item_embedding.weight.mul_(50)  # spreads the scores, and the padding's row is no candidate
            self.model.item_embedding.weight[0] = 100
        self.noise = InferenceNoise.draw(self.model, self.flow)
        self.step = OneStep(self.model, self.flow, self.noise, k, length)
        self.device = torch.device(device)

    def inputs(self, batch: int, excluded: int, denied: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of all lengths, the first without any item; on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        length, items = self.step.length, self.step.num_items
        history = torch.randint(1, items + 1, (batch, length), generator=generator)
        lengths = torch.arange(batch) % (length + 1)
        history.masked_fill_(torch.arange(length) < length - lengths[:, None], 0)
        exclude = torch.randint(-2, items + 3, (batch, excluded), generator=generator)
        return history, exclude, torch.rand(items + 1, generator=generator) < denied

    def run(self, history: Tensor, exclude: Tensor, deny: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(history.to(self.device), exclude.to(self.device), deny.to(self.device))  # type: ignore[no-any-return]

    def expected(self, history: Tensor, exclude: Tensor, deny: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            endpoint = encode(self.model, self.flow, self.noise, history.numpy())
        excluded = Exclusions.from_lists(exclude.tolist()).to(self.device)
        table = self.model.item_embedding.weight.detach()
        return score_topk(endpoint, table, self.step.k, excluded, deny.to(self.device), backend="reference")

    def exact_scores(self, history: Tensor) -> Tensor:
        """All scores [B, N + 1] in float64 of the model's own numbers."""
        wide = copy.deepcopy(self.model).double()
        noise = InferenceNoise(*(part.double() for part in vars(self.noise).values()))
        with torch.no_grad():
            return encode(wide, self.flow, noise, history.numpy()) @ wide.item_embedding.weight.T


def assert_lists_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The network runs in float64, far below float32's rounding; a score is rounded to float32 once, so that two ways
    of computing it differ by one of its steps at most, 2^-23 of its size.
    """
    torch.testing.assert_close(found[0], expected[0], rtol=2**-23, atol=0)
    assert torch.equal(found[1], expected[1])


def assert_as_close_as_plain(case: Case, found: tuple[Tensor, Tensor], *inputs: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, against float64, and a list complete up to that."""
    exact = case.exact_scores(inputs[0])
    scores, ids = (part.to(case.device) for part in found)
    plain, plain_ids = case.expected(*inputs)
    ours, theirs = (
        (given - exact.gather(1, chosen)) for given, chosen in ((scores.double(), ids), (plain.double(), plain_ids))
    )
    assert ours.norm() <= 2 * theirs.norm()
    assert scores.diff(dim=1).le(0).all()
    left_out = inputs[2].to(case.device).expand_as(exact).clone()
    left_out[:, 0] = True
    inside = inputs[1].clamp(0, case.step.num_items).where(inputs[1] <= case.step.num_items, 0).to(case.device)
    left_out.scatter_(1, inside, True)
    assert not left_out.gather(1, ids).any()
    others = exact.masked_fill(left_out, -torch.inf).scatter(1, ids, -torch.inf).amax(1)
    assert (others <= exact.gather(1, ids).amin(1) + 2 * ours.abs().max()).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())


SAMPLED = {"rho": 0.5, "anchor_at_inference": "uniform", "lambda_at_inference": "sample"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "default": ({}, {}, None),
    "all drawn": ({}, SAMPLED, None),
    "gaussian, layer norm, causal": ({"norm": "layer", "attention": "causal"}, {"prior": "gaussian"}, None),
    "one block, no positions": ({"blocks": 1, "position": "none", "source_block": -1}, {}, None),
    "short histories": ({}, SAMPLED, 4),
    "histories of one": ({}, {}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_lists_are_those_of_encode_and_topk(name: str) -> None:
    model, flow, length = CASES[name]
    case = Case(model, flow, length=length)
    inputs = case.inputs(11, 5)
    assert_lists_equal(case.run(*inputs), case.expected(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_as_close_as_plain(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    inputs = case.inputs(40, 5)
    assert_as_close_as_plain(case, case.run(*inputs), *inputs)


def test_scores_of_16_bits_are_not_rounded_to_16_bits() -> None:
    """257 = 16 * 16 + 1 needs nine bits."""
    case = Case(dtype=torch.bfloat16, items=2, k=1)
    case.step.table[1:3] = torch.tensor([16.0, 1.0] + [0.0] * 14)
    scores, _ = case.step.best(case.step.table[1:2], torch.zeros(1, 0, dtype=torch.int64), torch.zeros(3).bool())
    assert scores.tolist() == [[257.0]]


@pytest.mark.parametrize(("items", "k"), [(70, 1), (70, 20), (70, 70), (70, 75), (1, 3), (2000, 3), (5000, 20)])
@pytest.mark.parametrize("special", [False, True], ids=["ties", "nan and infinities"])
def test_ties_by_id(items: int, k: int, special: bool) -> None:
    """Whole numbers: products are exact, and most scores have equals, in other groups too."""
    case = Case(dtype=torch.float32, k=k, items=items)
    generator = torch.Generator().manual_seed(k)
    table = torch.randint(-1, 2, (items + 1, 16), generator=generator).float()
    queries = torch.randint(-1, 2, (6, 16), generator=generator).float()
    queries[0] = 0
    if special:
        places = torch.randint(1, items + 1, (4, items // 8), generator=generator)
        for value, rows in zip(SPECIAL, places, strict=True):
            table[rows, 0] = value
    table[0] = 100
    case.step.table[: items + 1] = table
    case.step.table[items + 1 :] = 100  # nobody may read what fills the last rows
    _, exclude, deny = case.inputs(6, 30, 0.3, seed=k)
    found = case.step.best(queries, exclude, deny)
    expected = score_topk(queries, table, k, Exclusions.from_lists(exclude.tolist()), deny, backend="reference")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_nothing_left() -> None:
    case = Case()
    history, exclude, deny = case.inputs(3, ITEMS, 0)
    exclude[1] = torch.arange(1, ITEMS + 1)
    scores, ids = case.run(history, exclude, deny)
    assert scores[1].eq(-torch.inf).all()
    assert ids[1].eq(0).all()
    scores, ids = case.run(history, exclude, torch.ones_like(deny))
    assert scores.eq(-torch.inf).all()
    assert ids.eq(0).all()


def test_exclusions_outside_the_catalogue_change_nothing() -> None:
    case = Case()
    history, _, deny = case.inputs(4, 0)
    outside = torch.tensor([[0, -1, ITEMS + 1, 2**62]]).expand(4, -1)
    found, expected = case.run(history, outside, deny), case.run(history, outside[:, :0], deny)
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_frozen() -> None:
    case = Case()
    inputs = case.inputs(8, 5)
    before = case.run(*inputs)
    with torch.no_grad():
        for weight in case.model.parameters():
            weight.add_(1)
        case.noise.keep.zero_()
    assert torch.equal(case.run(*inputs)[0], before[0])
    assert not any(parameter.requires_grad for parameter in case.step.parameters())


def test_one_table_is_held() -> None:
    """Not the history decoder too, which is as long as the catalogue."""
    state = Case({"ffn_mult": 1}).step.state_dict()
    assert [name for name, value in state.items() if value.numel() > 16 * ITEMS] == ["table"]


def test_what_does_not_fit_is_refused() -> None:
    case = Case()
    for k, length, message in ((0, None, "k is 0"), (K, 8, "length is 8; expected 1 to 7"), (K, 0, "length is 0")):
        with pytest.raises(ValueError, match=message):
            OneStep(case.model, case.flow, case.noise, k, length)
    with pytest.raises(ValueError, match="training mode"):
        OneStep(copy.deepcopy(case.model).train(), case.flow, case.noise, K)


@pytest.fixture(scope="module")
def compiled() -> tuple[Case, CompiledOneStep]:
    case = Case({"blocks": 1, "source_block": -1})
    # More sizes than Dynamo compiles one function for by default.
    step = CompiledOneStep(case.step, 5, backend="eager")
    step.warmup([3, 16])
    step.warmup([1, 2, 4, 5, 6, 7, 8])
    return case, step


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9, 16])
def test_compiled_buckets_equal(compiled: tuple[Case, CompiledOneStep], batch: int) -> None:
    case, step = compiled
    assert step.buckets == (1, 2, 3, 4, 5, 6, 7, 8, 16)
    for seed in (1, 2):  # what the call before left in the buffers reaches nobody
        inputs = case.inputs(batch, 5, seed=seed)
        step.deny(inputs[2])
        assert_lists_equal(step(*inputs[:2]), case.expected(*inputs))


def test_compiled_refuses(compiled: tuple[Case, CompiledOneStep]) -> None:
    case, step = compiled
    history, exclude, deny = case.inputs(17, 5)
    with pytest.raises(ValueError, match="the batch is 17; expected at most 16"):
        step(history, exclude)
    with pytest.raises(ValueError, match=r"history is \[2, 6\] and exclude \[2, 5\]; expected \[2, 7\] and \[2, 5\]"):
        step(history[:2, 1:], exclude[:2])
    with pytest.raises(ValueError, match=r"denied is torch.bool \[70\]; expected bool \[71\]"):
        step.deny(deny[1:])
    with pytest.raises(ValueError, match="a bucket is 0"):
        step.warmup([0, 1])
    with pytest.raises(ValueError, match="expected at most 0"):
        CompiledOneStep(case.step, 5, backend="eager")(history, exclude)


def test_compiled_belongs_to_its_thread(compiled: tuple[Case, CompiledOneStep]) -> None:
    case, step = compiled
    inputs = case.inputs(2, 5)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match=r"expected \d+, which warmed up"):
        pool.submit(step, *inputs[:2]).result()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compiled_on_a_gpu(mode: Any) -> None:
    """One block, for the sake of the time that max-autotune takes."""
    model = {"d": 64, "blocks": 1, "source_block": -1, "max_length": 50}
    case = Case(model, dtype=torch.bfloat16, device="cuda", items=12_101, k=20)
    step = CompiledOneStep(case.step, 60, mode)
    step.warmup([1, 16])
    for batch in (16, 1, 9):
        inputs = case.inputs(batch, 60)
        step.deny(inputs[2])
        found = [part.clone() for part in step(*inputs[:2])]
        assert_as_close_as_plain(case, (found[0], found[1]), *inputs)
        assert (found[0] != found[0].bfloat16()).any()  # nor were they rounded on the way
        again = step(*inputs[:2])
        assert torch.equal(again[0], found[0])  # run to run
        assert torch.equal(again[1], found[1])

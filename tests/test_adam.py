from __future__ import annotations

import copy

import pytest
import torch
from fave_fast.kernels import adam as kernels
from torch import Tensor

from fave_fast.errors import BackendError
from fave_fast.ops.adam import ClippedAdam

SHAPES = [(3, 7), (5000,), (1,), (33, 128)]
CLIP = 0.5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def optimiser(device: str, dtype: torch.dtype = torch.float32, rate: float = 0.01) -> torch.optim.Adam:
    draws = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=draws).to(device, dtype).requires_grad_() for shape in SHAPES]
    return torch.optim.Adam(parameters, torch.tensor(rate, device=device), weight_decay=0.1)


def give(one: torch.optim.Adam, step: int, without: int = -1) -> None:
    """Gradients of a norm below the clip in every other step, and none for the tensor `without`."""
    draws = torch.Generator().manual_seed(step + 1)
    for index, parameter in enumerate(one.param_groups[0]["params"]):
        gradient = torch.randn(parameter.shape, generator=draws) * (1e-4 if step % 2 else 1)
        parameter.grad = None if index == without else gradient.to(parameter)


def weights(one: torch.optim.Adam) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in one.param_groups[0]["params"]]


def trained(one: torch.optim.Adam, backend: str, steps: int = 7, without: int = -1) -> list[Tensor]:
    adam = ClippedAdam(one, CLIP, backend)
    for step in range(steps):
        give(one, step, without)
        adam.take()
    return weights(one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("without", [-1, 1])
@pytest.mark.parametrize("few", [1, kernels.FEW])  # of eight sums: added up by a program, or by all
def test_step_is_clipped_adam(device: str, without: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors at most twice PyTorch's in fp32, both against fp64; a tensor without a gradient stays as it is."""
    monkeypatch.setattr(kernels, "FEW", few)
    wide = optimiser(device, torch.float64)
    want = trained(wide, "reference", without=without)
    plain = trained(optimiser(device), "reference", without=without)
    got = trained(optimiser(device), "triton", without=without)
    start = weights(optimiser(device))
    for index, (ours, theirs, exact, before) in enumerate(zip(got, plain, want, start, strict=True)):
        if index == without:
            assert torch.equal(ours, before)
            continue
        moved = (exact - before).abs().max()
        # Half an ulp of the weights themselves is what even an exact step errs by: 2^-24 of values up to 4, a step.
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 7 * 4 * 2**-24
        assert moved > 0.03


@pytest.mark.parametrize("device", DEVICES)
def test_either_backend_goes_on_where_the_other_stopped(device: str) -> None:
    for first, second in (("triton", "reference"), ("reference", "triton")):
        one, other = optimiser(device), optimiser(device)
        trained(one, first, 3)
        kept = copy.deepcopy(one.state_dict())
        for parameter, value in zip(other.param_groups[0]["params"], weights(one), strict=True):
            parameter.data.copy_(value)
        other.load_state_dict(kept)
        trained(one, first, 3)
        trained(other, second, 3)
        for a, b in zip(weights(one), weights(other), strict=True):
            # Three steps of 0.01, each rounded to 2^-23 of itself a few times over, on weights rounded as above.
            torch.testing.assert_close(a, b, rtol=0, atol=3 * (0.01 * 10 * 2**-23 + 4 * 2**-24))
        assert {float(state["step"]) for state in other.state.values()} == {6.0}


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_may_begin_anywhere(device: str) -> None:
    """Where 16 bytes cannot be read at once the bits are the same."""
    results = []
    for before in (0, 1):
        one = optimiser(device)
        adam = ClippedAdam(one, CLIP, "triton")
        for step in range(2):
            give(one, step)
            for parameter in one.param_groups[0]["params"]:
                room = torch.empty(before + parameter.numel(), device=device)
                parameter.grad = room[before:].view_as(parameter).copy_(parameter.grad)
            adam.take()
        results.append(weights(one))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_that_is_no_number_shows(device: str) -> None:
    one = optimiser(device)
    give(one, 0)
    one.param_groups[0]["params"][2].grad.fill_(torch.nan)
    ClippedAdam(one, CLIP, "triton").take()
    assert all(bool(weight.isnan().all()) for weight in weights(one))


@pytest.mark.gpu
def test_captured_step() -> None:
    """The same bits as launched; the learning rate is read at each replay.

    The graph has freed memory before the step, of every size up to 64 KiB, that earlier nodes write at each replay.
    """
    results = []
    for captured in (False, True):
        one = optimiser("cuda")
        adam = ClippedAdam(one, CLIP, "triton")
        give(one, 0)
        adam.take()
        gradients = [parameter.grad for parameter in one.param_groups[0]["params"]]
        graph, addresses = torch.cuda.CUDAGraph(), adam.addresses()
        if captured:
            with torch.cuda.graph(graph):
                freed = [torch.full((1 << size,), 0x7E, dtype=torch.int8, device="cuda") for size in range(9, 17)]
                del freed
                adam.take(addresses)
            adam.bind(addresses, gradients)
        for step in range(1, 5):
            give(one, step)
            given = [parameter.grad for parameter in one.param_groups[0]["params"]]
            one.param_groups[0]["lr"].fill_(0.01 / step)
            if captured:
                for place, gradient in zip(gradients, given, strict=True):
                    place.copy_(gradient)
                graph.replay()
            else:
                adam.take()
        results.append(weights(one))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_step_captured_without_its_addresses_raises() -> None:
    one = optimiser("cuda")
    adam = ClippedAdam(one, CLIP, "triton")
    give(one, 0)
    adam.take()
    with (
        pytest.raises(ValueError, match="no memory for its gradients' addresses"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        adam.take()


def test_refusals() -> None:
    plain = torch.optim.Adam([torch.zeros(3, requires_grad=True)], 0.1)
    with pytest.raises(BackendError, match="learning rate from a tensor"):
        ClippedAdam(plain, 1.0, "triton")
    with pytest.raises(BackendError, match="contiguous float32"):
        ClippedAdam(optimiser("cpu", torch.float64), 1.0, "triton")
    with pytest.raises(ValueError, match="amsgrad"):
        ClippedAdam(torch.optim.Adam([torch.zeros(3, requires_grad=True)], 0.1, amsgrad=True), 1.0)

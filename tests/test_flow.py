from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fave_fast import flow
from fave_fast.config import FlowConfig, ModelConfig
from fave_fast.model import FAVE

few = settings(max_examples=50, deadline=None)
CPU = torch.device("cpu")
CONFIG = ModelConfig(d=8, blocks=2, heads=2, max_length=5, delta=0.3, embedding_std=1.0)
HISTORY = torch.tensor([[0, 0, 0, 4, 2], [1, 2, 3, 4, 5], [0, 0, 0, 0, 9]])
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=8)
JUST_BELOW_1 = 1 - 2.0**-24
UNIFORM = st.sampled_from([0.0, JUST_BELOW_1]) | st.floats(0, JUST_BELOW_1, width=32)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> FAVE:
    torch.manual_seed(0)
    return FAVE(CONFIG, 9).double().eval()


def padded(lengths: list[int], width: int = 6) -> torch.Tensor:
    """Row i holds items 1, 2, ... in its last lengths[i] positions, so that an item tells its age."""
    return torch.tensor([[0] * (width - n) + list(range(1, n + 1)) for n in lengths])


def test_path_and_velocities() -> None:
    x_0, x_1 = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator())
    t = torch.tensor([0.0, 0.25, 0.7, 1.0], dtype=torch.float64)
    want = np.stack([(1 - u) * a + u * b for u, a, b in zip(t.numpy(), x_0.numpy(), x_1.numpy(), strict=True)])
    np.testing.assert_allclose(flow.interpolate(x_0, x_1, t).numpy(), want, rtol=0, atol=2e-15)  # 4 roundings below 4
    assert torch.equal(flow.interpolate(x_0, x_1, t)[[0, 3]], torch.stack((x_0[0], x_1[3])))
    np.testing.assert_array_equal(flow.conditional_velocity(x_0, x_1).numpy(), x_1.numpy() - x_0.numpy())
    np.testing.assert_array_equal(flow.learned_velocity(x_1, x_0).numpy(), x_1.numpy() - x_0.numpy())


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 1.75])
def test_mode_times_follow_the_formula(scale: float) -> None:
    count = 50_000
    t = flow.mode_times(count, scale, CPU, generator()).double().numpy()
    u = torch.rand(count, generator=generator()).double().numpy()
    want = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    # About six fp32 roundings of values up to 1, times (1 + |s|): 6 * 2.75 * 2^-24.
    np.testing.assert_allclose(t, want, rtol=0, atol=1e-6)
    assert t.min() >= 0
    assert t.max() <= 1
    # t falls with u for every allowed s; at the steepest scales it is flat somewhere, hence the same rounding.
    assert (np.diff(t[np.argsort(u)]) <= 1e-6).all()
    # E t = 1/2 for any s; E t^2 from a midpoint rule (error about 1e-9). Six standard errors; t and t^2 vary by < 1/2.
    grid = (np.arange(10_000) + 0.5) / 10_000
    square = np.mean((1 - grid - scale * (np.cos(np.pi * grid / 2) ** 2 - 1 + grid)) ** 2)
    assert abs(t.mean() - 0.5) < 6 * 0.5 / math.sqrt(count)
    assert abs((t**2).mean() - square) < 6 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("p_end", [0.0, 0.3, 1.0])
def test_stage2_times(p_end: float) -> None:
    count = 50_000
    t, r = flow.stage2_times(count, p_end, CPU, generator())
    assert t.shape == r.shape == (count,)
    assert ((t >= 0) & (t <= r) & (r <= 1)).all()
    share = (r == 1).double().mean().item()
    # Six binomial deviations; U(t, 1) itself rounds to 1 only if t > 1 - 2^-23 / (1 - u), in about 1e-6 of draws.
    assert abs(share - p_end) <= 6 * math.sqrt(p_end * (1 - p_end) / count) + 1e-4
    assert abs(t.double().mean().item() - 0.5) < 6 / math.sqrt(12 * count)
    early = r < 1
    if p_end < 1:
        n = int(early.sum())
        position = ((r - t) / (1 - t))[early].double()  # U(0, 1): mean 1/2, variance 1/12, E x^2 = 1/3, sd x^2 < 0.3
        assert abs(position.mean().item() - 0.5) < 6 / math.sqrt(12 * n)
        assert abs(position.square().mean().item() - 1 / 3) < 6 * 0.3 / math.sqrt(n)


def test_gaussian_prior_is_standard_normal() -> None:
    x = flow.gaussian_prior(5000, 8, CPU, generator()).double()
    assert x.shape == (5000, 8)
    assert abs(x.mean().item()) < 6 / math.sqrt(40_000)  # six standard errors, as below
    assert abs(x.square().mean().item() - 1) < 6 * math.sqrt(2 / 40_000)


@few
@given(st.data(), LENGTHS)
def test_anchor_is_the_chosen_real_item(data: st.DataObject, lengths: list[int]) -> None:
    uniform = data.draw(st.lists(UNIFORM, min_size=len(lengths), max_size=len(lengths)))
    positions = flow.anchor_positions(padded(lengths), torch.tensor(uniform))
    for n, u, position in zip(lengths, uniform, positions.tolist(), strict=True):
        if n == 0:
            assert position == 5
        else:
            # The product is rounded to fp32: u n just below a whole number may become it, but never n.
            product = float(np.float32(u) * np.float32(n))
            assert position == 6 - n + min(math.floor(product), n - 1)


@few
@given(LENGTHS, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**32))
def test_draw_anchor_keeps_channels_of_one_real_item(lengths: list[int], rho: float, seed: int) -> None:
    # Channel values name their item; row 0 would show as -1.
    embedding = torch.arange(7.0)[:, None].expand(7, 4).clone()
    embedding[0] = -1
    history = padded(lengths)
    drawn = flow.draw_anchor(embedding, history, rho, generator(seed))
    for n, row in zip(lengths, drawn.tolist(), strict=True):
        if n == 0:
            continue
        kept = {value for value in row if value}
        assert len(kept) <= 1
        assert kept <= set(range(1, n + 1))
        assert rho != 1 or len(kept) == 1
        assert rho != 0 or not kept


def test_draw_anchor_mask_rate_and_uniform_choice() -> None:
    count, n, d, rho = 20_000, 4, 8, 0.75
    embedding = torch.arange(7.0)[:, None].expand(7, d)
    drawn = flow.draw_anchor(embedding, padded([n]).expand(count, -1), rho, generator())
    # Six binomial deviations.
    assert abs((drawn != 0).double().mean().item() - rho) < 6 * math.sqrt(rho * (1 - rho) / (count * d))
    shares = torch.bincount(drawn.max(1).values.long(), minlength=n + 1)[1:].double() / count
    # (1 - rho)^8 = 1.5e-5 of rows show no channel.
    assert (shares - 1 / n).abs().max() < 6 * math.sqrt(0.25 * 0.75 / count) + 1e-4
    columns = (drawn != 0).double().mean(0)
    assert (columns - rho).abs().max() < 6 * math.sqrt(rho * (1 - rho) / count)
    # Bernoulli for each row and channel apart: a mask shared by the batch would have every column at 0 or 1 (above),
    # one shared by the channels would leave only 0 or d kept.
    assert ((drawn != 0).sum(1).unique()).numel() > 3


def test_anchor_prior_masks_channels() -> None:
    embedding = torch.randn(10, 3, generator=generator())
    keep = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    got = flow.anchor_prior(embedding, HISTORY, torch.tensor([3, 0, 4]), keep)
    assert torch.equal(got, torch.stack((embedding[4], embedding[1], embedding[9])) * keep)


def sampler_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x_0 = torch.randn(3, 8, dtype=torch.float64, generator=generator(1))
    return x_0, 0.3 + 0.3 * torch.randn(3, 5, 8, dtype=torch.float64, generator=generator(2))


def test_one_euler_step_is_one_step(model: FAVE) -> None:
    x_0, lam = sampler_inputs()
    with torch.no_grad():
        one = flow.one_step(model, HISTORY, x_0, lam)
        zeros = torch.zeros(3, dtype=torch.float64)
        assert torch.equal(one, model(HISTORY, x_0, zeros, zeros + 1, lam).endpoint)
        # x_0 + (f - x_0): two roundings of values below 8.
        torch.testing.assert_close(flow.euler(model, HISTORY, x_0, lam, 1), one, rtol=0, atol=4e-15)


@pytest.mark.parametrize("steps", [2, 7])
def test_euler_equals_a_loop(model: FAVE, steps: int) -> None:
    x_0, lam = sampler_inputs()
    ones = torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        x = x_0.clone()
        for k in range(steps):
            v = model(HISTORY, x, ones * k / steps, ones, lam).endpoint - x_0
            x += v * (1 / steps)
        got = flow.euler(model, HISTORY, x_0, lam, steps)
        # Roundings of t (1e-16) are scaled by 999 in the angles and grow little over 7 steps.
        torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)
        assert (got - flow.one_step(model, HISTORY, x_0, lam)).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [0, -1])
def test_euler_refuses_fewer_than_one_step(model: FAVE, steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {steps}; expected at least 1"):
        flow.euler(model, HISTORY, *sampler_inputs(), steps)


@pytest.mark.parametrize("anchor", ["last", "uniform"])
def test_inference_noise_does_not_depend_on_the_batch(model: FAVE, anchor: str) -> None:
    settings_ = FlowConfig(anchor_at_inference=anchor, lambda_at_inference="sample", seed=4)
    noise = flow.InferenceNoise.draw(model, settings_)
    together = noise.prior(model, settings_, HISTORY)
    again = flow.InferenceNoise.draw(model, settings_, seed=4)
    for row in range(3):
        n = int((HISTORY[row] != 0).sum())
        alone = HISTORY[row : row + 1, -n:]
        assert torch.equal(again.prior(model, settings_, alone)[0], together[row])
        assert torch.equal(again.lambdas(alone)[0], noise.lambdas(HISTORY)[row, -n:])
    assert not torch.equal(flow.InferenceNoise.draw(model, settings_, seed=5).lam, noise.lam)
    if anchor == "last":
        assert torch.equal(together, model.item_embedding.weight[HISTORY[:, -1]] * noise.keep)


def test_inference_noise_mean_lambda_and_gaussian_prior(model: FAVE) -> None:
    settings_ = FlowConfig(prior="gaussian", rho=1.0)
    noise = flow.InferenceNoise.draw(model, settings_)
    assert noise.lam.dtype == torch.float64
    assert torch.equal(noise.lambdas(HISTORY), torch.full((3, 5, 8), 0.3).double())
    assert torch.equal(noise.keep, torch.ones(8).double())
    assert torch.equal(noise.prior(model, settings_, HISTORY), noise.gaussian.expand(3, -1))

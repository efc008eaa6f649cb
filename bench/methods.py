"""What `bench.quality` trains beside ours on our network, by our trainer: the objectives and samplers of the peers.

Written anew from the papers: FMRec (arXiv 2505.16298) trains f(x_t, t) on a straight path from noise by squared error,
cross-entropy and a reconstruction of the history, at mode-sampled times, which is what stage 1 of FAVE takes over
(eqs. 11 to 13); DiffuRec (arXiv 2304.00686) by the cross-entropy of the x_0 that it predicts from a diffused target, at
uniform times. Both add lambda (x_t + z) to every position, as eq. (9) does, and answer by `bench.sampling` in all of
their steps, in validation too. SASRec needs nothing of its own: it is our network, causal, without x_t and t
(delta = 0), trained by the cross-entropy alone (`bench.quality.PEERS`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.sampling import DIFFUREC_STEPS, DiffuRec, FMRec, diffused
from fave_fast.config import Config
from fave_fast.data import Interactions, gather_histories
from fave_fast.evaluate import Positions
from fave_fast.losses import OBJECTIVES, Losses, Network
from fave_fast.model import FAVE
from fave_fast.train import Method


class Sampled:
    """Endpoints of a module from histories [B, L] to [B, D] that draws: the same ones in each evaluation."""

    def __init__(self, make: Callable[[FAVE], nn.Module], model: FAVE, config: Config, backend: str) -> None:
        self._module = make(model).eval()
        self._longest, self._seed = config.model.max_length, config.flow.seed
        self._device = model.item_embedding.weight.device

    def __call__(self, data: Interactions, starts: Positions, ends: Positions) -> Tensor:
        """As `fave_fast.evaluate.Endpoints`."""
        history = torch.from_numpy(gather_histories(data.items, starts, ends, self._longest)).to(self._device)
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            endpoints: Tensor = self._module(history)
        self._seed += 1  # another batch, other noise
        return endpoints


@functools.cache
def _diffused(device: torch.device) -> Tensor:
    """[2, steps]; made before a step is captured, for the first of each kind is not."""
    return torch.tensor(diffused(DIFFUREC_STEPS), device=device)


def diffurec_objective(network: Network, config: Config, targets: Tensor, generator: torch.Generator | None) -> Losses:
    """Cross-entropy of the target's embedding predicted from the embedding after a uniform number of noising steps."""
    x = network.embed(targets)
    step = torch.randint(DIFFUREC_STEPS, targets.shape, device=targets.device, generator=generator)
    kept, spread = _diffused(targets.device)[:, step, None]
    noise = torch.randn(x.shape, device=x.device, generator=generator)
    time = (step / DIFFUREC_STEPS).to(x.dtype)
    prediction = network.predict((kept * x + spread * noise).to(x.dtype), time, torch.ones_like(time))
    loss = network.target_loss(prediction.endpoint, targets, config.loss.target)
    zero = torch.zeros_like(loss)
    return Losses(((1.0, loss),), zero, loss, zero, zero)


METHODS = {
    "fave": Method(),
    "fmrec-style": Method(OBJECTIVES, functools.partial(Sampled, FMRec)),
    "diffurec-style": Method((diffurec_objective, diffurec_objective), functools.partial(Sampled, DiffuRec)),
}

"""The demo: data with planted structure, both stages of training, full ranking, a table; on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fave_fast import cli
from fave_fast.config import Config
from fave_fast.data import split
from fave_fast.engine import Recommender
from fave_fast.evaluate import evaluate, table
from fave_fast.synthetic import PlantedConfig, best_hit_rate, generate
from fave_fast.train import Trainer

# 31,572 training windows: enough to learn 92 % of what can be known, in 50 s of one core. The transitions depend on
# the last item alone, so that counting which item follows which is a strong baseline here (95 %).
_DATA = PlantedConfig(users=2000, stay=0.85, recall=0.0, background=0.1)
_CONFIG = {
    "model": {
        "d": 64,
        "blocks": 2,
        "heads": 2,
        "max_length": 16,
        "dropout": 0.1,
        "embedding_dropout": 0.1,
        "norm": "layer",
    },
    "train": {"batch_size": 256, "lr": 3e-3, "epochs": 8, "epochs_stage2": 1},
}


def run_demo(show: Callable[[Recommender, int], str]) -> str:
    """Run the demo and return what to print; `show` draws lists of a recommender, so many items each."""
    config = Config.from_dict(_CONFIG, "demo")
    planted, data = generate(_DATA, seed=0)
    parts = split(data, config.data)
    best = best_hit_rate(planted, data, parts, 20)
    cli.say(f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, {data.num_interactions:,} interactions")
    with tempfile.TemporaryDirectory() as folder:
        outcome = Trainer(data, config, Path(folder) / "model.pt", seed=0).run()
    result = evaluate(outcome.checkpoint, data, "test", device=torch.device("cpu"))
    reached = result["filtered"]["HR@20"]
    return "\n".join(
        [
            show(Recommender(outcome.checkpoint), 8),
            "",
            table(result),
            "",
            f"best possible HR@20 of this data, from its generator: {best:.2f} %",
            f"reached: {reached:.2f} %, {100 * reached / best:.1f} % of the best possible",
        ]
    )

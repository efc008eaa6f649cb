"""The commands, from file to file, beside the same work written plainly in PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.conftest import Sizes
from bench.peers import Eager, OnePass
from bench.sampling import Lists
from bench.training import jvp
from fave_fast import checkpoint as checkpoints
from fave_fast import evaluate, infer, losses, train
from fave_fast.checkpoint import Checkpoint
from fave_fast.data import gather_histories, load_interactions, split
from fave_fast.metrics import rank_metrics
from fave_fast.model import FAVE
from fave_fast.synthetic import PlantedConfig, generate

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=2)
USERS, LENGTH, K = 200, 12, 20
CONFIG = f"""
model: {{d: 32, blocks: 2, heads: 2, max_length: {LENGTH}}}
train: {{batch_size: 256, epochs: 1, epochs_stage2: 1}}
"""


class Files:
    """A log, histories of its users, and a checkpoint trained on it."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.log, self.requests, self.config = folder / "log.csv", folder / "requests.jsonl", folder / "config.yaml"
        self.model, self.answers = folder / "model.pt", folder / "answers.jsonl"
        planted = PlantedConfig(users=USERS, items=300, interests=5, min_length=4, max_length=LENGTH)
        _, data = generate(planted, seed=0)
        rows = [(user, int(item)) for user in range(data.num_users) for item in data.history(user)]
        self.log.write_text(
            "user_id,item_id,timestamp\n" + "".join(f"{user},{item},{at}\n" for at, (user, item) in enumerate(rows))
        )
        self.requests.write_text(
            "".join(
                json.dumps({"user": user, "history": data.history(user).tolist()}) + "\n"
                for user in range(data.num_users)
            )
        )
        self.config.write_text(CONFIG)
        self.train()

    def train(self) -> int:
        """`fave_fast.train`."""
        return train.main(
            ["--data", str(self.log), "--out", str(self.model), "--config", str(self.config), "--device", self.device]
        )

    def evaluate(self) -> int:
        """`fave_fast.evaluate`."""
        return evaluate.main(["--ckpt", str(self.model), "--data", str(self.log), "--json", "--device", self.device])

    def infer(self) -> int:
        """`fave_fast.infer`."""
        return infer.main(
            ["--ckpt", str(self.model), "--input", str(self.requests), "--output", str(self.answers),
             "--device", self.device]
        )  # fmt: skip

    def loaded(self) -> tuple[Checkpoint, FAVE]:
        """The checkpoint and its network."""
        checkpoint = checkpoints.load(self.model)
        return checkpoint, checkpoint.build_model().to(self.device).eval()


@pytest.fixture(scope="module")
def files(sizes: Sizes, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("commands"), sizes.device.type)


def plain_training(files: Files, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """The same training with the tangents of `torch.func.jvp`."""
    monkeypatch.setattr(losses, "predict_with_tangent", jvp)
    return files.train


def plain_evaluation(files: Files) -> dict[str, float]:
    """Raw ranks by a matrix of all scores."""
    checkpoint, model = files.loaded()
    data = load_interactions(files.log)
    parts = split(data, checkpoint.config.data)
    starts = evaluate.target_starts(data, parts.test)
    ranks = []
    with torch.no_grad():
        network = OnePass(model, checkpoint.config.flow)
        for rows in np.array_split(np.arange(len(starts)), max(1, len(starts) // 512)):
            history = gather_histories(data.items, starts[rows], parts.test[rows], LENGTH)
            scores = network(torch.from_numpy(history).to(files.device)) @ model.item_embedding.weight[1:].T
            wanted = torch.from_numpy(data.items[parts.test[rows]].astype(np.int64)).to(files.device)
            ranks.append(1 + (scores > scores.gather(1, wanted[:, None] - 1)).sum(1))
    return rank_metrics(torch.cat(ranks).cpu())


def plain_answers(files: Files) -> list[list[object]]:
    """Read, pad, one batch after another, write."""
    checkpoint, model = files.loaded()
    lists = Lists(OnePass(model, checkpoint.config.flow), model.item_embedding.weight.detach(), K)
    answer, found = Eager(lists.eval(), torch.device(files.device)), []
    requests = [json.loads(line) for line in files.requests.read_text().splitlines()]
    with (files.folder / "plain.jsonl").open("w") as out:
        for start in range(0, len(requests), 512):
            batch = requests[start : start + 512]
            grid = np.zeros((len(batch), LENGTH), dtype=np.int64)
            for row, request in zip(grid, batch, strict=True):
                numbers = checkpoint.item_ids.index(request["history"][-LENGTH:]) + 1
                row[len(row) - len(numbers) :] = numbers
            scores, items = answer(grid)
            for request, row, best in zip(batch, items, scores, strict=True):
                found.append(checkpoint.item_ids.take(row - 1))
                out.write(json.dumps({"user": request["user"], "items": found[-1], "scores": best.tolist()}) + "\n")
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("who", ["fave_fast", "PyTorch, torch.func.jvp"])
def test_train(who: str, files: Files, timed: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    call = files.train if who == "fave_fast" else plain_training(files, monkeypatch)
    assert timed("train", f"{USERS} users, two epochs", who, call) == 0


@pytest.mark.parametrize("who", ["fave_fast", "PyTorch, all scores"])
def test_evaluate(who: str, files: Files, timed: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    files.evaluate()
    raw = json.loads(capsys.readouterr().out.splitlines()[-1])["raw"]
    plain = plain_evaluation(files)
    assert abs(raw["NDCG@20"] - plain["NDCG@20"]) < 0.05  # of 100: a rank changed by a rounding moves it by a third
    if who == "fave_fast":
        timed("evaluate", f"{USERS} users", who, files.evaluate)
    else:
        timed("evaluate", f"{USERS} users", who, lambda: plain_evaluation(files))


@pytest.mark.parametrize("who", ["fave_fast", "PyTorch eager"])
def test_infer(who: str, files: Files, timed: Callable[..., object]) -> None:
    assert files.infer() == 0
    found = [json.loads(line)["items"] for line in files.answers.read_text().splitlines()]
    shared = [
        len({*map(str, one)} & {*map(str, other)}) for one, other in zip(found, plain_answers(files), strict=True)
    ]
    assert np.mean(shared) > 0.95 * K
    call = files.infer if who == "fave_fast" else lambda: plain_answers(files)
    timed("infer", f"{USERS} users", who, call)

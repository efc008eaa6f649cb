"""RecBole's SASRec, GRU4Rec, BERT4Rec and Caser on our sequences, split and ranking.

`python -m bench.recbole_baselines --data beauty.npz beauty --model SASRec GRU4Rec --out FOLDER` writes files like those
of `bench.quality`, whose `--summarise` takes them in. RecBole (`pip install recbole`) gives the networks and their
losses; the windows, batches, schedule, selection on validation (filtered NDCG@20) and the ranking are ours, in fp32.
Sizes are the preset's where a model has them; dropout is the preset's too, everything else RecBole's default.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
import random
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import quality
from fave_fast import cli, env
from fave_fast.config import PRESETS, Config, preset
from fave_fast.data import Interactions, Split, Windows, gather_histories, split
from fave_fast.errors import InputError
from fave_fast.evaluate import LIST_LENGTH, Positions, protocol, target_starts
from fave_fast.metrics import coverage, intra_list_diversity, rank_metrics
from fave_fast.train import epoch_batches

MODELS = ("SASRec", "GRU4Rec", "BERT4Rec", "Caser")
_AT_A_TIME = 512
_SELECTION = "NDCG@20"
_MASKED, _HIDDEN, _PLACES = "masked", "hidden", "places"  # columns of BERT4Rec's batches


def import_recbole() -> types.ModuleType:
    """RecBole's sequential models.

    Its release of 2025 names types that NumPy 2 has dropped, imports TensorBoard, which nothing here uses, and has
    autograd look everywhere for NaN: a step of SASRec's takes 18 ms without and 73 with.

    Raises:
        InputError: it is not installed.
    """
    for name, kind in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
        if not hasattr(np, name):
            setattr(np, name, kind)
    if importlib.util.find_spec("tensorboard") is None:
        stub: Any = types.ModuleType("torch.utils.tensorboard")
        stub.SummaryWriter = None
        sys.modules.setdefault("torch.utils.tensorboard", stub)
    looks_for_nan = torch.is_anomaly_enabled()
    try:
        return importlib.import_module("recbole.model.sequential_recommender")
    except ImportError as error:
        raise InputError(f"RecBole cannot be imported ({error}): pip install recbole") from None
    finally:
        torch.autograd.set_detect_anomaly(looks_for_nan)


@dataclass(frozen=True)
class Counts:
    """What RecBole's models ask a data set for."""

    user_num: int
    item_num: int

    def num(self, field: str) -> int:
        """Users or items, the padding included."""
        return self.item_num if field == "item_id" else self.user_num


@dataclass(frozen=True)
class Baseline:
    """A model of RecBole's with what its batches need."""

    network: nn.Module
    mask_ratio: float | None  # BERT4Rec's
    counts: Counts
    length: int

    @classmethod
    def make(cls, name: str, data: Interactions, config: Config, device: torch.device) -> Baseline:
        """Its weights come from PyTorch's generator."""
        module = import_recbole()
        make = importlib.import_module("recbole.config").Config
        model = config.model
        values = {
            "embedding_size": model.d, "hidden_size": model.d, "inner_size": model.ffn_mult * model.d,
            "n_layers": model.blocks, "n_heads": model.heads, "hidden_dropout_prob": model.dropout,
            "attn_dropout_prob": model.dropout, "dropout_prob": model.dropout, "train_neg_sample_args": None,
            "MAX_ITEM_LIST_LENGTH": model.max_length, "use_gpu": device.type == "cuda", "device": device,
        }  # fmt: skip
        before, sys.argv = sys.argv, sys.argv[:1]  # it would read our options
        try:
            options = make(model=name, dataset="none", config_dict=values)
        finally:
            sys.argv = before
        options["device"] = device
        masks = name == "BERT4Rec"
        if masks:  # what its network asks of the options, RecBole's own masking would enter
            options["MASK_ITEM_SEQ"], options["POS_ITEMS"] = _MASKED, _HIDDEN
            options["NEG_ITEMS"], options["MASK_INDEX"] = _HIDDEN, _PLACES
        counts = Counts(data.num_users + 1, data.num_items + 1)
        network = getattr(module, name)(options, counts).to(device)
        if name == "Caser":
            for convolution in (network.conv_v, *network.conv_h):
                convolution.forward = functools.partial(convolved, convolution)
        return cls(network, options["mask_ratio"] if masks else None, counts, model.max_length)

    def batch(self, data: Interactions, starts: Positions, ends: Positions, targets: Positions) -> Any:
        """Histories items[start:end] and targets items[target] as RecBole has them: padded on the right."""
        interaction = importlib.import_module("recbole.data.interaction").Interaction
        history = gather_histories(data.items, starts, ends, self.length)
        lengths = (history != 0).sum(1)
        place = np.arange(self.length)
        there = place < lengths[:, None]
        columns = np.where(there, place + history.shape[1] - lengths[:, None], 0)
        rows = np.where(there, np.take_along_axis(history, columns, 1), 0)
        users = np.searchsorted(data.offsets, targets, side="right")  # from 1
        named = {"item_id_list": rows, "item_length": lengths, "item_id": data.items[targets], "user_id": users}
        device = next(self.network.parameters()).device
        return interaction({name: torch.from_numpy(part.astype(np.int64)).to(device) for name, part in named.items()})

    def loss(self, data: Interactions, starts: Positions, targets: Positions) -> Tensor:
        """Of the histories items[start:target], a scalar."""
        if self.mask_ratio is None:
            batch = self.batch(data, starts, targets, targets)
        else:  # it masks items of whole sequences, to which the target belongs
            batch = self.batch(data, starts, targets + 1, targets)
            hidden = masked(batch["item_id_list"], self.mask_ratio, self.counts.item_num)
            for name, part in zip((_MASKED, _HIDDEN, _PLACES), hidden, strict=True):
                batch[name] = part
        loss: Tensor = self.network.calculate_loss(batch)  # type: ignore[operator]
        return loss

    def scores(self, data: Interactions, starts: Positions, targets: Positions) -> Tensor:
        """Of the histories items[start:target], [B, N + 1]; column 0 is the padding's."""
        scores: Tensor = self.network.full_sort_predict(self.batch(data, starts, targets, targets))  # type: ignore[operator]
        return scores[:, : self.counts.item_num]


def convolved(convolution: nn.Conv2d, rows: Tensor) -> Tensor:
    """What a convolution of Caser gives for rows [B, 1, L, D]: its kernel is one channel wide, [L, 1] or [h, D].

    As such cuDNN takes 7.2 s for a step's backward pass of 512 histories of 50 items (H200, fp32, 05b9dd0), an epoch of
    ML-100k 23 minutes. Along the items, with D channels, it is the same sum.
    """
    weight, bias = convolution.weight[:, 0], convolution.bias
    assert bias is not None
    if convolution.kernel_size[1] == 1:
        return (torch.matmul(weight[:, :, 0], rows[:, 0]) + bias[:, None]).unsqueeze(2)
    return F.conv1d(rows[:, 0].transpose(1, 2), weight.transpose(1, 2), bias).unsqueeze(3)


def masked(rows: Tensor, ratio: float, mask: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of items with some hidden, as RecBole's MaskItemSequence hides them, on the rows' device.

    That one goes through a batch item by item on the host, which takes 7 ms for 512 histories of ML-100k (one core of
    an EPYC) and has a GPU wait.

    Args:
        rows: int64 [B, L], 0 behind the last item.
        ratio: each item is hidden with this probability.
        mask: what stands for a hidden item.

    Returns:
        The rows; of the last int(ratio * L) hidden items of each which they were, and where, [B, int(ratio * L)], 0 on
        the left where there are fewer.
    """
    most = int(ratio * rows.shape[1])
    hides = (torch.rand(rows.shape, device=rows.device) < ratio) & (rows != 0)
    behind = hides.flip(1).cumsum(1).flip(1)  # hidden items from here on
    to = (most - behind).where(hides & (behind <= most), most)  # one column more than is returned takes the others
    items, places = torch.zeros(2, len(rows), most + 1, dtype=rows.dtype, device=rows.device)
    items.scatter_(1, to, rows)
    places.scatter_(1, to, torch.arange(rows.shape[1], device=rows.device).expand_as(rows))
    # RecBole's network takes views of them.
    return rows.masked_fill(hides, mask), items[:, :most].contiguous(), places[:, :most].contiguous()


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """From 1, int64 [B]: of equal scores [B, N + 1] the lower id first, -inf for what is no candidate."""
    own = scores.gather(1, targets[:, None])
    ids = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (ids < targets[:, None]))
    return before[:, 1:].sum(1) + 1


@torch.no_grad()
def rank_all(baseline: Baseline, data: Interactions, targets: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Filtered and raw ranks [U], and filtered lists [U, 20], as `fave_fast.evaluate.rank_targets`."""
    baseline.network.eval()
    starts, found = target_starts(data, targets), []
    for begin in range(0, len(targets), _AT_A_TIME):
        some, ends = starts[begin : begin + _AT_A_TIME], targets[begin : begin + _AT_A_TIME]
        scores = baseline.scores(data, some, ends).float()
        scores[:, 0] = -torch.inf
        wanted = torch.from_numpy(data.items[ends].astype(np.int64)).to(scores.device)
        raw = ranks(scores, wanted)
        own = scores.gather(1, wanted[:, None])
        seen = gather_histories(data.items, some, ends, int((ends - some).max()))
        scores.scatter_(1, torch.from_numpy(seen).to(scores.device), -torch.inf)
        best = scores.topk(min(LIST_LENGTH, scores.shape[1]), dim=1)
        lists = best.indices.masked_fill(best.values == -torch.inf, 0)
        scores.scatter_(1, wanted[:, None], own)  # the target is always a candidate
        found.append((ranks(scores, wanted).cpu(), raw.cpu(), lists.cpu()))
    filtered, raw, lists = (torch.cat(part) for part in zip(*found, strict=True))
    return filtered, raw, lists


@dataclass
class Training:
    """One run: epochs, selection and the cut of the learning rate as in `fave_fast.train`, stage 1."""

    baseline: Baseline
    data: Interactions
    parts: Split
    config: Config
    seed: int

    def run(self) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Any]]:
        """The curve, the best weights and the curve's line of them."""
        train, network = self.config.train, self.baseline.network
        windows = Windows(self.data.offsets, self.parts.train_end)
        optimiser = torch.optim.Adam(network.parameters(), train.lr, weight_decay=train.weight_decay)
        curve: list[dict[str, Any]] = []
        best, weights, waiting, cut, spent = None, copy.deepcopy(network.state_dict()), 0, False, 0.0
        for epoch in range(train.epochs):
            started = time.perf_counter()
            loss = self._epoch(windows, optimiser, epoch)
            spent += time.perf_counter() - started
            if (epoch + 1) % train.evaluate_every and epoch + 1 < train.epochs:
                continue
            metrics = rank_metrics(rank_all(self.baseline, self.data, self.parts.val)[0])
            line = {"stage": 1, "epoch": epoch + 1, "seconds": round(spent, 3), "loss": loss}
            curve.append({**line, **{f"val_filtered_{name}": value for name, value in metrics.items()}})
            if best is None or metrics[_SELECTION] > best[f"val_filtered_{_SELECTION}"]:
                best, weights, waiting = curve[-1], copy.deepcopy(network.state_dict()), 0
                continue
            waiting += 1
            if waiting >= train.patience:
                if cut:
                    break
                cut, waiting = True, 0
                network.load_state_dict(weights)
                for group in optimiser.param_groups:
                    group["lr"] /= 10
        assert best is not None
        return curve, weights, best

    def _epoch(self, windows: Windows, optimiser: torch.optim.Adam, epoch: int) -> float:
        network, total = self.baseline.network.train(), 0.0
        batches = epoch_batches(self.data, windows, self.config, (self.seed, 1, epoch))
        for numbers in batches:
            loss = self.baseline.loss(self.data, *windows.positions(numbers))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), self.config.train.clip)
            optimiser.step()
            total += loss.detach()
        return float(total) / len(batches)


def run(name: str, data: Interactions, base: str, config: Config, seed: int, device: torch.device) -> dict[str, Any]:
    """Train and test one model: an object like those of `bench.quality`."""
    torch.manual_seed(seed)
    random.seed(seed)
    parts = split(data, config.data)
    baseline = Baseline.make(name, data, config, device)
    curve, weights, best = Training(baseline, data, parts, config, seed).run()
    baseline.network.load_state_dict(weights)
    filtered, raw, lists = rank_all(baseline, data, parts.test)
    table = baseline.network.item_embedding.weight.detach()
    test = {
        "protocol": protocol("test", parts.description, config.model.max_length),
        "filtered": rank_metrics(filtered),
        "raw": rank_metrics(raw),
        "coverage@20": coverage(lists, data.num_items),
        "ild@20": intra_list_diversity(lists, F.normalize(table.float(), dim=-1)),
    }
    chosen = {key.removeprefix("val_filtered_"): value for key, value in best.items() if key.startswith("val_")}
    _, raw, _ = rank_all(baseline, data, parts.val)
    facts = {"users": data.num_users, "items": data.num_items, "interactions": data.num_interactions}
    return {
        "dataset": data.name,
        "preset": base,
        "setting": f"recbole-{name.lower()}",
        "seed": seed,
        "method": f"RecBole {importlib.metadata.version('recbole')}",
        "config": config.to_dict(),
        "dtype": "fp32",
        "backend": "reference",
        "steps": "recbole",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "data": {**facts, "protocol": parts.description, "decisions": [*data.decisions, *parts.decisions]},
        "finished": True,
        "seconds": curve[-1]["seconds"],
        "curve": curve,
        "stage": {"chosen": 1, "last stage": 1},
        "epoch": {"chosen": best["epoch"], "last stage": best["epoch"]},
        "validation": {"chosen": chosen, "last stage": chosen},
        "validation_raw": rank_metrics(raw),
        "test": {"chosen": test, "last stage": test},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.Parser("recbole_baselines", "RecBole's models on our split and ranking; files as of bench.quality.")
    parser.prog = "python -m bench.recbole_baselines"
    parser.add_argument("--data", nargs=2, required=True, metavar=("FILE", "PRESET"), help="log and its preset")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="which; default: all")
    parser.add_argument("--seeds", nargs="+", type=cli.whole_number(0), default=[0], help="of the runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over the preset")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the JSON files go")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--commit", help="of the code, where it is no checkout")
    cli.add_log_options(parser)
    arguments = parser.parse_args(argv)
    path, base = arguments.data
    if base not in PRESETS:
        parser.error(f"--data {path} {base}; expected one of the presets {', '.join(PRESETS)}")
    import_recbole()
    config = preset(base).override(quality.read_changes(arguments.set), "--set")
    arguments.data = path
    data = cli.load_log(arguments, config.data)
    device = cli.resolve_device(arguments.device)
    common = {"commit": arguments.commit or quality.commit(), "versions": env.versions()}
    quality.make_folder(arguments.out)
    for seed in arguments.seeds:
        for name in arguments.model:
            result = run(name, data, base, config, seed, device)
            result["dataset"] = Path(path).stem
            quality.write_run(arguments.out, {**common, **result})
    return 0


if __name__ == "__main__":
    cli.run(main)

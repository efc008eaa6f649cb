"""Configuration: frozen dataclasses, validated field by field, read from and written to YAML.

Where the paper is silent or has two readings, the choice is a field here, and its comment says which reading is the
default. Presets are settings that differ from the defaults for a known data set.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fave_fast.errors import ConfigError


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}; expected {expected}")


def _positive(name: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, name, value, "a number above 0")


def _non_negative(name: str, value: float) -> None:
    _require(math.isfinite(value) and value >= 0, name, value, "a number of at least 0")


def _probability(name: str, value: float) -> None:
    _require(0 <= value <= 1, name, value, "a number from 0 to 1")


def _dropout(name: str, value: float) -> None:
    _require(0 <= value < 1, name, value, "a number from 0 up to, not including, 1")


@dataclass(frozen=True)
class DataConfig:
    """How a log becomes histories and targets."""

    min_count: int = 0  # iterative k-core: drop users and items with fewer interactions; 0 and 1 keep all
    drop_repeats: bool = False  # keep only the first time a user meets an item
    split: Literal["leave-one-out", "global-time"] = "leave-one-out"
    val_fraction: float = 0.1  # global-time: share of the interactions, by time, before the test part
    test_fraction: float = 0.1  # global-time: share of the interactions, by time, at the end

    def __post_init__(self) -> None:
        _require(self.min_count >= 0, "data.min_count", self.min_count, "a whole number of at least 0")
        _require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "a number between 0 and 1")
        _require(0 < self.test_fraction < 1, "data.test_fraction", self.test_fraction, "a number between 0 and 1")
        total = self.val_fraction + self.test_fraction
        _require(total < 1, "data.val_fraction + data.test_fraction", total, "a sum below 1")


@dataclass(frozen=True)
class ModelConfig:
    """The network's shape and its choices."""

    d: int = 128  # embedding and hidden size D
    blocks: int = 4
    heads: int = 4
    ffn_mult: int = 4  # hidden size of the feed-forward, in multiples of d
    max_length: int = 50  # L: only the last L items of a history are read
    dropout: float = 0.3  # inside the blocks
    embedding_dropout: float = 0.3  # on the embedded history
    embedding_std: float = 0.02  # 0.02 against N(0, 1): about +2.6 points HR@20 on ML-100k in a prototype
    norm: Literal["rms", "layer"] = "rms"
    position: Literal["rotary", "none"] = "rotary"
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    conditioning: Literal["add", "gate", "film", "token"] = "add"  # how x_t is read: eq. (9), or `conditioning.py`
    delta: float = 0.001  # eq. (9): mean and standard deviation of lambda
    time_scale: float = 999.0  # the sinusoid sees time_scale * t
    source_block: int = -2  # E_u of eq. (13): hidden state after this block, counted as Python counts

    def __post_init__(self) -> None:
        for name in ("d", "blocks", "heads", "ffn_mult", "max_length"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "a whole number of at least 1")
        _require(self.d % (2 * self.heads) == 0, "model.d", self.d, f"a multiple of 2 * heads = {2 * self.heads}")
        _dropout("model.dropout", self.dropout)
        _dropout("model.embedding_dropout", self.embedding_dropout)
        _positive("model.embedding_std", self.embedding_std)
        _non_negative("model.delta", self.delta)
        _positive("model.time_scale", self.time_scale)
        _require(
            -self.blocks <= self.source_block < self.blocks,
            "model.source_block",
            self.source_block,
            f"a block from {-self.blocks} to {self.blocks - 1}",
        )


@dataclass(frozen=True)
class FlowConfig:
    """Priors, times, and what is random when the model answers."""

    rho: float = 0.75  # eq. (14): a channel of the anchor is kept with this probability
    mode_scale: float = 1.0  # s of the heavy-tailed mode sampling (Esser et al. 2024) in stage 1
    p_end: float = 0.5  # eq. (20): r = 1 with this probability, else U(t, 1)
    prior: Literal["anchor", "gaussian"] = "anchor"  # stage 2 and inference
    prior_stage1: Literal["anchor", "gaussian"] = "gaussian"  # the paper's; anchor: stage 1 sees what is served
    tangent: Literal["conditional", "learned"] = "conditional"  # v of eq. (22): x_1 - x_0, or f - x_0
    anchor_at_inference: Literal["last", "uniform"] = "last"  # which item of the history becomes e_k
    lambda_at_inference: Literal["mean", "sample"] = "mean"
    n_samples: int = 1  # endpoints drawn per request; an item's score is its best over them
    seed: int = 0  # of the generator that draws masks at inference

    def __post_init__(self) -> None:
        _probability("flow.rho", self.rho)
        _require(-1 <= self.mode_scale <= 1.75, "flow.mode_scale", self.mode_scale, "a number from -1 to 1.75")
        _probability("flow.p_end", self.p_end)
        _require(self.n_samples >= 1, "flow.n_samples", self.n_samples, "a whole number of at least 1")
        _require(0 <= self.seed < 2**63, "flow.seed", self.seed, "a whole number from 0 to 2^63 - 1")


@dataclass(frozen=True)
class LossConfig:
    """Weights of stage 1's losses and of eq. (24), and how squared errors are reduced."""

    alpha: float = 1.0  # L_tgt
    beta: float = 0.2  # L_src
    gamma: float = 0.1  # L_cons, stage 2
    rec: float = 1.0  # L_rec of eq. (11), stage 1
    match: float = 1.0  # L_match of eq. (21), stage 2; 0 is the paper's ablation "w/o L_match"
    target: Literal["all", "unseen"] = "all"  # L_tgt's softmax: over all items as eq. (12), or without the history's
    source: Literal["sampled", "dense"] = "sampled"  # L_src over the history and as many absent items, or over all
    reduction: Literal["mean", "sum"] = "mean"  # of squared errors over channels; the batch is always averaged

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "rec", "match"):
            _non_negative(f"loss.{name}", getattr(self, name))


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser and the two stages' schedule. Times are in epochs."""

    batch_size: int = 512
    lr: float = 1e-3  # Adam
    lr_stage2: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    epochs: int = 100  # stage 1, at most
    epochs_stage2: int = 20  # at most; 0 leaves stage 2 out
    evaluate_every: int = 1
    patience: int = 10  # evaluations without a better NDCG@20; then lr is cut tenfold once, then the stage ends
    group_by_length: bool = True  # batches of histories of like length: less padding
    checkpoint_seconds: float = 60.0  # how often the state for --resume is written

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "evaluate_every", "patience"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "a whole number of at least 1")
        _require(self.epochs_stage2 >= 0, "train.epochs_stage2", self.epochs_stage2, "a whole number of at least 0")
        for name in ("lr", "lr_stage2", "clip", "checkpoint_seconds"):
            _positive(f"train.{name}", getattr(self, name))
        _non_negative("train.weight_decay", self.weight_decay)


@dataclass(frozen=True)
class Config:
    """Everything that decides what a trained model is, apart from the data and the seed."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, ready for YAML, JSON or a checkpoint."""
        return dataclasses.asdict(self)

    def stage1(self) -> Config:
        """The configuration without stage 2: of two runs whose results here are equal, stage 1 is the same.

        `flow.prior` and `flow.rho` stay, as the model is judged with them in stage 1 too.
        """
        flow, loss, train = FlowConfig(), LossConfig(), TrainConfig()
        return dataclasses.replace(
            self,
            flow=dataclasses.replace(self.flow, p_end=flow.p_end, tangent=flow.tangent),
            loss=dataclasses.replace(self.loss, gamma=loss.gamma, match=loss.match),
            train=dataclasses.replace(self.train, lr_stage2=train.lr_stage2, epochs_stage2=0),
        )

    def override(self, values: object, source: str) -> Config:
        """A copy with the nested mapping `values` laid over it.

        Raises:
            ConfigError: an unknown section or key, a value of the wrong type, or one outside its field's range.
                `source` (a file name, say) begins the message.
        """
        try:
            result: Config = _override(self, values, "")
            return result
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_dict(cls, values: object, source: str) -> Config:
        """The defaults with `values` laid over them; see `override`."""
        return cls().override(values, source)


def _override(node: Any, values: object, path: str) -> Any:
    if values is None:
        return node
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the configuration'} is {values!r}; expected a mapping of keys to values")
    hints = typing.get_type_hints(type(node))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(f"unknown key {name!r}; expected one of {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[key]):
            changes[key] = _override(getattr(node, key), value, name)
        else:
            changes[key] = _coerce(hints[key], value, name)
    return dataclasses.replace(node, **changes)


def _coerce(kind: Any, value: object, name: str) -> object:
    """`value` as the field's type; whole numbers serve as floats, nothing else is converted."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        _require(value in choices, name, value, " or ".join(map(str, choices)))
        return value
    if kind is float and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        _require(
            abs(value) <= sys.float_info.max or isinstance(value, float), name, value, "a number within a float's range"
        )
        return float(value)
    expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
    _require(type(value) is kind, name, value, expected)
    return value


# Settings for known data sets, chosen on validation; Steam's are the only ones that were tried.
PRESETS: types.MappingProxyType[str, dict[str, dict[str, Any]]] = types.MappingProxyType(
    {
        "default": {},
        "ml-100k": {
            "model": {"dropout": 0.4, "embedding_dropout": 0.4},
            "loss": {"source": "dense", "target": "unseen"},
            "train": {"epochs": 80, "epochs_stage2": 5},
        },
        "beauty": {
            "model": {"blocks": 2, "norm": "layer", "max_length": 20, "dropout": 0.4, "embedding_dropout": 0.6},
            "loss": {"alpha": 8.0},
            "train": {"epochs": 100, "epochs_stage2": 5, "evaluate_every": 2},
        },
        # Half the blocks, on validation within the seeds' interval of the above.
        "beauty-one-block": {
            "model": {
                "blocks": 1,
                "source_block": -1,
                "norm": "layer",
                "max_length": 20,
                "dropout": 0.4,
                "embedding_dropout": 0.7,
            },
            "loss": {"alpha": 8.0},
            "train": {"epochs": 120, "epochs_stage2": 5, "evaluate_every": 2},
        },
        "steam": {
            "model": {"blocks": 2},
            "loss": {"alpha": 2.0},
            "train": {"epochs": 40, "epochs_stage2": 4, "patience": 6, "evaluate_every": 2},
        },
    }
)


def preset(name: str) -> Config:
    """The configuration called `name`.

    Raises:
        ConfigError: no preset has that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return Config.from_dict(PRESETS[name], f"preset {name}")


def load_yaml(path: str | Path, base: Config) -> Config:
    """`base` with the YAML file at `path` laid over it.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or holds an unknown key or a bad value.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return base.override(values, str(path))


def dump_yaml(config: Config) -> str:
    """`config` as YAML that `load_yaml` reads back to an equal value."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False)

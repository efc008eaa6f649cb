from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fave_fast.config import PRESETS, Config, dump_yaml, load_yaml, preset
from fave_fast.errors import ConfigError

WHOLE = ("model.d", "model.blocks", "model.heads", "model.ffn_mult", "model.max_length", "flow.n_samples")
COUNTS = (*WHOLE, "train.batch_size", "train.epochs", "train.evaluate_every", "train.patience")
POSITIVE = ("model.embedding_std", "model.time_scale", "train.lr", "train.lr_stage2", "train.clip")
NON_NEGATIVE = (
    "model.delta",
    "loss.alpha",
    "loss.beta",
    "loss.gamma",
    "loss.rec",
    "loss.match",
    "train.weight_decay",
)
BAD_RANGES: list[tuple[str, Any]] = [
    *((name, value) for name in COUNTS for value in (0, -1)),
    *((name, value) for name in (*POSITIVE, "train.checkpoint_seconds") for value in (0, -1e-9, math.nan, math.inf)),
    *((name, value) for name in NON_NEGATIVE for value in (-1e-9, math.nan, math.inf)),
    *((name, value) for name in ("flow.rho", "flow.p_end") for value in (-0.01, 1.01, math.nan)),
    *((name, value) for name in ("model.dropout", "model.embedding_dropout") for value in (-0.1, 1, math.nan)),
    *((f"data.{part}_fraction", value) for part in ("val", "test") for value in (0, 1, -0.5, math.nan, 0.95)),
    *((name, -1) for name in ("data.min_count", "flow.seed", "train.epochs_stage2")),
    *(("flow.mode_scale", value) for value in (-1.01, 1.76, math.nan)),
    *(("model.source_block", value) for value in (-5, 4)),
    ("model.d", 12),  # no multiple of 2 * 4 heads
    ("flow.seed", 2**64),  # more than a generator's seed can be
    ("train.lr", 10**400),  # a whole number that no float holds
]
BOUNDS: list[tuple[str, Any]] = [
    *((name, 1) for name in COUNTS if name not in ("model.d", "model.blocks")),
    *((name, 0) for name in (*NON_NEGATIVE, "flow.rho", "flow.p_end", "model.dropout", "model.embedding_dropout")),
    *((name, 0) for name in ("data.min_count", "flow.seed", "train.epochs_stage2")),
    *((name, 1) for name in ("flow.rho", "flow.p_end")),
    *(("flow.mode_scale", value) for value in (-1, 1.75)),
    *(("model.source_block", value) for value in (-4, 3)),
]
BAD_TYPES: list[tuple[str, Any, str]] = [
    ("model.d", 128.0, "a whole number"),
    ("model.d", "128", "a whole number"),
    ("model.d", True, "a whole number"),
    ("model.d", None, "a whole number"),
    ("model.dropout", "0.3", "a number"),
    ("model.dropout", False, "a number"),
    ("model.dropout", [0.3], "a number"),
    ("train.group_by_length", 1, "true or false"),
    ("data.drop_repeats", "yes", "true or false"),
    ("model.norm", "batch", "rms or layer"),
    ("model.norm", 3, "rms or layer"),
    ("model.norm", ["rms"], "rms or layer"),
    ("flow.prior", None, "anchor or gaussian"),
    ("loss.reduction", {"mean": 1}, "mean or sum"),
]


def nested(name: str, value: object) -> dict[str, dict[str, object]]:
    section, key = name.split(".")
    return {section: {key: value}}


def read(tmp_path: Path, text: str, base: Config | None = None) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_yaml(path, base or Config())


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_round_trip_of_presets(tmp_path: Path, name: str) -> None:
    config = preset(name)
    # Whatever the base: the dump names every field.
    other = Config.from_dict({"model": {"d": 8, "heads": 1}, "loss": {"alpha": 9}, "flow": {"prior": "gaussian"}}, "x")
    assert read(tmp_path, dump_yaml(config), other) == config
    assert Config.from_dict(config.to_dict(), "x") == config


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-300, 1e300), st.floats(0, 1, exclude_max=True), st.integers(1, 10**12))
def test_yaml_keeps_numbers_exactly(
    tmp_path_factory: pytest.TempPathFactory, lr: float, dropout: float, epochs: int
) -> None:
    values = {"train": {"lr": lr, "epochs": epochs}, "model": {"dropout": dropout}}
    config = Config.from_dict(values, "x")
    assert read(tmp_path_factory.getbasetemp(), dump_yaml(config)) == config
    assert (config.train.lr, config.model.dropout, config.train.epochs) == (lr, dropout, epochs)


def test_override_lays_values_over_the_base(tmp_path: Path) -> None:
    base = Config.from_dict({"model": {"d": 64}, "loss": {"alpha": 0.5}}, "x")
    config = read(tmp_path, "model:\n  norm: layer\nloss:\n  alpha: 2\nflow:\n", base)
    assert (config.model.d, config.model.norm, config.loss.alpha) == (64, "layer", 2.0)
    assert type(config.loss.alpha) is float
    assert config.flow == base.flow
    assert read(tmp_path, "", base) == base


def test_fields_that_bound_each_other_change_together() -> None:
    assert Config.from_dict({"model": {"blocks": 1, "source_block": 0}}, "x").model.blocks == 1
    assert Config.from_dict({"model": {"d": 12, "heads": 3}}, "x").model.d == 12


@pytest.mark.parametrize("text", ["train: {lr: 1e-3}", "train: {lr: 1.0e-3}", "train: {lr: 0.001}"])
def test_scientific_numbers(tmp_path: Path, text: str) -> None:
    """YAML 1.1 takes 1e-3 for a text; for a user it is the same number as 0.001."""
    assert read(tmp_path, text).train.lr == 0.001


@pytest.mark.parametrize(("name", "value"), BAD_RANGES, ids=lambda x: str(x)[:24])
def test_value_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="expected") as error:
        Config.from_dict(nested(name, value), "my.yaml")
    message = str(error.value)
    assert message.startswith("my.yaml: ")
    assert name in message


@pytest.mark.parametrize(("name", "value"), BOUNDS)
def test_value_at_its_bound(name: str, value: float) -> None:
    section, key = name.split(".")
    assert getattr(getattr(Config.from_dict(nested(name, value), "x"), section), key) == value


@pytest.mark.parametrize(("name", "value", "expected"), BAD_TYPES)
def test_value_of_the_wrong_type(name: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_dict(nested(name, value), "my.yaml")
    assert str(error.value) == f"my.yaml: {name} is {value!r}; expected {expected}"


def test_every_number_is_validated() -> None:
    """A new numeric field must say its range: below it, above it or NaN, something is refused."""
    tested = {name for name, _ in BAD_RANGES}
    for section in dataclasses.fields(Config):
        values = getattr(Config(), section.name)
        for field in dataclasses.fields(values):
            if type(getattr(values, field.name)) in (int, float):
                assert f"{section.name}.{field.name}" in tested


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": {}}, "unknown key 'models'; expected one of data, model, flow, loss, train"),
        ({"model": {"dim": 3}}, "unknown key 'model.dim'; expected one of d, blocks, "),
        ({3: {}}, "unknown key '3'"),
        ({"model": 3}, "model is 3; expected a mapping"),
        ([1], r"the configuration is \[1\]; expected a mapping"),
        ("text", "the configuration is 'text'; expected a mapping"),
    ],
)
def test_unknown_keys_and_shapes(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"my.yaml: {message}"):
        Config.from_dict(values, "my.yaml")


@pytest.mark.parametrize(
    "text", ["a: [", "\t- x", "model: {d: 1", "a: b: c", "data: 2024-99-99", "x: !!python/name:os.system"]
)
def test_not_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: not YAML: ") as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the configuration: No such file"):
        load_yaml(tmp_path / "none.yaml", Config())
    with pytest.raises(ConfigError, match="cannot read the configuration: Is a directory"):
        load_yaml(tmp_path, Config())
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not YAML: "):
        load_yaml(tmp_path / "binary.yaml", Config())


def test_unknown_preset() -> None:
    with pytest.raises(
        ConfigError, match="unknown preset 'beuty'; expected one of default, ml-100k, beauty, beauty-one-block, steam"
    ):
        preset("beuty")


def test_stage1_leaves_out_what_stage_2_alone_reads() -> None:
    base = preset("beauty")
    later = {
        "flow": {"p_end": 0.1, "tangent": "learned"},
        "loss": {"gamma": 0.0, "match": 0.0},
        "train": {"lr_stage2": 1.0, "epochs_stage2": 9},
    }
    assert base.override(later, "x").stage1() == base.stage1()
    assert base.stage1().train.epochs_stage2 == 0
    for values in (
        {"flow": {"prior": "gaussian"}},
        {"flow": {"rho": 0.5}},
        {"loss": {"rec": 0.0}},
        {"train": {"lr": 1}},
    ):
        assert base.override(values, "x").stage1() != base.stage1()


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.d = 3  # type: ignore[misc]

"""The training options: ranges, TOML there and back, messages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.config import TrainConfig
from foreword.errors import ConfigError

FIELDS = dataclasses.fields(TrainConfig)


def test_every_option_explains_itself() -> None:
    for option in FIELDS:
        text = option.metadata["help"]
        assert len(text) > 10, option.name
        assert text[0].isupper(), option.name
        assert text.endswith("."), option.name


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])), length=st.integers(1, 10**6), rate=st.floats(1e-12, 1e3),
    strict=st.booleans(), schedule=st.sampled_from(["linear", "cosine", "constant"]),
)  # fmt: skip
def test_toml_there_and_back(tmp_path: Path, text: str, length: int, rate: float, strict: bool, schedule: str) -> None:
    config = TrainConfig(text=text, length=length, learning_rate=rate, strict=strict, schedule=schedule)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8", newline="\n")
    assert TrainConfig.from_toml(path) == config
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("epochs = 3\nlearning_rate = 1\n")
    config = TrainConfig.from_toml(path, {"epochs": 4})
    assert (config.epochs, config.learning_rate) == (4, 1.0)
    assert type(config.learning_rate) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; expected 'epochs'"),
        ({"zzz": 3}, "unknown option 'zzz'; expected one of length, init"),
        ({"epochs": 0}, "epochs = 0; expected at least 1"),
        ({"learning_rate": 0}, "learning_rate = 0.0; expected more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan; expected a finite number"),
        ({"warmup_ratio": 1.5}, "warmup_ratio = 1.5; expected at most 1"),
        ({"epochs": "3"}, "epochs = '3'; expected a whole number"),
        ({"epochs": True}, "epochs = True; expected a whole number"),
        ({"epochs": 2.5}, "epochs = 2.5; expected a whole number"),
        ({"strict": 1}, "strict = 1; expected true or false"),
        ({"precision": "fp8"}, "precision = 'fp8'; expected auto, float32 or bfloat16"),
    ],
)
def test_bad_values_are_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict(values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"epochs = = 3", b"\xff\xfe", b"[run]\nepochs = 3", b"epochs = -1"])
def test_bad_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad[.]toml"):
        TrainConfig.from_toml(path)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read configuration"):
        TrainConfig.from_toml(tmp_path / "none.toml")


def test_decisive_leaves_out_what_changes_no_result() -> None:
    assert TrainConfig(checkpoint_seconds=1, tracker="wandb").decisive() == TrainConfig().decisive()
    assert TrainConfig(seed=1).decisive() != TrainConfig().decisive()

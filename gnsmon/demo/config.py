"""What a demo run can be told, by a TOML file and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from gnsmon.config import load


class DemoConfig(BaseModel):
    """What every task takes; the field names are the keys of `configs/*.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["digits", "text"]
    seed: int = 0
    steps: PositiveInt  # optimizer steps
    batch_size: int = Field(ge=2)  # examples in an optimizer step
    optimizer: Literal["sgd", "adamw"]
    lr: PositiveFloat
    methods: list[str] = Field(["pepgns", "sogns"], min_length=1)
    every: PositiveInt = 1  # measure one step in this many
    decay: float = Field(0.99, gt=0, lt=1)  # of the averages, per measured step
    run_dir: Path | None = None  # runs/demo-TASK-TIME


class DigitsConfig(DemoConfig):
    """A CNN of a million parameters on handwritten digits."""

    task: Literal["digits"] = "digits"
    steps: PositiveInt = 600
    batch_size: int = Field(128, ge=2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.02
    shift: int = Field(2, ge=0, le=27)  # pixels by which an image may move along either axis
    data_dir: Path | None = None  # a folder with the MNIST files; scikit-learn's digits without


class TextConfig(DemoConfig):
    """A character transformer on the text of Python's own manual."""

    task: Literal["text"] = "text"
    steps: PositiveInt = 600
    batch_size: int = Field(16, ge=2)
    microbatch: PositiveInt = 8  # sequences in one forward pass
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: PositiveFloat = 3e-3  # at the end of the warm-up; falls by a cosine to a tenth
    warmup: int = Field(30, ge=0)  # steps
    clip: PositiveFloat = 1.0  # largest gradient norm
    decay: float = Field(0.95, gt=0, lt=1)  # |G|² falls fast: a shorter memory follows it
    context: int = Field(128, ge=1, le=4096)  # characters in a sequence
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _whole_microbatches(self) -> TextConfig:
        if self.batch_size % self.microbatch:
            raise ValueError(
                f"batch_size: expected a multiple of microbatch = {self.microbatch}, "
                f"got {self.batch_size}"
            )
        return self


class _Task(BaseModel):
    task: Literal["digits", "text"] = "digits"


def load_config(file: Path | None = None, **settings: Any) -> DigitsConfig | TextConfig:
    """The settings of a run: those of `settings` that are not None, over `file`, over defaults.

    Raises:
        ValueError: an unknown key (with the nearest one) or an impossible value, naming the key.
        FileNotFoundError: no such `file`.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = load(_Task, file, **{k: v for k, v in given.items() if k == "task"})
    return load(DigitsConfig if chosen.task == "digits" else TextConfig, file, **given)

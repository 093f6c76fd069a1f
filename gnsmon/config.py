"""What a user may set: one model for keyword arguments and TOML files."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TAPPED = ("pepgns", "sketch", "sogns", "norm_layers")
OTHERS = ("microbatch", "subbatch", "random_signs")
FILLED = ("pepgns", "sketch", "sogns")  # of which another source may fill the gaps
CALIBRATED = ("sogns", "norm_layers")
WEIGHED = ("pepgns", "microbatch", "subbatch", "ranks")  # which may be preconditioned
METHODS = (*TAPPED, *OTHERS, "ranks")
HALF_LIFE = re.compile(
    r"\s*(\d+(?:[,_]\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kMG]?)\s*(steps|examples|tokens)\s*"
)
Model = TypeVar("Model", bound=BaseModel)


class MonitorConfig(BaseModel):
    """The settings of `gnsmon.attach`; every one is a keyword argument of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    method: list[str] = Field(["pepgns"], min_length=1)
    """Sources of the small-batch norms, each its own reading; advice is given on the first.

    By example: "pepgns" (exact), "sketch" (unbiased, in time linear in positions), "sogns" (an
    approximation), "norm_layers" (of their parameters alone). Microbatches of gradient
    accumulation, for any model: "microbatch" (all), "subbatch" (the first against the whole step).
    The microbatches of all ranks of DistributedDataParallel, one or more a rank: "ranks".
    One more backward of randomly signed losses, for any model: "random_signs", which wants
    `Monitor.losses`. "pepgns+microbatch" takes the second source for the parameters that the
    first leaves out.
    """
    calibrate_every: int | None = Field(None, ge=1)
    """For sogns and norm_layers: one measured step in this many is measured exactly too."""
    preconditioned: bool = False
    """Beside each method that can, a second reading in the metric of the optimizer.

    The noise scale tr(P Σ) / (G' P G), P = 1 / (sqrt(v) + eps) of Adam and its like as it was
    before the step, logged as "microbatch_preconditioned", and so of "subbatch" and "ranks", and
    "pepgns_preconditioned_factored", for which P is taken for a product of rows and columns, as
    Adafactor's. Other methods, and those with a plus, have none.
    """
    subspace: int = Field(8, ge=1)
    """For sketch: directions in which the norms are exact."""
    probes: int = Field(1, ge=1)
    """For sketch: random probes of each example in the other directions."""
    engine: Literal["auto", "fused", "hooks"] = "auto"
    """How the exact norms of a layer are had.

    "fused" takes over the backward of linear, convolution and norm layers, so that nothing is done
    twice; the gradients are autograd's to rounding. "hooks" leaves them bitwise as they are. "auto"
    times what there is, once for each layer and shape, takes the fastest, and leaves small layers.
    """
    every: int | Literal["auto"] = "auto"
    """Measure one optimizer step in this many; "auto": as many as `overhead` pays for.

    That is found out while training, and again when the batch or the speed of the model changes.
    The first sixty steps or so, from which the cost is learnt, have fifteen measured ones. Which
    steps are measured depends on how long they take, so that a second run may measure others.
    """
    overhead: float = Field(0.01, gt=0, lt=1)
    """Share of the training time that measuring may take, with every="auto" only."""
    decay: float | None = Field(None, gt=0, lt=1)
    """Weight kept by the averages at each measured step; 0.99 unless half_life or window is set."""
    half_life: str | None = None
    """Memory of the averages instead of decay: "500 steps", "1e6 examples", "20M tokens"."""
    window: int | None = Field(None, ge=2)
    """Average the last so many measured steps, all alike, instead."""
    grad_memory: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How many times as long |G|² is remembered as S."""
    level: float = Field(0.95, gt=0, lt=1)
    """Level of the interval."""
    groups: str | Callable[[str], str] | Mapping[str, str] = "layer"
    """Parameters reported together: "layer", "kind", "total", a function, or pattern -> group."""
    sinks: list[Any] = []
    """Where readings go beside the log: "tensorboard:runs/a", "console", "csv", a function, ..."""
    run_dir: Path | None = None
    """Folder of gns.jsonl and of sinks without a path; runs/gnsmon-<time> unless named."""
    diagnostics: bool = False
    """Watch the layers' health too, in the same pass: see docs/health.md."""
    clip: float | None = Field(None, gt=0)
    """For diagnostics: the gradient norm at which clipping would begin, of all and of each layer.

    Nothing is clipped.
    """
    norm_bound: float | None = Field(None, gt=0)
    """For diagnostics: a bound on the norm of an example's own gradient."""
    batch_dim: int = Field(0, ge=0, le=1)
    """Axis of the examples in the input and output of every layer."""
    strict: bool = False
    """Raise what goes wrong instead of leaving the measurement out and saying so."""

    @field_validator("method", mode="before")
    @classmethod
    def _one_method(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("method")
    @classmethod
    def _known_methods(cls, value: list[str]) -> list[str]:
        for name in value:
            first, plus, rest = name.partition("+")
            if first not in METHODS or plus and not (first in FILLED and rest in OTHERS):
                raise ValueError(
                    f"expected one of {', '.join(METHODS)}, or a plus between one of "
                    f"{', '.join(FILLED)} and one of {', '.join(OTHERS)}; got {name!r}"
                )
        return value

    @field_validator("every", mode="before")
    @classmethod
    def _every(cls, value: Any) -> Any:
        if value == "auto" or isinstance(value, int) and value >= 1:
            return value
        raise ValueError(f'expected "auto" or a number of steps, 1 or more; got {value!r}')

    @field_validator("sinks", mode="before")
    @classmethod
    def _sinks(cls, value: Any) -> Any:
        one = isinstance(value, str) or callable(value)
        return [] if value is None else [value] if one else list(value)

    @field_validator("clip", "norm_bound")
    @classmethod
    def _bound(cls, value: float | None) -> float | None:
        if value == math.inf:
            raise ValueError(
                "expected a finite norm, got inf, which nothing exceeds; leave it out to have no "
                "such bound, the norms are told without it"
            )
        return value

    @field_validator("half_life")
    @classmethod
    def _half_life(cls, value: str | None) -> str | None:
        if value is not None:
            parse_half_life(value)
        return value

    @model_validator(mode="after")
    def _one_memory(self) -> MonitorConfig:
        memories = [k for k in ("decay", "half_life", "window") if getattr(self, k) is not None]
        if len(memories) > 1:
            raise ValueError(f"{' and '.join(memories)} are set; the averages take one of them")
        if "overhead" in self.model_fields_set and self.every != "auto":
            raise ValueError(
                f'overhead is for every="auto", and every is {self.every}; give one of them'
            )
        if not self.diagnostics:
            for key in ("clip", "norm_bound"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for diagnostics=True, and diagnostics is off")
        if len(set(self.method)) < len(self.method):
            raise ValueError(f"method names a source twice: {self.method}")
        if self.calibrate_every and not any(m.partition("+")[0] in CALIBRATED for m in self.method):
            raise ValueError(
                f"calibrate_every is for {' and '.join(CALIBRATED)}, and method is {self.method}"
            )
        if self.preconditioned and not self.weighed:
            raise ValueError(
                f"preconditioned is for {', '.join(WEIGHED)}, and method is {self.method}; add one "
                "of them to the list"
            )
        return self

    @property
    def weighed(self) -> list[str]:
        """The methods that have a preconditioned reading too."""
        return [m for m in self.method if self.preconditioned and m in WEIGHED]


def parse_half_life(text: str) -> tuple[float, str]:
    """Amount and unit.

    >>> parse_half_life("20M tokens")
    (20000000.0, 'tokens')
    """
    match = HALF_LIFE.fullmatch(text)
    if match is None:
        raise ValueError(
            'expected a number and a unit such as "500 steps", "1e6 examples" or '
            f'"20M tokens"; got {text!r}'
        )
    number, factor, unit = match.groups()
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[factor]
    amount = float(number.replace(",", "").replace("_", "")) * scale
    if amount <= 0:
        raise ValueError(f"expected a positive amount, got {text!r}")
    return amount, unit


def load(kind: type[Model], path: Model | str | Path | None, **overrides: Any) -> Model:
    """The settings of a TOML file or those made before, with `overrides` on top.

    Raises:
        ValueError: on an unknown key (with the nearest one) or an impossible value, naming the key.
    """
    if isinstance(path, kind):
        path, overrides = None, {**path.model_dump(exclude_unset=True), **overrides}
    if not isinstance(path, str | Path | None):
        raise ValueError(
            f"config: expected a {kind.__name__} or the path of a TOML file, got {path!r}; give "
            "single settings as keywords"
        )
    where = f"{path}: " if path is not None else ""
    try:
        values = tomllib.loads(Path(path).read_text()) if path is not None else {}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}{error}") from None
    try:
        return kind(**{**values, **overrides})
    except ValidationError as error:
        problems = "; ".join(_problem(kind, e) for e in error.errors())
        raise ValueError(f"{where}{problems}") from None


def _problem(kind: type[BaseModel], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, kind.model_fields, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(kind.model_fields)}"
        return f"unknown setting {key!r}; {known}"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if "got" in message else f", got {error['input']!r}"
    return f"{key}: {message}{got}" if key else message

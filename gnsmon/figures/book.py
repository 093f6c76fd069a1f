"""Makes the figures that are asked for; those of one training run share it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gnsmon.figures.page import Page

if TYPE_CHECKING:
    from gnsmon.figures import layers, training

NAMES = ("1", "2a", "2b", "3", "4", "5", "6")
Say = Callable[[str], None]


def make(
    only: Sequence[str] = NAMES,
    *,
    out: Path = Path("docs/figures"),
    quick: bool = False,
    checkpoint: Path | None = None,
    tokens: Path | None = None,
    validation: Path | None = Path("docs/validation.json"),
    options: str = "",
    say: Say = lambda _: None,
) -> Iterator[Path]:
    """Measure, draw and write the figures one by one; the files, each when it is written.

    Args:
        only: any of `NAMES`.
        out: folder of figure_N.png and figure_N.md, made if need be.
        quick: smaller models, fewer steps, fewer examples.
        checkpoint: folder of a Hugging Face causal language model, for figure 3.
        tokens: .npy file of token indices [N, T] for that model.
        validation: file of measured critical batches, for figure 2b; may not exist.
        options: further ones of the command that is written beside each figure, after a space.
        say: told what is being done.

    Raises:
        ValueError: on another name, tokens without a checkpoint or that are none, or a checkpoint
            without figure 3.
        FileNotFoundError: if there is no model in the checkpoint's folder.
        ImportError: without matplotlib, before anything is measured.
    """
    if unknown := [name for name in only if name not in NAMES]:
        raise ValueError(f"expected figures among {', '.join(NAMES)}, got {', '.join(unknown)}")
    if tokens is not None and checkpoint is None:
        raise ValueError("tokens are for a checkpoint: name its folder too")
    if checkpoint is not None:
        if "3" not in only:
            raise ValueError(f"a checkpoint is for figure 3, got figures {', '.join(only)} alone")
        _need_files(checkpoint, tokens)
    _need_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        book = _Book(Path(folder), quick, checkpoint, tokens, validation, say)
        for name in NAMES:
            if name in only:
                say(f"figure {name}")
                model = _of_model(checkpoint, tokens) if name == "3" else ""
                command = f"gnsmon figures --only {name}{model}{options}"
                yield from book.page(name).write(out, command)


def _need_files(checkpoint: Path, tokens: Path | None) -> None:
    from gnsmon.figures import layers

    layers.need_model(checkpoint)
    if tokens is not None:
        layers.tokens_of(tokens)


def _of_model(checkpoint: Path | None, tokens: Path | None) -> str:
    named = {"checkpoint": checkpoint, "tokens": tokens}
    return "".join(f" --{key} {path.name}" for key, path in named.items() if path is not None)


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError('a figure needs matplotlib: pip install "gnsmon[report]"')


class _Book:
    """The figures of one call, with the training run that some of them share."""

    def __init__(
        self,
        folder: Path,
        quick: bool,
        checkpoint: Path | None,
        tokens: Path | None,
        validation: Path | None,
        say: Say,
    ) -> None:
        self._folder, self._quick, self._say = folder, quick, say
        self._checkpoint, self._tokens, self._validation = checkpoint, tokens, validation

    def page(self, name: str) -> Page:
        """One figure, measured."""
        if name == "1":
            from gnsmon.figures import variance

            return variance.page(variance.measure(repeat=2_000 if self._quick else 20_000))
        if name in ("2a", "2b"):
            from gnsmon.figures import training

            numbers = training.measure(self._trained, validation=self._validation)
            return training.page_a(numbers) if name == "2a" else training.page_b(numbers)
        if name == "3":
            from gnsmon.figures import layers

            return layers.page(layers.measure(self._at_checkpoint()))
        if name in ("4", "5"):
            from gnsmon.figures import violations

            examples = 64 if self._quick else 256
            numbers_of = violations.measure(unit_variance=name == "4", examples=examples)
            return violations.page(numbers_of)
        from gnsmon.figures import appendix_e as e

        return e.page(e.measure(e.QUICK if self._quick else e.Settings()))

    @cached_property
    def _trained(self) -> training.Trained:
        from gnsmon.figures.training import QUICK, Settings, train

        return train(QUICK if self._quick else Settings(), self._folder, say=self._say)

    def _at_checkpoint(self) -> layers.Checkpoint:
        from gnsmon.figures import layers

        if self._checkpoint is None:
            return layers.demo(self._trained, batches=10 if self._quick else 60)
        tokens = None if self._tokens is None else layers.tokens_of(self._tokens)
        batches = 4 if self._quick else 20
        return layers.hugging_face(self._checkpoint, tokens=tokens, batches=batches)

"""Figure 3: layer by layer, small norms and noise scale, SOGNS beside exact, at one checkpoint."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gnsmon
from gnsmon.demo.data import topics, windows
from gnsmon.estimators import GroupReading
from gnsmon.figures.page import Page, Rows, number
from gnsmon.figures.training import METHODS, Trained, loss_of

TITLE = "Layer by layer at one checkpoint: SOGNS beside exact norms"
SAME = 1e-4  # relative difference below which SOGNS took a layer's norms exactly
MOST = 60  # layers drawn; all are in the table


@dataclass(frozen=True)
class Checkpoint:
    """A model with batches to measure it on."""

    about: str  # both, in words
    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Iterable[Any]


@dataclass(frozen=True)
class Estimates:
    """One method's moments of a layer, means over the batches; NaN where there is no number."""

    small_sq_norm: float  # mean squared norm of one example's gradient
    b_simple: float
    low: float
    high: float


@dataclass(frozen=True)
class Layer:
    """A layer by both methods."""

    name: str
    exact: Estimates
    sogns: Estimates

    @property
    def ratio(self) -> float:
        """SOGNS over exact small norm."""
        return self.sogns.small_sq_norm / self.exact.small_sq_norm


@dataclass(frozen=True)
class Numbers:
    """All measured layers, in the model's order, and the whole model."""

    about: str
    batches: int
    layers: list[Layer]
    total: Layer
    left_out: dict[str, str]  # parameter -> why


def measure(checkpoint: Checkpoint) -> Numbers:
    """Both methods on every batch of the checkpoint, whose parameters stay as they are."""
    batches = list(checkpoint.batches)
    model = checkpoint.model.eval()
    with (
        tempfile.TemporaryDirectory() as folder,
        gnsmon.attach(
            model, method=list(METHODS), every=1, window=max(len(batches), 2), run_dir=folder
        ) as gns,
    ):
        for batch in batches:
            checkpoint.loss(model, batch).backward()
            gns.commit()
            model.zero_grad()
        if gns.reading is None:
            raise ValueError(f"{checkpoint.about}: nothing could be measured: {dict(gns.skipped)}")
        exact, sogns = (gns.readings[name] for name in METHODS)
        left_out = gns.coverage().missing
    layers = [
        Layer(name, _estimates(group), _estimates(sogns.groups[name]))
        for name, group in exact.groups.items()
    ]
    total = Layer("all", _estimates(exact), _estimates(sogns))
    return Numbers(checkpoint.about, len(batches), layers, total, left_out)


def _estimates(reading: GroupReading | gnsmon.Reading) -> Estimates:
    """For single examples E |g|^2 = |G|^2 + S, and so are their unbiased estimates."""
    known = (math.nan if x is None else x for x in (reading.b_simple, reading.low, reading.high))
    return Estimates(reading.grad_sq_norm + reading.tr_sigma, *known)


def demo(trained: Trained, *, batches: int, seed: int = 1) -> Checkpoint:
    """The checkpoint of figure 2a on as large batches of the same text, drawn anew."""
    s, text = trained.settings, topics()
    generator = torch.Generator().manual_seed(seed)
    drawn = islice(windows(text.train, s.batch, s.context, generator), batches)
    about = (
        f"The character GPT of figure 2a after {s.steps} steps, on {batches} batches of {s.batch} "
        f"sequences of {s.context} characters."
    )
    return Checkpoint(about, trained.model, loss_of, drawn)


def hugging_face(
    folder: Path,
    *,
    tokens: Tensor | None = None,
    batches: int = 20,
    batch: int = 8,
    context: int = 128,
    seed: int = 1,
) -> Checkpoint:
    """A causal language model from a folder, on given tokens, on Python's manual, or on random.

    Args:
        folder: with config.json and weights, as `save_pretrained` writes them.
        tokens: [N, T], as many batches of them as there are; else the text of Python's manual by
            the folder's own tokenizer; if it has none, random ones, which say little.
        batches: of other tokens than given ones.
        batch: sequences in a batch.
        context: tokens in a sequence, at most.
        seed: of the choice of other tokens than given ones.

    Raises:
        ImportError: without transformers.
        FileNotFoundError: if there is no model in `folder`.
        ValueError: on tokens that make fewer than two batches, or no matrix of indices.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            'a Hugging Face checkpoint needs transformers: pip install "gnsmon[transformers]"'
        ) from error
    need_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    context = min(context, getattr(model.config, "max_position_embeddings", None) or context)
    if tokens is not None:
        positions = getattr(model.config, "max_position_embeddings", None)
        parts = _given(tokens, batch, model.config.vocab_size, positions)
        what = "given tokens"
    else:
        generator = torch.Generator().manual_seed(seed)
        what, stream = _stream(folder, model.config.vocab_size, generator)
        drawn = windows(stream, batch, context, generator)
        parts = [x for x, _ in islice(drawn, batches)]
    count, length = parts[0].shape
    about = (
        f"{type(model).__name__} from the folder {folder.name}, on {len(parts)} batches of {count} "
        f"sequences of {length} tokens: {what}."
    )
    return Checkpoint(about, model, _causal_loss, parts)


def need_model(folder: Path) -> None:
    """FileNotFoundError unless `folder` looks like one that `save_pretrained` wrote."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: expected a folder with config.json and weights, as save_pretrained writes"
        )


def _given(tokens: Tensor, batch: int, vocabulary: int, positions: int | None) -> list[Tensor]:
    whole = tokens.ndim == 2 and not tokens.is_floating_point() and tokens.shape[1] > 1
    if not whole or len(tokens) < 2 * batch:
        raise ValueError(
            f"tokens: expected integers [N, T] with N of {2 * batch} or more and T of 2 or more, "
            f"got {tokens.dtype} {list(tokens.shape)}"
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"tokens: expected indices from 0 to {vocabulary - 1}, got {int(tokens.min())} to "
            f"{int(tokens.max())}"
        )
    if positions is not None and tokens.shape[1] > positions:
        raise ValueError(
            f"tokens: expected at most {positions} to a sequence, as many as the model has "
            f"positions, got {tokens.shape[1]}"
        )
    return list(tokens.long()[: len(tokens) // batch * batch].split(batch))


def _stream(folder: Path, vocabulary: int, generator: torch.Generator) -> tuple[str, Tensor]:
    """What the tokens are, and a long row of them."""
    if not (folder / "tokenizer_config.json").is_file():
        what = "random tokens, as the folder has no tokenizer, so that the gradients say little"
        return what, torch.randint(vocabulary, (100_000,), generator=generator)
    from transformers import AutoTokenizer

    text = topics()
    characters = "".join(text.vocabulary[i] for i in text.train.tolist())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(characters, add_special_tokens=False, verbose=False)["input_ids"]
    return "the text of Python's manual", torch.tensor(ids)


def _causal_loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def page(numbers: Numbers) -> Page:
    """The figure."""
    exact_by_nature = [x for x in numbers.layers if abs(x.ratio - 1) < SAME]
    off = [x.ratio for x in numbers.layers if x not in exact_by_nature]
    worst = max(numbers.layers, key=lambda x: abs(math.log(x.ratio)))
    total = numbers.total
    text = (
        f"{numbers.about} The parameters stay as they are, so that the means over the batches are "
        "of one gradient and one covariance. Bars are 95 % intervals by exact norms.",
        f"In the {len(off)} layers that SOGNS approximates, its small norm is "
        f"{np.median(off) if off else 1:.3g} times the exact one in the median and "
        f"{worst.ratio:.3g} times in {worst.name}, the worst. In the {len(exact_by_nature)} others "
        "(norm layers, embeddings, single positions) it is exact; they are in the table alone. "
        f"Of the whole model, {number(total.ratio)} times, and a b_simple of "
        f"{number(total.sogns.b_simple)} against {number(total.exact.b_simple)}. A dash: no noise "
        "scale could be read, because |G|² came out too close to zero, or below.",
    )
    if numbers.left_out:
        missing = "; ".join(f"{name} ({why})" for name, why in numbers.left_out.items())
        text += (f"Left out by both methods: {missing}.",)
    return Page("3", TITLE, text, _rows(numbers), partial(plot, numbers))


def _rows(numbers: Numbers) -> Rows:
    head = ("layer", "small norm, exact", "SOGNS", "ratio", "b_simple, exact", "95 %", "SOGNS")
    rows: Rows = [head]
    for layer in [*numbers.layers, numbers.total]:
        exact, sogns = layer.exact, layer.sogns
        small = number(exact.small_sq_norm), number(sogns.small_sq_norm), f"{layer.ratio:.2f}"
        interval = f"{number(exact.low)} to {number(exact.high)}"
        noise = number(exact.b_simple), interval, number(sogns.b_simple)
        rows.append((layer.name, *small, *noise))
    return rows


def plot(numbers: Numbers, path: Path) -> None:
    """Draw both quantities, a line for each layer that SOGNS approximates."""
    from gnsmon.figures.drawing import APPROXIMATE, EXACT, canvas, plain_numbers

    shown = [x for x in numbers.layers if abs(x.ratio - 1) >= SAME] or numbers.layers
    shown = [*shown[:MOST], numbers.total]
    y = np.arange(len(shown))
    height = 1.6 + 0.24 * len(shown)
    with canvas(path, TITLE, columns=2, size=(10.0, height)) as (norms, noise):
        for axes, key in ((norms, "small_sq_norm"), (noise, "b_simple")):
            exact, sogns = (
                np.array([getattr(getattr(x, method), key) for x in shown])
                for method in ("exact", "sogns")
            )
            axes.hlines(y, exact, sogns, color="#c9c9c9", lw=1.4)
            if key == "b_simple":
                ends = [np.array([getattr(x.exact, end) for x in shown]) for end in ("low", "high")]
                axes.hlines(y, *ends, color=EXACT, alpha=0.25, lw=6)
            axes.plot(exact, y, "o", color=EXACT, ms=6, label="exact")
            axes.plot(sogns, y, "D", color=APPROXIMATE, ms=5, mfc="white", label="SOGNS")
            axes.set_xscale("log")
            axes.set_ylim(len(shown) - 0.5, -0.5)
        norms.set_yticks(y, [x.name for x in shown])
        noise.set_yticks(y, [""] * len(shown))
        norms.set(xlabel="squared norm of one example's gradient (mean)")
        noise.set(xlabel="noise scale (sequences)")
        plain_numbers(noise.xaxis, subs=(1, 2, 5))
        plain_numbers(norms.xaxis, subs=(1,))
        norms.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)


def tokens_of(file: Path) -> Tensor:
    """The matrix of token indices in a .npy file.

    Raises:
        ValueError: on another kind of file, or another kind of numbers.
    """
    expected = f"{file}: expected token indices [N, T] in a .npy file"
    with file.open("rb") as stream:
        if stream.read(6) != b"\x93NUMPY":
            raise ValueError(expected)
    kept = np.load(file, allow_pickle=False)
    if kept.dtype.kind not in "iu":
        raise ValueError(f"{expected}, got {kept.dtype} {list(kept.shape)}")
    return torch.from_numpy(kept.astype(np.int64))  # torch 2.13 finds no least of uint16

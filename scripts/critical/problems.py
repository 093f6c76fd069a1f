"""What is trained: models, data and losses, small enough for a grid of hundreds of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnsmon.demo.data import digits, shifted, topics
from gnsmon.demo.models import CharGPT

Batch = tuple[Tensor, Tensor]
CONTEXT = 32  # characters in an example of the text
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}


@dataclass(frozen=True)
class Problem:
    """A training problem and the grid over which it is measured."""

    name: str
    task: str  # "digits" or "text"
    optimizer: str
    batch_sizes: tuple[int, ...]  # examples, rising
    targets: tuple[float, ...]  # held-out losses, falling
    lr: float  # where the search begins, at the largest batch
    max_steps: int  # of a run, as long as nothing is known of the steps that it takes
    seeds: int = 3  # of the grid
    noise_seeds: int = 5  # of the runs along which the noise scale is averaged


@dataclass(frozen=True)
class Task:
    """A model and its data; examples are drawn independently, with replacement."""

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    sample: Callable[[int], Batch]  # from torch's generator
    held_out: Batch
    positions: int | None = None  # in an example of a sequence model


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "digits-sgd",
            task="digits",
            optimizer="sgd",
            batch_sizes=(2, 4, 8, 16, 32, 64, 128, 256),
            targets=(0.7, 0.35, 0.18),
            lr=0.4,
            max_steps=600,
        ),
        Problem(
            "text-sgd",
            task="text",
            optimizer="sgd",
            batch_sizes=(2, 4, 8, 16, 32, 64, 128),
            targets=(2.8, 2.65, 2.5),
            lr=0.5,
            max_steps=600,
        ),
        Problem(
            "text-adam",
            task="text",
            optimizer="adam",
            batch_sizes=(2, 4, 8, 16, 32, 64, 128),
            targets=(2.7, 2.5, 2.3),
            lr=0.01,
            max_steps=600,
        ),
    )
}


def quick(problem: Problem) -> Problem:
    """The same problem with fewer batch sizes and seeds and nearer targets: minutes in all."""
    return replace(
        problem,
        batch_sizes=problem.batch_sizes[1::2],
        targets=problem.targets[:2],
        seeds=2,
        noise_seeds=3,
    )


@cache
def load_task(name: str) -> Task:
    """The task of that name, with its data in memory."""
    return {"digits": _digits, "text": _text}[name]()


def _digits() -> Task:
    """A CNN of 17 thousand parameters on digits of 14 x 14, moved by up to one pixel."""
    (images, labels), (held_images, held_labels) = (
        (F.avg_pool2d(part.tensors[0], 2), part.tensors[1]) for part in digits()
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        held_images = shifted(held_images, 1)

    def model() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(24 * 3 * 3, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def sample(size: int) -> Batch:
        chosen = torch.randint(len(labels), (size,))
        return shifted(images[chosen], 1), labels[chosen]

    return Task(model, _cross_entropy, sample, (held_images, held_labels))


def _text() -> Task:
    """A transformer of one layer and 17 thousand parameters on 32 characters of Python's manual."""
    text = topics()
    ahead = torch.arange(CONTEXT + 1)

    def model() -> nn.Module:
        sizes: dict[str, Any] = {"width": 32, "layers": 1, "heads": 2, "dropout": 0.0}
        return CharGPT(len(text.vocabulary), context=CONTEXT, **sizes)

    def sample(size: int) -> Batch:
        window = text.train[torch.randint(len(text.train) - CONTEXT, (size, 1)) + ahead]
        return window[:, :-1], window[:, 1:]

    starts = torch.linspace(0, len(text.validation) - CONTEXT - 1, 128).long()
    held_out = text.validation[starts[:, None] + ahead]
    return Task(model, _cross_entropy, sample, (held_out[:, :-1], held_out[:, 1:]), CONTEXT)


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the labels of [B, classes] or [B, T, classes]."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

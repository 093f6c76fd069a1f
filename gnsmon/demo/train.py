"""The two training loops of the demo, ordinary but for the line that attaches the monitor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import gnsmon
from gnsmon.demo.config import DigitsConfig, TextConfig
from gnsmon.demo.data import digits, shifted, topics, windows
from gnsmon.demo.models import CharGPT, DigitsCNN
from gnsmon.demo.progress import Ticker
from gnsmon.report import write_report

OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
ABOUT = {
    "digits": "a CNN of 1.0M parameters on handwritten digits",
    "text": "a character transformer of 0.4M parameters on the text of Python's manual",
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended, in words."""

    validation: str
    advice: str


def train_digits(config: DigitsConfig, run_dir: Path, ticker: Ticker) -> Outcome:
    """Train a CNN on handwritten digits, each moved a little at random."""
    torch.manual_seed(config.seed)
    train, validation = digits(config.data_dir)
    if config.batch_size > len(train):
        raise ValueError(
            f"batch_size: expected at most the {len(train)} training images, "
            f"got {config.batch_size}"
        )
    loader = DataLoader(train, config.batch_size, shuffle=True, drop_last=True)
    model = DigitsCNN()
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), lr=config.lr)
    with gnsmon.attach(
        model,
        optimizer,
        method=config.methods,
        every=config.every,
        decay=config.decay,
        sinks=["tensorboard"],
        run_dir=run_dir,
    ) as gns:
        for step, (images, labels) in ticker.track(_forever(loader)):
            loss = F.cross_entropy(model(shifted(images, config.shift)), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            gns.log_loss(loss.item())
            ticker.show(step, loss.item(), gns.readings)
        accuracy = _accuracy(model, validation)
        return Outcome(f"validation accuracy {accuracy:.1%}", str(gns.advice()))


def train_text(config: TextConfig, run_dir: Path, ticker: Ticker) -> Outcome:
    """Train a character transformer with accumulation, clipping, warm-up and a cosine."""
    accumulation = config.batch_size // config.microbatch
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    text = topics()
    batches = windows(text.train, config.batch_size, config.context, generator)
    model = CharGPT(len(text.vocabulary), context=config.context, dropout=config.dropout)
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), lr=config.lr)
    schedule = LambdaLR(optimizer, _warmup_then_cosine(config.warmup, config.steps))
    with gnsmon.attach(
        model,
        optimizer,
        method=config.methods,
        every=config.every,
        decay=config.decay,
        preconditioned=config.optimizer == "adamw" and "pepgns" in config.methods,
        sinks=["tensorboard"],
        run_dir=run_dir,
    ) as gns:
        for step, (inputs, targets) in ticker.track(batches):
            total = 0.0
            parts = zip(
                inputs.split(config.microbatch), targets.split(config.microbatch), strict=True
            )
            for x, y in parts:
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / accumulation
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            gns.log_loss(total)
            ticker.show(step, total, gns.readings)
        bits = _bits_per_character(model, text.validation, config.context)
        return Outcome(f"validation {bits:.2f} bits per character", str(gns.advice()))


def run(config: DigitsConfig | TextConfig, console: Console) -> Path:
    """Train as `config` says and print the outcome; the run folder, with report and logs."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = config.run_dir or Path("runs") / f"demo-{config.task}-{stamp}"
    console.print(
        f"Training {ABOUT[config.task]}: {config.steps:,} steps of {config.batch_size} examples. "
        "Ctrl-C ends early and still reports.\n",
        highlight=False,
    )
    with Ticker(console, config.steps) as ticker:
        if isinstance(config, DigitsConfig):
            outcome = train_digits(config, run_dir, ticker)
        else:
            outcome = train_text(config, run_dir, ticker)
    early = f"stopped after step {ticker.done}; " if ticker.interrupted else ""
    console.print(f"\n{early}{outcome.validation}", highlight=False)
    console.print(Panel(Text(outcome.advice), title="Advice", title_align="left"))
    _print_paths(console, write_report(run_dir))
    return run_dir


def _forever(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _warmup_then_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))

    return factor


@torch.no_grad()
def _accuracy(model: nn.Module, validation: TensorDataset) -> float:
    model.eval()
    batches = DataLoader(validation, batch_size=500)
    right = sum((model(images).argmax(1) == labels).sum() for images, labels in batches)
    return float(right) / len(validation)


@torch.no_grad()
def _bits_per_character(model: nn.Module, text: Tensor, context: int) -> float:
    model.eval()
    count = (len(text) - 1) // context
    inputs = text[: count * context].view(count, context)
    targets = text[1 : count * context + 1].view(count, context)
    losses = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        for x, y in zip(inputs.split(64), targets.split(64), strict=True)
    ]
    return float(sum(losses)) / targets.numel() / math.log(2)


def _print_paths(console: Console, report: Path) -> None:
    run_dir = report.parent
    files = {"report": report, "picture": run_dir / "gns.png", "readings": run_dir / "gns.jsonl"}
    lines = [f"{name:<11}{path}" for name, path in files.items() if path.exists()]
    lines.append(f"dashboard  tensorboard --logdir {run_dir}")
    console.print(Text("\n".join(lines)), soft_wrap=True)

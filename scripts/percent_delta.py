"""Repeats PercentDelta's comparison of how fast the layers change, on digits, by the diagnostics.

    python scripts/percent_delta.py            # two minutes on one core
    python scripts/percent_delta.py --sweep    # final accuracy at each rate of a grid

Abu-El-Haija 2017, "Proportionate gradient updates with PercentDelta", compares on MNIST by how much
SGD, Adam, LARS and PercentDelta change each trainable tensor in a step. Here the demo's CNN learns
scikit-learn's digits (MNIST itself with --data-dir) by each of them, from the same start and on the
same batches, at a constant rate; the measure is the monitor's own, mean |dw / w| of each tensor.

It prints a table and draws a picture; with --write both go to docs/health.md and its figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gnsmon
from gnsmon.demo.data import digits, shifted
from gnsmon.demo.models import DigitsCNN

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- percent_delta -->\n", "<!-- end of percent_delta -->\n"


class ByTensor(torch.optim.Optimizer):
    """Gradient descent with a rate for each tensor: w -= lr * scale(w, g) * g, no momentum."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, scale: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__(params, {"lr": lr})
        self._scale = scale

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self._scale(p, p.grad) * p.grad)


def lars(w: Tensor, g: Tensor) -> Tensor:
    """|w| / |g|: the trust ratio of You, Gitman & Ginsburg 2017, without weight decay."""
    return _over(w.norm(), g.norm())


def percent_delta(w: Tensor, g: Tensor) -> Tensor:
    """The size over sum |g / w|: mean |dw / w| is then the rate (Abu-El-Haija 2017).

    Numbers with w = 0 are left out of sum and size.
    """
    there = w != 0
    return _over(there.sum(), (g[there] / w[there]).abs().sum())


def _over(a: Tensor, b: Tensor) -> Tensor:
    """Of a / b, 0 where b is: a tensor without a gradient stays where it is, and one of zeros."""
    return a / b if b > 0 else torch.zeros_like(b)


Make = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Make, tuple[float, ...]]] = {  # with a grid of rates
    "SGD": (lambda p, lr: torch.optim.SGD(p, lr=lr), (0.02, 0.05, 0.1, 0.2, 0.5)),
    "Adam": (lambda p, lr: torch.optim.Adam(p, lr=lr), (0.0003, 0.001, 0.002, 0.005, 0.01)),
    "LARS": (lambda p, lr: ByTensor(p, lr, lars), (0.002, 0.005, 0.01, 0.02, 0.05)),
    "PercentDelta": (
        lambda p, lr: ByTensor(p, lr, percent_delta),
        (0.01, 0.03, 0.1, 0.2, 0.5),
    ),
}
RATES = {"SGD": 0.1, "Adam": 0.002, "LARS": 0.01, "PercentDelta": 0.1}


class Changes:
    """A sink that keeps the relative changes."""

    def __init__(self) -> None:
        self.healths: list[gnsmon.Health] = []

    def __call__(self, reading: gnsmon.Reading) -> None:
        """Readings are of no interest here."""

    def health(self, health: gnsmon.Health) -> None:
        """Keep it."""
        self.healths.append(health)


def main(
    steps: Annotated[int, typer.Option(help="Steps of each optimizer.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 64,
    every: Annotated[int, typer.Option(help="One step in so many is measured.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    data_dir: Annotated[Path | None, typer.Option(help="MNIST's files.")] = None,
    sweep: Annotated[bool, typer.Option(help="Only the accuracies over the rates.")] = False,
    write: Annotated[bool, typer.Option(help="Write into docs/health.md.")] = False,
) -> None:
    torch.set_num_threads(1)
    data = digits(data_dir)
    if sweep:
        for name, (_, rates) in OPTIMIZERS.items():
            found = [run(name, rate, data, steps, batch_size, 10**6, seed)[1] for rate in rates]
            pairs = zip(rates, found, strict=True)
            text = ", ".join(f"{rate:g}: {right:.1%}" for rate, right in pairs)
            print(f"{name}: {text}", flush=True)
        return
    runs = {
        name: run(name, rate, data, steps, batch_size, every, seed) for name, rate in RATES.items()
    }
    text = table(runs)
    print(text)
    picture = DOCS / "figures" / "percent_delta.png" if write else Path("percent_delta.png")
    draw({name: healths for name, (healths, _) in runs.items()}, picture)
    print(f"\npicture: {picture}")
    if write:
        page = DOCS / "health.md"
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}{text}\n{END}{after}")


def run(
    name: str,
    rate: float,
    data: tuple[torch.utils.data.TensorDataset, torch.utils.data.TensorDataset],
    steps: int,
    batch_size: int,
    every: int,
    seed: int,
) -> tuple[list[gnsmon.Health], float]:
    """The health of each measured step, by tensor, and the validation accuracy at the end."""
    torch.manual_seed(seed)
    model = DigitsCNN()
    optimizer = OPTIMIZERS[name][0](model.parameters(), rate)
    batches = DataLoader(data[0], batch_size, shuffle=True, drop_last=True)
    kept, step = Changes(), 0
    with (
        tempfile.TemporaryDirectory() as folder,
        gnsmon.attach(
            model,
            optimizer,
            every=every,
            groups=str,  # each tensor by its own name, as PercentDelta scales them
            diagnostics=True,
            sinks=[kept],
            run_dir=folder,
            engine="hooks",
        ),
    ):
        while step < steps:
            for images, labels in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(shifted(images, 2)), labels).backward()
                optimizer.step()
                step += 1
                if step == steps:
                    break
    return kept.healths, accuracy(model, *data[1].tensors)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


def table(runs: dict[str, tuple[list[gnsmon.Health], float]]) -> str:
    """Medians over the measured steps, in Markdown."""
    healths = {name: healths for name, (healths, _) in runs.items()}
    lines = [
        "| tensor | " + " | ".join(f"{name}, {RATES[name]:g}" for name in runs) + " |",
        "|---|" + "--:|" * len(runs),
    ]
    for tensor in next(iter(healths.values()))[0].groups:
        found = [changes(of, tensor) for of in healths.values()]
        lines.append(f"| `{tensor}` | " + " | ".join(f"{np.median(x):.2g}" for x in found) + " |")
    for said, key in (
        ("largest over smallest in a step", "change_ratio"),
        ("standard deviation over mean in a step", "change_variation"),
    ):
        found = [np.median([getattr(h, key) for h in of]) for of in healths.values()]
        lines.append(f"| {said} | " + " | ".join(f"{x:.3g}" for x in found) + " |")
    right = " | ".join(f"{right:.1%}" for _, right in runs.values())
    return "\n".join([*lines, f"| accuracy at the end | {right} |"])


def changes(healths: list[gnsmon.Health], tensor: str) -> np.ndarray:
    values = [h.groups[tensor].relative_change for h in healths]
    return np.array([np.nan if value is None else value for value in values])


def draw(runs: dict[str, list[gnsmon.Health]], path: Path) -> None:
    """A panel for each optimizer, a line for each tensor; biases are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.7), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(runs), sharey=True)
    for panel, (name, healths) in zip(panels, runs.items(), strict=True):
        steps = [health.step for health in healths]
        for i, tensor in enumerate(healths[0].groups):
            style = {"color": f"C{i // 2}", "linestyle": "--" if "bias" in tensor else "-"}
            panel.plot(steps, changes(healths, tensor), linewidth=1.2, label=tensor, **style)
        panel.set(title=f"{name}, rate {RATES[name]:g}", xlabel="step", yscale="log")
        panel.grid(color="#e9e9e9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean |dw / w| of a step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)

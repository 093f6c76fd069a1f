"""The models, batches and losses that are timed: random data, everything seeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsmon.demo.models import CharGPT

Batch = tuple[Tensor, Tensor]  # examples on the first axis of both


@dataclass(frozen=True)
class Workload:
    """A training problem on a device."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    device: str = "cpu"
    bf16: bool = False  # by autocast
    compiled: bool = False
    tiny: bool = False

    def build(self) -> tuple[nn.Module, Batch]:
        """The same model and batch at every call."""
        torch.manual_seed(0)
        x, y = self.batch()
        return self.model().to(self.device), (x.to(self.device), y.to(self.device))

    def losses(self, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:  # [B]
        """The loss of each example, of sequences the mean over positions."""
        x, y = batch
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            logits = model(x)  # [B, classes] or [B, T, vocabulary]
            by_target = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
        return by_target.view(len(y), -1).mean(1)


def workloads(device: str = "cpu", *, tiny: bool = False) -> dict[str, Workload]:
    """Those of the tables; of a few numbers each if `tiny`, to try the script itself."""
    gpt = {"vocabulary": 4096, "context": 256, "width": 256, "layers": 4, "heads": 4}
    gpt2 = {"vocabulary": 50304, "context": 1024, "width": 768, "layers": 12, "heads": 12}
    if tiny:
        gpt = gpt2 = {"vocabulary": 32, "context": 8, "width": 16, "layers": 1, "heads": 2}
        found = [
            images("mlp", 6, 4, lambda: mlp(4 * 4, 16)),
            images("cnn", 6, 8, lambda: cnn(2, 8, 8)),
            text("gpt", 4, **gpt),
            images("resnet", 4, 8, lambda: ResNet18(8, groups=4), channels=3),
        ]
    else:
        found = [
            images("mlp", 256, 28, lambda: mlp(28 * 28, 512)),
            images("cnn", 128, 28, lambda: cnn(32, 104, 28)),
            text("gpt", 8, **gpt),
            images("resnet", 32, 32, lambda: ResNet18(64, groups=32), channels=3),
        ]
    found.append(replace(found[2], name="gpt-compiled", compiled=True))
    if tiny or device == "cuda":
        large = replace(text("gpt2", 4 if tiny else 8, tied=True, **gpt2), bf16=True)
        found += [large, replace(large, name="gpt2-compiled", compiled=True)]
    return {load.name: replace(load, device=device, tiny=tiny) for load in found}


def images(
    name: str, examples: int, size: int, model: Callable[[], nn.Module], *, channels: int = 1
) -> Workload:
    """Ten classes of random images."""

    def batch() -> Batch:
        return torch.randn(examples, channels, size, size), torch.randint(10, (examples,))

    return Workload(name, model, batch)


def text(
    name: str, examples: int, *, vocabulary: int, context: int, tied: bool = False, **shape: int
) -> Workload:
    """A pre-LN decoder with learned positions, no dropout, on random tokens."""

    def model() -> nn.Module:
        gpt = CharGPT(vocabulary, context=context, dropout=0.0, **shape)
        if not tied:
            gpt.lm_head.weight = nn.Parameter(torch.randn(vocabulary, shape["width"]) * 0.02)
        return gpt

    def batch() -> Batch:
        window = torch.randint(vocabulary, (examples, context + 1))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    return Workload(name, model, batch)


def mlp(inputs: int, width: int) -> nn.Module:
    """Two hidden layers."""
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def cnn(width: int, hidden: int, size: int) -> nn.Module:
    """Two convolutions without padding and two linear layers."""
    convolutions = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.ReLU()]
    pooled = 2 * width * ((size - 4) // 2) ** 2
    top = [nn.Linear(pooled, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *top)


class ResNet18(nn.Module):
    """The CIFAR form: a 3x3 stem without pooling; GroupNorm for BatchNorm."""

    def __init__(self, width: int, *, groups: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, width, 3, 1, groups), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(
            *(
                block
                for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False))
                for block in (
                    Residual(before, after, 1 + (i > 0), groups),
                    Residual(after, after, 1, groups),
                )
            )
        )
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W]
        """Logits."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Residual(nn.Module):
    """Two convolutions, added to the input or its projection."""

    def __init__(self, before: int, after: int, stride: int, groups: int) -> None:
        super().__init__()
        first, second = _conv(before, after, 3, stride, groups), _conv(after, after, 3, 1, groups)
        self.body = nn.Sequential(*first, nn.ReLU(), *second)
        same = before == after and stride == 1
        self.skip = nn.Sequential(*([] if same else _conv(before, after, 1, stride, groups)))

    def forward(self, x: Tensor) -> Tensor:
        """The next feature map."""
        return F.relu(self.body(x) + self.skip(x))


def _conv(before: int, after: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.GroupNorm(groups, after)]

"""Models, batches and losses that every rule is proven on, in float64; one line adds a case."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B = 4  # examples in every batch

with warnings.catch_warnings():  # torch warns once a process that this may copy
    warnings.simplefilter("ignore")
    F.conv1d(torch.zeros(1, 1, 3), torch.zeros(1, 1, 2), padding="same")


def energy(model: nn.Module, batch: Any) -> Tensor:
    """Mean over examples of a bumpy function of each one's outputs, never zero in its gradient."""
    y = (model(*batch) if isinstance(batch, tuple) else model(batch)).flatten(1)
    return (y + torch.arange(y.shape[1])).sin().sum(1).mean()


@dataclass(frozen=True)
class Case:
    """`make()` gives the same model and batch each time; `loss` is a mean over the examples."""

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    loss: Callable[[nn.Module, Any], Tensor] = energy


def reals(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(B, *shape, dtype=torch.float64)


def ids(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, (B, *shape))


def both(*makes: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(make() for make in makes)


def case(name: str, model: Callable[[], nn.Module], batch: Callable[[], Any]) -> Case:
    def make() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            built = model().double()
            with torch.no_grad():
                for p in built.parameters():
                    p.add_(torch.randn_like(p), alpha=0.3)  # no parameter at a special value
            return built, batch()

    return Case(name, make)


def of(kind: type[nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(*args, **options)


def evaluated(kind: type[nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A layer in eval mode, with running statistics that are not the initial ones."""

    def make() -> nn.Module:
        layer = kind(*args, **options)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        return layer.eval()

    return make


def frozen(model: Callable[[], nn.Module], *names: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        built = model()
        for name in names:
            built.get_parameter(name).requires_grad_(False)
        return built

    return make


class Resized(nn.Module):
    """A transposed convolution told its output size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ConvTranspose2d(3, 2, 3, stride=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, output_size=(11, 12))


class RaggedBag(nn.Module):
    """EmbeddingBag on a flat input with offsets; the first `length` tokens of each row."""

    def __init__(self, weighted: bool = False, **options: Any):
        super().__init__()
        self.weighted, self.last = weighted, options.get("include_last_offset", False)
        self.bag = nn.EmbeddingBag(7, 3, **options)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        keep = torch.arange(tokens.shape[1]) < lengths
        ends = lengths.flatten().cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends if self.last else ends[:-1]])
        flat = tokens[keep]
        return self.bag(flat, offsets, 0.5 + flat.double() if self.weighted else None)


class WeightedBag(nn.Module):
    """EmbeddingBag on rows with a weight for each token."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 3, mode="sum", padding_idx=2)

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        return self.bag(tokens, per_sample_weights=weights)


class Language(nn.Module):
    """Token and position embeddings, a normalised hidden layer and a head tied to the tokens."""

    def __init__(self, vocabulary: int = 6, width: int = 5, tied: bool = True, **options: Any):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, **options)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens)
        h = h + self.hidden(self.norm(h)).tanh()
        return self.head(h.cumsum(1))


class TiedLinears(nn.Module):
    """Two layers with one weight and biases of their own, on inputs of different lengths."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()[:, 1:])


class TiedEmbeddings(nn.Module):
    """Two tables that are one, one of them with a padding index."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(5, 3, padding_idx=0), nn.Embedding(5, 3)
        self.target.weight = self.source.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.source(source).sum(1, keepdim=True) * self.target(target)


class TiedConvs(nn.Module):
    """An autoencoder whose decoder is the transpose of its encoder."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).tanh())


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Unused(nn.Module):
    """A layer that is not called beside one that is."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Padded(nn.Conv2d):
    """A subclass that inherits both forward and its parts."""


class Windows(nn.Module):
    """A layer on windows of two axes that are merged into the batch's, as in Swin."""

    def __init__(self, order: list[int] | None = None):
        super().__init__()
        self.inside, self.layer, self.order = nn.Linear(3, 3), nn.Linear(3, 2), order

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, 10, 3]
        parts = self.inside(x).view(len(x), 2, 2, 5, 2, 3).transpose(2, 3)
        windows = parts.contiguous().view(-1, 2, 2, 3)
        if self.order:
            windows = windows.index_select(0, torch.tensor(self.order))
        y = self.layer(windows.view(-1, 4, 3)).tanh()
        return y.unflatten(0, (len(x), -1))


class First(nn.Module):
    """A layer between two others, its first output, the examples on its axis `axis`."""

    def __init__(self, layer: nn.Module, axis: int = 0, times: int = 1):
        super().__init__()
        self.inside, self.layer = nn.Linear(4, 4), layer
        self.axis, self.times = axis, times

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        for _ in range(self.times):
            x = self.call(x.transpose(0, self.axis))
            x = (x[0] if isinstance(x, tuple) else x).transpose(0, self.axis)
        return x

    def call(self, x: Tensor) -> Any:
        return self.layer(x)


class Attends(First):
    """Self-attention, masked where it looks ahead and at the last position of some examples."""

    def call(self, x: Tensor) -> Any:
        first = x.transpose(0, self.axis)[:, :, 0]
        ahead = torch.ones(first.shape[1], first.shape[1]).triu(1).bool()
        padding = (first > 0) & (torch.arange(first.shape[1]) == first.shape[1] - 1)
        return self.layer(x, x, x, key_padding_mask=padding, attn_mask=ahead)


class Crosses(First):
    """Attention to something of another length and width."""

    def call(self, x: Tensor) -> Any:
        seen = x.cumsum(1)[:, 1:, :3]
        return self.layer(x, seen, value=seen, need_weights=False)


class Starts(First):
    """A recurrent layer with a state to start from."""

    def call(self, x: Tensor) -> Any:
        return self.layer(x, x[None, :, 0].tanh())


class Steps(First):
    """A cell, called for every position."""

    def call(self, x: Tensor) -> Any:
        state, states = None, []
        for t in range(x.shape[1]):
            state = self.layer(x[:, t], state)
            states.append(state)
        return torch.stack(states, 1)


class ScaledTanh(nn.Module):
    """A layer of the user's; its scale has no axes."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return self.scale * (gain * x + self.shift).tanh()


class Rows(First):
    """A layer of the user's on rows that are examples times positions."""

    def call(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1), gain=2.0).unflatten(0, x.shape[:2])


class TiedCustom(nn.Module):
    """Two layers of the user's with one scale."""

    def __init__(self):
        super().__init__()
        self.first, self.second = ScaledTanh(), ScaledTanh()
        self.second.scale = self.first.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).cumsum(1))


class NamedByTwo(nn.Module):
    """A head that also holds its layer's bias, without using it, as BERT's does."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(4, 3)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)


def network() -> nn.Module:
    """One layer of most kinds, on images."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.Conv2d(4, 4, 3, groups=4, stride=2),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(2),
        nn.Linear(4, 3),
        nn.RMSNorm(3),
    )


LAYERS = [
    case("linear 2d", of(nn.Linear, 5, 3), reals(5)),
    case("linear 3d, gram", of(nn.Linear, 9, 8), reals(3, 9)),
    case("linear 3d, direct", of(nn.Linear, 3, 2), reals(7, 3)),
    case("linear 4d, no bias", of(nn.Linear, 5, 3, bias=False), reals(2, 3, 5)),
    case("linear, one position", of(nn.Linear, 5, 3), reals(1, 5)),
    case("bilinear", of(nn.Bilinear, 3, 4, 2), both(reals(3), reals(4))),
    case("bilinear 3d", of(nn.Bilinear, 3, 4, 2, bias=False), both(reals(5, 3), reals(5, 4))),
    case("conv1d", of(nn.Conv1d, 3, 4, 3), reals(3, 9)),
    case("conv1d, one position", of(nn.Conv1d, 3, 4, 9), reals(3, 9)),
    case("conv1d, same, even", of(nn.Conv1d, 3, 4, 4, padding="same"), reals(3, 9)),
    case("conv1d, same, dilated", of(nn.Conv1d, 2, 2, 2, dilation=3, padding="same"), reals(2, 9)),
    case("conv2d", of(nn.Conv2d, 3, 4, (3, 2), bias=False), reals(3, 6, 5)),
    case("conv2d, stride", of(nn.Conv2d, 3, 4, 3, stride=(2, 3), padding=(1, 2)), reals(3, 8, 7)),
    case("conv2d, dilation", of(nn.Conv2d, 2, 4, 3, dilation=(2, 1), stride=2), reals(2, 8, 7)),
    case("conv2d, groups", of(nn.Conv2d, 4, 6, 3, groups=2, padding=1), reals(4, 5, 5)),
    case("conv2d, depthwise", of(nn.Conv2d, 3, 6, 3, groups=3, stride=2), reals(3, 7, 7)),
    case("conv2d, 1x1", of(nn.Conv2d, 6, 5, 1), reals(6, 2, 2)),
    case("conv2d, valid", of(nn.Conv2d, 2, 3, 2, padding="valid"), reals(2, 4, 4)),
    case("conv2d, same", of(nn.Conv2d, 2, 3, (4, 3), padding="same"), reals(2, 6, 5)),
    case(
        "conv2d, same, even, circular",
        of(nn.Conv2d, 2, 3, (4, 2), padding="same", padding_mode="circular", dilation=(1, 3)),
        reals(2, 6, 5),
    ),
    case("conv2d, subclass", of(Padded, 2, 3, 3, padding=1), reals(2, 5, 5)),
    case("conv3d", of(nn.Conv3d, 2, 4, (1, 3, 2), groups=2, stride=(1, 2, 1)), reals(2, 2, 5, 4)),
    case("conv3d, same", of(nn.Conv3d, 2, 2, 2, padding="same"), reals(2, 3, 3, 3)),
    *(
        case(f"conv{n}d, {mode}", of(kind, 2, 3, 3, padding=pad, padding_mode=mode), batch)
        for n, kind, batch in (
            (1, nn.Conv1d, reals(2, 7)),
            (2, nn.Conv2d, reals(2, 5, 6)),
            (3, nn.Conv3d, reals(2, 4, 3, 4)),
        )
        for mode, pad in (("circular", 1), ("reflect", 2), ("replicate", "same"))
    ),
    case("conv transpose 1d", of(nn.ConvTranspose1d, 3, 2, 3, stride=2), reals(3, 5)),
    case(
        "conv transpose 1d, dilation",
        of(nn.ConvTranspose1d, 2, 2, 3, dilation=4, padding=3, stride=2, output_padding=3),
        reals(2, 5),
    ),
    case("conv transpose 2d", of(nn.ConvTranspose2d, 3, 2, (3, 2), bias=False), reals(3, 4, 3)),
    case(
        "conv transpose 2d, groups",
        of(nn.ConvTranspose2d, 4, 6, 3, groups=2, stride=(2, 3), padding=1, output_padding=(1, 2)),
        reals(4, 3, 3),
    ),
    case("conv transpose 2d, output size", Resized, reals(3, 4, 4)),
    case(
        "conv transpose 3d",
        of(nn.ConvTranspose3d, 2, 2, 2, groups=2, stride=2, padding=1),
        reals(2, 3, 2, 3),
    ),
    case("embedding", of(nn.Embedding, 4, 3), ids(4, 9)),
    case("embedding 1d", of(nn.Embedding, 4, 3), ids(4)),
    case("embedding 3d, int32", of(nn.Embedding, 4, 3), lambda: ids(4, 2, 3)().int()),
    case("embedding, padding", of(nn.Embedding, 4, 3, padding_idx=1), ids(4, 9)),
    case("embedding, padding -1", of(nn.Embedding, 4, 3, padding_idx=-1), ids(4, 9)),
    case("embedding, max norm", of(nn.Embedding, 4, 3, max_norm=0.5), ids(4, 9)),
    case("embedding, sparse", of(nn.Embedding, 9, 3, sparse=True), ids(9, 5)),
    case("bag, mean", of(nn.EmbeddingBag, 5, 3), ids(5, 8)),
    case("bag, sum", of(nn.EmbeddingBag, 5, 3, mode="sum"), ids(5, 8)),
    case("bag, mean, padding", of(nn.EmbeddingBag, 5, 3, padding_idx=-2), ids(5, 8)),
    case("bag, only padding", of(nn.EmbeddingBag, 2, 3, padding_idx=0), ids(2, 1)),
    case("bag, weights", WeightedBag, both(ids(7, 6), reals(6))),
    *(
        case(
            f"ragged bag, {name}",
            of(RaggedBag, **options),
            both(ids(7, 6), lambda: torch.tensor([[3], [6], [0], [1]])),
        )
        for name, options in {
            "mean": {},
            "sum": {"mode": "sum"},
            "mean, padding, last offset": {"include_last_offset": True, "padding_idx": 3},
            "weights": {"mode": "sum", "weighted": True, "include_last_offset": True},
        }.items()
    ),
    case("layer norm", of(nn.LayerNorm, 5), reals(7, 5)),
    case("layer norm 2d", of(nn.LayerNorm, 5, eps=0.1), reals(5)),
    case("layer norm, two axes, no bias", of(nn.LayerNorm, (3, 5), bias=False), reals(2, 3, 5)),
    case("rms norm", of(nn.RMSNorm, 5), lambda: 1e-7 * reals(7, 5)()),
    case("rms norm, two axes", of(nn.RMSNorm, (3, 5), eps=0.1), reals(3, 5)),
    case("group norm", of(nn.GroupNorm, 2, 6, eps=0.1), reals(6, 4, 3)),
    case("group norm 2d", of(nn.GroupNorm, 2, 6), reals(6)),
    case("instance norm 1d", of(nn.InstanceNorm1d, 3, affine=True, eps=0.1), reals(3, 7)),
    case("instance norm 2d", of(nn.InstanceNorm2d, 3, affine=True), reals(3, 4, 3)),
    case("instance norm 3d", of(nn.InstanceNorm3d, 2, affine=True), reals(2, 3, 2, 2)),
    case(
        "instance norm, tracking",
        of(nn.InstanceNorm1d, 3, affine=True, track_running_stats=True),
        reals(3, 7),
    ),
    case(
        "instance norm, running",
        evaluated(nn.InstanceNorm2d, 3, affine=True, track_running_stats=True),
        reals(3, 4, 3),
    ),
    case("batch norm 1d, running", evaluated(nn.BatchNorm1d, 3), reals(3)),
    case("batch norm 1d, running, 3d", evaluated(nn.BatchNorm1d, 3, eps=0.1), reals(3, 5)),
    case("batch norm 2d, running", evaluated(nn.BatchNorm2d, 3), reals(3, 4, 2)),
    case("batch norm 3d, running", evaluated(nn.BatchNorm3d, 3), reals(3, 2, 2, 2)),
    case("sync batch norm, running", evaluated(nn.SyncBatchNorm, 3), reals(3, 4, 2)),
    case("prelu", of(nn.PReLU), reals(3, 5)),
    case("prelu, channels", of(nn.PReLU, 3), reals(3, 2, 2)),
    case("prelu 2d, channels", of(nn.PReLU, 3), reals(3)),
]

NETWORKS = [
    case("network", network, reals(2, 6, 6)),
    case("frozen", frozen(network, "0.weight", "1.bias", "6.weight", "7.weight"), reals(2, 6, 6)),
    case("unused", Unused, reals(3)),
    case("untied", of(Language, tied=False), ids(6, 7)),
    case("tied, more tokens", of(Language), ids(6, 9)),
    case("tied, more width", of(Language, 40, 30), ids(40, 4)),
    case("tied, padding", of(Language, padding_idx=0), ids(6, 7)),
    case("tied linears", TiedLinears, reals(4, 5)),
    case("tied embeddings", TiedEmbeddings, both(ids(5, 6), ids(5, 7))),
    case("tied convolutions", TiedConvs, reals(2, 5, 7)),
    case("twice, linear", lambda: Twice(nn.Linear(4, 4)), reals(3, 4)),
    case("twice, groups", lambda: Twice(nn.Conv1d(4, 4, 3, groups=2, padding=1)), reals(4, 5)),
    case("twice, norm", lambda: Twice(nn.LayerNorm(4)), reals(3, 4)),
]

ATTENTION = of(nn.MultiheadAttention, 4, 2, batch_first=True)
REPLAYED = [
    case("attention", lambda: Attends(ATTENTION()), reals(5, 4)),
    case(
        "attention, batch second",
        lambda: Attends(nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True), 1),
        reals(5, 4),
    ),
    case(
        "attention, cross",
        lambda: Crosses(nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=3)),
        reals(5, 4),
    ),
    case("attention, twice", lambda: Attends(ATTENTION(), times=2), reals(5, 4)),
    case("lstm", lambda: First(nn.LSTM(4, 3, batch_first=True)), reals(5, 4)),
    case("lstm, batch second", lambda: First(nn.LSTM(4, 3), 1), reals(5, 4)),
    case(
        "lstm, all options",
        lambda: First(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, proj_size=2)),
        reals(5, 4),
    ),
    case("gru, state", lambda: Starts(nn.GRU(4, 4, batch_first=True)), reals(5, 4)),
    case(
        "rnn, relu", lambda: First(nn.RNN(4, 3, nonlinearity="relu", batch_first=True)), reals(5, 4)
    ),
    case("gru cell", lambda: Steps(nn.GRUCell(4, 4)), reals(5, 4)),
    case("custom", lambda: First(ScaledTanh()), reals(5, 4)),
    case("custom, twice", lambda: First(ScaledTanh(), times=2), reals(5, 4)),
    case("custom, rows", lambda: Rows(ScaledTanh()), reals(5, 4)),
    case("custom, tied", TiedCustom, reals(5, 4)),
    case("custom, frozen", frozen(lambda: First(ScaledTanh()), "layer.scale"), reals(5, 4)),
    case("held by two", NamedByTwo, reals(5, 4)),
]

CASES = LAYERS + NETWORKS


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)

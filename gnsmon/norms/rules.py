"""A table from layer type to rule: a layer's input and output gradient give its parameters' forms.

A rule is `fn(module, x, dy) -> {parameter name: Form}`. x is the layer's input (a tuple of the
tensors passed, if more than one), dy the gradient at its output, both with the batch as leading
axis. A rule reads x, dy and the layer's settings, never the values of its parameters: those may be
sharded. It leaves out parameters that are None; frozen ones may stay in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsmon.norms.contractions import IN_CACHE, cast_like, wide, wider
from gnsmon.norms.convolved import Convolved
from gnsmon.norms.forms import Dense, Form, Outer, Rows
from gnsmon.norms.normalised import GROUP_NORM, LAYER_NORM, RMS_NORM, EachOf, differentiated

METHODS = ("forward", "_conv_forward")  # that a layer computes with
Forms = dict[str, Form]
Rule = Callable[[Any, Any, Tensor], Forms]
Refuse = Callable[[Any], str | None]
Mask = tuple[bool, bool, bool]
# (module, x, dy, weight, which are wanted) -> gradients of input, weight and bias
Backward = Callable[[Any, Tensor, Tensor, Tensor, Mask], tuple[Tensor | None, ...]]


class _Entry(NamedTuple):
    rule: Rule
    refuse: Refuse | None
    backward: Backward | None
    each: EachOf | None


_TABLE: dict[type[nn.Module] | str, _Entry] = {}


def rule(
    *kinds: type[nn.Module] | str,
    refuse: Refuse | None = None,
    backward: Backward | None = None,
    each: EachOf | None = None,
) -> Callable[[Rule], Rule]:
    """Decorator that makes a function the rule of the layer types `kinds`; the last one counts.

    Args:
        kinds: layer types. Subclasses take the rule over unless they override `forward`. A type
            that is not to be imported is given by its full name, with wildcards if need be.
        refuse: layer -> the reason why, as it is set up, it has no per-example gradient, or None.
        backward: the layer's backward as autograd has it, so that the product for the weight's
            gradient can be had from the examples' instead of being repeated; see `fused`.
        each: for a norm layer, a backward that gives each example's gradients too.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self, d):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(d))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @rule(Scale)
        ... def scale(module, x, dy):  # [B, T, d]
        ...     return {"weight": Dense((dy * x).sum(1))}
        >>> find_rule(Scale(3)) is scale
        True
    """

    def register(fn: Rule) -> Rule:
        _TABLE.update(dict.fromkeys(kinds, _Entry(fn, refuse, backward, each)))
        return fn

    return register


def find_rule(module: nn.Module) -> Rule | None:
    """The rule of `module`'s type, or of the nearest base whose `forward` it still runs."""
    entry = _in_use(type(module))
    return None if entry is None else entry.rule


def find_backward(module: nn.Module) -> Backward | None:
    """The backward of `module`'s type, found as its rule is; None if its forward was replaced."""
    entry = _in_use(type(module))
    return None if entry is None or not _as_written(type(module)) else entry.backward


def find_each(module: nn.Module) -> EachOf | None:
    """The backward that gives each example's gradients too, if the type has one."""
    entry = _in_use(type(module))
    return None if entry is None else entry.each


def refusal(module: nn.Module) -> str | None:
    """Why `module`, as it is set up now, has no per-example gradient, and what to do; or None."""
    for base in type(module).__mro__:
        if entry := _entry(base):
            return entry.refuse(module) if entry.refuse is not None else None
    return None


def coupling(module: nn.Module) -> str | None:
    """Why `module`, as it is set up now, leaves no layer of its model a per-example gradient."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return _batch_statistics(module) if batch_norm else None


def _in_use(kind: type) -> _Entry | None:
    entries = ((base, _entry(base)) for base in kind.__mro__)
    return next((e for base, e in entries if e is not None and _same_forward(kind, base)), None)


def _entry(kind: type) -> _Entry | None:
    if kind in _TABLE:
        return _TABLE[kind]
    name = f"{kind.__module__}.{kind.__qualname__}"
    patterns = (key for key in _TABLE if isinstance(key, str) and fnmatchcase(name, key))
    return next((_TABLE[key] for key in patterns), None)


def _same_forward(kind: type, base: type) -> bool:
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in METHODS)


def _as_written(kind: type) -> bool:
    """Whether the methods that a layer computes with stand in the class that has them."""
    for name in METHODS:
        for base in kind.__mro__:
            if name in vars(base):
                method = vars(base)[name]
                own = f"{base.__module__}.{base.__qualname__}.{name}"
                if f"{method.__module__}.{method.__qualname__}" != own:
                    return False
                if hasattr(method, "__wrapped__"):
                    return False
                break
    return True


def _linear_backward(
    module: Any, x: Tensor, dy: Tensor, weight: Tensor, wanted: Mask
) -> tuple[Tensor | None, ...]:
    return (
        dy @ cast_like(weight, dy) if wanted[0] else None,
        # Laid out as the weight, or it would be copied where it is accumulated.
        _flat(dy).mT @ _flat(cast_like(x, dy)) if wanted[1] else None,
        _flat(dy).sum(0) if wanted[2] else None,
    )


def _flat(t: Tensor) -> Tensor:
    """All positions on one axis; not by flatten, which autograd's own vmap refuses."""
    return t.reshape(prod(t.shape[:-1]), t.shape[-1])


# Falcon's overrides forward with the same product.
@rule(nn.Linear, "transformers.models.falcon.*.FalconLinear", backward=_linear_backward)
def linear(module: nn.Linear, x: Tensor, dy: Tensor) -> Forms:
    """Goodfellow 2015 for [B, I], its sum over positions for any rank."""
    bias = _bias(module, dy, _to_last(1))
    factors = _positions(dy), _positions(cast_like(x, dy))
    return {"weight": Outer(*factors, summed=_summed(bias)), **bias}


def _conv1d_backward(
    module: Any, x: Tensor, dy: Tensor, weight: Tensor, wanted: Mask
) -> tuple[Tensor | None, ...]:
    return (
        dy @ cast_like(weight.mT, dy) if wanted[0] else None,
        _flat(cast_like(x, dy)).mT @ _flat(dy) if wanted[1] else None,
        _flat(dy).sum(0) if wanted[2] else None,
    )


@rule("transformers.pytorch_utils.Conv1D", backward=_conv1d_backward)
def hugging_face_conv1d(module: Any, x: Tensor, dy: Tensor) -> Forms:
    """A linear layer with its weight laid out [in, out]; GPT-2's."""
    bias = _bias(module, dy, _to_last(1))
    factors = _positions(cast_like(x, dy)), _positions(dy)
    return {"weight": Outer(*factors, inputs="left", summed=_summed(bias)), **bias}


@rule(nn.Bilinear)
def bilinear(module: nn.Bilinear, x: tuple[Tensor, Tensor], dy: Tensor) -> Forms:
    """A linear layer of the products of the two inputs."""
    pairs = cast_like(x[0][..., :, None] * x[1][..., None, :], dy).flatten(-2)
    shape = (module.out_features, module.in1_features, module.in2_features)
    dy = _positions(dy)
    return {"weight": Outer(dy, _positions(pairs), shape), **_bias(module, dy, _to_last(1))}


def _conv_backward(
    module: Any, x: Tensor, dy: Tensor, weight: Tensor, wanted: Mask
) -> tuple[Tensor | None, ...]:
    output_padding = [0] * len(module.stride)
    padding, geometry = list(module.padding), (list(module.stride), list(module.dilation))
    if module.transposed:  # as forward's output_size may have it
        sizes = zip(x.shape[2:], dy.shape[2:], *_geometry(module), padding, strict=True)
        output_padding = [
            out - (stride * (n - 1) + dilation * (k - 1) + 1 - 2 * pad)
            for n, out, k, stride, dilation, pad in sizes
        ]
    return torch.ops.aten.convolution_backward(
        dy,
        cast_like(x, dy),
        cast_like(weight, dy),
        [module.out_channels],
        geometry[0],
        padding,
        geometry[1],
        module.transposed,
        output_padding,
        module.groups,
        wanted,
    )


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, backward=_conv_backward)
def conv(module: Any, x: Tensor, dy: Tensor) -> Forms:
    """A linear layer of the patches under the kernel, group by group."""
    _check_rank(module, x, 2 + len(module.kernel_size))
    x, padding = cast_like(x, dy), module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = (
            F.pad(x, module._reversed_padding_repeated_twice, mode=mode),
            (0,) * (dy.ndim - 2),
        )
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    bias = _bias(module, dy, _to_channels)
    geometry = module.stride, padding, module.dilation, module.groups
    return {"weight": Convolved(x, dy, shape, *geometry, summed=_summed(bias)), **bias}


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, backward=_conv_backward)
def conv_transpose(module: Any, x: Tensor, dy: Tensor) -> Forms:
    """The convolution that maps dy to the input's gradient, with input and output exchanged."""
    _check_rank(module, x, 2 + len(module.kernel_size))
    settings = (x.shape[2:], dy.shape[2:], *_geometry(module), module.padding)
    widths: list[int] = []
    for size, out, k, stride, dilation, pad in zip(*settings, strict=True):
        seen = stride * (size - 1) + dilation * (k - 1) + 1  # the rest is output_padding
        widths = [pad, seen - pad - out, *widths]
    shape = (module.in_channels, module.out_channels // module.groups, *module.kernel_size)
    none = (0,) * (dy.ndim - 2)
    geometry = module.stride, none, module.dilation, module.groups
    weight = Convolved(F.pad(dy, widths), cast_like(x, dy), shape, *geometry, inputs="left")
    return {"weight": weight, **_bias(module, dy, _to_channels)}


def _batch_frequency(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if not module.scale_grad_by_freq:
        return None
    return (
        "scale_grad_by_freq=True divides each row's gradient by its count in the whole batch, so "
        "an example's gradient depends on the others; set it to False"
    )


@rule(nn.Embedding, refuse=_batch_frequency)
def embedding(module: nn.Embedding, x: Tensor, dy: Tensor) -> Forms:
    """Each looked-up row gets dy, `padding_idx` nothing."""
    index, value = x[:, None].flatten(1), _positions(dy)
    if module.padding_idx is not None:
        padding = index == module.padding_idx % module.num_embeddings
        value = value.masked_fill(padding[..., None], 0)
    return {"weight": Rows(index, value, (module.num_embeddings, module.embedding_dim))}


@rule("transformers.models.*ScaledWordEmbedding", refuse=_batch_frequency)
def scaled_embedding(module: Any, x: Tensor, dy: Tensor) -> Forms:
    """Embedding times a constant that it holds; BART's and Gemma's."""
    return embedding(module, x, dy * module.embed_scale)


def _bag_refusal(module: nn.EmbeddingBag) -> str | None:
    if module.mode == "max":
        return (
            "mode='max' gives the gradient to the largest entries, which only the weights tell; "
            "use mode 'sum' or 'mean'"
        )
    return _batch_frequency(module)


@rule(nn.EmbeddingBag, refuse=_bag_refusal)
def embedding_bag(module: nn.EmbeddingBag, x: Any, dy: Tensor) -> Forms:
    """Each row of a bag gets dy, times its weight or over the bag's count; padding gets nothing.

    Eagerly, a flat input with offsets costs one synchronisation for the longest bag. Compiled, the
    bags are padded to the length of the input instead: quadratic memory.
    """
    index, *others = x if isinstance(x, tuple) else (x,)
    weights = next((t for t in others if t.is_floating_point()), None)
    offsets = next((t for t in others if not t.is_floating_point()), None)
    inside = torch.ones_like(index, dtype=torch.bool)
    if offsets is not None:
        at, inside = _bags(offsets[: len(dy)], len(index))
        index, weights = index[at], None if weights is None else weights[at]
    if module.padding_idx is not None:
        inside = inside & (index != module.padding_idx % module.num_embeddings)
    dy = wide(dy)
    if module.mode == "mean":  # an empty bag has nothing inside to divide
        weights = 1 / inside.sum(1, keepdim=True).clamp(min=1).to(dy.dtype)
    scale = cast_like(inside, dy) if weights is None else inside * weights
    value = scale[..., None] * dy[:, None]
    return {"weight": Rows(index, value, (module.num_embeddings, module.embedding_dim))}


def _bags(starts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Where the entries of each bag are in the flat input, [B, longest], and which exist."""
    ends = torch.cat([starts[1:], starts.new_full((1,), total)])
    compiling = torch.compiler.is_compiling()
    longest = total if compiling else max(1, int((ends - starts).max()))
    at = starts[:, None] + torch.arange(longest, device=starts.device)
    inside = at < ends[:, None]
    return at.where(inside, 0), inside


@differentiated
def _layer_norm(module: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


@rule(nn.LayerNorm, backward=_layer_norm, each=LAYER_NORM)
def layer_norm(module: nn.LayerNorm, x: Tensor, dy: Tensor) -> Forms:
    """d/d gamma = sum_t dy xhat, d/d beta = sum_t dy."""
    normalised = partial(F.layer_norm, normalized_shape=module.normalized_shape, eps=module.eps)
    return _affine(module, normalised, x, dy, _to_last(len(module.normalized_shape)))


@differentiated
def _rms_norm(module: nn.RMSNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.rms_norm(x, module.normalized_shape, weight, module.eps)


@rule(nn.RMSNorm, backward=_rms_norm, each=RMS_NORM)
def rms_norm(module: nn.RMSNorm, x: Tensor, dy: Tensor) -> Forms:
    """d/d gamma = sum_t dy xhat; eps=None means that of the computing dtype, float32 for half."""
    normalised = partial(F.rms_norm, normalized_shape=module.normalized_shape, eps=module.eps)
    return _affine(module, normalised, x, dy, _to_last(len(module.normalized_shape)))


@differentiated
def _group_norm(module: nn.GroupNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, module.num_groups, weight, bias, module.eps)


@rule(nn.GroupNorm, backward=_group_norm, each=GROUP_NORM)
def group_norm(module: nn.GroupNorm, x: Tensor, dy: Tensor) -> Forms:
    """d/d gamma = sum over positions of dy xhat."""
    normalised = partial(F.group_norm, num_groups=module.num_groups, eps=module.eps)
    return _affine(module, normalised, x, dy, _to_channels)


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: Any, x: Tensor, dy: Tensor) -> Forms:
    """As GroupNorm with a group a channel, or by running statistics where forward takes them."""
    _check_rank(module, x, 1 + module._get_no_batch_dim())
    if module.training or not module.track_running_stats:
        return _affine(module, partial(F.instance_norm, eps=module.eps), x, dy, _to_channels)
    return _affine(module, partial(_by_running_stats, module), x, dy, _to_channels)


def _batch_statistics(module: Any) -> str | None:
    if not module.training and module.running_mean is not None:
        return None
    return (
        "batch statistics make each example's loss depend on the other examples, so a per-example "
        "gradient does not exist; use method='microbatch' with gradient accumulation, GroupNorm "
        "or LayerNorm, or put the layer in eval mode, where it takes its running statistics"
    )


@rule(nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm, refuse=_batch_statistics)
def batch_norm(module: Any, x: Tensor, dy: Tensor) -> Forms:
    """An affine map of fixed running statistics; refused while it normalises by the batch."""
    if reason := _batch_statistics(module):
        raise ValueError(f"{type(module).__name__}: {reason}")
    return _affine(module, partial(_by_running_stats, module), x, dy, _to_channels)


@rule(nn.PReLU)
def prelu(module: nn.PReLU, x: Tensor, dy: Tensor) -> Forms:
    """d/d slope = sum of dy min(x, 0), over all positions, per channel if there are as many."""
    grad = dy * wide(x).clamp(max=0)
    if module.num_parameters == 1:
        grad = grad[:, None].flatten(1)[:, None]  # all positions of one channel
    return {"weight": Dense(_to_channels(grad))}


def _positions(t: Tensor) -> Tensor:  # [B, ..., d] -> [B, T, d]
    return t if t.ndim == 3 else t.unsqueeze(1) if t.ndim == 2 else t.flatten(1, -2)


def _geometry(module: Any) -> tuple[tuple[int, ...], ...]:
    return module.kernel_size, module.stride, module.dilation


def _by_running_stats(module: Any, x: Tensor) -> Tensor:
    stats = cast_like(module.running_mean, x), cast_like(module.running_var, x)
    return F.batch_norm(x, *stats, eps=module.eps)


def _affine(
    module: Any,
    normalised: Callable[[Tensor], Tensor],
    x: Tensor,
    dy: Tensor,
    total: Callable[[Tensor], Tensor],
) -> Forms:
    """Of a layer weight * normalised(x) + bias, a few examples at a time to stay in cache."""
    if module.weight is None:
        return _bias(module, dy, total)
    each = max(dy.numel() // max(len(dy), 1), 1)
    step = max(1, len(dy) if torch.compiler.is_compiling() else IN_CACHE // each)
    weight, bias = [], []
    for a, b in zip(x.split(step), dy.split(step), strict=True):
        weight.append(total(b * normalised(wide(a))))
        if getattr(module, "bias", None) is not None:
            bias.append(total(b))
    sums = {"weight": weight, "bias": bias}
    return {own: Dense(t[0] if len(t) == 1 else torch.cat(t)) for own, t in sums.items() if t}


def _bias(module: Any, dy: Tensor, total: Callable[[Tensor], Tensor]) -> dict[str, Dense]:
    return {} if getattr(module, "bias", None) is None else {"bias": Dense(total(dy))}


def _summed(bias: Mapping[str, Dense]) -> Tensor | None:
    return bias["bias"].grad if bias else None


def _to_last(axes: int) -> Callable[[Tensor], Tensor]:  # sums [B, ..., *last] to [B, *last]
    def total(t: Tensor) -> Tensor:
        if t.ndim == 1 + axes:
            return t
        positions = t if t.ndim == 2 + axes else t[:, None].flatten(1, -1 - axes)
        return positions.sum(1, dtype=wider(t.dtype))

    return total


def _to_channels(t: Tensor) -> Tensor:  # sums [B, C, ...] to [B, C]
    return (t if t.ndim == 3 else t[:, :, None].flatten(2)).sum(2, dtype=wider(t.dtype))


def _check_rank(module: nn.Module, x: Tensor, rank: int) -> None:
    if x.ndim != rank:
        raise ValueError(
            f"{type(module).__name__}: expected an input with {rank} axes, the batch first; got "
            f"{list(x.shape)}. Give the layer a batch axis"
        )

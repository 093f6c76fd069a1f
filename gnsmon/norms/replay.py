"""Per-example gradients of a module without a rule: its forward is run again for each example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gnsmon.norms.forms import Dense

LARGEST = 2**26  # numbers in a module's parameters: the gradients of one example must fit
CHUNK_BYTES = 2**28  # of per-example gradients that live at a time
# What can be given to forward a second time without a trace; a cache, say, would be changed.
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
CHANGES = "its forward changes a buffer, so a replay would not be the same"
REFUSED = {  # what torch.func says (2.13), in plainer words
    "randomness": (
        "its forward draws random numbers, such as dropout in training mode, and a replay would "
        "draw others"
    ),
    "mutate a captured Tensor": CHANGES,
}


@dataclass(frozen=True)
class Call:
    """How a forward was called, without its tensors: those are saved through autograd."""

    spec: TreeSpec
    leaves: tuple[Any, ...]  # Tensor itself in the place of each tensor
    output: int | None  # which of several outputs is tapped
    autocast: tuple[bool, torch.dtype]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `tensors` in their places."""
        rest = iter(tensors)
        leaves = [next(rest) if leaf is Tensor else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]


def refuse_replay(module: nn.Module) -> str | None:
    """Why `module` cannot be replayed, whatever its input; or None."""
    kind = type(module).__name__
    if not bypasses(module) and any(True for c in module.children() for _ in c.parameters()):
        return (
            f"{kind} has no rule, and layers of its own that a replay would run again; move the "
            f"parameter into a layer, or write a rule with @gnsmon.rule({kind})"
        )
    if sum(p.numel() for p in module.parameters()) > LARGEST:
        return f"{kind} has no rule and is too large to replay; write one with @gnsmon.rule({kind})"
    return None


def bypasses(module: nn.Module) -> bool:
    """Whether forward uses the parameters of the module's layers without calling these."""
    return isinstance(module, nn.MultiheadAttention)


def recorded(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: int | None, device: torch.device
) -> tuple[Call, tuple[Tensor, ...]]:
    """The call and its tensors; ValueError for an argument that cannot be given again."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    if odd := [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))]:
        raise ValueError(f"it is given a {type(odd[0]).__name__}, which a replay would use again")
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    bare = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return Call(spec, bare, output, autocast), tensors


def replay(
    module: nn.Module,
    call: Call,
    x: Sequence[Tensor],
    axes: Sequence[int | None],
    dy: Tensor,
    axis: int,
    *,
    chunk: int | None = None,
) -> Iterator[dict[str, Dense]]:
    """Forms of the module's trainable parameters, for some examples after others.

    Args:
        module: left as it is: parameters, buffers and attributes, though not what forward does to
            the inside of a list or the world outside.
        call: as the forward was called.
        x: its tensors, the examples moved to the first axis.
        axes: where forward has the examples in each of them; None where it has no such axis.
        dy: the gradient at the output, the examples moved to the first axis.
        axis: where forward has them in its output.
        chunk: examples at a time, a divisor of what must stay together; as fit by default.

    Raises:
        ValueError: where forward draws random numbers, changes a buffer, or has sharded parameters.
    """
    own = {f"module.{name}": p for name, p in module.named_parameters() if p.requires_grad}
    if odd := [type(p.data).__name__ for p in own.values() if type(p.data) is not Tensor]:
        raise ValueError(f"its parameters are of type {odd[0]}, which cannot be replayed")
    buffers = {f"module.{name}": b.clone() for name, b in module.named_buffers()}
    versions = [b._version for b in buffers.values()]
    holder = _Forward(module)

    def gradients(parameters: dict[str, Tensor], dy: Tensor, *x: Tensor) -> dict[str, Tensor]:
        tensors = [t if a is None else t.unsqueeze(a) for t, a in zip(x, axes, strict=True)]
        args, kwargs = call.arguments(tensors)

        def run(parameters: dict[str, Tensor]) -> Tensor:
            output = functional_call(holder, (parameters, buffers), args, kwargs)
            return output if call.output is None else output[call.output]

        return vjp(run, parameters)[1](dy.unsqueeze(axis))[0]  # type: ignore[no-any-return]

    each = vmap(gradients, in_dims=(0, 0, *(None if a is None else 0 for a in axes)))
    x = [t.detach() for t in x]
    enabled, dtype = call.autocast
    for start in range(0, len(dy), chunk or len(dy)):
        part = slice(start, start + (chunk or len(dy)))
        some = [t if a is None else t[part] for t, a in zip(x, axes, strict=True)]
        # Parameters of their own for each example: recurrent layers add in place to x @ w.
        copies = {n: p.detach().expand(len(dy[part]), *p.shape) for n, p in own.items()}
        with (
            _left_alone(module),
            torch.autocast(dy.device.type, dtype, enabled, cache_enabled=False),
            _plain_kernels(),
        ):
            try:
                found = each(copies, dy[part], *some)
            except RuntimeError as error:
                why = next((why for words, why in REFUSED.items() if words in str(error)), None)
                if why is None:
                    raise
                raise ValueError(why) from error
        if versions != [b._version for b in buffers.values()]:
            raise ValueError(CHANGES)
        yield {name.removeprefix("module."): Dense(grad) for name, grad in found.items()}


def examples_at_a_time(module: nn.Module) -> int:
    """How many examples' gradients fit in `CHUNK_BYTES`, at least one."""
    return max(1, CHUNK_BYTES // sum(p.numel() * p.element_size() for p in module.parameters()))


class _Forward(nn.Module):
    """Calls a module's forward without its hooks, which have already run."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.module, nn.RNNBase):  # it keeps a list of its parameters beside them
            names = self.module._flat_weights_names
            self.module._flat_weights = [getattr(self.module, name) for name in names]
        return self.module.forward(*args, **kwargs)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Without the fused kernels of attention and recurrent layers: vmap has no rule for them."""
    one_dnn = torch._C._get_mkldnn_enabled()  # its public switch warns of other flags (torch 2.13)
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(one_dnn)


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    """Attributes that forward sets, such as attention weights kept for a plot, are put back."""
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes in before:
            m.__dict__.clear()
            m.__dict__.update(attributes)

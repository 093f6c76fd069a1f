"""Which parameters are reported together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from torch import nn

Groups = str | Callable[[str], str] | Mapping[str, str]
NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.batchnorm._NormBase,
)
KINDS = {
    "mlp": r"mlp|ffn|feed_?forward",
    "attention": r"attn|attention|(^|[._])(qkv|[qkvo]?_?proj)([._]|$)",
    "head": r"(^|[._])(head|lm_head|classifier|score|fc_out|decoder)$",
}


def group_of(model: nn.Module, groups: Groups) -> dict[str, str]:
    """The group of every parameter of `model`.

    `groups` is "layer" (the module that owns the parameter), "kind" (attention, mlp, norm,
    embedding, head, by the module's type and path), "total" (no groups beside the total), a
    function of the parameter's name, or a mapping from patterns (`"blocks.*.attn.*"`, first match
    wins; "other" without one) to groups.
    """
    names = [name for name, _ in model.named_parameters()]
    if isinstance(groups, Mapping):
        return {
            n: next((g for p, g in groups.items() if fnmatchcase(n, p)), "other") for n in names
        }
    if callable(groups):
        found = {name: groups(name) for name in names}
        for name, group in found.items():
            if not isinstance(group, str) or not group:
                raise ValueError(
                    f"groups: expected the function to name a group for {name!r}, got {group!r}"
                )
        return found
    if groups == "total":
        return {}
    if groups not in ("layer", "kind"):
        raise ValueError(
            f'groups: expected "layer", "kind", "total", a function of the parameter\'s name or a '
            f"mapping from patterns to groups; got {groups!r}"
        )
    owner = {name: name.rpartition(".")[0] for name in names}
    if groups == "layer":
        return {name: path or type(model).__name__ for name, path in owner.items()}
    return {name: _kind(path, model.get_submodule(path)) for name, path in owner.items()}


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer, also of somebody's own."""
    return isinstance(module, NORMS) or "norm" in type(module).__name__.lower()


def _kind(path: str, module: nn.Module) -> str:
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    by_path = (kind for kind, pattern in KINDS.items() if re.search(pattern, path.lower()))
    return next(by_path, "mlp")

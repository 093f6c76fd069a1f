"""What a rank holds of a parameter's gradient, and of which shards that is understood."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gnsmon.collectors.reduction import Ranks

SUPPORTED = (
    "supported are data-parallel ranks alone: DistributedDataParallel, and fully_shard over a mesh "
    "of all ranks, [shard] or [replicate, shard], along the first axis of the parameters"
)


def is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor; without importing what few runs need."""
    return type(t) is not Tensor and hasattr(t, "placements") and hasattr(t, "to_local")


def is_managed(model: nn.Module) -> bool:
    """Whether `fully_shard` holds parameters of the model, whole just now or in shards."""
    return any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())


def local(gradient: Tensor) -> Tensor:
    """What this rank has of it; looking at more would wait for the others."""
    return gradient.to_local() if is_sharded(gradient) else gradient  # type: ignore[operator]


def held(gradient: Tensor, ranks: Ranks) -> tuple[Tensor, int] | None:
    """This rank's rows of `gradient`, and the number of rows before them.

    None where another rank holds the same ones, so that what all hold is the gradient once: the
    first of data-parallel ranks has all of it, and the first of replicated shards its shard.
    """
    if not is_sharded(gradient):
        return (gradient.detach(), 0) if ranks.rank == 0 else None
    sharded: Any = gradient
    mesh = sharded.device_mesh
    coordinates = mesh.get_coordinate()
    *replicas, at = coordinates
    if any(replicas):
        return None
    rows = -(-gradient.shape[0] // mesh.size(len(coordinates) - 1))  # as torch.chunk deals them
    return local(gradient).detach(), min(at * rows, gradient.shape[0])


def refusal(model: nn.Module, ranks: Ranks) -> str | None:
    """Why the gradients of these ranks would be put together wrongly; None where they are not."""
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            return f"{path or 'the model'} is a FullyShardedDataParallel (FSDP1); {SUPPORTED}"
    sharded = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    if not sharded:
        return None
    from torch.distributed.fsdp import FSDPModule

    paths = [path for path, module in model.named_modules() if isinstance(module, FSDPModule)]
    for name, p in sharded.items():
        if not any(f"{name}.".startswith(f"{path}." if path else "") for path in paths):
            return (
                f"{name} is a DTensor that no fully_shard has made (tensor parallel?); {SUPPORTED}"
            )
        mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
        *replicas, last = placements
        first_axis = type(last).__name__ == "Shard" and last.dim == 0
        if len(replicas) > 1 or not first_axis or not all(r.is_replicate() for r in replicas):
            return f"{name} is placed {placements} over {mesh}; {SUPPORTED}"
        if mesh.size() != ranks.size:
            return f"{name} is sharded over {mesh.size()} of {ranks.size} ranks; {SUPPORTED}"
    return None

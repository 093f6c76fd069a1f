"""One step's share over all data-parallel ranks, by one sum, the same on every one of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gnsmon.collectors.step import Share, Skipped
from gnsmon.estimators.values import Array

LETTERS = 24  # of a rank's reason to skip that the others come to know
ELSEWHERE = "it was left out on another rank, as it says there"


@dataclass(frozen=True)
class Ranks:
    """The processes that average their gradients, and which of them this is."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those of a `DistributedDataParallel`, otherwise all; one where none were started."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        group = model.process_group if isinstance(model, DistributedDataParallel) else None
        return cls(dist.get_rank(group), dist.get_world_size(group), group)


def over_ranks(
    local: Share | Skipped,
    names: Sequence[str],
    ranks: Ranks,
    *,
    device: torch.device,
    n_methods: int = 1,
) -> Share | Skipped:
    """The share of all ranks' parts, or Skipped on every rank if one has none; equal on all.

    It is one all_reduce, of a vector whose length depends on all arguments but the first: call it
    on every rank, whatever has become of the step there, and none waits for another in vain.

    The gradient is to be the mean over ranks of what each adds to its own, so that a part is worth
    1/R of what its rank saw. `.grad` is read on the first rank: where another's is not the same,
    the parts do not add up to it.

    Args:
        local: of this rank, its parts as this rank saw them, but `.grad` after the mean.
        names: of the parameters, in the order of the arrays.
        ranks: who takes part.
        device: of the parameters, for a backend that knows no other.
        n_methods: rows of `parts_sq_norm`.
    """
    shapes = (ranks.size, LETTERS), (9,), (n_methods, len(names)), (5, len(names))
    reasons, *sums = (np.zeros(shape) for shape in shapes)
    if isinstance(local, Skipped):
        reasons[ranks.rank] = _spelled(local.reason)
    else:
        sums = _packed(local, names, ranks)
    vector = np.concatenate([part.ravel() for part in (reasons, *sums)])
    parts = np.split(_sum(vector, ranks, device), np.cumsum([prod(s) for s in shapes])[:-1])
    reasons, *sums = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
    if reasons.any():
        first = int(reasons.any(1).argmax())
        reason = _read(reasons[first])
        told = f"rank {first} could not measure it ({reason}), as its own warning says"
        return Skipped(reason, local.detail if isinstance(local, Skipped) else told)
    assert isinstance(local, Share)
    return _unpacked(sums, local, names, ranks)


def others(said: object, ranks: Ranks, device: torch.device) -> list[int]:
    """The ranks that say another thing than the first one; the same list on all, by one sum."""
    digests = np.zeros((ranks.size, 32))
    digests[ranks.rank] = np.frombuffer(sha256(repr(said).encode()).digest(), np.uint8)
    digests = _sum(digests.ravel(), ranks, device).reshape(digests.shape)
    return np.flatnonzero((digests != digests[0]).any(1)).tolist()


def _packed(local: Share, names: Sequence[str], ranks: Ranks) -> list[Array]:
    """What adds up over ranks: numbers [9], sums of squares [n_methods, n], a table [5, n]."""
    first = ranks.rank == 0
    every = [
        local.examples,
        local.tokens or 0,
        local.tokens is not None,
        local.sum_weights,
        local.sum_sq_weights,
        local.weighted,
    ]
    one = first * np.array([local.whole, local.microbatch, local.microbatches])
    missing = [name in local.missing for name in names]
    gradient = first * np.stack([local.big_sq_norm, local.big_along])
    return [
        np.concatenate([every, one]),
        local.parts_sq_norm / ranks.size**2,
        np.stack([local.along / ranks.size, local.present, missing, *gradient]),
    ]


def _unpacked(
    sums: Sequence[Array], local: Share, names: Sequence[str], ranks: Ranks
) -> Share | Skipped:
    numbers, parts_sq_norm, (along, present, missing, big_sq_norm, big_along) = sums
    examples, tokens, counted, sum_weights, sum_sq_weights, weighted, whole, *micro = numbers
    if weighted not in (0, ranks.size):
        return Skipped("weights", "weights were given on some ranks only; give them on all or none")
    return Share(
        parts_sq_norm=parts_sq_norm,
        along=along,
        big_sq_norm=big_sq_norm,
        big_along=big_along,
        present=present > 0,
        whole=float(whole),
        sum_weights=float(sum_weights),
        sum_sq_weights=float(sum_sq_weights),
        weighted=bool(weighted),
        examples=int(examples),
        tokens=int(tokens) if counted == ranks.size else None,
        microbatch=int(micro[0]),
        microbatches=int(micro[1]),
        missing={
            name: local.missing.get(name, ELSEWHERE)
            for name, flag in zip(names, missing, strict=True)
            if flag
        },
    )


def _sum(vector: Array, ranks: Ranks, device: torch.device) -> Array:
    """The sum over ranks, on the CPU where the backend works there: NCCL does not."""
    on_host = {"gloo", "mpi"} & set(re.split("[:,]", dist.get_backend_config(ranks.group)))
    summed = torch.from_numpy(vector).to("cpu" if on_host else device)
    dist.all_reduce(summed, group=ranks.group)
    return summed.cpu().numpy()


def _spelled(text: str) -> Array:
    """The first letters of `text` as numbers [LETTERS], which a sum with zeros leaves alone."""
    return np.frombuffer(text.encode("ascii", "replace")[:LETTERS].ljust(LETTERS), np.uint8).astype(
        np.float64
    )


def _read(letters: Array) -> str:
    return letters.astype(np.uint8).tobytes().decode("ascii").rstrip()

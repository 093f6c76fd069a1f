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

from gnsmon.collectors.step import Columns, Share, Skipped
from gnsmon.estimators.values import Array

LETTERS = 24  # of a rank's reason to skip that the others come to know
ELSEWHERE = "it was left out on another rank, as it says there"
UNREDUCED = (
    ", or it is not the mean over the ranks, but compressed or never reduced (is the model trained "
    "through DistributedDataParallel or fully_shard?)"
)


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


ALONE = Ranks()


def over_ranks(
    local: Sequence[tuple[Share | Skipped, Columns]],
    seconds: float,
    ranks: Ranks,
    *,
    device: torch.device,
) -> tuple[list[Share | Skipped], float]:
    """The shares of all ranks' parts, or Skipped on every rank if one has none; the mean seconds.

    All is equal on all ranks.

    It is one all_reduce for all the sources of a step, of a vector whose length depends on their
    columns alone: call it on every rank, whatever has become of the step there, and none waits for
    another in vain.

    Args:
        local: of this rank, from each source, and how it is laid out.
        seconds: that it took on this rank.
        ranks: who takes part.
        device: of the parameters, for a backend that knows no other.
    """
    shapes = [_shapes(columns) for _, columns in local]
    vector = [
        part.ravel()
        for (share, columns), of_source in zip(local, shapes, strict=True)
        for part in _message(share, columns, of_source, ranks)
    ]
    flat = [shape for of_source in shapes for shape in of_source]
    ends = np.cumsum([prod(shape) for shape in flat])
    *parts, took = np.split(_sum(np.concatenate([*vector, [seconds]]), ranks, device), ends)
    pieces = iter([part.reshape(shape) for part, shape in zip(parts, flat, strict=True)])
    answers = [
        _answered([next(pieces) for _ in of_source], share, columns, ranks)
        for (share, columns), of_source in zip(local, shapes, strict=True)
    ]
    return answers, float(took[0] / ranks.size)


def length(columns: Columns) -> int:
    """Numbers that a source sends in a measured step, however many ranks there are."""
    return sum(prod(shape) for shape in _shapes(columns))


def _shapes(columns: Columns) -> list[tuple[int, ...]]:
    """Of the failures, the numbers, the squared norms, the table, the proof and the metric."""
    n = len(columns.names)
    norms = (columns.slots, n), (5, n), (2, len(columns.of_rows)), (2 * columns.metric, n)
    return [(2 * (1 + LETTERS),), (9,), *norms]


def _message(
    local: Share | Skipped, columns: Columns, shapes: Sequence[tuple[int, ...]], ranks: Ranks
) -> list[Array]:
    """What is sent; a rank that cannot measure the step sends its reason alone."""
    failed, *zeros = (np.zeros(shape) for shape in shapes)
    if isinstance(local, Share):
        return [failed, *_packed(local, columns.names, ranks)]
    letters = _spelled(local.reason)
    return [np.concatenate([[1, ranks.rank], letters, letters**2]), *zeros]


def _answered(
    sums: Sequence[Array], local: Share | Skipped, columns: Columns, ranks: Ranks
) -> Share | Skipped:
    (count, rank, *letters), *sums = sums
    if count:
        mean, squares = np.array(letters).reshape(2, -1) / count
        reason = _read(mean) if (mean**2 == squares).all() else "several reasons"
        who = f"rank {rank:.0f}" if count == 1 else f"{count:.0f} ranks"
        told = f"{who} could not measure it ({reason}), as the warning there says"
        return Skipped(reason, local.detail if isinstance(local, Skipped) else told)
    assert isinstance(local, Share)
    return _unpacked(sums, local, columns.names, ranks)


def others(said: object, ranks: Ranks, device: torch.device) -> list[int]:
    """The ranks that say another thing than the first one; the same list on all, by one sum."""
    digests = np.zeros((ranks.size, 32))
    digests[ranks.rank] = np.frombuffer(sha256(repr(said).encode()).digest(), np.uint8)
    digests = _sum(digests.ravel(), ranks, device).reshape(digests.shape)
    return np.flatnonzero((digests != digests[0]).any(1)).tolist()


def _packed(local: Share, names: Sequence[str], ranks: Ranks) -> list[Array]:
    """What adds up over ranks: numbers, squared norms, a table, the proof, what is in a metric."""
    every = [
        local.examples,
        local.tokens or 0,
        local.tokens is not None,
        local.sum_weights,
        local.sum_sq_weights,
        local.weighted,
        local.whole,
    ]
    one = (ranks.rank == 0) * np.array([local.microbatch, local.microbatches])
    missing = [name in local.missing for name in names]
    return [
        np.concatenate([every, one]),
        local.parts_sq_norm,
        np.stack([local.big_sq_norm, local.present, local.seen, local.half, missing]),
        np.stack([local.along, local.big_along]),
        np.zeros((0, len(names))) if local.in_metric is None else local.in_metric,
    ]


def _unpacked(
    sums: Sequence[Array], local: Share, names: Sequence[str], ranks: Ranks
) -> Share | Skipped:
    numbers, parts_sq_norm, table, (along, big_along), in_metric = sums
    big_sq_norm, present, seen, half, missing = table
    examples, tokens, counted, sum_weights, sum_sq_weights, weighted, whole, *micro = numbers
    if weighted not in (0, ranks.size):
        return Skipped("weights", "weights were given on some ranks only; give them on all or none")
    return Share(
        parts_sq_norm=parts_sq_norm,
        along=along,
        big_sq_norm=big_sq_norm,
        big_along=big_along,
        present=present > 0,
        seen=seen > 0,
        half=half > 0,
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
        in_metric=in_metric if len(in_metric) else None,
    )


def _sum(vector: Array, ranks: Ranks, device: torch.device) -> Array:
    """The sum over ranks."""
    summed = torch.from_numpy(vector).to(_device(ranks, device))
    dist.all_reduce(summed, group=ranks.group)
    return summed.cpu().numpy()


def _device(ranks: Ranks, device: torch.device) -> torch.device:
    """The CPU where the backend works there: NCCL does not."""
    on_host = {"gloo", "mpi"} & set(re.split("[:,]", dist.get_backend_config(ranks.group)))
    return torch.device("cpu") if on_host else device


def _spelled(text: str) -> Array:
    """The first letters of `text` as numbers [LETTERS], which a sum with zeros leaves alone."""
    return np.frombuffer(text.encode("ascii", "replace")[:LETTERS].ljust(LETTERS), np.uint8).astype(
        np.float64
    )


def _read(letters: Array) -> str:
    return letters.astype(np.uint8).tobytes().decode("ascii").rstrip()

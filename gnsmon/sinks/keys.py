"""The dashboard keys of a reading and of the layers' health, the same in TensorBoard and W&B."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gnsmon.estimators import Groups, Reading
from gnsmon.estimators.health import Health, Layers


def prefix(method: str, primary: str) -> str:
    """`gns` for the run's primary method, `gns/<method>` for the others."""
    return "gns" if method == primary else f"gns/{method}"


def scalars(reading: Reading, prefix: str = "gns") -> dict[str, float]:
    """Key -> value for every number that the reading has; what is absent is left out."""
    groups = Groups.of(reading.groups)
    of_groups = zip(groups.names, groups.ratios.b_simple.tolist(), strict=True)
    values = {
        "b_simple": reading.b_simple,
        "b_simple_low": reading.low,
        "b_simple_high": reading.high,
        "tr_sigma": reading.tr_sigma,
        "grad_sq_norm": reading.grad_sq_norm,
        "batch_size": reading.examples,
        "suggested_batch_size": reading.suggested_batch_size,
        "coverage": reading.coverage,
        "overhead": reading.overhead,
        **_approximation(reading),
        "skipped_steps": sum(reading.skipped.values()),
        **{f"layer/{name}/b_simple": b_simple for name, b_simple in of_groups},
    }
    return _present(values, prefix)


OF_HEALTH = (
    "grad_norm",
    "clip_factor",
    "clip_share",
    "layer_clip_factor",
    "layer_clip_cosine",
    "layer_clip_share",
    "depth_ratio",
    "relative_change",
    "change_ratio",
    "change_variation",
    "above_bound",
)
OF_LAYERS = ("grad_norm", "grad_share", "clip_factor", "clip_share", "relative_change")


def health_scalars(health: Health, root: str = "gns") -> dict[str, float]:
    """Key -> value for every number of the whole model, and five of each layer, as far as known."""
    layers = Layers.of(health.groups)
    values = {f"health/{key}": getattr(health, key) for key in OF_HEALTH}
    for key in OF_LAYERS:
        column = zip(layers.names, layers.columns[key].tolist(), strict=True)
        values |= {f"layer/{name}/{key}": value for name, value in column}
    return _present(values, root)


def _present(values: Mapping[str, float | None], prefix: str) -> dict[str, float]:
    return {
        f"{prefix}/{key}": value
        for key, value in values.items()
        if value is not None and math.isfinite(value)
    }


def _approximation(reading: Reading) -> dict[str, float | None]:
    known = reading.approximation
    if known is None:
        return {}
    names = ("factor", "spread", "standard_error", "amplification")
    return {f"approximation/{name}": getattr(known, name) for name in names}

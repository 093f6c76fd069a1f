"""Gradient noise scale monitor for PyTorch: is my batch too small or too large?

Names are imported when they are first used, so that reading a log needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gnsmon.advice import Advice, BatchSizeSchedule, Goal, Layout, StepTime, advise
    from gnsmon.checking import check
    from gnsmon.config import MonitorConfig
    from gnsmon.curvature import FullNoiseScale, full_noise_scale
    from gnsmon.estimators import Reading
    from gnsmon.estimators.critical import CriticalBatch, fit_critical_batch
    from gnsmon.estimators.health import Health
    from gnsmon.halves import Alignment, alignment
    from gnsmon.monitor import Coverage, Monitor, attach
    from gnsmon.norms.forms import Dense, Outer, Rows
    from gnsmon.norms.oracles import per_example_sq_norms, random_sign_sq_norms
    from gnsmon.norms.rules import rule

_HOME = {
    "advice": ("Advice", "BatchSizeSchedule", "Goal", "Layout", "StepTime", "advise"),
    "checking": ("check",),
    "config": ("MonitorConfig",),
    "curvature": ("FullNoiseScale", "full_noise_scale"),
    "estimators": ("Reading",),
    "estimators.critical": ("CriticalBatch", "fit_critical_batch"),
    "estimators.health": ("Health",),
    "halves": ("Alignment", "alignment"),
    "monitor": ("Coverage", "Monitor", "attach"),
    "norms.forms": ("Dense", "Outer", "Rows"),
    "norms.oracles": ("per_example_sq_norms", "random_sign_sq_norms"),
    "norms.rules": ("rule",),
}
_ROOMS = ("hf",)  # that need optional packages
_MODULE = {name: f"gnsmon.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "Advice",
    "Alignment",
    "BatchSizeSchedule",
    "Coverage",
    "CriticalBatch",
    "Dense",
    "FullNoiseScale",
    "Goal",
    "Health",
    "Layout",
    "Monitor",
    "MonitorConfig",
    "Outer",
    "Reading",
    "Rows",
    "StepTime",
    "advise",
    "alignment",
    "attach",
    "check",
    "fit_critical_batch",
    "full_noise_scale",
    "per_example_sq_norms",
    "random_sign_sq_norms",
    "rule",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gnsmon")
    if name in _ROOMS:
        return import_module(f"gnsmon.{name}")
    if name not in _MODULE:
        raise AttributeError(f"module 'gnsmon' has no attribute {name!r}")
    value = getattr(import_module(_MODULE[name]), name)
    globals()[name] = value
    return value

"""From norms of gradients to the noise scale with its interval; numpy and scipy only."""

from gnsmon.estimators.columns import Groups, Ratios
from gnsmon.estimators.estimator import Estimator
from gnsmon.estimators.moments import moments, obstacle
from gnsmon.estimators.values import GroupReading, Moments, NormPair, Ratio, Raw, Reading

__all__ = [
    "Estimator",
    "GroupReading",
    "Groups",
    "Moments",
    "NormPair",
    "Ratio",
    "Ratios",
    "Raw",
    "Reading",
    "moments",
    "obstacle",
]

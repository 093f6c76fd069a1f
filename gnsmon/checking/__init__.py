"""A doctor for the user's own model: proof of its norms, and findings about its noise scale."""

from gnsmon.checking.findings import Finding
from gnsmon.checking.proof import check
from gnsmon.checking.values import TOLERANCE, Check, Row

__all__ = ["TOLERANCE", "Check", "Finding", "Row", "check"]

"""From a noise scale to a decision: which batch, what it saves and costs, when to change it."""

from gnsmon.advice import export
from gnsmon.advice.advice import Advice, Point, advise, suggested
from gnsmon.advice.goal import Goal, examples_factor, steps_factor
from gnsmon.advice.layout import Layout
from gnsmon.advice.schedule import BatchSizeSchedule, Stage, planned
from gnsmon.advice.timing import StepTime

__all__ = [
    "Advice",
    "BatchSizeSchedule",
    "Goal",
    "Layout",
    "Point",
    "Stage",
    "StepTime",
    "advise",
    "examples_factor",
    "export",
    "planned",
    "steps_factor",
    "suggested",
]

"""Which of several ways to the same exact norms is the fastest: counted, or timed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from math import inf
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

SMALL = 2**24  # multiply-adds of a sum over the batch below which a clock is not worth its time
WORTH_KNOWING = 2**20  # numbers of a layer's input and output that a proof need not read then
HOPELESS = 12.0  # times the least work: not even timed
BEHIND = 3.0  # times the fastest, with the sum: not timed again
FREE = 10  # times what squaring a product in between costs is the time of the product


class Plan(NamedTuple):
    """One way to the exact squared norms of a form."""

    work: Callable[[Any], float]  # multiply-adds
    sq_norms: Callable[[Any], Tensor]  # [B]
    fused: Callable[[Any], tuple[Tensor, Tensor]] | None = None  # the sum too, [shape], at no cost


class Planned(Protocol):
    """A form that has a choice."""

    plans: Mapping[str, Plan]

    @property
    def batch(self) -> int:
        """Number of examples."""

    @property
    def signature(self) -> Hashable:
        """What the fastest plan depends on, less the number of examples."""

    @property
    def sum_work(self) -> float:
        """Multiply-adds of `sum()`, which autograd does anyway."""

    def sum(self) -> Tensor:
        """Sum over the batch."""


_timed: dict[Hashable, str] = {}  # signature -> name


def chosen(form: Planned, *, fusable: bool = False) -> Plan:
    """The plan that was timed as the fastest, or else is counted to be.

    `fusable` says that the caller can use the sum, in place of autograd's.
    """
    if not torch.compiler.is_compiling():
        plan = form.plans.get(_timed.get(_key(form), ""))
        if plan is not None and (fusable or plan.fused is None):
            return plan
    return form.plans[_counted(form, fusable)[0]]


def tune(form: Planned, *, repeats: int = 3) -> None:
    """Time the plans on `form`, whose values do not matter, unless that is known or not worth it.

    The sum that some plans give is taken to be of use. Under `torch.use_deterministic_algorithms`
    nothing is timed, lest two runs differ.
    """
    key = _key(form)
    if key in _timed:
        return
    if torch.are_deterministic_algorithms_enabled():
        return
    least = min(plan.work(form) for plan in form.plans.values())
    tried = [name for name, plan in form.plans.items() if plan.work(form) <= HOPELESS * least]
    usual, seconds = inf, dict.fromkeys(tried, inf)  # the least of each: others may hold the cores
    for _ in range(repeats):
        usual = min(usual, _seconds(form.sum))
        for name in tried:
            plan = form.plans[name]
            seconds[name] = min(seconds[name], _seconds(partial(plan.fused or plan.sq_norms, form)))
        extra = {n: t - usual * (form.plans[n].fused is not None) for n, t in seconds.items()}
        limit = BEHIND * (min(extra.values()) + usual)
        tried = [name for name in tried if extra[name] + usual <= limit]
    _timed[key] = min(extra, key=extra.__getitem__)


def extra_work(form: Planned, *, fusable: bool = False) -> float:
    """Multiply-adds for an example's exact norm, beside the sum that autograd makes."""
    return _counted(form, fusable)[1]


def _counted(form: Planned, fusable: bool) -> tuple[str, float]:
    """The plan of the least extra work."""
    best, least = next(iter(form.plans)), inf
    for name, plan in form.plans.items():  # min(..., key=...) breaks a graph (torch 2.13)
        extra = plan.work(form)
        if fusable and plan.fused is not None:
            extra -= form.sum_work - form.sum_work // FREE  # floats would not trace (torch 2.13)
        if extra < least:
            best, least = name, extra
    return best, least


def _key(form: Planned) -> Hashable:
    return type(form), form.signature


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def bucket(size: int) -> int:
    """Sizes of one bucket are at most a factor of two apart."""
    return int(size).bit_length()

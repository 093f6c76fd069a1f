"""The conductor: attaches to a training run and turns its steps into readings."""

from __future__ import annotations

import logging
import math
import platform
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gnsmon.advice import Advice, Goal, Layout, advise, suggested
from gnsmon.collectors.backward import device_of
from gnsmon.collectors.groups import group_of
from gnsmon.collectors.per_example import EXACT, NOT_A_NORM
from gnsmon.collectors.preconditioner import NO_MOMENT, NO_STATE, named
from gnsmon.collectors.random_signs import RandomSigns
from gnsmon.collectors.reduction import Ranks, others, over_ranks
from gnsmon.collectors.shards import refusal
from gnsmon.collectors.step import (
    NO_BACKWARD,
    NO_LOSSES,
    NO_TAP,
    UNUSED,
    Columns,
    Measured,
    Share,
    Skipped,
    StepNorms,
)
from gnsmon.estimators import Estimator, Groups, NormPair, Reading, obstacle
from gnsmon.estimators.health import Health
from gnsmon.estimators.values import SCHEMA, Array
from gnsmon.health import HealthWatch
from gnsmon.methods import NO_EXAMPLES, PATIENCE, Method, Outcome, metric, readings, sources
from gnsmon.pace import Fixed, Paced
from gnsmon.sinks import SinkSet, open_sink

if TYPE_CHECKING:  # pydantic, which takes longer to import than all else here, waits for attach
    from gnsmon.config import MonitorConfig

OVERFLOWS = 10  # in a row after which they are no longer a scaler's search
TOTAL = ""  # key of the total among the groups


class Scaler(Protocol):
    """A loss scaler such as `torch.amp.GradScaler`."""

    def get_scale(self) -> float:
        """The factor on the loss."""


class Collector(Protocol):
    """Makes norms of each optimizer step, by one or several methods in one pass."""

    names: list[str]  # of all parameters, in the order of the norms
    columns: Columns  # of its shares

    @property
    def wanted(self) -> bool:
        """Whether the present step is to be measured."""

    @property
    def pending(self) -> bool:
        """Whether a backward has been measured since the last step."""

    @property
    def untapped(self) -> Mapping[str, str]:
        """Parameters that are known not to be measured before any step, and why."""

    def arm(self, measure: bool, *, exact: bool = False) -> None:
        """Measure the next step, or let it pass; `exact` asks for exact norms too, if it can."""

    def weigh(self, weights: Tensor) -> None:
        """Weigh the examples of the batch whose backward comes next."""

    def share(self) -> Share | Skipped | None:
        """What this process brings to the step, forgotten here; None if it is not measured."""

    def norms(self, share: Share) -> Measured | Skipped:
        """The step's norms by each method, from its share or that of all ranks."""

    def remove(self) -> None:
        """Leave the model as it was."""


@dataclass(frozen=True)
class Coverage:
    """Which parameters are in the norms, and why the others are not."""

    covered: list[str]
    missing: dict[str, str]  # parameter -> reason
    fraction: float  # of the numbers in trainable parameters
    norm_fraction: float | None  # of the gradient's squared norm, at the last measured step

    def __str__(self) -> str:
        missing = "".join(f"\n  {name}: {why}" for name, why in self.missing.items())
        norm = "" if self.norm_fraction is None else f", {self.norm_fraction:.1%} of |grad|²"
        left_out = f"; left out:{missing}" if missing else ""
        return f"{self.fraction:.1%} of the trainable parameters{norm}{left_out}"


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    scaler: Scaler | None = None,
    weights: Callable[..., Tensor] | None = None,
    config: MonitorConfig | str | Path | None = None,
    **settings: Any,
) -> Monitor:
    """Measure the gradient noise scale of a training run, whose loop stays as it is.

    Call it before `torch.compile` and before the first step. With several ranks, call it and load
    its state on every one, and take as many optimizer steps on each: at a measured step they wait
    for one another, so that `join()` of DDP, for uneven inputs, does not go with it. The first rank
    writes.

    Args:
        model: what the training loop calls; of `DistributedDataParallel` the wrapper or its module;
            of `fully_shard` its root, before or after.
        optimizer: whose steps end a measurement; several in a sequence; without any, call `commit`
            after each step.
        scaler: the GradScaler in use, so that |G|² and S are those of the loss itself.
        weights: for losses that weigh examples unequally (a mean over tokens of sequences of
            unequal length): called with the arguments of the model's forward, gives a weight for
            each example, [B], up to a factor that is the same throughout an optimizer step.
            Integers are taken as counts of tokens. See also `Monitor.weigh`. Microbatches weigh
            what their examples do; "random_signs" sees the weights by itself.
        config: a `MonitorConfig` or a TOML file of its settings.
        settings: any field of `MonitorConfig`, over those of `config`.

    Returns:
        The monitor; also a context manager that closes itself.

    Raises:
        ValueError: on an unknown setting or an impossible value, naming it; on ranks that do not
            train the same model together.
    """
    from gnsmon.config import MonitorConfig, load

    return Monitor(
        model,
        optimizer,
        load(MonitorConfig, config, **settings),
        scaler=scaler,
        weights=weights,
    )


class Monitor:
    """A run under observation; made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        config: MonitorConfig,
        *,
        scaler: Scaler | None = None,
        weights: Callable[..., Tensor] | None = None,
    ):
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
        self._ranks = Ranks.of(model)
        if isinstance(model, DistributedDataParallel):
            model = getattr(model.module, "_orig_mod", model.module)
        self.config, self.model = config, model
        self._check_ranks()
        self._scaler = scaler
        optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        # Wrappers such as Accelerate's hide the optimizer whose hooks fire.
        self._optimizers = [getattr(o, "optimizer", o) for o in optimizers if o is not None]
        for o in self._optimizers:
            if not isinstance(o, Optimizer):
                raise ValueError(
                    f"optimizer: expected a torch.optim.Optimizer or several, got {o!r}; without "
                    "one call commit() after each step"
                )
        self._metric = metric(model, config, self._optimizers)
        self._sources: list[tuple[Collector, list[str]]] = sources(
            model, config, weights, self._ranks, self._metric
        )
        if self._ranks.size > 1:
            layouts = [collector.columns for collector, _ in self._sources]
            settings = config.model_dump(exclude={"sinks", "run_dir", "groups"})
            device = device_of(model)
            if odd := others((settings, layouts), self._ranks, device):
                for collector, _ in self._sources:
                    collector.remove()
                raise ValueError(
                    "expected the same model and the same settings on all ranks, as of "
                    "data-parallel training (not the stages of a pipeline), which wait for one "
                    f"another at a measured step; those of rank {', '.join(map(str, odd))} are not "
                    "those of rank 0"
                )
        names = self._sources[0][0].names
        self._groups, self._index = _index(names, group_of(model, config.groups))
        # A rank that switched itself off would leave the others waiting.
        patience = PATIENCE if self._ranks.size == 1 else math.inf
        self._methods = {
            name: Method(name, names, self._by_group, level=config.level, patience=patience)
            for name in readings(config)
        }
        memory, self._unit = {"decay": config.decay, "window": config.window}, "steps"
        if config.half_life is not None:
            from gnsmon.config import parse_half_life

            memory["half_life"], self._unit = parse_half_life(config.half_life)
        self._estimators = {
            method: Estimator(
                len(self._groups),
                **memory,
                grad_memory=config.grad_memory,
                unit=self._unit,
                level=config.level,
            )
            for method in self._methods
        }
        self.step = 0  # optimizer steps since the run began
        self.skipped: Counter[str] = Counter()  # reason -> measurements dropped
        self.readings: dict[str, Reading] = {}  # method -> its last reading
        self.health: Health | None = None  # the last, with diagnostics=True
        self._first_step = 0
        self._overflows = 0  # in a row
        self._counted: dict[str, tuple[Any, float]] = {}  # method -> what is measured, its share
        self._told: set[str] = set()  # parameters whose absence was warned of
        self._closed = False
        self._clock = self._paced()
        writes = self._ranks.rank == 0
        self.run_dir = _run_dir(config) if writes else None  # None on a rank that writes nothing
        # A mistake in a name is to be found on all ranks, or the others would wait in vain.
        sinks = [open_sink(spec, self.run_dir or Path()) for spec in ["jsonl", *config.sinks]]
        self._sinks = SinkSet(sinks if writes else [], strict=config.strict)
        self._started = False
        self._losses: list[tuple[int, float]] = []
        self._watch = self._watched(names) if config.diagnostics else None
        self._hooks = self._around_steps() + [
            o.register_step_post_hook(lambda *_, first=(i == 0): self._stepped(first))
            for i, o in enumerate(self._optimizers)
        ]
        self._arm()

    def _watched(self, names: Sequence[str]) -> HealthWatch:
        return HealthWatch(
            self.model,
            self._optimizers,
            names,
            self._groups,
            self._by_group,
            config=self.config,
            ranks=self._ranks,
            deliver=self._tell_health,
        )

    def _around_steps(self) -> list[Any]:
        """The hooks by which the diagnostics see the optimizers' steps, before these end ours."""
        hooks = []
        for i, o in enumerate(self._optimizers if self._watch else ()):
            before = o.register_step_pre_hook(
                lambda *_, i=i: self._diagnose(lambda watch: watch.before(i, self._asked))
            )
            after = o.register_step_post_hook(
                lambda *_, i=i: self._diagnose(lambda watch: watch.after(i))
            )
            hooks += [before, after]
        return hooks

    @property
    def _asked(self) -> bool:
        """Whether the present step is to be measured."""
        return not (self._off or self._closed) and any(c.wanted for c, _ in self._sources)

    def _diagnose(self, look: Callable[[HealthWatch], None]) -> None:
        """Have the diagnostics look; where that fails, switch them off, for training must go on."""
        if self._watch is None:
            return
        watch = self._watch
        if isinstance(fault := self._guarded(lambda: look(watch)), Skipped):
            self._watch = None
            self.warn(f"diagnostics switched off: {fault.detail}")

    def _tell_health(self, health: Health) -> None:
        self.health = health
        self._start()
        self._sinks.health(health)

    def _check_ranks(self) -> None:
        """Raises ValueError where the methods, or the model, do not fit the ranks."""
        methods = self.config.method
        if self._ranks.size == 1:
            if "ranks" in methods:
                raise ValueError(
                    "method: 'ranks' compares the ranks of data-parallel training, and this is one "
                    "process; use 'pepgns', or attach after torch.distributed.init_process_group"
                )
            return
        if odd := [method for method in methods if "random_signs" in method.split("+")]:
            raise ValueError(
                f"method: {odd[0]!r} measures one process only, and this is a run of "
                f"{self._ranks.size} ranks; use 'pepgns', 'sketch' or 'ranks'"
            )
        if why := self._refusal():
            raise ValueError(f"model: its gradients cannot be measured: {why}")

    @property
    def reading(self) -> Reading | None:
        """The last reading of the first method; None before there is one."""
        return self.readings.get(self.config.method[0])

    @property
    def closed(self) -> bool:
        """Whether it measures no more."""
        return self._closed

    def commit(self) -> None:
        """End the step, where no optimizer was given: call it after the parameters changed."""
        self._stepped(first=True)

    def weigh(self, weights: Tensor) -> None:
        """Weigh the examples of the batch whose backward comes next; see `attach`."""
        for collector, _ in self._sources:
            collector.weigh(torch.as_tensor(weights))

    def losses(self, losses: Tensor) -> None:
        """Tell the loss of each example between forward and backward, for "random_signs".

            losses = F.cross_entropy(model(x), y, reduction="none")
            gns.losses(losses)
            losses.mean().backward()

        Once for each forward. The rest of the loop stays as it is: mean or sum, weights, loss
        scaling and accumulation are seen in the backward. With other methods, in steps that are
        not measured and under `torch.no_grad` it does nothing.

        Args:
            losses: [B] with its graph, the same tensor that the backward comes through; it holds
                the whole loss of each example. Of losses by token, each example's mean, which the
                loss weighs by its tokens afterwards: `(losses * counts).sum() / counts.sum()`. Of
                padding, multiply the losses by 0 afterwards. What is weighed inside the vector
                cannot be told from a larger loss, and p comes out too small.

        Raises:
            ValueError: when strict, on another shape or without a graph; otherwise the
                measurement is left out and the reason told.
        """
        for collector, _ in self._sources:
            if isinstance(collector, RandomSigns):
                collector.losses(losses)

    def log_loss(self, value: float, step: int | None = None) -> None:
        """Record the training loss beside the readings, of the last step unless `step` is given."""
        step = max(self.step - 1, 0) if step is None else step
        if self._started:
            self._sinks.loss(step, value)
        else:
            self._losses.append((step, value))

    def coverage(self, method: str | None = None) -> Coverage:
        """Which parameters are measured; before the first measured step, as far as is known.

        Args:
            method: the first one unless named.
        """
        return self._coverage(self._methods[method or self.config.method[0]])

    def advice(
        self,
        goal: Goal | None = None,
        *,
        largest_microbatch: int | None = None,
        powers_of_two: bool = True,
    ) -> Advice:
        """What to make of the last reading.

        Args:
            goal: limits and prices that make another batch than b_simple the best.
            largest_microbatch: examples that fit into a worker's memory; see `Layout`.
            powers_of_two: see `Layout`.

        Raises:
            ValueError: before there is a reading, and on sizes below 1.
        """
        if self.reading is None:
            raise ValueError("no step has been measured yet, so there is nothing to advise on")
        layout = {"largest_microbatch": largest_microbatch, "powers_of_two": powers_of_two}
        return self._advise(self.reading, goal=goal, **layout)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on, JSON-able."""
        return {
            "schema": SCHEMA,
            "step": self.step,
            "methods": {name: method.state_dict() for name, method in self._methods.items()},
            "groups": self._groups,
            "skipped": dict(self.skipped),
            "estimators": {m: e.state_dict() for m, e in self._estimators.items()},
            "pace": self._clock.state_dict(),
            **({"health": self._watch.state_dict()} if self._watch else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the log continues at its step.

        Raises:
            ValueError: on another schema, other groups, or another kind of averages; nothing is
                taken in.
        """
        for key, own in (("schema", SCHEMA), ("groups", self._groups)):
            if state[key] != own:
                raise ValueError(
                    f"{key}: expected {own!r}, got {state[key]!r} in the saved state; attach with "
                    "the same model and settings as the saved run, or start afresh"
                )
        for method in self._estimators:
            if method not in state["estimators"]:
                raise ValueError(
                    f"method {method!r} is not in the saved state, which has "
                    f"{list(state['estimators'])}; start afresh to add a method"
                    + ", or leave preconditioned off"
                    * (method not in self.config.method)
                )
        for method, estimator in self._estimators.items():
            estimator.load_state_dict(state["estimators"][method])
        self.step = self._first_step = int(state["step"])
        for name, method in self._methods.items():
            method.load_state_dict(state["methods"][name])
        self.skipped = Counter(state["skipped"])
        self._diagnose(lambda watch: watch.load_state_dict(state.get("health")))
        self._clock = self._paced(state.get("pace"))
        self._arm()

    def close(self) -> None:
        """Give the last advice to the sinks, close them and leave the model as it was."""
        if self._closed:
            return
        self._diagnose(lambda watch: watch.flush())
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        for collector, _ in self._sources:
            collector.remove()
        if self._metric is not None:
            self._metric.freeze(False)
        if self.step > self._first_step or self._losses:  # an earlier log may be in its place
            self._start()
        if self.reading is not None:
            advice = self._advise(self.reading)
            self._sinks.advise(str(advice), advice.batch_size)
        self._sinks.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stepped(self, first: bool) -> None:
        """An optimizer has stepped; the first of several counts the steps."""
        pending = any(collector.pending for collector, _ in self._sources)
        # Of ranks all must take the same path, so that it may not depend on what is pending here.
        if self._off or self._closed:
            return
        if not (first or (pending and self._ranks.size == 1)):
            if not pending:  # the first has armed the next step, and this one's moments are new
                self._freeze(self._asked)
            return
        if not any(collector.wanted for collector, _ in self._sources):
            self._clock.tick(False)
            self.step += first
            if self._clock.due(self.step):
                self._arm()
            return
        found: dict[str, Outcome] = {}
        shares = self._shares()
        for (collector, names), outcome in zip(self._sources, shares, strict=True):
            if isinstance(outcome, Share):
                outcome = self._guarded(lambda c=collector, s=outcome: self._norms(c, s))
            found |= outcome if isinstance(outcome, dict) else dict.fromkeys(names, outcome)
        said: list[Skipped] = []  # by several methods at once, perhaps
        for method in self._methods.values():
            if outcome := self._guarded(lambda m=method: self._take(m, found)):
                method.faults = method.faults + 1 if outcome.reason == "fault" else 0
                if outcome not in said:
                    self._skip(method, outcome)
                said.append(outcome)
        exact = found.get("pepgns", found.get(EXACT))
        self._diagnose(lambda watch: watch.take(self.step, shares, exact, self._scale))
        self._clock.tick(True)
        self.step += first
        self._arm()

    def _shares(self) -> list[Share | Skipped | None]:
        """What the sources bring to the step on all ranks together; None if it is not measured."""
        collectors = [collector for collector, _ in self._sources]
        unread = Skipped("fault", "what it measured could not be read")
        shares = [unread if collector.wanted else None for collector in collectors]
        measured = [i for i, share in enumerate(shares) if share]
        try:
            refused = Skipped("sharding", why) if measured and (why := self._refusal()) else None
            for i, collector in enumerate(collectors):
                share = self._guarded(collector.share)
                shares[i] = share and (refused or share)
        finally:  # the other ranks wait for this one, whatever has gone wrong here
            if measured:
                seconds = self._clock.lap(self.step)
                if self._ranks.size > 1:
                    local = [(shares[i], collectors[i].columns) for i in measured]
                    device = device_of(self.model)
                    of_all, seconds = over_ranks(local, seconds, self._ranks, device=device)
                    for i, share in zip(measured, of_all, strict=True):
                        shares[i] = share
                self._record(seconds, shares)
        return shares

    def _record(self, seconds: float, shares: Sequence[Share | Skipped | None]) -> None:
        """Plan the next measured step by what is the same on all ranks."""
        known = [share.examples for share in shares if isinstance(share, Share)]
        before = self._clock.interval
        self._clock.record(self.step, seconds, known[0] if known else None)
        interval, cost = self._clock.interval, self._clock.cost
        if interval != before and interval and cost and self._ranks.rank == 0:
            logging.getLogger("gnsmon").info(
                "step %d: from now on one step in %.3g is measured, which takes %.0f %% longer",
                self.step,
                interval,
                100 * cost.extra / cost.bare,
            )

    def _paced(self, state: Mapping[str, Any] | None = None) -> Fixed | Paced:
        """What tells the steps to measure, from `self.step` on."""
        if self.config.every == "auto":
            return Paced(self.config.overhead, state=state, step=self.step)
        return Fixed(self.config.every, timed=lambda: _on_host(self.model))

    def _refusal(self) -> str | None:
        return refusal(self.model, self._ranks) if self._ranks.size > 1 else None

    def _norms(self, collector: Collector, share: Share) -> Measured | Skipped:
        norms = collector.norms(share)
        if isinstance(norms, Skipped):
            return norms
        return {
            method: of if isinstance(of, Skipped) else of.unscaled(self._scale)
            for method, of in norms.items()
        }

    @property
    def _scale(self) -> float:
        """What the loss, and with it the gradient, was multiplied by."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def _guarded(self, fn: Callable[[], Any]) -> Any:
        """`fn()`; a failure as the reason to skip a measurement, for training must go on."""
        try:
            return fn()
        except Exception as error:
            if self.config.strict:
                raise
            return Skipped("fault", f"{type(error).__name__}: {error}")

    def _arm(self) -> None:
        """Ask the sources for the next step, if it is one of those measured."""
        used = {n for m in self._methods.values() if not m.off for n in (m.first, m.rest)}
        due, rare = self._clock.due(self.step), self.config.calibrate_every
        exact = due and rare is not None and self._clock.ordinal(self.step) % rare == 0
        self._freeze(due)
        for collector, names in self._sources:
            collector.arm(due and not used.isdisjoint(names), exact=exact)

    def _freeze(self, measure: bool) -> None:
        """Take the optimizers' metric as it is now, if the next step is to be measured in it."""
        if self._metric is not None:
            self._metric.fault = self._guarded(partial(self._metric.freeze, measure))

    @property
    def _off(self) -> bool:
        return all(method.off for method in self._methods.values())

    def _take(self, method: Method, found: Mapping[str, Outcome]) -> Skipped | None:
        """Make a reading of what the sources found; why not, where there is none."""
        norms = None if method.off else method.norms(found)
        if isinstance(norms, Skipped):
            # With several optimizers, another one's step may have closed this one's measurement.
            empty = norms.reason in (NO_TAP, NO_BACKWARD, NO_LOSSES)
            closed = method.closed_step == self.step
            method.closed_step = self.step
            method.nothing = norms.detail if norms.reason in NO_EXAMPLES else None
            return None if empty and closed else norms
        if norms is None:
            return None
        method.closed_step = self.step
        pair = method.pair(norms)
        if reason := obstacle(pair):
            return Skipped(reason, f"its {norms.examples} example(s) give no estimate: {reason}")
        elapsed = self._elapsed(method, norms)
        method.last, method.last_step = norms, self.step
        reading = self.readings[method.name] = self._read(method, norms, pair, elapsed)
        method.faults = self._overflows = 0
        self._start()
        self._tell_missing(method, norms.missing)
        self._sinks(reading)
        return None

    def _read(self, method: Method, norms: StepNorms, pair: NormPair, elapsed: float) -> Reading:
        estimator = self._estimators[method.name]
        step = estimator.update(pair, elapsed=elapsed)
        ratios = method.ratios(estimator.ratios(), pair.examples)
        s, g = estimator.averages.mean
        columns: dict[str, Any] = {
            "grad_sq_norm": g,
            "tr_sigma": s,
            "raw": {
                "big_sq_norm": pair.big_sq_norm,
                "parts_sq_norm": pair.parts_sq_norm,
                "sum_sq_weights": np.full_like(g, pair.sum_sq_weights),
                **vars(step),
            },
        }
        if (known := method.approximations(norms, ratios)) is not None:
            columns["approximation"] = known
        groups = Groups(self._groups, ratios, columns)
        total = groups.at(0)
        # As `_advise` has it, without what a person reads.
        layout = Layout(self._ranks.size, norms.microbatch)
        found = suggested(total, present=pair.examples, layout=layout)
        return Reading(
            step=self.step,
            examples=pair.examples,
            tokens=norms.tokens,
            method=method.name,
            **vars(total),
            n_eff=estimator.n_eff,
            coverage=self._fraction(method, norms),
            overhead=self._clock.overhead,
            skipped=dict(self.skipped),
            suggested_batch_size=found.batch_size if found else None,
            groups=groups.take(_seen(s, g)),
        )

    def _by_group(self, values: Array) -> Array:
        """Sums over parameters [n_parameters] as [n_groups], the total first."""
        sums = np.bincount(self._index, weights=values, minlength=len(self._groups))
        sums[0] = values.sum()
        return sums

    def _elapsed(self, method: Method, norms: StepNorms) -> float:
        """Steps, examples or tokens since the last measured step, all steps taken to be alike."""
        steps = 1 if method.last_step is None else self.step - method.last_step
        each = {"steps": 1, "examples": norms.examples, "tokens": norms.tokens}[self._unit]
        if each is None:
            raise ValueError(
                "half_life in tokens, but the tokens of a step are not known: pass weights= with "
                "each example's number of tokens (with method='random_signs' gns.weigh), or give "
                "half_life in examples"
            )
        return float(max(steps, 1) * each)

    def _advise(self, reading: Reading, **asked: Any) -> Advice:
        last = self._methods[reading.method].last
        assert last is not None
        return advise(
            reading,
            present=reading.examples,
            microbatch=last.microbatch,
            world_size=self._ranks.size,
            optimizer=" and ".join(map(_named, self._optimizers)),
            in_metric=self.readings.get(named(reading.method)),
            tokens_per_example=reading.tokens / reading.examples if reading.tokens else None,
            **asked,
        )

    def _coverage(self, method: Method) -> Coverage:
        norms = method.last
        sizes = {n: p.numel() for n, p in self.model.named_parameters() if p.requires_grad}
        missing = self._untapped(method) if norms is None else norms.missing
        if norms is None and method.nothing is not None:
            missing = {**dict.fromkeys(sizes, method.nothing), **missing}
        missing = {name: missing[name] for name in sizes if name in missing}
        covered = [name for name in sizes if name not in missing]
        share = sum(sizes[name] for name in covered) / max(sum(sizes.values()), 1)
        return Coverage(covered, missing, share, norms.norm_fraction if norms else None)

    def _fraction(self, method: Method, norms: StepNorms) -> float:
        """That of `_coverage`, counted anew only when other parameters are measured than before."""
        measured = norms.missing, (norms.big_sq_norm != 0).tobytes()
        if method.name not in self._counted or self._counted[method.name][0] != measured:
            self._counted[method.name] = measured, self._coverage(method).fraction
        return self._counted[method.name][1]

    def _untapped(self, method: Method) -> Mapping[str, str]:
        untapped = {name: c.untapped for c, names in self._sources for name in names}
        first = untapped[method.first]
        rest = untapped[method.rest] if method.rest else first
        return {name: why for name, why in first.items() if name in rest}

    def _skip(self, method: Method, skipped: Skipped) -> None:
        """Count a dropped measurement, say so once, and give up after repeated faults."""
        self.skipped[skipped.reason] += 1
        if method.off:
            self.warn(
                f"method {method.name!r} switched off after {PATIENCE} faults in a row, the last: "
                f"{skipped.detail}"
            )
        elif skipped.reason == "nonfinite":  # now and then a loss scaler in search of its scale
            self._overflows += 1
            if self._overflows == OVERFLOWS:
                self.warn(
                    f"{OVERFLOWS} measurements in a row were not possible: {skipped.detail}, or "
                    "their squares overflow float32"
                )
        # Before its first step an optimizer never has a state; twice is worth a word.
        elif self.skipped[skipped.reason] == 1 + (skipped.reason == NO_STATE):
            beside = "" if method.name in self.config.method else " in the optimizer's metric"
            self.warn(f"step {self.step} is not measured{beside}: {skipped.detail}")

    def _tell_missing(self, method: Method, missing: Mapping[str, str]) -> None:
        """Warn of parameters that are left out, once of each."""
        known = (UNUSED, NOT_A_NORM, NO_MOMENT)
        new = {n: why for n, why in missing.items() if n not in self._told and why not in known}
        self._told |= new.keys()
        if new and self._ranks.rank == 0:
            left_out = "".join(f"\n  {name}: {why}" for name, why in new.items())
            share = self._coverage(method).fraction
            self.warn(f"{share:.1%} of the trainable parameters are measured; left out:{left_out}")

    def warn(self, text: str) -> None:
        """Warn; where warnings are errors, log instead unless strict, for training must go on."""
        try:
            warnings.warn(f"gnsmon: {text}", RuntimeWarning, stacklevel=3)
        except RuntimeWarning:
            if self.config.strict:
                raise
            logging.getLogger("gnsmon").warning(text)

    def _start(self) -> None:
        """Announce the run to the sinks, once what is covered is known."""
        if self._started:
            return
        self._started = True
        self._sinks.start(self._header(), step=self._first_step)
        for step, value in self._losses:
            self._sinks.loss(step, value)

    def _header(self) -> dict[str, Any]:
        coverage, last = self.coverage(), self._methods[self.config.method[0]].last
        parameters = list(self.model.parameters())
        return {
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "optimizer": [_named(o) for o in self._optimizers],
            "methods": list(self._methods),
            "every": self.config.every,
            "overhead": self.config.overhead if self.config.every == "auto" else None,
            "calibrate_every": self.config.calibrate_every,
            "decay": self.config.decay,
            "half_life": self.config.half_life,
            "window": self.config.window,
            "level": self.config.level,
            "unit": "examples",
            "world_size": self._ranks.size,
            "examples": last.examples if last else None,
            "microbatch": last.microbatch if last else None,
            "microbatches": last.microbatches if last else None,
            "coverage": {"fraction": coverage.fraction, "missing": coverage.missing},
            "versions": {
                "gnsmon": version("gnsmon"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def _named(optimizer: Optimizer) -> str:
    """The optimizer's class, and its momentum, with which SGD is another."""
    momentum, name = optimizer.defaults.get("momentum"), type(optimizer).__name__
    return f"{name} with momentum {momentum:g}" if momentum else name


def _on_host(model: nn.Module) -> bool:
    """Whether its steps have ended when their calls return."""
    return all(p.device.type == "cpu" for p in model.parameters())


def _index(names: list[str], group_of: Mapping[str, str]) -> tuple[list[str], NDArray[np.intp]]:
    """The groups, the total first, and the position of each parameter's; 0 without a group."""
    groups = [TOTAL, *dict.fromkeys(group_of[name] for name in names if name in group_of)]
    return groups, np.array([groups.index(group_of.get(n, TOTAL)) for n in names], dtype=np.intp)


def _seen(s: Array, g: Array) -> slice | NDArray[np.intp]:
    """The groups with anything in them, without the total."""
    seen = (s[1:] != 0) | (g[1:] != 0)
    return slice(1, None) if seen.all() else 1 + np.flatnonzero(seen)


def _run_dir(config: MonitorConfig) -> Path:
    if config.run_dir is not None:
        return config.run_dir
    for spec in config.sinks:
        kind, _, place = spec.partition(":") if isinstance(spec, str) else ("", "", "")
        if kind in ("tensorboard", "csv", "jsonl") and place:
            return Path(place) if not Path(place).suffix else Path(place).parent
    name = f"gnsmon-{datetime.now():%Y%m%d-%H%M%S}"
    for i in count():
        path = Path("runs") / (f"{name}-{i}" if i else name)
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another run of this second
            continue
        return path
    raise AssertionError

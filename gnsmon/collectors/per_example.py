"""One optimizer step's norms from taps: its examples' by the taps, its gradient's from `.grad`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gnsmon.collectors.backward import Backwards
from gnsmon.collectors.gathered import Gathered
from gnsmon.collectors.groups import is_norm
from gnsmon.collectors.preconditioner import Preconditioner, named
from gnsmon.collectors.proof import gaps
from gnsmon.collectors.reduction import ALONE, UNREDUCED, Ranks
from gnsmon.collectors.shards import held, is_sharded
from gnsmon.collectors.step import (
    HALF_TOLERANCE,
    NO_TAP,
    SEVERAL,
    TF32_TOLERANCE,
    TOLERANCE,
    UNUSED,
    Columns,
    Measured,
    Share,
    Skipped,
    StepNorms,
    check_weights,
    known_sum,
    square_sum,
    to_host,
)
from gnsmon.estimators.values import Array
from gnsmon.norms.contractions import wide
from gnsmon.norms.forms import Form
from gnsmon.norms.sketch import SUBSPACE
from gnsmon.norms.taps import ABSENT, LayerTap, Taps
from gnsmon.norms.ways import WAYS, Help

# method -> the way in which it takes norms; that of `norm_layers` is asked of these alone
METHODS = {"pepgns": "exact", "sogns": "sogns", "sketch": "sketch", "norm_layers": "exact"}
NOT_A_NORM = "it belongs to no normalisation layer, and method 'norm_layers' measures these alone"
EXACT = "exact"  # in place of a method: what an approximate one is calibrated by
FACTORED = named("pepgns")
NOT_CROSSED = (
    "it is used more than once in a compiled model, whose uses are not joined in the optimizer's "
    "metric"
)
NOT_JOINED = (
    "it is used more than once, and its uses in a compiled model cannot be joined: they are in "
    "different graphs, inside an activation checkpoint, or of a rule of your own"
)


@dataclass(frozen=True)
class _Pass:
    """One forward and backward: a microbatch."""

    serial: int | None  # of the forward; None where it was compiled
    batch: int
    tokens: int | None
    weights: Tensor | None
    forwards: int  # since the last backward
    uses: list[dict[str, Form]] = field(default_factory=list)  # of shared parameters
    joined: set[str] = field(default_factory=set)  # parameters whose uses were among these
    compiled: dict[LayerTap, Tensor] = field(default_factory=dict)  # uses, links of each parameter
    each: dict[str, list[Tensor]] = field(default_factory=dict)  # norms [B] of each parameter


class _Places(NamedTuple):
    """Where the numbers of each parameter are in the vectors of some taps, one after the other."""

    parameters: NDArray[np.intp]  # [k] of each use, the column
    sums: NDArray[np.intp]  # [slots, k] the places of what the ways give
    proof: NDArray[np.intp]  # [r] the places of all rows
    rows: NDArray[np.intp]  # [r] which rows they are of all parameters' proofs


class PerExample:
    """Collects from the first backward after a step to the next step.

    The big norm is read when a backward has ended, before clipping, unscaling or decay can touch
    `.grad`; the last backward before the step wins, so accumulated gradients are read whole.
    Nothing is copied to the host before `close`.

    Every measurement proves itself: along a random direction, the sum over examples of each
    parameter's gradients must be that of `.grad`. It shows what no rule can see: a weight used by a
    function call, a penalty on the weights, gradients that were clamped or never cleared.

    Args: see `Taps`; `methods` are any of `METHODS`; with `calibrated`, `arm` may ask for exact
    norms beside them; with `each`, a share has the norms of the single examples; with `metric`,
    `norms` gives those of "pepgns" in it too, as `FACTORED`.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[str],
        *,
        calibrated: bool = False,
        batch_dim: int = 0,
        weigh: Callable[..., Tensor] | None = None,
        strict: bool = False,
        subspace: int = SUBSPACE,
        probes: int = 1,
        engine: str = "hooks",
        each: bool = False,
        ranks: Ranks = ALONE,
        metric: Preconditioner | None = None,
    ):
        self.model, self.methods, self.strict = model, tuple(methods), strict
        self._ranks, self._metric = ranks, metric
        ways = {METHODS[method] for method in methods} | ({"exact"} if calibrated else set())
        ways |= {"factored"} if metric else set()
        self.taps = Taps(
            model,
            [way for way in WAYS if way in ways],
            batch_dim=batch_dim,
            weigh=weigh,
            strict=strict,
            subspace=subspace,
            probes=probes,
            engine=engine,
            wants_each=each,
            seed=ranks.rank,  # lest the sketches of all ranks err alike
            metrics=metric.factored if metric else None,
        )
        if "norm_layers" in methods and not self._in_norms():
            self.taps.remove()
            raise ValueError(
                "method 'norm_layers': the model has no normalisation layer with parameters that "
                "could be measured; use method='sketch' or 'pepgns'"
            )
        self._known: dict[str, nn.Parameter] | None = None
        self._exact = False  # whether the present step is measured exactly too
        self._uncrossed: set[str] = set()  # parameters whose parts have no norm in the metric
        self.taps.ready(self._fired)
        self.names = [name for name, _ in model.named_parameters()]
        self._column = {name: i for i, name in enumerate(self.names)}
        self._gaps = np.zeros(0)  # [n_parameters], relative, at the last measurement
        self._proved = np.zeros(0, dtype=bool)  # [n_parameters], whether there was a proof
        self._taps_of: dict[str, list[LayerTap]] = {name: [] for name in self.names}
        for tap in self.taps.layers:
            for _, name in tap.pairs():
                self._taps_of[name].append(tap)
        rows = {own: size for tap in self.taps.layers for own, size in _rows(tap)}
        of_rows = np.repeat([self._column[name] for name in rows], list(rows.values()))
        self.columns = Columns(
            self.names, self.taps.slots, of_rows.astype(np.intp), metric is not None
        )
        self._on_cuda = np.array([p.is_cuda for p in model.parameters()])
        ends = accumulate(rows.values())
        self._first_rows = {name: end - rows[name] for name, end in zip(rows, ends, strict=True)}
        self._places: dict[tuple[LayerTap, ...], _Places] = {}  # of the last step
        self._gathered = Gathered()
        self._backwards = Backwards(
            model, ended=self._harvest, discarded=self._discard, strict=strict
        )
        self._clear()

    def arm(self, measure: bool, *, exact: bool = False) -> None:
        """Measure the next step, or let it pass; takes effect at the next forward of the model.

        With `exact`, `norms` gives exact norms too, under the name `EXACT`.
        """
        self._exact = exact
        everywhere = {METHODS[m] for m in self.methods if m != "norm_layers"}
        everywhere |= {"exact"} if exact else set()
        everywhere |= {"factored"} if self._metric else set()
        norms = everywhere | {METHODS[m] for m in self.methods}
        # In the order of the probe, for a compiled graph must find them alike.
        chosen = {
            is_norm: tuple(way for way in self.taps.ways if way in asked)
            for is_norm, asked in ((True, norms), (False, everywhere))
        }
        self.taps.want(measure, lambda tap: chosen[is_norm(tap.module)])

    def close(self) -> Measured | Skipped | None:
        """The step's norms in one process; None when it was not to be measured."""
        share = self.share()
        return self.norms(share) if isinstance(share, Share) else share

    def share(self) -> Share | Skipped | None:
        """What this process brings, read after its optimizer step; None if it is not measured."""
        try:
            with self._backwards.exactly():
                return self._share() if self.wanted else None
        finally:
            self._clear()

    def _track(self, norms: StepNorms) -> None:
        """Turn the sketches' subspaces towards this step's gradient, whatever its scale by now."""
        assert norms.parts_variance is not None
        for name, sketch in self.taps.sketches.items():
            grad = self.model.get_parameter(name).grad
            if name in norms.missing or grad is None:
                continue
            # All that a compiled graph tells: norms that it took exactly have no variance.
            sketch.used = sketch.used or bool(norms.parts_variance[self._column[name]] > 0)
            # Where it is in shards, the sketch's own iteration in each backward has to do.
            if not is_sharded(grad):
                sketch.track(grad.to_dense() if grad.is_sparse else grad)

    @property
    def pending(self) -> bool:
        """Whether a backward has been measured since the last step."""
        return bool(self._passes) or self._backwards.fault is not None

    @property
    def wanted(self) -> bool:
        """Whether the present step is to be measured."""
        return self.taps.wanted

    @property
    def untapped(self) -> dict[str, str]:
        """Parameters that are known not to be measured before any step, and why."""
        return self.taps.untapped

    def weigh(self, weights: Tensor) -> None:
        """Weigh the examples of the batch whose backward comes next."""
        self.taps.weights = weights

    def remove(self) -> None:
        """Leave the model as it was."""
        self.taps.remove()
        self._clear()

    def _clear(self) -> None:
        self._passes: list[_Pass] = []
        self._layers: dict[LayerTap, Tensor] = {}  # summed probes
        self._gathered.clear()
        self._shared: dict[str, Tensor] = {}  # as a probe, of one shared parameter
        self._big: dict[str, Tensor] = {}
        self._in_metric: dict[str, Tensor] = {}  # big norms
        self._along: dict[str, Tensor] = {}
        # Gradients with one axis, in one tensor, with their names and lengths.
        self._vectors: dict[tuple[tuple[str, int], ...], Tensor] = {}
        self._present: dict[str, int] = {}  # parameter -> rows of .grad before this rank's
        self._backwards.clear()
        self.taps.clear()

    def _fired(self, _: Tensor) -> None:
        """A tap gave its gradient: a backward is under way."""
        self.taps.heard.add(torch._C._current_graph_task_id())
        self._backwards.under_way(self.taps.forwards)

    def _harvest(self) -> None:
        """Take the statistics of this backward and the gradient as accumulated so far.

        A reentrant checkpoint ends a backward of its own inside the outer one; what it brings
        belongs to the same microbatch, and the last reading of `.grad` wins.
        """
        taps, tasks = self.taps, self._backwards.tasks
        # torch.autograd.grad runs taps too, but what it brings reaches neither probe nor .grad.
        fired = {(serial, batch) for task, serial, batch in taps.fired if task in tasks}
        if len(fired) > 1:
            self._backwards.fault = self._backwards.fault or SEVERAL
        self._enter_pass(*min(fired, default=(None, taps.batch)))
        compiled = self._passes[-1].compiled
        for tap in taps.layers:
            if tap.probe.grad is not None:
                self._layers[tap] = self._layers.get(tap, 0) + tap.probe.grad
                tail = tap.probe.grad[-1 - len(tap.owned) :]
                compiled[tap] = compiled.get(tap, 0) + tail
            tap.probe.grad = tap.pulse.grad = None
        self._gathered.add([b for b in taps.brought if b.task in tasks])
        taps.brought.clear()
        self._passes[-1].uses.extend(use for task, use in taps.deferred if task in tasks)
        taps.deferred.clear()
        for some in taps.each:
            if some.task in tasks:
                self._passes[-1].each.setdefault(some.name, []).append(some.sq_norms)
        taps.each.clear()
        taps.fired.clear()
        self._big, self._along, self._vectors, self._present = {}, {}, {}, {}
        self._in_metric = {}
        vectors: dict[torch.device, dict[str, Tensor]] = {}
        self._known = None  # FSDP has others before a backward than after it
        for name, p in self._trainable().items():
            if p.grad is None:
                continue
            self._present[name] = 0
            if own := held(p.grad, self._ranks):
                grad, start = own
                if self._metric and name in self._metric.known:
                    self._in_metric[name] = square_sum(self._metric.factored[name].scaled(grad))
                direction = taps.directions.get(name)
                if direction is None or not direction.whole or grad.ndim != 1:
                    self._big[name] = square_sum(grad)
                    if direction is not None:
                        self._present[name], self._along[name] = direction.along(grad, start)
                else:  # small enough to be sent as it is
                    self._present[name] = start
                    vectors.setdefault(grad.device, {})[name] = grad
        for some in vectors.values():
            lengths = tuple((name, grad.shape[0]) for name, grad in some.items())
            self._vectors[lengths] = torch.cat(list(some.values()))

    def _enter_pass(self, serial: int | None, batch: int | None) -> None:
        """Begin a microbatch, unless this backward is a part of the last one's."""
        taps = self.taps
        if self._passes:
            last = self._passes[-1].serial
            if serial == last if serial is not None else not taps.forwards:
                return
        self._settle()
        assert batch is not None
        later = serial not in (None, taps.serial)  # another forward, without backward, came since
        if later and taps.weigh is not None:
            self._backwards.fault = Skipped(
                "weights", "the last forward, whose weights are known, is another"
            )
        tokens = None if later else taps.tokens
        self._passes.append(_Pass(serial, batch, tokens, taps.weights, taps.forwards))
        taps.end_pass()
        taps.draw()

    def _discard(self) -> None:
        """The gradients of the microbatches so far were thrown away: begin again."""
        self._passes.clear()
        self._layers.clear()
        self._gathered.clear()
        self._shared.clear()

    def _settle(self) -> None:
        """Join the uses of each shared parameter in the last microbatch."""
        uses = self._passes[-1].uses if self._passes else []
        for name in sorted({name for use in uses for name in use}):
            form = reduce(add, (use[name] for use in uses if name in use))
            asked = {way for tap in self._taps_of[name] for way in tap.ways}
            direction = self.taps.directions[name]
            given = Help(self.taps.sketches.get(name), self.taps.metrics.get(name))
            pieces = [
                WAYS[way].sums(form, given, None)
                if way in asked
                else direction.signs.new_zeros(WAYS[way].width)
                for way in self.taps.ways
            ]
            pieces.append(direction.along_sum(form))
            if self.taps.wants_each and "exact" in asked:
                self._passes[-1].each[name] = [form.sq_norms()]
            joined = torch.cat([wide(piece).reshape(-1) for piece in pieces])
            self._shared[name] = self._shared.get(name, 0) + joined
            self._passes[-1].joined.add(name)
        uses.clear()

    def _share(self) -> Share | Skipped:
        taps = self.taps
        if taps.fault is not None:
            return Skipped("fault", taps.fault)
        if taps.coupled is not None:
            return Skipped("coupled examples", taps.coupled)
        if self._backwards.fault is not None:
            return self._backwards.fault
        if not self._passes:
            return self._nothing_fired()
        self._settle()
        layers, eager, shared, big, in_metric, along, vectors, each, weights, *compiled = to_host(
            self._layers,
            self._gathered.flat,
            self._shared,
            self._big,
            self._in_metric,
            self._along,
            self._vectors,
            self._each(),
            self._weight_sums(),
            *(p.compiled for p in self._passes),
        )
        for tap, vector in self._gathered.vectors(eager).items():
            layers[tap] = layers[tap] + vector if tap in layers else vector
        for lengths, flat in vectors.items():
            start = 0
            for name, size in lengths:
                along[name] = vector = flat[start : start + size]
                big[name] = np.array([vector @ vector])
                start += size
        whole_sq_norm = sum(float(a[0]) for a in big.values())
        if not np.isfinite(whole_sq_norm):
            return Skipped("nonfinite", "the gradient has infinite or undefined values")
        batches = [p.batch for p in self._passes]
        apart = self._apart(compiled)
        counts = {}
        for tap, vector in layers.items():
            uses = [tails[tap][0] if tap in tails else 0.0 for tails in compiled]
            if tap.shared and not sum(uses):
                continue
            extra = sum(max(n - 1, 0) * b for n, b in zip(uses, batches, strict=True))
            again = any(apart.get(name) == NOT_JOINED for name in tap.names)
            counts[tap] = int(vector[0] - (0 if again else extra))
        if counts and min(counts.values()) > sum(batches):
            return SEVERAL
        whole = sum(batches)
        possible = {whole} if set(counts.values()) <= {whole} else _subset_sums(batches)
        for tap, count in counts.items():
            if count not in possible:
                tap.reason = tap.reason or (
                    f"{tap.path}: it saw {count} examples of {whole}; it is called several "
                    "times in one forward, or its batch is not the model's"
                )
        parts, proof, seen = self._by_parameter({tap: layers[tap] for tap in counts}, shared)
        missing = self._left_out(parts, seen, apart)
        parts[:, [self._column[name] for name in missing]] = 0.0
        total, squares, integral = weights.get("sums", (whole, whole, False))
        tokens = int(total) if integral else known_sum([p.tokens for p in self._passes])
        size = self._ranks.size  # the mean over so many is taken
        powers = [2 * (1 + i) for way in taps.ways for i in range(WAYS[way].width)]
        return Share(
            parts_sq_norm=parts / np.power(float(size), powers)[:, None],
            along=proof / size,
            big_sq_norm=np.array([big[n][0] if n in big else 0.0 for n in self.names]),
            big_along=self._big_along(along),
            present=np.array([name in self._present for name in self.names]),
            seen=seen,
            half=self._half(),
            whole=whole_sq_norm,
            sum_weights=float(total),
            sum_sq_weights=float(squares),
            weighted=bool(weights),
            examples=whole,
            tokens=tokens,
            microbatch=batches[-1],
            microbatches=len(batches),
            missing=missing,
            each_sq_norms=self._own_norms(each, weights) if taps.wants_each else None,
            in_metric=self._table(in_metric) if self._metric else None,
        )

    def _each(self) -> dict[int, Tensor]:
        """The squared norms [B] of the examples of each microbatch, over all parameters."""
        found = {}
        for i, p in enumerate(self._passes):
            norms = [torch.cat(some) if len(some) > 1 else some[0] for some in p.each.values()]
            if norms and all(len(n) == p.batch for n in norms):
                device = norms[0].device
                found[i] = torch.stack([wide(n).to(device) for n in norms]).sum(0)
        return found

    def _own_norms(
        self, each: Mapping[int, Array], weights: Mapping[str, Array]
    ) -> Array | Skipped:
        """The squared norm of each example's own gradient, of which `.grad` is the weighted mean.

        [examples], at the loss's scale; `.grad` is the sum of these gradients times their weights.
        """
        if any(p.compiled for p in self._passes):
            return Skipped("compiled", "a compiled model brings sums over the examples alone")
        measured = {name for p in self._passes for name in p.each}
        if rest := self._present.keys() - measured:
            return Skipped(
                "examples",
                f"{len(rest)} parameter(s) have no exact norms by example, as method 'pepgns' "
                f"takes them: {min(rest)} is one",
            )
        if len(each) < len(self._passes):
            return Skipped("examples", "not all layers saw all the examples of the batch")
        norms = np.concatenate([each[i] for i in range(len(each))])
        if not weights:
            return norms * len(norms) ** 2
        w = weights["each"]
        return norms[w > 0] * np.square(w.sum() / w[w > 0])

    def _table(self, in_metric: Mapping[str, Array]) -> Array:
        """`Share.in_metric`."""
        assert self._metric is not None
        known = self._metric.known - self._uncrossed
        of_each = ((in_metric.get(n, np.zeros(1))[0], n in known) for n in self.names)
        return np.array(list(of_each), dtype=float).T

    def _big_along(self, along: Mapping[str, Array]) -> Array:
        """`Share.big_along`: of each parameter this process may have some rows alone."""
        rows = np.zeros(len(self.columns.of_rows))
        for name, some in along.items():
            start = self._first_rows[name] + self._present[name]
            rows[start : start + len(some)] = some
        return rows

    def norms(self, share: Share) -> Measured | Skipped:
        """The step's norms, from the share of this process or of all ranks."""
        trainable = self._trainable()
        missing = self._missing(share, trainable)
        measured = self._among(trainable) & ~self._among(missing)
        if not measured.any():
            why = next(iter(missing.values()), "no parameter is trainable")
            return Skipped("nothing measured", why)
        slots = np.where(measured, share.parts_sq_norm, 0.0)
        if not np.isfinite(slots).all():
            return Skipped("nonfinite", "an example's gradient has infinite or undefined values")
        every = share.norms(measured, missing)
        ends = np.cumsum([WAYS[way].width for way in self.taps.ways])
        by_way = dict(zip(self.taps.ways, np.split(slots, ends[:-1]), strict=True))
        asked = {EXACT: "exact"} if self._exact else {}
        found: dict[str, Any] = {}
        for method, way in (asked | {m: METHODS[m] for m in self.methods}).items():
            sums, *variance = by_way[way]
            found[method] = replace(
                every, parts_sq_norm=sums, parts_variance=variance[0] if variance else None
            )
        if self._metric:
            found[FACTORED] = self._metric.norms(
                every,
                share,
                by_way["factored"][0],
                self.names,
                ranks=self._ranks.size,
                missing=dict.fromkeys(self._uncrossed, NOT_CROSSED),
            )
        if "norm_layers" in found:
            found["norm_layers"] = found["norm_layers"].without(
                dict.fromkeys(trainable.keys() - self._in_norms(), NOT_A_NORM), self.names
            )
        if "sketch" in found:
            with self._backwards.exactly():
                self._track(found["sketch"])
        return found

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The parameters with gradients as of the last backward: to look them up takes a while."""
        if self._known is None:
            self._known = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return self._known

    def _in_norms(self) -> set[str]:
        return {name for tap in self.taps.layers if is_norm(tap.module) for name in tap.names}

    def _nothing_fired(self) -> Skipped:
        known = [*(tap.reason for tap in self.taps.layers), *self.taps.untapped.values()]
        if reasons := [why for why in known if why]:
            return Skipped("nothing measured", reasons[0])
        return Skipped(
            NO_TAP,
            "a step was taken, but no layer reported a gradient. Was the model compiled and called "
            "before attach (attach first, or call torch._dynamo.reset())? Is another model "
            "trained? Do the gradients come from torch.autograd.grad?",
        )

    def _weight_sums(self) -> dict[str, Tensor]:
        if all(p.weights is None for p in self._passes):
            if self.taps.weigh is not None:
                raise ValueError(
                    "weights: they are made from the arguments of the attached model's forward, "
                    "which was not called; attach the part of it that the loss calls, or call "
                    "gns.weigh(...) before each backward"
                )
            return {}
        each = [check_weights(p.weights, p.batch) for p in self._passes]
        weights = torch.cat(each).double()
        integral = not any(w.is_floating_point() for w in each)
        sums = [weights.sum(), weights.square().sum(), weights.new_tensor(float(integral))]
        found = {"sums": torch.stack(sums)}
        return {**found, "each": weights} if self.taps.wants_each else found

    def _apart(self, compiled: Sequence[Mapping[LayerTap, Array]]) -> dict[str, str]:
        """Parameters with compiled uses of which two were not linked: no proof would show it."""
        apart: dict[str, str] = {}
        self._uncrossed = set()
        for p, tails in zip(self._passes, compiled, strict=True):
            uses, linked = Counter(), Counter()
            for tap, (calls, *links) in tails.items():
                for name, received in zip(tap.names, links, strict=True):
                    uses[name] += int(calls)
                    linked[name] += int(received)
            self._uncrossed |= {name for name, k in uses.items() if k > 1}
            for name, k in uses.items():
                if linked[name] != k * (k - 1) // 2 or (k and name in p.joined):
                    again = p.forwards == 1 and k > self.taps.uses[name]
                    apart[name] = self._called_again(name, k) if again else NOT_JOINED
        return apart

    def _called_again(self, name: str, uses: int) -> str:
        """Have a parameter's uses linked that were more than its layers are."""
        self.taps.uses[name] = uses
        for tap in self._taps_of[name]:
            tap.shared = True
        return (
            f"{self._taps_of[name][0].path}: used {uses} times in one compiled forward; joined "
            "from the next step on"
        )

    def _by_parameter(
        self, layers: Mapping[LayerTap, Array], shared: Mapping[str, Array]
    ) -> tuple[Array, Array, NDArray[np.bool_]]:
        """What the ways give, [slots, n_parameters], the proofs, and whose there are."""
        n, slots = len(self.names), self.taps.slots
        found = tuple(layers)
        self._places = {found: self._places.get(found) or self._places_in(found)}
        places, numbers = self._places[found], np.concatenate([np.zeros(0), *layers.values()])
        parts, proof = np.zeros((slots, n)), np.zeros(len(self.columns.of_rows))
        np.add.at(parts, (slice(None), places.parameters), numbers[places.sums])
        np.add.at(proof, places.rows, numbers[places.proof])
        seen = np.zeros(n, dtype=bool)
        seen[places.parameters] = True
        for name, vector in shared.items():
            at, row = self._column[name], self._first_rows[name]
            parts[:, at] += vector[:slots]
            proof[row : row + len(vector) - slots] += vector[slots:]
            seen[at] = True
        return parts, proof, seen

    def _places_in(self, taps: Sequence[LayerTap]) -> _Places:
        start, uses, proof, rows = 0, [], [], []
        for tap in taps:
            for name, sums, own in tap.places:
                first = self._first_rows[name]
                uses.append([self._column[name], *range(start + sums.start, start + sums.stop)])
                proof.append(np.arange(start + own.start, start + own.stop))
                rows.append(np.arange(first, first + own.stop - own.start))
            start += len(tap.probe)
        every = np.array(uses, dtype=np.intp).reshape(-1, 1 + self.taps.slots).T
        none = np.zeros(0, dtype=np.intp)
        both = np.concatenate([none, *proof]), np.concatenate([none, *rows])
        return _Places(every[0], every[1:], *both)

    def _missing(self, share: Share, trainable: Mapping[str, nn.Parameter]) -> dict[str, str]:
        """Why trainable parameters are not in this step's norms."""
        gap = self._gaps = gaps(share, self.columns, share.big_sq_norm)
        here = self._proved = share.seen & share.present
        wrong = ~(gap <= np.where(share.half, HALF_TOLERANCE, self._tolerances()))
        proved = here & ~self._among(share.missing)
        for i in np.flatnonzero(proved):  # what is wrong is looked at in the same rows again
            self.taps.directions[self.names[i]].suspect = bool(wrong[i])
        doubtful = {self.names[i] for i in np.flatnonzero(~proved | wrong)}
        missing = {}
        for name in trainable:
            if name not in self._column:
                missing[name] = "it was added to the model after attach"
            elif name not in doubtful:
                continue
            elif name in share.missing:
                missing[name] = share.missing[name]
            elif not share.present[self._column[name]]:
                missing[name] = UNUSED
            elif not share.seen[self._column[name]]:
                missing[name] = self._unseen(name)
            else:
                missing[name] = (
                    f"the gradients of the examples do not add up to .grad (off by "
                    f"{gap[self._column[name]]:.1%}): the parameter is also used outside its "
                    "layer's forward, penalised in the loss, changed by a hook, not cleared since "
                    "an earlier step, rounded to half precision, or its rule is wrong"
                    + UNREDUCED
                    * (self._ranks.size > 1)
                )
        return missing

    @property
    def gaps(self) -> dict[str, float]:
        """How far each parameter's parts were from `.grad` at the last measurement, relative."""
        return {self.names[i]: float(self._gaps[i]) for i in np.flatnonzero(self._proved)}

    def _among(self, names: Iterable[str]) -> NDArray[np.bool_]:
        """Which parameters are among `names`, [n_parameters]."""
        found = np.zeros(len(self.names), dtype=bool)
        found[[self._column[name] for name in names if name in self._column]] = True
        return found

    def _tolerances(self) -> Array:
        """How far the parts may be from `.grad`, but in half precision."""
        rounded = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        return np.where(self._on_cuda & rounded, TF32_TOLERANCE, TOLERANCE)

    def _half(self) -> Array:
        """Of which parameters the statistics come from half precision."""
        half = {name for name, p in self._trainable().items() if p.dtype.itemsize == 2}
        half |= {name for tap in self.taps.layers if tap.half for name in tap.names}
        return np.array([self.taps.half or name in half for name in self.names])

    def _left_out(
        self, parts: Array, seen: NDArray[np.bool_], apart: Mapping[str, str]
    ) -> dict[str, str]:
        """Why this process leaves parameters out; another's part may still be the only one."""
        reasons = {tap: tap.reason for tap in self.taps.layers if tap.reason}
        absent = {self.names[i] for i in np.flatnonzero((parts == ABSENT).any(0))}
        of_taps = {name for tap in reasons for name in tap.names}
        missing = {}
        for name in sorted(of_taps | absent | apart.keys() | self.taps.untapped.keys()):
            own = [reasons[tap] for tap in self._taps_of[name] if tap in reasons]
            if name in self.taps.untapped:
                missing[name] = self.taps.untapped[name]
            elif own:
                missing[name] = own[0]
            elif not seen[self._column[name]] or name not in self._present:
                continue
            elif name in absent:
                tap = self._taps_of[name][0]
                missing[name] = f"the rule of {tap.path} gives it no gradient"
            else:
                missing[name] = apart[name]
        return missing

    def _unseen(self, name: str) -> str:
        tap = self._taps_of[name][0]
        return (
            f"{tap.path}: its parameters have a gradient, but its forward was not called, or "
            "only under a transform such as vmap, or compiled with its batch axis lost"
            + ("; without a rule, it is not replayed in a compiled model" * (tap.rule is None))
        )


def _rows(tap: LayerTap) -> Iterator[tuple[str, int]]:
    """The layer's parameters, each with the number of rows in its proof."""
    return ((name, tap.rows[own]) for own, name in tap.pairs())


def _subset_sums(sizes: Sequence[int]) -> set[int]:
    """What a layer may count that runs in some of the microbatches, or in all."""
    sums = {0}
    for size in sizes:
        sums |= {s + size for s in sums}
    return sums

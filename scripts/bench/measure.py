"""What a step costs against the bare one, how right its norms are, and what they cover."""

from __future__ import annotations

import gc
import math
import re
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import gnsmon
from bench.steps import PEERS, UNMEASURED, Norms, Step, bare, hooks_alone, monitored
from bench.workloads import Workload, workloads

TWIN, FLOOR = "bare, again", "a floor, hooks alone"
SETTINGS = {
    "pepgns": {},
    "pepgns, by hooks": {"engine": "hooks"},
    "sketch": {"method": "sketch"},
    "sogns": {"method": "sogns"},
    "norm_layers": {"method": "norm_layers"},
    "random_signs": {"method": "random_signs"},
    "microbatch": {"method": "microbatch"},
    'every="auto"': {"every": "auto", "overhead": 0.01},
    "not measured": {"every": UNMEASURED},
}
RUN = 0.1  # seconds of bare steps timed together: a short one alone would find the caches cold
UNDER_COMPILE = (TWIN, "pepgns", "pepgns, by hooks", "sketch", "sogns", 'every="auto"')


@dataclass(frozen=True)
class Variant:
    """A step to compare with the bare one of as many microbatches."""

    make: Callable[[Workload], Step]
    microbatches: int = 1
    in_blocks: bool = False  # its steps are unlike one another; many are timed together


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int  # ratios of one figure
    limit: float  # seconds, after which `least` of them are enough
    least: int
    blocks: int  # instead of rounds, for steps that are timed in blocks
    block: float  # seconds of the bare steps in one
    learning: int  # steps before them, in which every="auto" learns what a measured one costs
    memory: bool  # peaks too


@dataclass(frozen=True)
class Truth:
    """A parameter by brute force, in float64."""

    mean: float  # over the examples, of the squared norm
    numbers: int
    sq_norm: float  # of the batch's gradient


@dataclass(frozen=True)
class Row:
    """A line of the tables; None: not known, or there is no such thing."""

    workload: str
    step: str
    note: str | None = None  # why there is nothing else
    ratio: float | None = None
    low: float | None = None  # quartiles
    high: float | None = None
    rounds: int | None = None
    bare_seconds: float | None = None
    parameters: float | None = None  # covered share of their number
    sq_norm: float | None = None  # covered share of |grad|²
    error: float | None = None  # relative, of the mean squared norm of what is covered
    rms: float | None = None  # of that error over the steps
    memory: float | None = None  # peak growth, over that of the bare step
    bare_memory: int | None = None  # bytes


def variants(load: Workload) -> dict[str, Variant]:
    """All that can be compared on this workload, by the name in the tables."""
    known = gnsmon.MonitorConfig.model_fields
    found = {TWIN: Variant(bare), FLOOR: Variant(hooks_alone)}
    for name, settings in SETTINGS.items():
        if settings.keys() <= known.keys():
            parts = 2 if name == "microbatch" else 1
            make = partial(monitored, microbatches=parts, **settings)
            found[name] = Variant(make, parts, in_blocks=settings.get("every") == "auto")
    found |= {name: Variant(make) for name, (make, _) in PEERS.items()}
    return {n: v for n, v in found.items() if n in UNDER_COMPILE or not load.compiled}


def truths(load: Workload) -> dict[str, Truth]:
    """By parameter."""
    model, (x, y) = load.build()
    model.double()
    batch = (x.double() if x.is_floating_point() else x, y)
    exact = replace(load, bf16=False)
    parts = gnsmon.per_example_sq_norms(model, lambda m, b: exact.losses(m, b).mean(), batch)
    exact.losses(model, batch).mean().backward()
    return {
        name: Truth(parts[name].mean().item(), p.numel(), p.grad.square().sum().item())
        for name, p in model.named_parameters()
    }


def measured(load: Workload, name: str, truth: dict[str, Truth], effort: Effort) -> Row:
    """A variant's line; of one that does not run, the reason."""
    row = Row(load.name, name)
    try:
        return _measured(row, load, variants(load)[name], truth, effort)
    except ImportError:
        return replace(row, note="not installed: `pip install 'gnsmon[bench]'`")
    except Exception as error:  # of whatever library; the table is to be finished
        reason = re.split(r"[;\n]", str(error).strip() or type(error).__name__)[0]
        return replace(row, note=f"does not run: {reason}")


def compared(
    load: Workload, variant: Variant, effort: Effort
) -> tuple[np.ndarray, list[Norms], list[int]]:
    """Seconds of a step (before, own, after) [rounds, 3], what was found, peaks of (own, bare)."""
    torch._dynamo.reset()  # beyond eight compiled models of a class the next would run eagerly
    own, own_peak = _warm(variant.make(load), load, effort.limit / 4)
    plain, plain_peak = _warm(bare(load, microbatches=variant.microbatches), load, effort.limit / 4)
    rounds, bare_seconds = effort.rounds, _seconds(plain, load.device)
    if variant.in_blocks:
        rounds, count = effort.blocks, math.ceil(effort.block / bare_seconds)
        _seconds(own, load.device, effort.learning)
    else:
        most = math.ceil(10 * RUN / _seconds(own, load.device))
        count = min(math.ceil(RUN / bare_seconds), most)
    times, found = [], []
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + effort.limit
        while len(times) < rounds and (
            variant.in_blocks or len(times) < effort.least or time.perf_counter() < end
        ):
            times.append([_seconds(s, load.device, count) / count for s in (plain, own, plain)])
            found.append(own.norms())
    finally:
        gc.enable()
    return np.array(times), [norms for norms in found if norms], [own_peak, plain_peak]


def _warm(step: Step, load: Workload, seconds: float) -> tuple[Step, int]:
    """The step after a few runs; of CUDA memory, the peak over what was there before them."""
    cuda = load.device == "cuda"
    needed = 2 if cuda or load.compiled else 1
    held = torch.cuda.memory_allocated() if cuda else 0
    begin = time.perf_counter()
    for i in range(4):
        if i == 1 and cuda:
            torch.cuda.reset_peak_memory_stats()  # without what compiling and tuning took
        if i < needed or time.perf_counter() - begin < seconds:
            _seconds(step, load.device)
    return step, torch.cuda.max_memory_allocated() - held if cuda else 0


@cache
def grown(load: str, variant: str | None, microbatches: int, tiny: bool, threads: int) -> int:
    """Bytes by which a fresh process grows in a few steps, of the bare one if no variant is named.

    What the first step imports is there already, from steps of a tiny workload.
    """
    arguments = load, variant, microbatches, tiny, threads
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_growth, *arguments).result()


def _growth(name: str, variant: str | None, microbatches: int, tiny: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    before = 0
    for small in (True, tiny):
        load = workloads(tiny=small)[name]
        if variant is None:
            step = bare(load, microbatches=microbatches)
        else:
            step = variants(load)[variant].make(load)
        before = _resident("VmRSS")
        for _ in range(3):
            step.run()
    return _resident("VmHWM") - before


def _resident(which: str) -> int:
    """Bytes; of Linux alone."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) * 1024


def _measured(
    row: Row, load: Workload, variant: Variant, truth: dict[str, Truth], effort: Effort
) -> Row:
    times, found, peaks = compared(load, variant, effort)
    before, own, after = times.T
    ratios = 2 * own / (before + after)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    if variant.in_blocks:  # the measured steps are in some blocks and not in others
        middle = 2 * own.sum() / (before + after).sum()
    row = replace(
        row,
        ratio=float(middle),
        low=float(low),
        high=float(high),
        rounds=len(times),
        bare_seconds=float(np.median([before, after])),
    )
    if effort.memory:
        if load.device == "cpu" and not load.compiled and Path("/proc/self/status").exists():
            where = variant.microbatches, load.tiny, torch.get_num_threads()
            peaks = [grown(load.name, name, *where) for name in (row.step, None)]
        if all(peaks):
            row = replace(row, memory=peaks[0] / peaks[1], bare_memory=peaks[1])
    return _judged(row, found[-1].covered, truth, [n.mean for n in found]) if found else row


def _judged(row: Row, covered: list[str], truth: dict[str, Truth], means: list[float]) -> Row:
    part, whole = [truth[n] for n in covered], truth.values()
    errors = np.array(means) / sum(t.mean for t in part) - 1
    return replace(
        row,
        parameters=sum(t.numbers for t in part) / sum(t.numbers for t in whole),
        sq_norm=sum(t.sq_norm for t in part) / sum(t.sq_norm for t in whole),
        error=float(errors.mean()),
        rms=float(np.sqrt(np.square(errors).mean())),
    )


def _seconds(step: Step, device: str, count: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        step.run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin

"""How a reading sounds to a person, in the terminal and in the report."""

from __future__ import annotations

from gnsmon.estimators.health import STEEP, Health
from gnsmon.estimators.values import GroupReading, Reading


def number(value: float | None) -> str:
    """A count of examples as a person writes it: `1,234`, `12`, `1.5`, `2.5e+07`."""
    if value is None:
        return "-"
    if abs(value) >= 1e7:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def interval(reading: Reading | GroupReading) -> str:
    """The interval: `290-410`, `at least 800`, or `-`."""
    if reading.low is None:
        return "-" if reading.high is None else f"at most {number(reading.high)}"
    if reading.high is None:
        return f"at least {number(reading.low)}"
    return f"{number(reading.low)}-{number(reading.high)}"


def noise_scale(reading: Reading | GroupReading, level: float = 0.95) -> str:
    """The noise scale and how well it is known, in one phrase; `level` is of the interval."""
    if reading.status == "undefined":
        return f"noise scale not measurable yet: {reading.reason}"
    if reading.b_simple is None:
        return f"noise scale not measurable yet: {interval(reading)}"
    about = "noise scale roughly" if reading.status == "wide" else "noise scale"
    return f"{about} {number(reading.b_simple)} ({level * 100:g}%: {interval(reading)})"


def approximation(reading: Reading | GroupReading) -> str:
    """How far an approximate source may be off, in one phrase; empty where it is exact."""
    known = reading.approximation
    if known is None:
        return ""
    if known.factor is None:
        return "a proxy, not calibrated" + " yet" * bool(known.exact_steps)
    words = [f"corrected by {known.factor:.2g}"] if known.exact_steps else []
    if known.spread is not None:
        words.append(f"{known.spread:.1%} off at later exact steps")
    elif known.standard_error is not None:
        what = "which is" if known.exact_steps else "norms"
        words.append(f"{what} known to {known.standard_error:.1%}")
    if known.amplification is not None:
        words.append(f"errors count {known.amplification:.2g} times in |G|²")
    return ", ".join(words)


def verdict(reading: Reading) -> str:
    """The step's batch against the noise scale; "too small" only where the interval says so."""
    batch, b_simple, low, high = reading.examples, reading.b_simple, reading.low, reading.high
    said = f"batch {number(batch)}"
    if reading.status == "undefined":
        return said
    if b_simple is None:
        if low is None or low < 2 * batch:
            return said
        return f"{said}: too small by at least {number(low / batch)}x"
    if b_simple >= 2 * batch and low is not None and low > batch:
        return f"{said}: too small by {number(b_simple / batch)}x"
    if b_simple <= batch / 2 and high is not None and high < batch:
        return f"{said}: larger than needed" + (
            f" by {number(batch / b_simple)}x" if b_simple else ""
        )
    close = reading.status == "ok" or batch / 2 < b_simple < 2 * batch
    return f"{said}: about right" if close else f"{said}: too early to say"


def layer_health(health: Health) -> list[str]:
    """The layers' health in sentences, warnings among them, and why what is absent is."""
    said = [f"Step {health.step:,}: gradient norm {number(health.grad_norm)}, before clipping."]
    said += [*_clipping(health), *_depth(health), *_movement(health)]
    if health.above_bound is not None:
        share, bound = f"{health.above_bound:.1%}", number(health.norm_bound)
        said.append(f"Examples whose own gradient's norm is above {bound}: {share} of this step's.")
    told = {k: why for k, why in health.notes.items() if not (k == "depth_ratio" and health.first)}
    return [*said, *(f"{_WHAT.get(k, k)}: {why}." for k, why in told.items())]


_WHAT = {
    "depth_ratio": "Last layers against first",
    "relative_change": "Change of the weights",
    "above_bound": "Examples above the norm bound",
}


def _clipping(health: Health) -> list[str]:
    if health.clip_factor is None or health.clip_share is None:
        return []
    said = [
        f"Clipping at {number(health.clip)} by the global norm would multiply this step by "
        f"{health.clip_factor:.3g}, and act in {health.clip_share:.0%} of the {health.steps:,} "
        "measured steps."
    ]
    left, cosine = health.layer_clip_factor, health.layer_clip_cosine
    share = health.layer_clip_share
    if left is not None and cosine is not None and share is not None:
        said.append(
            f"By each layer's norm it would leave {left:.1%} of this step's norm, turned to a "
            f"cosine of {cosine:.3g} with the gradient, and act on some layer in {share:.0%} of "
            "the steps."
        )
    return said


def _depth(health: Health) -> list[str]:
    ratio = health.depth_ratio
    if not health.first:
        return []
    first, last = (", ".join(names) for names in (health.first, health.last))
    if ratio is None:
        return [f"Warning: the gradient has vanished before the first layers ({first})."]
    said = f"Gradient of the last layers ({last}) over the first ({first}), rms: {ratio:.3g}."
    if 1 / STEEP <= ratio <= STEEP:
        return [said]
    kind = "vanishing" if ratio > 1 else "exploding"
    bound = f"above {STEEP:g}" if ratio > 1 else f"below 1/{STEEP:g}"
    return [said, f"Warning: {kind} gradients: that is {bound}."]


def _movement(health: Health) -> list[str]:
    if health.relative_change is None:
        return []
    said = f"The step changed the weights by {health.relative_change:.3g} (mean |dw/w|)"
    if health.change_ratio is not None and health.change_variation is not None:
        said += (
            f"; the fastest layer changed {number(health.change_ratio)} times as much as the "
            f"slowest, coefficient of variation {health.change_variation:.2g}"
        )
    return [said + "."]

"""How a reading sounds to a person, in the terminal and in the report."""

from __future__ import annotations

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

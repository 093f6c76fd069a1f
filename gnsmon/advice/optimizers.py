"""What is known of optimizers: how the learning rate goes with the batch, and what to beware of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Family(NamedTuple):
    """Optimizers that behave alike."""

    name: str
    words: tuple[str, ...]  # in the optimizer's name, in small letters
    # (before, after, b_simple) -> factor on the learning rate; None where it is not known
    rate: Callable[[int, int, float | None], float | None]
    has_beta2: bool = False
    caveats: tuple[str, ...] = ()


def _sgd_rate(before: int, after: int, b: float | None) -> float | None:
    """McCandlish et al. 2018, 2.9: the best rate is proportional to 1 / (1 + b / B)."""
    return None if b is None else (1 + b / before) / (1 + b / after)


def _root_rate(before: int, after: int, b: float | None) -> float | None:
    """Malladi et al. 2022, "On the SDEs and scaling rules for adaptive gradient algorithms"."""
    return math.sqrt(after / before)


def _unknown_rate(before: int, after: int, b: float | None) -> float | None:
    return None


ANISOTROPIC = (
    "b_simple takes the Hessian as a multiple of the identity and a learning rate near its best"
)

ADAPTIVE = (
    "an optimizer that divides by the gradient's size has another noise scale, which may differ by "
    "an order of magnitude"
)

# The first whose word is in the name; "momentum" is before "sgd", "sign" before "adam".
FAMILIES = (
    Family(
        "spectral",
        ("muon", "shampoo", "soap", "spectral"),
        _unknown_rate,
        caveats=(
            "updates by the spectral norm depend on the directions of the gradient, of which "
            "b_simple says nothing: look at the alignment of half batches instead "
            "(gnsmon.alignment), and take no learning-rate factor from here",
        ),
    ),
    Family(
        "sign",
        ("lion", "signsgd", "signum"),
        _root_rate,
        caveats=(
            "updates by the sign forget the gradient's length, which b_simple compares: look at "
            "the alignment of half batches beside it (gnsmon.alignment)",
        ),
    ),
    Family(
        "Adam",
        ("adam", "lamb", "rmsprop", "adafactor", "sophia"),
        _root_rate,
        has_beta2=True,
        caveats=(ADAPTIVE,),
    ),
    Family("Adagrad", ("adagrad",), _root_rate, caveats=(ADAPTIVE,)),  # it forgets nothing
    Family(
        "momentum",
        ("momentum", "nesterov"),
        _sgd_rate,
        caveats=(
            "the learning-rate factor is for the same momentum: what acts is lr / (1 - momentum)",
        ),
    ),
    Family("SGD", ("sgd",), _sgd_rate),
)


def family_of(optimizer: str | None) -> Family | None:
    """The family of an optimizer's class, or of what it is called; None if it is not known.

    Of several, joined by "and", one with the caveats of each, and with a factor on the learning
    rate only where it is the same for all.
    """
    names = (optimizer or "").split(" and ")
    found = list(dict.fromkeys(map(_family, names)))
    if len(found) == 1:
        return found[0]
    known = [family for family in found if family is not None]
    caveats = [caveat for family in known for caveat in family.caveats]
    rates = {_unknown_rate if family is None else family.rate for family in found}
    if len(rates) > 1:
        caveats.append(
            f"the learning rates of {' and '.join(names)} go by different rules, so that no one "
            "factor is given: ask for each of them by its name (optimizer=)"
        )
    return Family(
        " and ".join(family.name for family in known),
        (),
        rates.pop() if len(rates) == 1 else _unknown_rate,
        has_beta2=any(family.has_beta2 for family in known),
        caveats=tuple(dict.fromkeys(caveats)),
    )


def _family(optimizer: str) -> Family | None:
    name = optimizer.lower()
    if "sgd" not in name:  # another one's momentum makes no SGD of it
        name = name.partition(" with momentum")[0]
    return next((f for f in FAMILIES if any(word in name for word in f.words)), None)

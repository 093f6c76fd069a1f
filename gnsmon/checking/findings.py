"""What a doctor would say of a model, a loss and a batch before their noise scale is believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import factorial, prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gnsmon.checking.brute import Composition, NoiseShares
from gnsmon.norms.rules import coupling

SEVERITIES = ("error", "warning", "note")
SHUFFLED = Fraction(1, 1000)  # an order that a shuffle gives less often than this is none's


@dataclass(frozen=True)
class Finding:
    """One thing to know: what it does to the noise scale, and what to do."""

    severity: Literal["error", "warning", "note"]
    title: str
    text: str


Findings = Iterator[Finding]


# Of the model.


def of_batch_norm(model: nn.Module) -> Findings:
    """Layers that normalise by the batch."""
    paths = [path for path, module in model.named_modules() if coupling(module)]
    if not paths:
        return
    fixed = all(m.running_mean is not None for p, m in model.named_modules() if p in paths)
    yield Finding(
        "error",
        "BatchNorm in training mode",
        f"In {_listed(paths)}, each example's loss depends on the others through the batch's "
        "statistics, so a per-example gradient does not exist, of any layer. Train with GroupNorm "
        "or LayerNorm, or with these layers in eval mode; or accumulate gradients and take "
        "method='microbatch'. "
        + ("The table is with them in eval mode." if fixed else "Nothing could be compared."),
    )


def of_parameters(model: nn.Module) -> Findings:
    """Frozen parameters, adapters and half precision."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    share = sum(sizes[name] for name in trained) / max(sum(sizes.values()), 1)
    adapters = [name for name in trained if "lora_" in name or "adapter" in name.lower()]
    if adapters:
        yield Finding(
            "note",
            "adapters",
            f"Trained are {_percent(share)} of the numbers, among them adapters such as "
            f"{min(adapters)}: the noise scale is theirs, not that of training the whole model.",
        )
    elif share < 1:
        yield Finding(
            "note",
            "frozen parameters",
            f"{_listed([name for name in sizes if name not in trained])}: {_percent(1 - share)} of "
            "the numbers are not trained. The noise scale is that of the trained ones alone, and "
            "changes if others are unfrozen.",
        )
    if half := [n for n, p in model.named_parameters() if n in trained and p.dtype.itemsize == 2]:
        yield Finding(
            "note",
            "half precision",
            f"{_listed(half)}: checked here in float64. In training, half precision rounds the "
            "gradients; the monitor then allows their sum to be off by 5 %.",
        )


def random_layers(model: nn.Module) -> dict[str, float]:
    """Layers that drop at random as they are set up now, with their probability."""
    found = {}
    for path, module in model.named_modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        recurrent = isinstance(module, nn.RNNBase) and module.num_layers > 1
        attention = isinstance(module, nn.MultiheadAttention)
        p = module.p if dropout else module.dropout if recurrent or attention else 0
        if module.training and p:
            found[path] = float(p)
    return found


def of_dropout(
    layers: Mapping[str, float], shares: NoiseShares, silent: float, state: str
) -> Findings:
    """Random numbers in the forward, and their share of the noise; `silent` is S without them."""
    source = "Dropout" if layers else "A random draw in the forward (F.dropout, drop path, noise)"
    # Unbiased, the data's share may come out below zero where it is small.
    where = f" ({_listed([f'{path} p={p:g}' for path, p in layers.items()])})" if layers else ""
    off = "" if shares.deviation is None else f" (± {_percent(shares.deviation)})"
    yield Finding(
        "note",
        "dropout" if layers else "random forward",
        f"{source}{where} makes {_percent(shares.share)}{off} of the gradient's noise, "
        f"the data {_percent(1 - shares.share)}. The noise scale you will read in training "
        f"includes both: S = {shares.total:.3g} on this batch. {state.capitalize()}, as in the "
        f"table, it is {silent:.3g}.",
    )


def of_left_out_by_dropout(sizes: Mapping[str, int], missing: Mapping[str, str]) -> Findings:
    """Parameters that are covered without random draws only."""
    if missing:
        share = sum(sizes[name] for name in missing) / sum(sizes.values())
        yield Finding(
            "warning",
            "left out in training mode",
            f"{_listed(list(missing))}: {_percent(share)} of the trainable numbers are covered in "
            "the table, but not while the forward draws random numbers, as it will in training: "
            f"{next(iter(missing.values()))}. The noise scale will be that of the others.",
        )


def of_randomness_in_eval() -> Findings:
    """A forward that is random in any mode."""
    yield Finding(
        "error",
        "the loss is random in eval mode too",
        "One example alone draws other numbers than it does in the batch, so the norms cannot be "
        "compared. Give the check a loss that is a function of the batch: draw the noise outside, "
        "as one more tensor of the batch. The monitor itself does not mind draws that each example "
        "makes for itself: their noise is part of the gradient's.",
    )


# Of the loss.


def of_composition(found: Composition) -> Findings:
    """How the batch's gradient is made of its examples'."""
    scale, parts = float(found.weights.sum()), len(found.weights)
    if found.kind == "multiple":
        what = "sums over" if abs(scale / parts - 1) < 1e-6 else f"is {scale:.4g} times the mean of"
        yield Finding(
            "note",
            "the loss is no mean",
            f"It {what} the examples. Harmless: |G|^2 and S grow alike, and the scale cancels in "
            "the noise scale; the table allows for it.",
        )
    elif found.kind == "weighted":
        weights = [float(w) / scale for w in found.weights]
        shown = ", ".join(f"{w:.3f}" for w in weights[:8]) + ", ..." * (parts > 8)
        yield Finding(
            "warning",
            "the examples weigh unequally",
            f"In this batch they weigh {shown}, as in a mean over tokens of sequences of unequal "
            f"length. Tell the monitor: attach(..., weights=...), a function of the forward's "
            f"arguments that gives each example's weight (its number of tokens), or "
            f"gns.weigh(counts) before each backward. Otherwise it "
            f"takes sum w^2 = {1 / parts:.3f} for {sum(w * w for w in weights):.3f}, and |G|^2 "
            "and S are biased. The table allows for the weights.",
        )
    elif found.kind == "coupled":
        yield Finding(
            "error",
            "the loss couples the examples",
            f"The batch's gradient is {_percent(found.rest)} off any multiple of the mean of its "
            "examples', each taken alone, and no weights of theirs explain it: in-batch "
            "negatives, say, or a loss that is normalised by the batch. A per-example gradient "
            "does not exist, and what layers give is not the noise of independent examples. "
            "Accumulate gradients and take method='microbatch'.",
        )


def of_nonfinite(gradients: Tensor) -> Findings:
    """Examples with an infinite or undefined gradient."""
    if bad := [i for i, g in enumerate(gradients) if not bool(g.isfinite().all())]:
        yield Finding(
            "error",
            "non-finite gradients",
            f"Of example {_listed([str(i) for i in bad])} of the batch, taken alone, the gradient "
            "has infinite or undefined values (a mean over no tokens, a logarithm of zero?). A "
            "step with such a gradient is skipped; nothing could be compared.",
        )


# Of the coverage.


def of_coverage(
    sizes: Mapping[str, int], missing: Mapping[str, str], norm_fraction: float | None
) -> Findings:
    """Parameters that are in neither norm."""
    whole = sum(sizes.values())
    summed = [n for n, why in missing.items() if "already summed" in why or "batch axis" in why]
    if summed:
        share = sum(sizes[name] for name in summed) / whole
        yield Finding(
            "warning",
            "the batch axis is missing",
            f"{_listed(summed)}: {_percent(share)} of the trainable numbers. Such a layer's output "
            "is the same for all examples, or of a choice or mix of them (an expert's), and no "
            "example's share can be told. If it is the same, give its input a batch axis, as by "
            "positions.expand(batch, -1).",
        )
    left_out = sum(sizes[name] for name in missing) / whole
    if left_out > 0.01 and len(missing) < len(sizes):
        norm = "" if norm_fraction is None else f", {_percent(1 - norm_fraction)} of |grad|^2,"
        yield Finding(
            "warning",
            "coverage",
            f"{_percent(left_out)} of the trainable numbers{norm} are in neither norm: the noise "
            "scale is that of the other parameters, which may differ. The reasons are under the "
            "table. method='random_signs' measures them too.",
        )


# Of the batch.


def of_batch(
    tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor], config: Any = None
) -> Findings:
    """Copies, order, packing, and tensors without a batch axis.

    Args:
        tensors: those with the examples on the first axis, by their place in the batch.
        shared: the others.
        config: of a Hugging Face model: which tokens pad and separate.
    """
    if shared:
        count = len(next(iter(tensors.values())))
        yield Finding(
            "warning",
            "no batch axis",
            f"{_listed([f'{_at(k)} {list(t.shape)}' for k, t in shared.items()])}: the others have "
            f"{count} examples on their first axis, so each example is given this whole. If it is "
            "data, put the examples first; a table that is looked up by it is left out unless it "
            f"is expanded to {count} examples.",
        )
    yield from _repeated(tensors)
    yield from _packed(tensors, config)
    yield from _ordered(tensors, config)


def _repeated(tensors: Mapping[str, Tensor]) -> Findings:
    count = len(next(iter(tensors.values())))
    numbers = sum(t[0].numel() for t in tensors.values())
    if numbers < 8 and not any(t.is_floating_point() for t in tensors.values()):
        return  # a few whole numbers agree by chance
    distinct = {tuple(_bytes(t[i]) for t in tensors.values()) for i in range(count)}
    if copies := count - len(distinct):
        yield Finding(
            "warning",
            "repeated data",
            f"{copies} of the {count} examples {'is a copy' if copies == 1 else 'are copies'} of "
            "another: copies count as independent examples, so S reads too small and |G|^2 too "
            "large. Leave them out, or weigh distinct examples by their number.",
        )


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _packed(tensors: Mapping[str, Tensor], config: Any) -> Findings:
    for name, t in tensors.items():
        if t.ndim != 2 or t.is_floating_point() or t.shape[1] < 3:
            continue
        before, here, after = t[:, :-2], t[:, 1:-1], t[:, 2:]
        restarts = (before > 0) & (here == 0) & (after == 1)
        end = getattr(config, "eos_token_id", None)
        ends = (before != end) & (here == end) & (after != end)
        tokens = isinstance(end, int) and name.rpartition(".")[2] in ("", "0", "input_ids")
        if "position" in name and bool(restarts.any()):
            what = "positions begin again within a row"
        elif tokens and float(ends.any(1).double().mean()) > 0.5:
            what = "the end-of-text token stands inside most rows"
        else:
            continue
        yield Finding(
            "note",
            "packed sequences",
            f"{_at(name)}: {what}, so several documents share one. An example is a row here: "
            "b_simple counts rows, each of them the average of several documents; multiply by the "
            "documents in a row to compare with a batch that is not packed.",
        )
        return


def _ordered(tensors: Mapping[str, Tensor], config: Any) -> Findings:
    for name, t in tensors.items():
        for what, values in _keys(name, t, config):
            chance = chance_of_order(values)
            if chance < SHUFFLED:
                yield Finding(
                    "warning",
                    "a batch in order",
                    f"{_at(name)}: the examples stand in order of {what}; a shuffle does that once "
                    f"in {int(1 / chance):,}. Harmless if the batch was drawn at random and sorted "
                    "then. If batches come in the order of the data set (by class, or bucketed by "
                    "length), steps are not independent samples of it: S reads too small and the "
                    "interval too short. Shuffle.",
                )
                return


def _keys(name: str, t: Tensor, config: Any) -> Iterator[tuple[str, list[int]]]:
    """What the examples might be sorted by: class, or the number of tokens that are not padding."""
    if t.is_floating_point() or t.is_complex():
        return
    if t.ndim == 1 and len(t.unique()) < len(t):
        yield "their classes", t.tolist()
    pad = getattr(config, "pad_token_id", None)
    if t.ndim == 2 and "mask" in name and bool(((t == 0) | (t == 1)).all()):
        yield "length", t.sum(1).tolist()
    elif t.ndim == 2 and "label" in name and bool((t == -100).any()):
        yield "length", (t != -100).sum(1).tolist()
    elif t.ndim == 2 and isinstance(pad, int) and "mask" not in name:
        yield "length", (t != pad).sum(1).tolist()
    elif t.ndim == 2 and bool((t[:, 0] != 0).all()):
        inside = t != 0
        if bool((inside[:, :-1] >= inside[:, 1:]).all()):  # nothing but zeros behind the first
            yield "length", inside.sum(1).tolist()


def chance_of_order(values: Sequence[int]) -> Fraction:
    """The chance of a shuffle to sort these, up or down; 1 where they are not sorted, or alike."""
    rising = sorted(values)
    if rising[:1] == rising[-1:] or list(values) not in (rising, rising[::-1]):
        return Fraction(1)
    alike = prod(factorial(n) for n in Counter(values).values())
    return Fraction(2 * alike, factorial(len(values)))


def _at(name: str) -> str:
    return f"batch[{name}]" if name else "the batch"


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _percent(share: float) -> str:
    from_an_end = min(abs(share), abs(1 - share))
    return f"{100 * share:.{2 if from_an_end < 0.01 else 1 if from_an_end < 0.1 else 0}f} %"

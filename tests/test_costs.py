"""What a step does beside training: operations are counted, nothing is timed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cases import energy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gnsmon
from gnsmon.collectors import per_example
from gnsmon.norms.sketch import Sketch


class Operations(TorchDispatchMode):
    """Counts the operators that reach the device."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls[op._overloadpacket._qualified_op_name] += 1
        return op(*args, **(kwargs or {}))


def model_of(layers: int) -> nn.Module:
    torch.manual_seed(0)
    pieces = [m for _ in range(layers) for m in (nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh())]
    return nn.Sequential(*pieces)


def train(model: nn.Module, optimizer, steps: int) -> None:
    batch = torch.randn(4, 5, 8)
    for _ in range(steps):
        optimizer.zero_grad()
        energy(model, batch).backward()
        optimizer.step()


def operations(model: nn.Module, optimizer, steps: int = 3) -> Counter[str]:
    """Of the last of some steps."""
    train(model, optimizer, steps - 1)
    with Operations() as counter:
        train(model, optimizer, 1)
    return counter.calls


def monitored(layers: int, tmp_path, **settings) -> Counter[str]:
    model = model_of(layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gnsmon.attach(model, optimizer, run_dir=tmp_path, strict=True, **settings):
        return operations(model, optimizer)


def bare(layers: int) -> Counter[str]:
    model = model_of(layers)
    return operations(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("engine", ["auto", "fused", "hooks"])
def test_a_step_that_is_not_measured_does_nothing_else(tmp_path, engine):
    assert monitored(3, tmp_path, every=100, engine=engine) == bare(3)


def test_nor_with_all_that_can_be_asked_for(tmp_path):
    settings = {"preconditioned": True, "diagnostics": True, "clip": 1.0, "norm_bound": 1.0}
    model, twin = model_of(3), model_of(3)
    optimizer, other = (torch.optim.AdamW(m.parameters()) for m in (model, twin))
    methods = ["pepgns", "sketch", "microbatch", "subbatch"]
    with (
        pytest.warns(RuntimeWarning, match="this step has one"),
        gnsmon.attach(model, optimizer, run_dir=tmp_path, every=100, method=methods, **settings),
    ):
        assert operations(model, optimizer) == operations(twin, other)


@pytest.mark.parametrize("method", ["pepgns", "sogns", "sketch"])
def test_nothing_waits_for_the_device_but_one_copy(tmp_path, monkeypatch, method):
    copies = []
    original = per_example.to_host
    monkeypatch.setattr(per_example, "to_host", lambda *a: copies.append(1) or original(*a))
    calls = monitored(4, tmp_path, every=1, method=method)
    assert len(copies) == 3  # one a step
    assert not calls["aten::_local_scalar_dense"] and not calls["aten::nonzero"]


@pytest.mark.parametrize(("engine", "most"), [("hooks", 22), ("fused", 43)])
def test_operations_a_layer(tmp_path, engine, most):
    """Of a Linear and a LayerNorm together, of 4 examples; views do not count."""
    few, many = (monitored(n, tmp_path / str(n), every=1, engine=engine) for n in (4, 12))
    more = few - bare(4), many - bare(12)
    views = (
        "view",
        "alias",
        "detach",
        "t",
        "transpose",
        "slice",
        "select",
        "expand",
        "unsqueeze",
        "_unsafe_view",
        "squeeze",
        "split",
        "as_strided",
        "unbind",
        "permute",
    )
    work = [sum(n for op, n in c.items() if op.split("::")[1] not in views) for c in more]
    each = (work[1] - work[0]) / 8
    assert each < most
    assert work[0] - 4 * each < 30
    for op in ("aten::cat",):  # put together once a backward, not once a layer
        assert more[1][op] == more[0][op]


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("engine", "compiled"), [("auto", 0), ("fused", 0), ("auto", 1)])
def test_a_sketch_that_never_pays_is_neither_drawn_nor_tracked(
    tmp_path, monkeypatch, engine, compiled
):
    drawn, tracked = [], []
    model = model_of(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"every": 1, "engine": engine, "method": "sketch", "run_dir": tmp_path}
    with gnsmon.attach(model, optimizer, strict=True, **settings) as gns:
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        train(model, optimizer, steps=1)
        monkeypatch.setattr(Sketch, "draw", lambda self: drawn.append(1))
        monkeypatch.setattr(torch.linalg, "qr", lambda *a: tracked.append(1))
        train(model, optimizer, steps=2)
        assert gns.reading.step == 2
    assert not drawn and not tracked


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.late, self.called = nn.Linear(8, 8), nn.Linear(8, 8), False

    def forward(self, x):
        return self.late(self.always(x)) if self.called else self.always(x)


def test_whether_a_sketch_pays_is_unknown_until_its_layer_is_called(tmp_path):
    model = Sometimes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"every": 1, "method": "sketch", "run_dir": tmp_path}
    with gnsmon.attach(model, optimizer, **settings) as gns:
        sketches = gns._sources[0][0].taps.sketches
        train(model, optimizer, steps=1)
        assert sketches["always.weight"].used is False and sketches["late.weight"].used is None
        model.called = True
        train(model, optimizer, steps=1)
        assert sketches["late.weight"].used is False

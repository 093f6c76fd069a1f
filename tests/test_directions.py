"""The directions along which examples' gradients must add up to `.grad`."""

from __future__ import annotations

from random import Random

import pytest
import torch
import torch._dynamo.testing
from cases import energy
from torch import Tensor, nn

import gnsmon
from gnsmon.norms import directions
from gnsmon.norms.directions import Direction, look_elsewhere, share_memory


@pytest.fixture
def few(monkeypatch):
    """Large parameters are those of more than 32 numbers."""
    monkeypatch.setattr(directions, "NUMBERS", 32)
    monkeypatch.setattr(directions, "LEAST", 2)


def direction_of(*shape: int, seed: int = 0) -> Direction:
    return Direction(torch.zeros(shape), torch.Generator().manual_seed(seed))


def test_an_error_shows_by_its_size_in_expectation(few):
    torch.manual_seed(0)
    error, chance, seen = torch.randn(50, 8), Random(0), []
    for seed in range(3000):
        direction = direction_of(50, 8, seed=seed)
        look_elsewhere([direction], share_memory([direction]), chance)
        seen.append(direction.along(error)[1].square().sum())
    seen = torch.stack(seen)
    standard_error = seen.std() / len(seen) ** 0.5
    # Rows at the ends are in fewer blocks than those in the middle.
    inner = error[3:-3].square().sum() * 50 / 44
    assert abs(seen.mean() - inner) < 3 * standard_error + 0.05 * inner


@pytest.mark.parametrize("cuts", [(0, 20, 50), (0, 13, 14, 50), (0, 0, 50, 50)])
def test_shards_make_up_the_whole(few, cuts):
    gradient, direction, chance = torch.randn(50, 8), direction_of(50, 8), Random(1)
    firsts = share_memory([direction])
    for _ in range(20):
        look_elsewhere([direction], firsts, chance)
        _, want = direction.along(gradient)
        found = torch.full_like(want, torch.nan)
        for start, end in zip(cuts, cuts[1:], strict=False):
            before, some = direction.along(gradient[start:end], start)
            found[before : before + len(some)] = some
        torch.testing.assert_close(found, want)


def test_all_rows_come_up(few):
    direction = direction_of(20, 8)
    firsts, chance, seen = share_memory([direction]), Random(0), set()
    for _ in range(200):
        look_elsewhere([direction], firsts, chance)
        seen |= set(range(*direction.rows.indices(20)))
    assert seen == set(range(20))


class Behind(nn.Module):
    """Adds something to the gradient of a few rows behind the layer's back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (self.layer.weight[20:26] ** 2).sum()


def test_what_does_not_add_up_in_some_rows_is_found(few, tmp_path):
    torch.manual_seed(0)
    model = Behind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    missing = []
    gns = gnsmon.attach(model, optimizer, every=1, run_dir=tmp_path)
    with gns, pytest.warns(RuntimeWarning, match="do not add up"):
        for _ in range(30):
            optimizer.zero_grad()
            energy(model, torch.randn(4, 8)).backward()
            optimizer.step()
            missing.append("layer.weight" in gns.coverage().missing)
    assert all(missing[missing.index(True) :])  # and then it stays out


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_other_rows_are_no_other_graph(few, tmp_path):
    torch.manual_seed(0)
    model, batch = (
        nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 8)),
        torch.randn(4, 5, 8),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with gnsmon.attach(model, optimizer, every=1, run_dir=tmp_path, strict=True) as gns:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(5):
            optimizer.zero_grad()
            energy(compiled, batch).backward()
            optimizer.step()
            assert gns.reading.coverage == 1.0
    assert counter.frame_count == 1

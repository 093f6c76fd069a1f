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
    error, chance, seen = torch.randn(48, 8), Random(0), []
    for seed in range(3000):
        direction = direction_of(48, 8, seed=seed)
        look_elsewhere([direction], share_memory([direction]), chance)
        seen.append(direction.along(error)[1].square().sum())
    seen = torch.stack(seen)
    assert abs(seen.mean() - error.square().sum()) < 3 * seen.std() / len(seen) ** 0.5


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (7, 0), (7, 3), (40, 3), (1000, 2, 2)])
@pytest.mark.parametrize("numbers", [64, 120, 10**6])
def test_every_row_counts_alike(monkeypatch, shape, numbers):
    """Or up to twice where the last block of rows meets the one before: a few rows at most."""
    monkeypatch.setattr(directions, "NUMBERS", numbers)
    monkeypatch.setattr(directions, "LEAST", 16)
    direction, draws, chance = direction_of(*shape), 16_000, Random(0)
    firsts, seen = share_memory([direction]), torch.zeros(shape[0] if shape else 1)
    for _ in range(draws):
        look_elsewhere([direction], firsts, chance)
        rows = slice(None) if direction.rows is None else direction.rows
        seen[rows] += 1
        assert len(seen[rows]) == direction.count
    if torch.zeros(shape).numel():
        weights = seen / draws * direction.signs[0] ** 2
        assert weights.min() > 0.75
        assert weights.median() < 1.3
        assert weights.max() < 2.6


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

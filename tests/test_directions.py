"""The proof's random directions: any error shows as large as it is, on average."""

from __future__ import annotations

import pytest
import torch

from gnsmon.norms import directions
from gnsmon.norms.directions import Direction


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (7, 0), (7, 3), (40, 3), (1000, 2, 2)])
@pytest.mark.parametrize("numbers", [64, 120, 10**6])
def test_every_row_counts_alike(monkeypatch, shape, numbers):
    """Or up to twice where the last block of rows meets the one before: a few rows at most."""
    monkeypatch.setattr(directions, "NUMBERS", numbers)
    monkeypatch.setattr(directions, "LEAST", 16)
    generator, draws = torch.Generator().manual_seed(0), 4000
    p = torch.zeros(shape)
    direction, seen = Direction(p, generator), torch.zeros(shape[0] if shape else 1)
    for _ in range(draws):
        direction.draw(generator)
        rows = slice(None) if direction.rows is None else direction.rows
        seen[rows] += 1
        assert len(seen[rows]) == direction.count
    if p.numel():
        weights = seen / draws * direction.signs[0] ** 2
        assert weights.min() > 0.75
        assert weights.median() < 1.3
        assert weights.max() < 2.6


@pytest.mark.parametrize("start", [0, 10, 37])
def test_shards_have_the_rows_of_the_whole(monkeypatch, start):
    monkeypatch.setattr(directions, "NUMBERS", 64)
    generator, gradient = torch.Generator().manual_seed(0), torch.randn(50, 4)
    direction = Direction(gradient, generator)
    for _ in range(20):
        direction.draw(generator)
        _, want = direction.along(gradient)
        found = torch.zeros(direction.count)
        for first, shard in ((0, gradient[:start]), (start, gradient[start:])):
            before, some = direction.along(shard, first)
            found[before : before + len(some)] += some
        torch.testing.assert_close(found, want)

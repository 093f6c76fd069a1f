"""What taps bring, put together once a backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gnsmon.collectors.gathered import Gathered
from gnsmon.norms.taps import ABSENT, Brought, Fill, Taps


def taps_of(*devices: str):
    model = nn.ModuleList(nn.Linear(3, 2, device=device) for device in devices)
    return Taps(model, ["exact"]).layers


def numbers(*values: float, device: str = "cpu"):
    return torch.tensor(values, device=device)


def test_vectors_are_sums_whatever_fires_when():
    a, b = taps_of("cpu", "cpu")
    gathered = Gathered()
    for value in (1.0, 2.0):
        first = Brought(0, a, [Fill(4.0, 1), numbers(value), Fill(0.0, 2)])
        second = Brought(0, b, [Fill(4.0, 1), numbers(value, 2 * value)])
        gathered.add([first, second])
    gathered.add([Brought(1, b, [Fill(4.0, 1), numbers(10.0, 20.0)]), first])
    gathered.add([])
    gathered.add([Brought(2, a, [Fill(3.0, 1), Fill(ABSENT, 1), Fill(0.0, 2)])])
    found = gathered.vectors({key: flat.numpy() for key, flat in gathered.flat.items()})
    np.testing.assert_array_equal(found[a], [15.0, ABSENT, 0.0, 0.0])
    np.testing.assert_array_equal(found[b], [12.0, 13.0, 26.0])


@pytest.mark.parametrize("order", [("cpu", "meta"), ("meta", "cpu", "meta")])
def test_a_model_on_several_devices(order):
    gathered, taps = Gathered(), taps_of(*order)
    brought = [
        Brought(0, tap, [Fill(4.0, 1), numbers(1.0, device=device)])
        for tap, device in zip(taps, order, strict=True)
    ]
    gathered.add(brought)
    assert {flat.device.type for flat in gathered.flat.values()} == {"cpu", "meta"}
    on_host = {key: np.ones(len(flat)) for key, flat in gathered.flat.items()}
    assert {tap: list(v) for tap, v in gathered.vectors(on_host).items()} == {
        tap: [4.0, 1.0] for tap in taps
    }

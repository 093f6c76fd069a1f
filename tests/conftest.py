import pytest
import torch


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test in a folder of its own, from the same seed, with a fresh compiler."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()

"""The monitor in loops of Hugging Face Accelerate: attached after `prepare`, it needs no more."""

import pytest
import torch
from ranks_worker import as_launched, in_processes
from test_microbatch import gradients
from test_monitor import VOCABULARY, Dropping, T, Tiny, assert_right, brute, loss_of, watch
from test_ranks import assert_reading

from gnsmon.sinks import read_log

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402


@pytest.fixture(autouse=True)
def _afresh():
    """Accelerate keeps its state between tests."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def make(examples, batch, *, accumulate=1, lr=0.0, kind=Tiny, scaler=None, **options):
    """An accelerator and what it has prepared: model, optimizer and loader, always the same."""
    torch.manual_seed(1)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, **options
    )
    if scaler is not None:  # which Accelerate makes on a GPU only
        accelerator.scaler = scaler
    model = kind().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    data = torch.utils.data.TensorDataset(*torch.randint(0, VOCABULARY, (2, examples, T)))
    loader = torch.utils.data.DataLoader(data, batch_size=batch)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def train(accelerator, model, optimizer, loader, clip=None, after=lambda: None):
    """An epoch; `after` is called when the optimizer has stepped, or would have."""
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            after()


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_readings_are_those_of_brute_force(accumulate, clip):
    accelerator, model, optimizer, loader = make(12, 3, accumulate=accumulate)
    with watch(model, optimizer) as gns:
        steps = iter(list(zip(*[iter(loader)] * accumulate, strict=True)))

        def check():
            batch = tuple(torch.cat(tensors) for tensors in zip(*next(steps), strict=True))
            assert_right(gns, model, batch)

        train(accelerator, model, optimizer, loader, clip, check)
        assert gns.step == 4 // accumulate and not gns.skipped


def test_a_short_last_window_is_scaled_down_and_b_simple_is_not():
    """Accelerate divides by two microbatches, though the last step has one."""
    accelerator, model, optimizer, loader = make(15, 3, accumulate=2)
    readings = []
    with watch(model, optimizer, sinks=[readings.append]):
        train(accelerator, model, optimizer, loader)
    assert [r.examples for r in readings] == [6, 6, 3]
    big, parts = brute(model, list(loader)[-1])
    assert readings[-1].raw.big_sq_norm == pytest.approx(big / 4, rel=1e-9)
    assert readings[-1].raw.parts_sq_norm == pytest.approx(parts / 4, rel=1e-9)


def test_a_last_microbatch_of_another_size_is_weighed_by_the_user():
    def shares(ids):
        return torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)

    accelerator, model, optimizer, loader = make(10, 6, accumulate=2)
    with watch(model, optimizer, weights=shares) as gns:
        train(accelerator, model, optimizer, loader)
        batch = tuple(torch.cat(tensors) for tensors in zip(*loader, strict=True))
        weights = torch.cat([shares(ids) for ids, _ in loader])
        assert_right(gns, model, batch, weights=weights)


def test_bf16():
    accelerator, model, optimizer, loader = make(6, 3, mixed_precision="bf16")
    with watch(model.float(), optimizer) as gns:
        train(accelerator, model, optimizer, loader)
        big, parts = brute(model.double(), list(loader)[-1])
        assert gns.reading.raw.big_sq_norm == pytest.approx(big, rel=2e-2)
        assert gns.reading.raw.parts_sq_norm == pytest.approx(parts, rel=2e-2)


def test_the_accelerators_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator, model, optimizer, loader = make(9, 3, scaler=scaler)
    with watch(model, optimizer, scaler=accelerator.scaler) as gns:
        batches = iter(list(loader))
        train(
            accelerator,
            model,
            optimizer,
            loader,
            after=lambda: assert_right(gns, model, next(batches)),
        )
        assert gns.step == 3
        with torch.no_grad():
            before = model.norm.weight[0].item()
            model.norm.weight[0] = torch.inf  # this step is skipped, and the next is not
        accelerator.backward(loss_of(model, list(loader)[0]))
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped and gns.step == 3
        with torch.no_grad():
            model.norm.weight[0] = before
        accelerator.backward(loss_of(model, list(loader)[1]))
        optimizer.step()
        assert_right(gns, model, list(loader)[1])


@pytest.mark.parametrize("kind", [Tiny, Dropping])
def test_training_with_the_monitor_is_the_same_training(kind):
    results = []
    for watched in (False, True):
        accelerator, model, optimizer, loader = make(15, 3, accumulate=2, lr=0.1, kind=kind)
        gns = watch(model, optimizer) if watched else None
        train(accelerator, model, optimizer, loader, clip=0.5)
        if gns:
            assert gns.reading is not None
            gns.close()
        results.append((model.state_dict(), torch.get_rng_state()))
    (before, a), (after, b) = results
    assert torch.equal(a, b) and list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def in_two_processes(rank, given, method):
    as_launched(rank)
    accelerator, model, optimizer, loader = make(24, 3, accumulate=2)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    whole = torch.utils.data.DataLoader(loader.dataset, batch_size=3)
    batches = [list(whole)[i : i + 4] for i in (0, 4)]
    attached = {"wrapper": model, "module": model.module}[given]
    with watch(attached, optimizer, method=method) as gns:
        seen = iter(batches)

        def check():
            batches = next(seen)
            size = 3 if method == "ranks" else 1
            parts = [tuple(t[i : i + size] for t in b) for b in batches for i in range(0, 3, size)]
            u = gradients(model.module, lambda m, part: loss_of(m, part) * size / 12, parts)
            assert_reading(gns, u, [size] * len(parts), 12)

        train(accelerator, model, optimizer, loader, 1e-3, check)
        assert gns.step == 2 and not gns.skipped


@pytest.mark.parametrize("method", ["ranks", "pepgns"])
@pytest.mark.parametrize("given", ["wrapper", "module"])
def test_two_processes(tmp_path, given, method):
    in_processes(in_two_processes, given, method, folder=tmp_path)


def test_state_is_saved_and_loaded_with_the_accelerators(tmp_path):
    def run(epochs, resume=False):
        accelerator, model, optimizer, loader = make(12, 3, lr=0.1)
        gns = watch(model, optimizer, every=3, run_dir=tmp_path / "log")
        accelerator.register_for_checkpointing(gns)
        if resume:
            accelerator.load_state(tmp_path / "state")
        for epoch in range(epochs):
            train(accelerator, model, optimizer, loader)
            if not epoch and not resume:
                accelerator.save_state(tmp_path / "state", safe_serialization=False)
        gns.close()
        return gns

    whole = run(3)
    log = tmp_path / "log" / "gns.jsonl"
    before = [(r["step"], r["tr_sigma"]) for r in read_log(log).readings]
    resumed = run(2, resume=True)
    assert resumed.state_dict() == whole.state_dict()
    assert [(r["step"], r["tr_sigma"]) for r in read_log(log).readings] == before
    assert len(before) == 4

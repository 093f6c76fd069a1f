"""The monitor's readings are those of brute force, whatever the training loop does."""

import copy
import io
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gnsmon
from gnsmon.collectors.per_example import PerExample
from gnsmon.estimators import Estimator

B, T, VOCABULARY = 6, 5, 11


class Tiny(nn.Module):
    """A language model with everything that makes taps hard: a tied head and an in-place ReLU."""

    def __init__(self, width=8, tied=True):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def body(self, x):
        return x + self.down(self.relu(self.up(self.norm(x))))

    def forward(self, ids):
        return self.head(self.body(self.wte(ids)))


class Checkpointed(Tiny):
    reentrant = False

    def body(self, x):
        return checkpoint(super().body, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


def loss_of(model, batch, reduction="mean"):
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction=reduction)


def make(kind=Tiny, lr=0.0, **kwargs):
    torch.manual_seed(1)
    model = kind(**kwargs).double()
    batch = torch.randint(0, VOCABULARY, (2, B, T)).unbind()
    return model, torch.optim.SGD(model.parameters(), lr=lr), batch


def brute(model, batch, weights=None):
    """|sum w_i g_i|^2 and sum |w_i g_i|^2 for weights that add up to one, equal by default."""
    weights = (torch.ones(len(batch[0])) if weights is None else weights).double()
    weights = weights / weights.sum()
    model = copy.deepcopy(model)
    model.reentrant = False  # which torch.autograd.grad cannot take
    norms = gnsmon.per_example_sq_norms(model, loss_of, batch)
    parts = sum(float((weights.square() * n).sum()) for n in norms.values())
    examples = [loss_of(model, tuple(t[i : i + 1] for t in batch)) for i in range(len(weights))]
    total = sum(w * loss for w, loss in zip(weights, examples, strict=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(total, parameters)
    return sum(float(g.square().sum()) for g in gradient), parts


def watch(model, optimizer, **settings):
    return gnsmon.attach(model, optimizer, **{"every": 1, "strict": True, **settings})


def assert_right(gns, model, batch, scale=1.0, rtol=1e-9, weights=None):
    raw = gns.reading.raw
    big, parts = brute(model, batch, weights)
    assert raw.big_sq_norm == pytest.approx(scale**2 * big, rel=rtol)
    assert raw.parts_sq_norm == pytest.approx(scale**2 * parts, rel=rtol)
    assert gns.reading.examples == len(batch[0])
    assert gns.reading.coverage == 1.0


def split(batch, sizes):
    return list(zip(*(t.split(sizes) for t in batch), strict=True))


def plain(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def sum_loss(model, optimizer, batch):
    optimizer.zero_grad()
    (loss_of(model, batch, "sum") / T).backward()
    optimizer.step()


def accumulation(model, optimizer, batch):
    optimizer.zero_grad()
    for micro in split(batch, [2, 2, 2]):
        (loss_of(model, micro) / 3).backward()
    optimizer.step()


def ragged_accumulation(model, optimizer, batch):
    optimizer.zero_grad()
    for micro in split(batch, [3, 1, 2]):
        (loss_of(model, micro) * len(micro[0]) / B).backward()
    optimizer.step()


def clipped(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def closure(model, optimizer, batch):
    def evaluate():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    optimizer.step(evaluate)


def discarded_batch(model, optimizer, batch):
    loss_of(model, split(batch, [2, 4])[0]).backward()
    plain(model, optimizer, batch)


def discarded_in_place(model, optimizer, batch):
    loss_of(model, split(batch, [2, 4])[0]).backward()
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, batch).backward()
    optimizer.step()


def zero_after_forward(model, optimizer, batch):
    loss_of(model, split(batch, [2, 4])[0]).backward()
    loss = loss_of(model, batch)
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()


def evaluation_between(model, optimizer, batch):
    first, second = split(batch, [3, 3])
    optimizer.zero_grad()
    (loss_of(model, first) / 2).backward()
    model.eval()
    with torch.no_grad():
        loss_of(model, batch)
    model.train()
    loss_of(model, batch)  # grad mode on, but no backward
    (loss_of(model, second) / 2).backward()
    optimizer.step()


def gradients_for_something_else(model, optimizer, batch):
    optimizer.zero_grad()
    torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
    loss_of(model, batch).backward()
    optimizer.step()


LOOPS = [
    plain,
    sum_loss,
    accumulation,
    ragged_accumulation,
    clipped,
    closure,
    discarded_batch,
    discarded_in_place,
    zero_after_forward,
    evaluation_between,
    gradients_for_something_else,
]


@pytest.mark.parametrize("engine", ["hooks", "fused"])
@pytest.mark.parametrize("kind", [Tiny, Checkpointed])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_norms_are_those_of_brute_force(loop, kind, engine):
    model, optimizer, batch = make(kind)
    with watch(model, optimizer, engine=engine) as gns:
        for _ in range(3):
            loop(model, optimizer, batch)
            assert_right(gns, model, batch, scale=B if loop is sum_loss else 1.0)
        assert not gns.skipped
        assert len({r.step for r in [gns.reading]} | {gns.step}) == 2


def test_reentrant_checkpoints():
    model, optimizer, batch = make(Reentrant)
    with watch(model, optimizer) as gns:
        for loop in (plain, accumulation, clipped):
            loop(model, optimizer, batch)
            assert_right(gns, model, batch)


def test_two_optimizers_make_one_reading_a_step():
    model, _, batch = make()
    one = torch.optim.SGD(model.up.parameters(), lr=0.0)
    other = torch.optim.SGD([p for n, p in model.named_parameters() if "up" not in n], lr=0.0)
    readings = []
    with watch(model, [one, other], sinks=[readings.append]) as gns:
        for order in ((one, other), (other, one)):
            model.zero_grad()
            loss_of(model, batch).backward()
            for optimizer in order:
                optimizer.step()
            assert_right(gns, model, batch)
        assert [r.step for r in readings] == [0, 1]
        assert not gns.skipped


def test_the_advice_is_for_all_optimizers():
    """A matrix's Muon beside the others' AdamW: no rule for the rate holds for both."""
    model, _, batch = make()
    muon = type("Muon", (torch.optim.SGD,), {})(model.up.parameters(), lr=0.0)
    others = [p for n, p in model.named_parameters() if "up" not in n]
    with watch(model, [torch.optim.AdamW(others, lr=0.0), muon]) as gns:
        loss_of(model, batch).backward()
        for optimizer in gns._optimizers:
            optimizer.step()
        reading = replace(gns.reading, status="ok", b_simple=1e4, low=9e3, high=2e4)
        advice = gns._advise(reading)
    assert advice.batch_size > advice.present
    assert advice.learning_rate_factor is None


def test_without_an_optimizer_commit_ends_the_step():
    model, _, batch = make()
    with watch(model, None) as gns:
        loss_of(model, batch).backward()
        gns.commit()
        assert_right(gns, model, batch)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_is_undone_and_overflows_are_dropped(fused):
    model, _, batch = make()
    model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    with watch(model, optimizer, scaler=scaler) as gns:
        for i in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            if i == 2:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
            if i != 2:
                assert_right(gns, model, batch, rtol=1e-4)
        assert gns.skipped == ({"nonfinite": 1} if fused else {})
        assert gns.reading.n_eff == pytest.approx(5, rel=1e-3)


def test_autocast():
    model, _, batch = make()
    model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as gns:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        assert_right(gns, model, batch, rtol=0.02)


def test_backward_inside_autocast():
    model, _, batch = make()
    model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as gns, torch.autocast("cpu", dtype=torch.bfloat16):
        plain(model, optimizer, batch)
        assert_right(gns, model, batch, rtol=0.02)


def test_token_weighted_losses():
    model, optimizer, (ids, targets) = make()
    lengths = torch.tensor([5, 1, 3, 2, 5, 4])
    keep = torch.arange(T) < lengths[:, None]
    targets = targets.masked_fill(~keep, -100)

    def count(batch_ids):
        return lengths[: len(batch_ids)]

    with watch(model, optimizer, weights=count) as gns:
        plain(model, optimizer, (ids, targets))
        assert_right(gns, model, (ids, targets), weights=lengths)
        weights = lengths / lengths.sum()
        assert gns.reading.raw.sum_sq_weights == pytest.approx(float(weights.square().sum()))
        assert gns.reading.tokens == 20


def test_weights_given_by_hand_over_microbatches():
    model, optimizer, (ids, targets) = make()
    lengths = torch.tensor([5, 1, 3, 2, 5, 4])
    targets = targets.masked_fill(torch.arange(T) >= lengths[:, None], -100)
    with watch(model, optimizer) as gns:
        optimizer.zero_grad()
        for micro in split((ids, targets, lengths), [4, 2]):
            loss = loss_of(model, micro[:2], "sum") / lengths.sum()
            gns.weigh(micro[2])
            loss.backward()
        optimizer.step()
        assert_right(gns, model, (ids, targets), weights=lengths)


def test_wrong_weights_are_refused():
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        gns.weigh(torch.ones(3))
        loss_of(model, batch).backward()
        with pytest.raises(ValueError, match=r"one for each of the 6 examples.*got \[3\]"):
            optimizer.step()


def test_weights_of_a_forward_that_is_not_called_are_missed():
    model, optimizer, batch = make()
    with watch(nn.ModuleDict({"net": model}), optimizer, weights=len) as gns:
        loss_of(model, batch).backward()
        with pytest.raises(ValueError, match=r"forward, which was not called"):
            optimizer.step()
        assert gns.reading is None


def test_frozen_parameters_are_in_neither_norm():
    model, optimizer, batch = make(tied=False)
    model.up.weight.requires_grad_(False)
    for p in model.down.parameters():
        p.requires_grad_(False)
    with watch(model, optimizer) as gns:
        plain(model, optimizer, batch)
        assert_right(gns, model, batch)
        assert "up.weight" not in gns.coverage().covered


def test_several_methods_in_one_pass():
    model, optimizer, batch = make()
    readings = []
    with watch(model, optimizer, method=["pepgns", "sogns"], sinks=[readings.append]) as gns:
        plain(model, optimizer, batch)
        assert [r.method for r in readings] == ["pepgns", "sogns"]
        assert_right(gns, model, batch)
        exact, approximate = (r.raw for r in readings)
        assert exact.big_sq_norm == approximate.big_sq_norm
        assert exact.parts_sq_norm != approximate.parts_sq_norm


def test_groups_add_up_to_the_total():
    model, optimizer, batch = make()
    for groups in ("layer", "kind", {"*norm*": "norms"}, lambda name: name[0]):
        with watch(model, optimizer, groups=groups) as gns:
            plain(model, optimizer, batch)
            reading = gns.reading
            assert len(reading.groups) > 1
            for field in ("tr_sigma", "grad_sq_norm"):
                total = sum(getattr(g, field) for g in reading.groups.values())
                assert total == pytest.approx(getattr(reading, field))
    assert set(reading.groups) == {"w", "n", "u", "d"}


class Positions(Tiny):
    """Looks its positions up as [T]: their gradient is summed over the batch."""

    def __init__(self):
        super().__init__()
        self.wpe = nn.Embedding(T, 8)

    def forward(self, ids):
        return self.head(self.body(self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))))


def partial(model, batch, missing):
    norms = gnsmon.per_example_sq_norms(model, loss_of, batch)
    return sum(float(v.sum()) for n, v in norms.items() if n not in missing) / len(batch[0]) ** 2


def assert_left_out(model, optimizer, batch, missing, words, loop=plain, **settings):
    with pytest.warns(RuntimeWarning, match=words):
        gns = watch(model, optimizer, **settings)
        loop(model, optimizer, batch)
        gns.close()
    assert set(gns.coverage().missing) == missing
    assert gns.reading.coverage < 1
    expected = partial(model, batch, missing)
    assert gns.reading.raw.parts_sq_norm == pytest.approx(expected, rel=1e-9)
    model.zero_grad()
    loss_of(model, batch).backward()
    big = sum(float(p.grad.square().sum()) for n, p in model.named_parameters() if n not in missing)
    assert gns.reading.raw.big_sq_norm == pytest.approx(big, rel=1e-9)


def test_a_lost_batch_axis_is_left_out_and_named():
    model, optimizer, batch = make(Positions)
    assert_left_out(model, optimizer, batch, {"wpe.weight"}, r"wpe: output has shape \[5, 8\]")


def test_as_many_examples_as_positions_are_told_apart_by_another_batch():
    model, optimizer, (ids, targets) = make(Positions)
    square, other = (ids[:T], targets[:T]), (ids[:3], targets[:3])
    with watch(model, optimizer) as gns:
        with pytest.warns(RuntimeWarning, match="which are the examples"):
            plain(model, optimizer, square)
        assert gns.skipped == {"nothing measured": 1}
        with pytest.warns(RuntimeWarning, match="wpe: output has shape"):
            plain(model, optimizer, other)
        plain(model, optimizer, square)
        assert set(gns.coverage().missing) == {"wpe.weight"}
        expected = partial(model, square, {"wpe.weight"})
        assert gns.reading.raw.parts_sq_norm == pytest.approx(expected, rel=1e-9)


class Functional(Tiny):
    """Uses a layer's weight behind the layer's back."""

    def forward(self, ids):
        return F.linear(self.body(self.wte(ids)), self.wte.weight)


def test_a_weight_used_by_a_function_is_found_by_the_proof():
    model, optimizer, batch = make(Functional, tied=False)
    with pytest.warns(RuntimeWarning, match="do not add up to .grad"):
        gns = watch(model, optimizer)
        plain(model, optimizer, batch)
        gns.close()
    assert set(gns.coverage().missing) == {"wte.weight", "head.weight"}
    assert "no gradient" in gns.coverage().missing["head.weight"]


def test_a_penalty_on_the_weights_is_found_by_the_proof():
    model, optimizer, batch = make()
    with pytest.warns(RuntimeWarning, match=r"(?s)up\.weight.*do not add up to \.grad"):
        gns = watch(model, optimizer)
        (loss_of(model, batch) + model.up.weight.square().sum()).backward()
        optimizer.step()
        gns.close()
    assert set(gns.coverage().missing) == {"up.weight"}


def test_a_model_without_parameters_is_attached_to():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    for method in ("pepgns", "microbatch", "random_signs"):
        with watch(nn.Tanh(), optimizer, method=method) as gns:
            assert gns.coverage().covered == []


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x * self.scale


class WithCustom(Tiny):
    def __init__(self):
        super().__init__()
        self.custom = Custom()

    def body(self, x):
        return self.custom(super().body(x))


def test_a_layer_without_a_rule_is_replayed():
    model, optimizer, batch = make(WithCustom)
    with watch(model, optimizer) as gns:
        plain(model, optimizer, batch)
        assert_right(gns, model, batch)


def test_a_rule_of_the_users(monkeypatch):
    model, optimizer, batch = make(WithCustom)

    from gnsmon.norms import rules

    monkeypatch.setattr(rules, "_TABLE", dict(rules._TABLE))

    @gnsmon.rule(Custom)
    def _(module, x, dy):
        return {"scale": gnsmon.Dense((x * dy).sum(1))}

    with watch(model, optimizer) as gns:
        plain(model, optimizer, batch)
        assert_right(gns, model, batch)


def test_a_faulty_rule_stops_neither_training_nor_the_other_layers(monkeypatch):
    from gnsmon.norms import rules

    monkeypatch.setattr(rules, "_TABLE", dict(rules._TABLE))

    @gnsmon.rule(Custom)
    def _(module, x, dy):
        raise KeyError("oops")

    model, optimizer, batch = make(WithCustom)
    assert_left_out(
        model, optimizer, batch, {"custom.scale"}, "its rule failed: KeyError", strict=False
    )


class Flattened(Tiny):
    def body(self, x):
        return super().body(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_rows_of_batch_times_positions_are_regrouped():
    model, optimizer, batch = make(Flattened)
    with watch(model, optimizer) as gns:
        plain(model, optimizer, batch)
        assert_right(gns, model, batch)


class FlattenedByPosition(Tiny):
    def body(self, x):
        rows = x.transpose(0, 1).reshape(-1, x.shape[2])
        return super().body(rows).unflatten(0, (T, len(x))).transpose(0, 1)


def test_rows_of_positions_times_batch_are_regrouped():
    model, optimizer, batch = make(FlattenedByPosition)
    with watch(model, optimizer) as gns:
        plain(model, optimizer, batch)
        assert_right(gns, model, batch)


class Odd(Tiny):
    """Merges batch and positions in an order that cannot be seen."""

    def body(self, x):
        order = torch.randperm(len(x) * T, generator=torch.Generator().manual_seed(0))
        rows = super().body(x.flatten(0, 1)[order])
        return rows[order.argsort()].unflatten(0, (len(x), T))


def test_rows_that_cannot_be_told_apart_are_left_out_and_named():
    model, optimizer, batch = make(Odd)
    missing = {f"{n}.{p}" for n in ("norm", "up", "down") for p in ("weight", "bias")}
    assert_left_out(model, optimizer, batch, missing, "its batch axis is lost")


class Repeated(Tiny):
    def body(self, x):
        return super().body(super().body(x))


def test_a_layer_called_twice_is_joined_from_the_second_step_on():
    model, optimizer, batch = make(Repeated)
    with pytest.warns(RuntimeWarning, match="called twice"):
        gns = watch(model, optimizer)
        plain(model, optimizer, batch)
    plain(model, optimizer, batch)
    assert_right(gns, model, batch)
    gns.close()


def time_major(model, optimizer, batch):
    optimizer.zero_grad()
    ids, targets = (t.T for t in batch)
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()


def test_examples_on_the_second_axis():
    model, optimizer, batch = make()
    with watch(model, optimizer, batch_dim=1) as gns:
        time_major(model, optimizer, batch)
        assert_right(gns, model, batch)


def test_gradients_that_were_not_cleared_are_noticed():
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        plain(model, optimizer, batch)
        with pytest.warns(RuntimeWarning, match="not cleared since an earlier step"):
            loss_of(model, batch).backward()
            optimizer.step()
        assert gns.skipped == {"nothing measured": 1}


def test_gradients_that_nobody_clears_are_left_out_and_named():
    """Of an optimizer over a part of the model, as when a backbone was not frozen."""
    model, _, batch = make()
    optimizer = torch.optim.SGD(model.down.parameters(), lr=0.0)
    with pytest.warns(RuntimeWarning, match="not cleared") as warned:
        gns = watch(model, optimizer)
        for _ in range(3):
            plain(model, optimizer, batch)
        gns.close()
    assert len(warned) == 1
    assert set(gns.coverage().covered) == {"down.weight", "down.bias"}


def test_a_hook_that_changes_a_gradient_is_noticed_when_it_begins():
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        plain(model, optimizer, batch)
        assert_right(gns, model, batch)
        handle = model.up.weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
        with pytest.warns(RuntimeWarning, match="changed by a hook"):
            plain(model, optimizer, batch)
        assert set(gns.coverage().missing) == {"up.weight"}
        handle.remove()
        plain(model, optimizer, batch)
        assert_right(gns, model, batch)


def test_several_forwards_in_one_backward_are_noticed():
    model, optimizer, batch = make()
    first, second = split(batch, [3, 3])
    with (
        watch(model, optimizer) as gns,
        pytest.warns(RuntimeWarning, match="several forward passes share one backward"),
    ):
        (loss_of(model, first) + loss_of(model, second)).backward()
        optimizer.step()
    assert gns.skipped == {"several passes": 1}


def test_a_failed_backward_is_noticed_and_survived():
    model, optimizer, batch = make()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise MemoryError

    handle = model.down.register_forward_hook(lambda m, a, y: Fails.apply(y))
    with watch(model, optimizer) as gns:
        with pytest.raises(MemoryError):
            loss_of(model, batch).backward()
        handle.remove()
        with pytest.warns(RuntimeWarning, match="ended in an exception"):
            plain(model, optimizer, batch)
        plain(model, optimizer, batch)
        assert_right(gns, model, batch)
        assert gns.skipped == {"backward failed": 1}


def test_a_step_without_a_tap_says_so():
    model, optimizer, batch = make()
    compiled = torch.compile(model, backend="eager")
    loss_of(compiled, batch).backward()
    with watch(model, optimizer) as gns, pytest.warns(RuntimeWarning, match="compiled and called"):
        optimizer.zero_grad()
        loss_of(compiled, batch).backward()
        optimizer.step()
    assert gns.reading is None
    assert gns.skipped == {"no tap fired": 1}


def test_one_example_is_no_measurement():
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns, pytest.warns(RuntimeWarning, match="one part"):
        plain(model, optimizer, split(batch, [1, 5])[0])
    assert gns.skipped == {"one part": 1}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_whole(backend):
    model, optimizer, batch = make(tied=False)
    with watch(model, optimizer) as gns:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for loop in (plain, accumulation, clipped):
            loop(compiled, optimizer, batch)
            assert_right(gns, model, batch)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_tied_weights_are_measured():
    model, optimizer, batch = make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with watch(model, optimizer) as gns:
        for loop in (plain, accumulation):
            loop(compiled, optimizer, batch)
            assert_right(gns, model, batch)
    assert not gns.coverage().missing


class Dropping(Tiny):
    def body(self, x):
        return F.dropout(super().body(x), 0.2)


def train(monitored, kind, every=1):
    model, _, _ = make(kind)
    model.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gns = watch(model, optimizer, every=every) if monitored else None
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(3)
    losses = []
    for _ in range(8):
        batch = torch.randint(0, VOCABULARY, (2, B, T), generator=generator).unbind()
        optimizer.zero_grad()
        for micro in split(batch, [3, 3]):
            loss = loss_of(model, micro) / 2
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    random = torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters()]
    if gns:
        assert gns.reading is not None
        gns.close()
    return model, optimizer, torch.stack(losses), gradients, random


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", [Tiny, Dropping, Checkpointed])
def test_training_with_the_monitor_is_the_same_training(kind, every):
    bare, monitored = train(False, kind), train(True, kind, every)
    assert torch.equal(bare[2], monitored[2])
    assert all(map(torch.equal, bare[3], monitored[3]))
    assert torch.equal(bare[4], monitored[4])
    states = bare[0].state_dict(), monitored[0].state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_close_leaves_the_model_as_it_was():
    model, optimizer, batch = make()
    before = {id(m): set(vars(m)) for m in model.modules()}
    gns = watch(model, optimizer)
    plain(model, optimizer, batch)
    gns.close()
    gns.close()
    assert {id(m): set(vars(m)) for m in model.modules()} == before
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs
    assert not optimizer._optimizer_step_post_hooks
    gone = weakref.ref(gns)
    del gns
    import gc

    gc.collect()
    assert gone() is None


def test_copies_of_the_model_do_not_feed_the_monitor():
    model, optimizer, batch = make()
    with watch(model, optimizer) as gns:
        twin = copy.deepcopy(model)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        optimizer.zero_grad()
        for other in (twin, loaded):
            loss_of(other, batch).backward()
        loss_of(model, batch).backward()
        optimizer.step()
        assert_right(gns, model, batch)
        assert pickle.loads(pickle.dumps(twin.up))(torch.ones(2, 8).double()).shape == (2, 16)


def test_checkpointing_keeps_its_memory():
    """No activation inside a checkpoint is alive after forward."""

    def held(kind, monitored):
        model, optimizer, batch = make(kind, tied=False)
        alive = []
        model.up.register_forward_hook(lambda m, a, y: alive.append(weakref.ref(a[0])))
        gns = watch(model, optimizer) if monitored else None
        loss = loss_of(model, batch)
        count = sum(r() is not None for r in alive)
        loss.backward()
        if gns:
            optimizer.step()
            assert gns.reading is not None
            gns.close()
        return count

    assert held(Tiny, monitored=False) == 1
    assert held(Checkpointed, monitored=False) == 0
    assert held(Checkpointed, monitored=True) == 0


def test_only_measured_steps_cost_anything():
    model, optimizer, batch = make()
    with watch(model, optimizer, every=4) as gns:
        seen = []
        for _ in range(9):
            plain(model, optimizer, batch)
            seen.append(gns.reading.step)
        assert seen == [0, 0, 0, 0, 4, 4, 4, 4, 8]
        ids = [id(tap.probe.grad_fn) for tap in gns._sources[0][0].taps.layers]
        assert ids
        logits = model(batch[0])
        names = {type(f).__name__ for f in graph(logits.grad_fn)}
        assert "_TapBackward" not in names


def paced(gns, now, extra):
    """A loop whose steps take a second, and measured ones `extra` more."""
    gns._clock._clock = lambda: now[0]

    def take_step(model, optimizer, batch):
        now[0] += 1 + extra * any(collector.wanted for collector, _ in gns._sources)
        plain(model, optimizer, batch)

    return take_step


def test_as_many_steps_are_measured_as_the_share_pays_for(tmp_path, caplog):
    model, optimizer, batch = make()
    readings, now = [], [0.0]
    settings = {"every": "auto", "overhead": 0.05, "sinks": [readings.append]}
    with caplog.at_level("INFO", "gnsmon"), watch(model, optimizer, **settings) as gns:
        take_step = paced(gns, now, extra=0.5)
        for _ in range(500):
            take_step(model, optimizer, batch)
        state = gns.state_dict()
    steps = [r.step for r in readings]
    assert steps[:6] == [0, 1, 5, 13, 14, 18]
    assert len([s for s in steps if s < 60]) == 15
    # 0.5 / (n + 0.5) = 0.05
    assert gns._clock.interval == pytest.approx(9.5)
    assert [r.overhead for r in readings[:5]] == [None] * 5
    assert readings[-1].overhead == pytest.approx(0.05, rel=0.2)
    assert "one step in 9.5 is measured, which takes 50 % longer" in caplog.text

    readings.clear()
    with watch(model, optimizer, **settings) as resumed:
        resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
        take_step = paced(resumed, now, extra=0.5)
        for _ in range(50):
            take_step(model, optimizer, batch)
    assert readings[0].step == state["pace"]["next"]
    assert 3 <= len(readings) <= 9

    with watch(model, optimizer, **settings) as older:
        older.load_state_dict({k: v for k, v in state.items() if k != "pace"})
        plain(model, optimizer, batch)
        assert older.reading.step == 500


@pytest.mark.parametrize("every", ["auto", 2])
def test_exact_steps_are_counted_among_the_measured_ones(every):
    model, optimizer, batch = make()
    exact = []
    settings = {"method": "sogns", "calibrate_every": 3, "every": every}
    with watch(model, optimizer, **settings) as gns:
        collector = gns._sources[0][0]
        take_step = paced(gns, [0.0], extra=0.5)
        for _ in range(40):
            if collector.wanted:
                exact.append(collector._exact)
            take_step(model, optimizer, batch)
    assert len(exact) > 9
    assert exact == [i % 3 == 0 for i in range(len(exact))]


def test_the_header_says_how_steps_are_chosen():
    model, optimizer, batch = make()
    for settings, said in (({"every": "auto"}, ("auto", 0.01)), ({"every": 3}, (3, None))):
        headers = []
        with watch(model, optimizer, sinks=[Heads(headers)], **settings):
            plain(model, optimizer, batch)
        assert (headers[0]["every"], headers[0]["overhead"]) == said


class Heads:
    def __init__(self, headers):
        self.headers = headers

    def start(self, header, step):
        self.headers.append(header)

    def __call__(self, reading):
        pass


def graph(node, seen=None):
    seen = set() if seen is None else seen
    if node is not None and node not in seen:
        seen.add(node)
        for following, _ in node.next_functions:
            graph(following, seen)
    return seen


def test_state_continues():
    model, optimizer, batch = make()
    settings = {"half_life": "40 examples", "every": 2}
    with watch(model, optimizer, **settings) as whole:
        for _ in range(6):
            plain(model, optimizer, batch)
    with watch(model, optimizer, **settings) as first:
        for _ in range(3):
            plain(model, optimizer, batch)
        state = pickle.loads(pickle.dumps(first.state_dict()))
    with watch(model, optimizer, **settings) as second:
        second.load_state_dict(state)
        for _ in range(3):
            plain(model, optimizer, batch)
    assert second.reading.step == whole.reading.step == 4
    assert second.reading.n_eff == pytest.approx(whole.reading.n_eff)
    assert second.reading.tr_sigma == pytest.approx(whole.reading.tr_sigma)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_takes_no_step_leaves_the_log_alone(tmp_path, resumed):
    """One that fails before its first step, or whose state is refused, has nothing to say."""
    model, optimizer, batch = make()
    with watch(model, optimizer, run_dir=tmp_path) as gns:
        state = gns.state_dict()
        for _ in range(3):
            plain(model, optimizer, batch)
        state |= {"step": 1}
    before = (tmp_path / "gns.jsonl").read_text()
    with watch(model, optimizer, run_dir=tmp_path) as gns:
        if resumed:
            gns.load_state_dict(state)
    assert (tmp_path / "gns.jsonl").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["gns.jsonl"]


def test_state_of_another_run_is_refused():
    model, optimizer, batch = make()
    with watch(model, optimizer, half_life="40 examples") as gns:
        plain(model, optimizer, batch)
        state = gns.state_dict()
    for settings, words in (
        ({"groups": "kind"}, "groups: expected"),
        ({"half_life": "9 tokens"}, "unit: expected 'tokens', got 'examples'"),
        ({"method": ["pepgns", "sogns"], "half_life": "9 examples"}, "'sogns' is not in the saved"),
    ):
        gns = watch(model, optimizer, **settings)
        before = gns.state_dict()
        with pytest.raises(ValueError, match=words):
            gns.load_state_dict(state)
        assert gns.state_dict() == before  # nothing is taken in
        gns.close()


@pytest.mark.parametrize(("owner", "name"), [(PerExample, "_share"), (Estimator, "update")])
def test_repeated_faults_switch_the_monitor_off(monkeypatch, owner, name):
    model, optimizer, batch = make()

    def fails(self, *_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(owner, name, fails)
    with pytest.warns(RuntimeWarning) as warned:
        gns = watch(model, optimizer, strict=False)
        for _ in range(5):
            plain(model, optimizer, batch)
        gns.close()
    assert gns.skipped == {"fault": 3}
    assert [("switched off" in str(w.message)) for w in warned] == [False, True]


@pytest.mark.filterwarnings("ignore:gnsmon")
def test_coverage_of_a_model_of_which_no_step_can_be_measured(tmp_path):
    """As many sequences as positions: which axis is that of the examples?"""
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gnsmon.attach(model, optimizer, every=1, run_dir=tmp_path) as gns:
        assert gns.coverage().fraction == 1.0  # as far as is known
        for size in (6, 6, 4):
            model(torch.randn(size, 6, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            coverage = gns.coverage()
            assert coverage.fraction == (size == 4)
            assert len(coverage.missing) == (0 if size == 4 else 2)
            if size == 6:
                assert "6 is both the batch size and another axis" in str(coverage)

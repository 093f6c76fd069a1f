"""What a real Trainer's callback reads is what a plain loop reads, and training does not change."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gnsmon

pl = pytest.importorskip("lightning.pytorch")


from gnsmon.lightning import GNSCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "The '(train|val)_dataloader' does not have many workers",
        "You defined a `validation_step` but have no `val_dataloader`",
        "You are trying to `self.log\\(\\)` but the `self.trainer` reference",
        "Starting from v1.9.0, `tensorboardX` has been removed",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    )
]
FEATURES, CLASSES, BATCH, BATCHES = 5, 3, 6, 14


def data(n=BATCH * BATCHES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, FEATURES, generator=generator, dtype=dtype)
    y = x[:, :CLASSES].argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


class Own(pl.LightningModule):
    """Its loss calls `self(x)`."""

    def __init__(self, lr=0.1, momentum=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.lr, self.momentum = lr, momentum
        self.net = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES))
        self.double()

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, _):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class Inner(Own):
    """Has no forward of its own: its loss calls `self.net(x)`."""

    forward = pl.LightningModule.forward

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Manual(Inner):
    """Optimises by hand, two microbatches a step, with a clip of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, i):
        self.manual_backward(self.loss(batch) / 2)
        if i % 2:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, 1e-2, "norm")
            optimizer.step()
            optimizer.zero_grad()


def trainer(*callbacks, **kwargs):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **quiet | kwargs)


def fit(module, loader=None, validation=None, ckpt_path=None, settings=None, **kwargs):
    """The callback and its readings, after a fit."""
    readings = []
    settings = {"every": 1, "strict": True, "sinks": [readings.append]} | (settings or {})
    callback = GNSCallback(**settings)
    run = trainer(callback, **kwargs)
    run.fit(module, loader or data(), validation, ckpt_path=ckpt_path)
    return callback, readings


def plain(module, loader=None, *, window=1, epochs=1, clip=None, autocast=False, **settings):
    """The readings of a loop by hand over the same batches, each window's loss its mean."""
    optimizer, readings = module.configure_optimizers(), []
    settings = {"every": 1, "strict": True, "run_dir": "plain"} | settings
    model = module if isinstance(module, Own) and type(module) is Own else module.net
    with gnsmon.attach(model, optimizer, sinks=[readings.append], **settings):
        for _ in range(epochs):
            batches = iter(loader or data())
            while micro := list(islice(batches, window)):
                optimizer.zero_grad()
                for batch in micro:
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                        loss = module.loss(batch)
                    (loss / len(micro)).backward()
                if clip:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
    return readings


def assert_same(readings, others, rtol=1e-9):
    assert len(readings) == len(others) > 0
    for one, other in zip(readings, others, strict=True):
        assert (one.step, one.examples, one.status) == (other.step, other.examples, other.status)
        assert one.coverage == other.coverage == 1.0
        for key in ("b_simple", "low", "high", "grad_sq_norm", "tr_sigma"):
            of_one, of_other = getattr(one, key), getattr(other, key)
            assert (of_one is None) == (of_other is None)
            assert of_one is None or of_one == pytest.approx(of_other, rel=rtol)
        for key, value in vars(one.raw).items():
            assert value == pytest.approx(getattr(other.raw, key), rel=rtol)


LOOPS = {
    "plain": ({}, {}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"window": 2}),
    "accumulation, the last window short": ({"accumulate_grad_batches": 3}, {"window": 3}),
    "clipping": ({"gradient_clip_val": 0.01}, {"clip": 0.01}),
    "accumulation and clipping, two epochs": (
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01, "max_epochs": 2},
        {"window": 3, "clip": 0.01, "epochs": 2},
    ),
}


@pytest.mark.parametrize("kind", [Own, Inner])
@pytest.mark.parametrize("loop", LOOPS)
def test_readings_are_those_of_a_plain_loop(loop, kind):
    ours, theirs = LOOPS[loop]
    lr = 0.0 if "short" in loop or "two epochs" in loop else 0.1  # Lightning's steps are shorter
    _, readings = fit(kind(lr=lr), **ours)
    assert_same(readings, plain(kind(lr=lr), **theirs))


def test_norms_are_those_of_brute_force_where_a_window_is_cut_short():
    module = Inner(lr=0.0)
    _, readings = fit(module, accumulate_grad_batches=3)
    sizes, done = [18, 18, 18, 18, 12], 0
    x, y = data().dataset.tensors
    for reading, size in zip(readings, sizes, strict=True):
        batch = x[done : done + size], y[done : done + size]
        each = gnsmon.per_example_sq_norms(module, Inner.loss, batch)
        parts = sum(float(n.sum()) for n in each.values()) / size**2
        gradients = torch.autograd.grad(module.loss(batch), list(module.parameters()))
        assert reading.raw.parts_sq_norm == pytest.approx(parts, rel=1e-9)
        assert reading.raw.big_sq_norm == pytest.approx(
            sum(float(g.square().sum()) for g in gradients), rel=1e-9
        )
        done += size


def test_manual_optimisation():
    _, readings = fit(Manual())
    assert_same(readings, plain(Inner(), window=2, clip=1e-2))


def test_bf16():
    _, readings = fit(Own().float(), data(dtype=torch.float32), precision="bf16-mixed")
    others = plain(Own().float(), data(dtype=torch.float32), autocast=True)
    assert_same(readings, others, rtol=1e-6)


def test_validation_in_between_disturbs_nothing():
    _, readings = fit(
        Own(),
        validation=data(),
        accumulate_grad_batches=2,
        val_check_interval=1,
        num_sanity_val_steps=2,
    )
    assert_same(readings, plain(Own(), window=2))


@pytest.mark.parametrize("method", ["microbatch", "subbatch", "random_signs"])
@pytest.mark.parametrize("kind", [Own, Inner])
def test_other_methods(kind, method):
    class Told(kind):
        def loss(self, batch):
            x, y = batch
            model = self if kind is Own else self.net
            losses = F.cross_entropy(model(x), y, reduction="none")
            if gns and gns[-1].monitor:
                gns[-1].monitor.losses(losses)
            return losses.mean()

    gns, readings = [], []
    gns.append(GNSCallback(method=method, every=1, strict=True, sinks=[readings.append]))
    trainer(gns[-1], accumulate_grad_batches=2).fit(Told(), data())
    assert [r.examples for r in readings] == [2 * BATCH] * (BATCHES // 2)
    if method != "random_signs":
        gns.clear()
        assert_same(readings, plain(kind(), window=2, method=method))


@pytest.mark.parametrize("kind", [Own, Inner, Manual])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bitwise_the_same(kind, precision):
    settings = {
        "max_epochs": 2,
        "precision": precision,
        **({} if kind is Manual else {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    }
    bare, watched = kind(momentum=0.9).float(), kind(momentum=0.9).float()
    before = hooks(watched)
    trainer(**settings).fit(bare, data(dtype=torch.float32))
    fit(watched, data(dtype=torch.float32), **settings)
    assert bare.state_dict().keys() == watched.state_dict().keys()
    for name, value in bare.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert hooks(watched) == before


def hooks(model):
    """Every hook on the modules and the parameters, and what instances carry beside."""
    found = []
    for path, module in model.named_modules():
        for kind, value in sorted(vars(module).items()):
            if "hooks" in kind and value:
                found.append((path, kind, len(value)))
        found.append((path, "forward" in vars(module)))
    return found + [(n, len(p._backward_hooks or ())) for n, p in model.named_parameters()]

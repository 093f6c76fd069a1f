"""What a real Trainer's callback reads is what a plain loop reads, and training does not change."""

import csv
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import gnsmon
from gnsmon.sinks import read_log

pl = pytest.importorskip("lightning.pytorch")


from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from lightning_worker import fit_on_rank  # noqa: E402
from ranks_worker import in_processes  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import (  # noqa: E402
    EventAccumulator,
)

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


def fit(
    module, loader=None, validation=None, *, ckpt_path=None, callbacks=(), settings=None, **kwargs
):
    """The callback and its readings, after a fit."""
    readings = []
    settings = {"every": 1, "strict": True, "sinks": [readings.append]} | (settings or {})
    callback = GNSCallback(**settings)
    run = trainer(callback, *callbacks, **kwargs)
    run.fit(module, loader or data(), validation, ckpt_path=ckpt_path)
    return callback, readings


def plain(module, loader=None, *, window=1, epochs=1, clip=None, autocast=False, **settings):
    """The readings of a loop by hand over the same batches, each window's loss its mean."""
    optimizer, readings = module.configure_optimizers(), []
    settings = {"every": 1, "strict": True, "run_dir": "plain"} | settings
    own = type(module).forward is not pl.LightningModule.forward
    model = module if own else module.net
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


def test_a_net_and_a_head():
    """Where no forward of the whole is called, its layers tell of the batch."""

    class Headed(Inner):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.head = nn.Linear(CLASSES, CLASSES).double()

        def loss(self, batch):
            return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    module = Headed(lr=0.0)
    _, readings = fit(module)
    for reading, batch in zip(readings, data(), strict=True):
        each = gnsmon.per_example_sq_norms(module, Headed.loss, batch)
        parts = sum(float(n.sum()) for n in each.values()) / BATCH**2
        assert reading.raw.parts_sq_norm == pytest.approx(parts, rel=1e-9)
        assert reading.coverage == 1.0


def test_manual_optimisation():
    _, readings = fit(Manual())
    assert_same(readings, plain(Inner(), window=2, clip=1e-2))


def test_bf16():
    _, readings = fit(Own().float(), data(dtype=torch.float32), precision="bf16-mixed")
    others = plain(Own().float(), data(dtype=torch.float32), autocast=True)
    assert_same(readings, others, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", [Own, Inner])
@pytest.mark.parametrize("whole", [True, False])
def test_compiled(kind, whole):
    class Quiet(kind):
        """Its step logs nothing: Lightning 2.6 cannot compile that with torch 2.13."""

        def training_step(self, batch, _):
            return self.loss(batch)

    module = Quiet()
    if whole:
        module = torch.compile(module, backend="aot_eager")
    else:
        module.net = torch.compile(module.net, backend="aot_eager")
    callback, readings = fit(module)
    assert_same(readings, plain(kind()), rtol=1e-6)
    assert not callback.monitor.skipped


@pytest.mark.parametrize("kind", [Own, Inner])
def test_weights(kind):
    def weigh(x):
        return (x[:, 0] > 0).double() + 1

    class Weighted(kind):
        def loss(self, batch):
            x, y = batch
            w = weigh(x)
            losses = F.cross_entropy((self if kind is Own else self.net)(x), y, reduction="none")
            return (w * losses).sum() / w.sum()

    _, readings = fit(Weighted(), settings={"weights": weigh})
    assert_same(readings, plain(Weighted(), weights=weigh))
    assert readings[0].raw.sum_sq_weights != pytest.approx(1 / BATCH)


@pytest.mark.filterwarnings("ignore:gnsmon. .* of the trainable parameters are measured")
def test_layers_used_twice_in_one_forward():
    class Tied(Inner):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            again = nn.Linear(7, 7).double()
            self.net = nn.Sequential(self.net[0], again, nn.Tanh(), again, self.net[2])

    _, readings = fit(Tied())
    assert_same(readings[1:], plain(Tied())[1:])


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


def test_attached_only_during_a_fit():
    callback = GNSCallback(every=1, strict=True)
    module, run = Own(), trainer(callback, max_epochs=1)
    before = hooks(module)
    for epochs in (1, 2):  # the second fit goes on with the first
        run.fit_loop.max_epochs = epochs
        run.fit(module, data())
        assert hooks(module) == before
        assert callback.monitor.closed
        assert callback.monitor.step == callback.monitor.reading.step + 1 == epochs * BATCHES
    steps = [r["step"] for r in read_log(callback.monitor.run_dir).readings]
    assert steps == list(range(2 * BATCHES))
    run = trainer(callback, default_root_dir="another")
    run.fit(module, data())  # another trainer's run is another run
    assert [r["step"] for r in read_log("another").readings] == list(range(BATCHES))
    run.validate(module, data())
    assert callback.monitor.step == BATCHES


def test_an_exception_detaches():
    class Failing(Own):
        def training_step(self, batch, i):
            if i == 12:
                raise KeyError("data")
            return super().training_step(batch, i)

    module, callback = Failing(), GNSCallback(every=1, strict=True)
    before = hooks(module)
    with pytest.raises(KeyError, match="data"):
        trainer(callback).fit(module, data())
    assert hooks(module) == before
    assert callback.monitor.closed
    assert len(read_log(".").readings) == 12
    assert read_log(".").advice


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("window", [1, 2])
def test_resumed_it_goes_on_as_if_never_stopped(window):
    def run(epochs, folder, ckpt_path=None):
        keep = ModelCheckpoint(f"{folder}/kept", "{epoch}", save_top_k=-1)
        return fit(
            Own(momentum=0.9),
            data(3 * window * BATCH),
            callbacks=[keep],
            ckpt_path=ckpt_path,
            max_epochs=epochs,
            accumulate_grad_batches=window,
            enable_checkpointing=True,
            default_root_dir=folder,
        )

    whole, readings = run(2, "whole")
    _, first = run(1, "parts")
    saved = torch.load("parts/kept/epoch=0.ckpt", weights_only=True)
    assert saved["callbacks"]["gnsmon"]["step"] == 3
    resumed, second = run(2, "parts", "parts/kept/epoch=0.ckpt")
    assert [r.step for r in second] == [3, 4, 5]
    assert_same(first + second, readings, rtol=1e-12)
    assert resumed.state_dict() == whole.state_dict()
    log = read_log("parts")
    assert [r["step"] for r in log.readings] == [0, 1, 2, 3, 4, 5]
    assert [h["step"] for h in log.headers] == [0, 3]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_that_is_tested_is_not_gone_on_from():
    class Tested(Own):
        def test_step(self, batch, _):
            self.loss(batch)

    module, callback = Tested(), GNSCallback(every=1, strict=True, run_dir="log")
    keep = ModelCheckpoint("kept", "{step}", every_n_train_steps=3, save_top_k=-1)
    run = trainer(callback, keep, enable_checkpointing=True, max_steps=5, max_epochs=None)
    run.fit(module, data())
    run.test(module, data(), ckpt_path="kept/step=3.ckpt", verbose=False)
    run.fit_loop.epoch_loop.max_steps = 7
    run.fit(module, data())
    assert run.global_step == callback.monitor.step == 7
    assert [r["step"] for r in read_log("log").readings] == list(range(7))


def test_a_checkpoint_of_other_settings_is_refused_and_the_log_left_alone():
    run = trainer(GNSCallback(every=1, run_dir="log"))
    run.fit(Own(), data())
    run.save_checkpoint("kept.ckpt")
    before = Path("log/gns.jsonl").read_text()
    words = r"averages in the checkpoint do not fit: unit: .* checkpoint\['callbacks'\]\['gnsmon'\]"
    other = trainer(GNSCallback(half_life="90 examples", run_dir="log"), max_epochs=2)
    with pytest.raises(ValueError, match=words):
        other.fit(Own(), data(), ckpt_path="kept.ckpt")
    assert Path("log/gns.jsonl").read_text() == before


def test_a_checkpoint_that_knows_nothing_of_it_starts_afresh():
    run = trainer()
    run.fit(Own(), data())
    run.save_checkpoint("bare.ckpt")
    _, readings = fit(Own(), max_epochs=2, ckpt_path="bare.ckpt")
    assert [r.step for r in readings] == list(range(BATCHES))


def test_steps_end_in_the_middle_of_a_window():
    callback, readings = fit(Own(), max_steps=3, max_epochs=2, accumulate_grad_batches=3)
    assert [r.examples for r in readings] == [18, 18, 18]
    assert not callback.monitor.skipped


@pytest.mark.parametrize("settings", [{"fast_dev_run": 2}, {"overfit_batches": 2}], ids=str)
def test_shortened_runs(settings):
    callback, readings = fit(Own(), **settings)
    assert [r.step for r in readings] == [0, 1]
    assert not callback.monitor.skipped


def test_losses_scaled_for_half_precision_and_overflows():
    class Overflowing(Own):
        def training_step(self, batch, i):
            return super().training_step(batch, i) * (torch.inf if i == 2 else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    loader = data(dtype=torch.float32)
    kinds = Own(lr=0.0).float(), Overflowing(lr=0.0).float()
    callback, readings = fit(kinds[1], loader, plugins=[precision], gradient_clip_val=1e-3)
    assert not callback.monitor.skipped  # Lightning does not step where the loss overflows
    others = plain(kinds[0], loader)
    assert len(readings) == len(others) - 1
    for one, other in zip(readings, others[:2] + others[3:], strict=True):
        assert one.raw.grad_sq_norm == pytest.approx(other.raw.grad_sq_norm, rel=0.05)
        assert one.raw.tr_sigma == pytest.approx(other.raw.tr_sigma, rel=0.05)


class Gan(pl.LightningModule):
    """Two nets, each with a loss and an optimizer of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, FEATURES))
        self.critic = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))
        self.double()

    def losses(self, batch, noise):
        """The loss of each net, one after the other."""
        one = torch.ones(len(noise), 1).double()
        fake = self.generator(noise)
        yield F.binary_cross_entropy_with_logits(self.critic(fake), one)
        both = torch.cat([batch, fake.detach()])
        yield F.binary_cross_entropy_with_logits(self.critic(both), torch.cat([one, 1 - one]))

    def training_step(self, batch, i):
        noise = torch.randn(len(batch[0]), 4, generator=torch.Generator().manual_seed(i)).double()
        losses = self.losses(batch[0], noise)
        for loss, optimizer in zip(losses, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        nets = self.generator, self.critic
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]


def test_two_nets_have_a_callback_each():
    readings = {"generator": [], "critic": []}
    callbacks = [
        GNSCallback(module=name, every=1, strict=True, sinks=[sink.append])
        for name, sink in readings.items()
    ]
    run = trainer(*callbacks, logger=CSVLogger("."))
    gan = Gan()
    run.fit(gan, data())
    others = gans_by_hand(Gan())
    for callback, name in zip(callbacks, readings, strict=True):
        assert not callback.monitor.skipped
        assert_same(readings[name], others[name])
        assert read_log(f"{run.logger.log_dir}/{name}").column("b_simple").size == BATCHES
    header = Path(run.logger.log_dir, "metrics.csv").read_text().partition("\n")[0]
    assert {"gns/generator/tr_sigma", "gns/critic/tr_sigma"} < set(header.split(","))
    run.save_checkpoint("gan.ckpt")
    states = torch.load("gan.ckpt", weights_only=True)["callbacks"]
    assert {"gnsmon:generator", "gnsmon:critic"} <= states.keys()


def gans_by_hand(gan):
    """Readings of each net where all gradients are cleared before each loss."""
    gan.optimizers = gan.configure_optimizers
    gan.manual_backward = lambda loss: loss.backward()
    nets, optimizers = (gan.generator, gan.critic), gan.optimizers()
    gan.optimizers = lambda: optimizers
    readings = {"generator": [], "critic": []}
    monitors = [
        gnsmon.attach(net, o, every=1, strict=True, run_dir=name, sinks=[readings[name].append])
        for net, o, name in zip(nets, optimizers, readings, strict=True)
    ]
    for i, batch in enumerate(data()):
        gan.training_step(batch, i)
    for monitor in monitors:
        monitor.close()
    return readings


@pytest.mark.filterwarnings("ignore:gnsmon. .* of the trainable parameters are measured")
def test_several_losses_are_not_mixed():
    """Of the whole module, once it is clear that its optimizers step after different losses."""
    with pytest.raises(ValueError, match=r"GNSCallback\(module=\.\.\.\)"):
        fit(Gan())
    module, callback = Gan(), GNSCallback(every=1, run_dir="another")
    before = hooks(module)
    with pytest.warns(RuntimeWarning, match="different losses"):
        trainer(callback).fit(module, data())
    assert callback.monitor.closed
    assert hooks(module) == before


class TwoOptimizers(Inner):
    """One loss, two optimizers, one of which steps more rarely."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, i):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizers[0].step()
        if i % 3 == 0:
            optimizers[1].step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=self.lr) for i in (0, 2)]


def test_two_optimizers_of_one_loss():
    callback, readings = fit(TwoOptimizers(lr=0.0))
    assert_same(readings, plain(Inner(lr=0.0)))
    assert not callback.monitor.skipped


def test_loggers_have_what_was_read(capsys):
    loggers = TensorBoardLogger("tb"), CSVLogger("csv")
    callback, readings = fit(
        Own(), logger=loggers, max_epochs=2, accumulate_grad_batches=2, enable_progress_bar=True
    )
    events = EventAccumulator(loggers[0].log_dir, size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    with open(f"{loggers[1].log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for key in ("b_simple", "tr_sigma", "grad_sq_norm", "batch_size"):
        name = {"batch_size": "examples"}.get(key, key)
        wanted = {r.step: getattr(r, name) for r in readings if getattr(r, name) is not None}
        assert len(wanted) > 3
        in_csv = {int(r["step"]): float(r[f"gns/{key}"]) for r in rows if r[f"gns/{key}"]}
        in_tb = {e.step: e.value for e in events.Scalars(f"gns/{key}")}
        assert in_csv == pytest.approx(wanted)
        assert in_tb == pytest.approx(wanted, rel=1e-5)
    assert any(key.startswith("gns/layer/") for key in rows[0])
    (advice,) = events.Tensors("gns/advice/text_summary")
    text = advice.tensor_proto.string_val[0].decode()
    assert text.replace("  \n", "\n") == str(callback.advice())
    assert callback.monitor.run_dir == Path(loggers[0].log_dir)
    assert len(read_log(loggers[0].log_dir).readings) == len(readings)
    shown = capsys.readouterr().out
    assert "b_simple" in shown
    assert f"{readings[-1].b_simple:.3f}" in shown


def test_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=".", offline=True)
    logged = []
    monkeypatch.setattr(
        type(logger.experiment), "log", lambda _, metrics, **__: logged.append(metrics)
    )
    callback, readings = fit(Own(), logger=logger)
    ours = [m for m in logged if "gns/tr_sigma" in m]
    assert [m["gns/tr_sigma"] for m in ours] == [r.tr_sigma for r in readings]
    assert [m["trainer/global_step"] for m in ours] == [r.step for r in readings]
    assert logger.experiment.summary["gns/advice"] == str(callback.advice())
    assert callback.monitor.run_dir == Path("lightning_logs") / logger.version
    logger.experiment.finish()


def test_run_dir_and_loggers_of_ones_own():
    fit(Own(), settings={"run_dir": "here"}, logger=CSVLogger("csv"))
    assert len(read_log("here").readings) == BATCHES


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown setting 'evry'; did you mean 'every'"):
        GNSCallback(evry=5)
    with pytest.raises(ValueError, match="part of Own, got 'nett'"):
        fit(Own(), settings={"module": "nett"})
    with pytest.raises(ValueError, match="no fit has begun"):
        GNSCallback().advice()
    Path("gns.toml").write_text("every = 7\n")
    assert GNSCallback(config="gns.toml", level=0.9)._config == gnsmon.MonitorConfig(
        every=7, level=0.9
    )


def test_without_lightning_it_says_what_to_install():
    code = "import sys; sys.modules['lightning.pytorch'] = None; import gnsmon.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "gnsmon[lightning]"' in done.stderr


def run_on_ranks(tmp_path, module, settings, **trainer_settings):
    """What each of two ranks found."""
    arguments = module, data(), settings, {"strategy": "ddp", **trainer_settings}
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    in_processes(fit_on_rank, *arguments, folder=folder)
    kind = "" if settings else "-bare"
    return [torch.load(folder / f"rank{rank}{kind}.pt", weights_only=False) for rank in (0, 1)]


def batches_of_ranks():
    """The microbatches of both ranks, in turn: a sampler deals the examples out one by one."""
    x, y = data().dataset.tensors
    dealt = [list(zip(x[r::2].split(BATCH), y[r::2].split(BATCH), strict=True)) for r in (0, 1)]
    return [batch for both in zip(*dealt, strict=True) for batch in both]


class Sharded(Inner):
    """Its net is sharded by FSDP2, as `ModelParallelStrategy` wants it."""

    def configure_model(self):
        for module in (self.net[0], self.net[2], self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "window"),
    [
        (Own, "ranks", 1),
        (Inner, "ranks", 3),
        (Manual, "ranks", 2),
        (Own, "pepgns", 3),
        (Sharded, "pepgns", 1),
        (Sharded, "ranks", 3),
    ],
)
def test_two_ranks(tmp_path, kind, method, window):
    lr = 0.0 if window == 3 else 0.1
    settings = {"accumulate_grad_batches": window} if kind is not Manual else {}
    if kind is Sharded:
        settings["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    found = run_on_ranks(tmp_path, kind(lr=lr), {"method": method}, **settings)
    batches = batches_of_ranks()[: 12 if kind is Manual else None]  # of seven it leaves one
    others = plain(
        Inner(lr=lr),
        batches,
        window=2 * window,
        clip=1e-2 if kind is Manual else None,
        method="microbatch" if method == "ranks" else method,
    )
    assert_same(found[0]["readings"], others)
    assert found[0]["state"] == found[1]["state"]
    assert len(read_log(next(tmp_path.glob("run*"))).readings) == len(others)


@pytest.mark.slow
def test_two_ranks_train_bitwise_the_same(tmp_path):
    watched = run_on_ranks(tmp_path, Own(momentum=0.9), {"method": "ranks"})
    bare = run_on_ranks(tmp_path, Own(momentum=0.9), {})
    for one, other in zip(watched, bare, strict=True):
        assert all(torch.equal(v, other["weights"][n]) for n, v in one["weights"].items())

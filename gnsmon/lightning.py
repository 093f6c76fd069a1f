"""A Lightning callback that measures the gradient noise scale of what its Trainer trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gnsmon.advice import Advice
from gnsmon.config import MonitorConfig, load
from gnsmon.estimators.health import Health
from gnsmon.estimators.values import Reading
from gnsmon.monitor import Monitor, attach
from gnsmon.sinks.keys import health_scalars, prefix, scalars

try:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
except Exception as error:  # a torchvision that does not fit torch is a RuntimeError
    raise ImportError(
        f'gnsmon.lightning needs Lightning: pip install "gnsmon[lightning]" ({error})'
    ) from error


SEVERAL_LOSSES = (
    "the optimizers step after different losses, and there is no noise scale of both together: "
    "measure each part of the model by a callback of its own, GNSCallback(module=...)"
)


class GNSCallback(pl.Callback):
    """Measures a fit; nothing else in it changes.

        callback = GNSCallback()
        trainer = Trainer(callbacks=[callback])
        trainer.fit(model, data)
        print(callback.advice())

    Readings go to the Trainer's loggers and, as `gns.jsonl`, to the folder of the first of them;
    `b_simple` is in the progress bar. Checkpoints hold the averages, and a fit from `ckpt_path`
    goes on with them.

    Args:
        module: path of the part to measure, with the optimizers that have its parameters. Of a
            LightningModule without a forward of its own it is its only child with parameters to
            train, else the whole. A run with several losses (a GAN) takes a callback for each net.
        weights: see `gnsmon.attach`; called with the arguments of the measured module's forward.
        config: a `MonitorConfig` (LightningCLI reads it as `config: {every: 10}`) or a TOML file.
        settings: any field of `MonitorConfig`, over those of `config`; not spelled out here, where
            they would have to be kept in step with it.

    Raises:
        ValueError: on an unknown setting or an impossible value, naming it.
    """

    def __init__(
        self,
        *,
        module: str | None = None,
        weights: Callable[..., Tensor] | None = None,
        config: MonitorConfig | str | Path | None = None,
        **settings: Any,
    ):
        self.monitor: Monitor | None = None  # of the present or the last fit
        self._config = load(MonitorConfig, config, **settings)
        self._module, self._weights = module, weights
        self._state: dict[str, Any] | None = None  # loaded, for the fit that begins next
        self._scale, self._steps = _Scale(), _Steps([])
        self._shown: Reading | None = None

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state."""
        return f"gnsmon:{self._module}" if self._module else "gnsmon"

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state; empty before the first fit."""
        return self.monitor.state_dict() if self.monitor else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state` in the present fit, or in the next."""
        if self.monitor and not self.monitor.closed:
            self.monitor.load_state_dict(state)
        else:
            self._state = state

    def advice(self) -> Advice:
        """What to make of the last reading.

        Raises:
            ValueError: before there is one.
        """
        if self.monitor is None:
            raise ValueError("no fit has begun, so there is nothing to advise on")
        return self.monitor.advice()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach."""
        self._detach()
        state = self._state
        if state is None and self.monitor and trainer.global_step:  # fit() goes on with this run
            state = self.monitor.state_dict()
        self._state = self._shown = None
        model = _measured(pl_module, self._module)
        wrapped = trainer.strategy.model
        if model is pl_module and isinstance(wrapped, DistributedDataParallel):
            model = wrapped
        optimizers = _optimizers_of(model, trainer.optimizers)
        self._scale, self._steps = _Scale(trainer, pl_module), _Steps(optimizers)
        folder = _folder(trainer)  # asks all ranks
        own = f"/{self._module}" if self._module else ""
        self.monitor = attach(
            model,
            optimizers,
            scaler=self._scale,
            weights=self._weights,
            config=self._config,
            run_dir=self._config.run_dir or folder / own.strip("/"),
            sinks=[_Loggers(trainer, f"gns{own}"), *self._config.sinks],
        )
        if state is not None:
            try:
                self.monitor.load_state_dict(state)
            except ValueError as error:
                raise ValueError(
                    f"the averages in the checkpoint do not fit: {error}. To go on without them, "
                    f"remove checkpoint['callbacks'][{self.state_key!r}] from the file"
                ) from None

    def on_before_zero_grad(self, *_: Any) -> None:
        """Begin to count microbatches."""
        self._scale.microbatches = 0

    def on_before_backward(self, *_: Any) -> None:
        """Count a microbatch, and see to it that all optimizers step after the same loss."""
        self._scale.microbatches += 1
        if self.monitor and not self.monitor.closed and self._steps.several_losses():
            self._detach()
            if self._config.strict:
                raise ValueError(SEVERAL_LOSSES)
            self.monitor.warn(SEVERAL_LOSSES)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note which optimizer steps."""
        self._steps.note(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Show a new reading in the progress bar."""
        reading = self.monitor.reading if self.monitor else None
        if reading is None or reading is self._shown:
            return
        self._shown = reading
        if reading.b_simple is not None:
            name = f"b_simple/{self._module}" if self._module else "b_simple"
            pl_module.log(name, reading.b_simple, prog_bar=True, logger=False)

    def on_train_end(self, *_: Any) -> None:
        """Give the last advice and detach, while the loggers are open."""
        self._detach()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Detach, where no training took place; the next fit goes on from no checkpoint tested."""
        self._detach()
        self._state = None

    def on_exception(self, *_: Any) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        if self.monitor:
            self.monitor.close()


class _Steps:
    """Which optimizers step after the same backward."""

    def __init__(self, optimizers: list[Optimizer]):
        self._optimizers = optimizers
        self._stepped: set[int] = set()  # since the last backward
        self._together: set[frozenset[int]] = set()

    def note(self, optimizer: Optimizer) -> None:
        """One is about to step."""
        self._stepped |= {i for i, o in enumerate(self._optimizers) if o is optimizer}

    def several_losses(self) -> bool:
        """Asked before a backward: whether two optimizers never step after the same one."""
        if self._stepped:
            self._together.add(frozenset(self._stepped))
            self._stepped.clear()
        return any(a.isdisjoint(b) for a in self._together for b in self._together)


class _Scale:
    """The factor that the Trainer has put on the loss of a step, beyond what makes it a mean."""

    def __init__(
        self, trainer: pl.Trainer | None = None, pl_module: pl.LightningModule | None = None
    ) -> None:
        self._trainer, self._module = trainer, pl_module
        self.microbatches = 0  # since gradients were cleared

    def get_scale(self) -> float:
        """That of the GradScaler, and of a window cut short: Lightning divides as by a whole one.

        Lightning 2.6 divides each loss by `accumulate_grad_batches`, also where an epoch ends
        after fewer.
        """
        if self._trainer is None or self._module is None:
            return 1.0
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        of = self._trainer.accumulate_grad_batches
        if self._module.automatic_optimization and 0 < self.microbatches < of:
            scale *= self.microbatches / of
        return scale


class _Loggers:
    """A sink that hands readings to all loggers of a Trainer, at its own step."""

    def __init__(self, trainer: pl.Trainer, root: str):
        self._trainer, self._root = trainer, root
        self._primary: str | None = None

    def start(self, header: dict[str, Any], step: int) -> None:
        """Learn the primary method, whose keys do not have its name."""
        self._primary = next(iter(header.get("methods") or []), None)

    def __call__(self, reading: Reading) -> None:
        """Log every number that the reading has."""
        _, *method = prefix(reading.method, self._primary or reading.method).split("/")
        values = scalars(reading, "/".join([self._root, *method]))
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=self._trainer.global_step)

    def health(self, health: Health) -> None:
        """Log every number of the layers' health."""
        values = health_scalars(health, self._root)
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=self._trainer.global_step)

    def advise(self, text: str, suggested: int | None) -> None:
        """Write the advice where a logger has a place for text: in TensorBoard and W&B."""
        for logger in self._trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_text"):
                lines = text.replace("\n", "  \n")
                experiment.add_text(f"{self._root}/advice", lines, self._trainer.global_step)
            elif hasattr(experiment, "summary"):
                experiment.summary[f"{self._root}/advice"] = text


def _measured(pl_module: pl.LightningModule, path: str | None) -> nn.Module:
    """The module that `path` names; by default one whose own forward is called, if it can be."""
    if path is not None:
        try:
            return pl_module.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"module: expected the path of a part of {type(pl_module).__name__}, got {path!r}: "
                f"{error}"
            ) from None
    if type(pl_module).forward is not pl.LightningModule.forward:
        return pl_module
    trained = [
        child for child in pl_module.children() if any(p.requires_grad for p in child.parameters())
    ]
    mine = any(p.requires_grad for p in pl_module.parameters(recurse=False))
    return trained[0] if len(trained) == 1 and not mine else pl_module


def _optimizers_of(model: nn.Module, optimizers: list[Optimizer]) -> list[Optimizer]:
    """Those with a parameter of the model."""
    own = {id(p) for p in model.parameters()}
    return [o for o in optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]


def _folder(trainer: pl.Trainer) -> Path:
    """The first logger's folder of this run, or the Trainer's; to be called on all ranks."""
    folder, logger = Path(trainer.log_dir or trainer.default_root_dir), trainer.logger
    if logger is None or isinstance(logger, TensorBoardLogger | CSVLogger):
        return folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return folder / str(logger.name or "") / version

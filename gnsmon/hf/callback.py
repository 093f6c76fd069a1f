"""The monitor's life in a Trainer: begins and ends with training, logs and is saved with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gnsmon.advice import Advice
from gnsmon.config import MonitorConfig, load
from gnsmon.hf.weights import Seen, Weights
from gnsmon.monitor import Monitor
from gnsmon.monitor import attach as attach_monitor
from gnsmon.norms.inputs import Announce, read_batch
from gnsmon.sinks.keys import health_scalars, prefix, scalars

try:
    from transformers import TrainerCallback
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.trainer_callback import ExportableState
except Exception as error:  # an optional package that is broken fails in many ways
    raise ImportError(
        f'gnsmon.hf needs transformers: pip install "gnsmon[transformers]" ({error})'
    ) from error


def attach(trainer: Any, **settings: Any) -> GNSCallback:
    """Measure the gradient noise scale in every `trainer.train()`, and in the Trainer's own logs.

    The callback comes first of the Trainer's, so that what it adds to the logs reaches TensorBoard,
    W&B, the console and `trainer.state.log_history`, under `gns/b_simple` and the like.

    Args:
        trainer: a `transformers.Trainer`, before or after `train()`.
        settings: see `GNSCallback`.

    Raises:
        ValueError: on an unknown setting or an impossible value, naming it.
    """
    handler = trainer.callback_handler
    if any(isinstance(other, GNSCallback) for other in handler.callbacks):
        raise ValueError("this Trainer has a GNSCallback already; to measure more, name methods")
    callback = GNSCallback(**settings)
    handler.callbacks.insert(0, callback)
    callback._trainer = weakref.ref(trainer)
    train = trainer.train

    @wraps(train)
    def trained(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:  # no event tells a callback of an exception
            callback.close()

    trainer.train = trained
    return callback


class GNSCallback(TrainerCallback, ExportableState):
    """Measures the gradient noise scale in a Trainer: `Trainer(..., callbacks=[GNSCallback()])`.

    Sinks are its own; `attach` writes to the Trainer's logs as well, and sees labels that are taken
    away before the model is called (label smoothing, `compute_loss_func`).

    Args:
        weights: how much the examples weigh in the loss, as for `gnsmon.attach`. Without it they
            are found out, and proven on the loss.
        config: a `MonitorConfig` or a TOML file of its settings.
        settings: any field of `MonitorConfig`, over those of `config`. `run_dir` is the folder
            `gnsmon` of the Trainer's `output_dir` unless named.

    Raises:
        ValueError: on an unknown setting or an impossible value, naming it.
    """

    _only: GNSCallback | None = None

    def __new__(cls, **_: Any) -> GNSCallback:
        """The callback, the only one of a class of its own.

        With `restore_callback_states_from_checkpoint` the Trainer puts `type(callback)()` in its
        place (transformers 5.23), a stranger to its settings and its owner; so it is itself.
        """
        if cls._only is None:
            own = super().__new__(type(cls.__name__, (cls,), {"__doc__": cls.__doc__}))
            type(own)._only = own
            return own
        return cls._only

    def __init__(
        self,
        *,
        weights: Callable[..., Tensor] | None = None,
        config: MonitorConfig | str | Path | None = None,
        **settings: Any,
    ):
        if hasattr(self, "monitor"):
            return
        self.config = load(MonitorConfig, config, **settings)
        self.monitor: Monitor | None = None
        self.saved: dict[str, Any] | None = None  # under this name in a checkpoint
        self._by_user = weights
        self._trainer: Callable[[], Any] = lambda: None
        self._undo: list[Callable[[], object]] = []
        self._doubted = False
        self._logged_step: int | None = None
        self._output: Any = None

    def advice(self) -> Advice:
        """What to make of the last reading.

        Raises:
            ValueError: before there is one.
        """
        if self.monitor is None:
            raise ValueError("no training has begun, so there is nothing to advise on")
        return self.monitor.advice()

    def close(self) -> None:
        """Detach from the model and close the sinks; without effect after a whole `train()`."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._output = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Attach to the model and the optimizer, or go on from the checkpoint."""
        self.close()  # training before may have ended in an exception
        self._come_first()
        config, self._logged_step = self.config, None
        if config.run_dir is None:
            config = config.model_copy(update={"run_dir": Path(args.output_dir) / "gnsmon"})
        self.monitor = attach_monitor(
            model,
            optimizer,
            scaler=getattr(optimizer, "scaler", None),
            weights=self._by_user,
            config=config,
        )
        self._undo.append(self.monitor.close)
        name = type(self).__name__
        if state.global_step:
            self._resume(state.stateful_callbacks.get(name))
        # A checkpoint from before the callback was there has no such key, which saving expects.
        state.stateful_callbacks[name] = self.state()
        if self._by_user is None:
            self._watch(model, args)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add readings and health to the Trainer's logs, once each; of layers sinks alone learn."""
        if self.monitor is None or self.monitor.closed or not logs or "loss" not in logs:
            return
        self.monitor.log_loss(float(logs["loss"]))
        reading = self.monitor.reading
        if reading is None or reading.step == self._logged_step:
            return
        self._logged_step = reading.step
        numbers = {
            key: value
            for method, of in self.monitor.readings.items()
            for key, value in scalars(of, prefix(method, reading.method)).items()
            if of.step == reading.step and "/layer/" not in key
        }
        if (health := self.monitor.health) and health.step == reading.step:
            numbers |= {k: v for k, v in health_scalars(health).items() if "/layer/" not in k}
        logs.update(numbers)
        if state.log_history:  # it has a copy of the logs, made before this event
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach; `monitor` keeps its last reading and its advice."""
        self.saved = self._state()
        self.close()

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint's trainer_state.json."""
        return {"args": {}, "attributes": {"saved": self._state()}}

    def _state(self) -> dict[str, Any] | None:
        running = self.monitor is not None and not self.monitor.closed
        return self.monitor.state_dict() if running else self.saved

    def _come_first(self) -> None:
        """Restored callbacks are put last."""
        if (trainer := self._trainer()) is not None:
            callbacks = trainer.callback_handler.callbacks
            callbacks.remove(self)
            callbacks.insert(0, self)

    def _resume(self, stored: Any) -> None:
        stored = stored[-1] if isinstance(stored, list) and stored else stored
        saved = (stored or {}).get("attributes", {}).get("saved")
        if saved is None:
            self._warn("the checkpoint has no state of the monitor: its averages begin afresh")
            return
        try:
            self.monitor.load_state_dict(saved)
        except ValueError as error:
            if self.config.strict:
                raise
            self._warn(f"the averages begin afresh, for the checkpoint's do not fit: {error}")

    def _watch(self, model: nn.Module, args: Any) -> None:
        """See every microbatch's labels, logits and loss, and weigh its examples."""
        trainer = self._trainer()
        average = getattr(args, "average_tokens_across_devices", False)
        weights = Weights(
            microbatches=args.gradient_accumulation_steps,
            ranks=args.world_size,
            averaged=average,
            scale=args.world_size if trainer is not None and average else 1.0,
            smoothing=args.label_smoothing_factor,
            shifts=_shifts(model),
            doubt=self._doubt,
        )
        if trainer is None:
            seen = model, lambda kwargs, output: self._weigh(weights, _seen(kwargs, output))
        else:
            self._wrap_compute_loss(trainer, weights)
            seen = trainer.model_wrapped, lambda _, output: setattr(self, "_output", output)
        hook = seen[0].register_forward_hook(
            Announce(seen[0], partial(_outside_graphs, seen[1])), with_kwargs=True
        )
        self._undo.append(hook.remove)

    def _wrap_compute_loss(self, trainer: Any, weights: Weights) -> None:
        """Labels and loss as the Trainer has them, whatever computes the loss."""
        own, original = vars(trainer).get("compute_loss"), trainer.compute_loss

        @wraps(original)
        def compute_loss(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            given = dict(inputs)  # labels may be taken out of it
            self._output = None
            found = original(model, inputs, *args, **kwargs)
            if torch.is_grad_enabled() and model.training:
                loss = found[0] if isinstance(found, tuple) else found
                items = kwargs.get("num_items_in_batch")
                given |= {"num_items_in_batch": items}
                self._weigh(weights, _seen(given, self._output, loss))
            self._output = None
            return found

        trainer.compute_loss = compute_loss
        self._undo.append(
            lambda: (
                vars(trainer).pop("compute_loss")
                if own is None
                else setattr(trainer, "compute_loss", own)
            )
        )

    def _weigh(self, weights: Weights, seen: Seen) -> None:
        try:
            with torch.no_grad():
                found = weights(seen)
        except Exception as error:
            if self.config.strict:
                raise
            self._doubt(f"{type(error).__name__}: {error}")
            found = torch.empty(0)  # which drops the measurement
        if found is not None:
            self.monitor.weigh(found)

    def _doubt(self, why: str) -> None:
        """Say once that the weights are a guess."""
        if not self._doubted:
            self._doubted = True
            self._warn(
                f"how much the examples weigh in the loss cannot be proven: {why}. They are taken "
                "to weigh as many labels as they have, or the same without labels. If that is "
                "wrong, pass weights= (of the model's inputs)"
                + ("" if self._trainer() else "; gnsmon.hf.attach(trainer) sees more than this")
            )

    def _warn(self, text: str) -> None:
        if self.monitor is not None and self.monitor.run_dir is not None:  # the first rank
            self.monitor.warn(text)


def _shifts(model: nn.Module) -> bool | None:
    """Whether its loss may be expected to shift labels; None where it never does."""
    model = getattr(model, "get_base_model", lambda: model)()  # of PEFT
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return causal or "LMHead" in type(model).__name__


def _outside_graphs(
    heard: Callable[[dict[str, Any], Any], None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    if not torch.compiler.is_compiling():
        heard(kwargs, output)


def _seen(inputs: Mapping[str, Any], output: Any, loss: Tensor | None = None) -> Seen:
    """A microbatch from the arguments and the outputs of the model."""
    shifted = inputs.get("shift_labels")
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    return Seen(
        labels=inputs.get("labels") if shifted is None else shifted,
        logits=logits if isinstance(logits, Tensor) else None,
        loss=loss,
        items=inputs.get("num_items_in_batch"),
        examples=read_batch((), inputs, 0).size,
        shifted=shifted is not None,
    )

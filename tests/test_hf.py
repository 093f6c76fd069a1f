"""A real Trainer, watched: readings by brute force, logs read back, checkpoints resumed."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks_worker import as_launched, in_processes
from torch import nn

import gnsmon
from gnsmon.sinks import read_log

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from gnsmon.hf.weights import Kind, Seen, Weights  # noqa: E402

FILTERED = [".*pin_memory.*no accelerator"]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{words}:UserWarning") for words in FILTERED]
VOCABULARY, T = 23, 8
TOLERANCE = {"rel": 1e-5}


def llama(kind=transformers.LlamaForCausalLM, **more):
    return kind(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=T,
            attn_implementation="eager",
            use_cache=False,
            **more,
        )
    )


def encoder(kind, **more):
    settings = kind.config_class(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=T,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )
    settings._attn_implementation = "eager"
    return kind(settings)


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=T,
            dropout=0.0,
            attention_dropout=0.0,
            attn_implementation="eager",
            use_cache=False,
        )
    )


def sequences(n, seed=0):
    """Sequences of unequal numbers of labels, none the first or last of all."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        ids = torch.randint(3, VOCABULARY, (T,), generator=g)
        length = int(torch.randint(3, T + 1, (), generator=g))
        mask = (torch.arange(T) < length).long()
        rows.append(
            {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        )
    return rows


def placed(rows):
    """With positions and segments of their own, which BERT otherwise shares between examples."""
    places = {"position_ids": torch.arange(T), "token_type_ids": torch.zeros(T, dtype=torch.int64)}
    return [row | places for row in rows]


def labelled(n, label):
    return [{**row, "labels": label(i)} for i, row in enumerate(placed(sequences(n)))]


def make(tmp_path, model, data, kind=None, **settings):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,
        "max_grad_norm": 0.05,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    more = {k: settings.pop(k) for k in ("compute_loss_func", "callbacks") if k in settings}
    return (kind or transformers.Trainer)(
        model=model,
        args=transformers.TrainingArguments(**{**defaults, **settings}),
        train_dataset=data,
        eval_dataset=data[:4],
        **more,
    )


class Microbatches:
    """What the Trainer trained on, step by step."""

    def __init__(self, trainer):
        self.steps, watched = [[]], trainer._prepare_inputs

        def prepare(inputs):
            inputs = watched(inputs)
            if trainer.model.training:
                self.steps[-1].append({k: v.clone() for k, v in inputs.items()})
                if trainer.accelerator.sync_gradients:
                    self.steps.append([])
            return inputs

        trainer._prepare_inputs = prepare


def watch(trainer, **settings):
    readings = []
    callback = gnsmon.hf.attach(
        trainer, **{"every": 1, "strict": True, "sinks": [readings.append], **settings}
    )
    return callback, readings, Microbatches(trainer)


def bearing(row, shift):
    labels = row["labels"][..., 1:] if shift else row["labels"]
    return int(labels.ne(-100).sum())


def own_loss(model, row):
    return model(**row).loss


def brute(model, microbatches, shift=True, per="step", loss=own_loss, but=()):
    """A, q and p of one step, one example at a time in float64."""
    model = copy.deepcopy(model).double().train()
    for module in model.modules():
        module._forward_hooks.clear()
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and name not in but]
    weights, gradients = [], []
    for batch in microbatches:
        rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
        counts = torch.tensor([float(bearing(r, shift)) for r in rows])
        weights += (counts if per == "step" else counts / counts.sum()).tolist()
        for row in rows:
            row = {k: v.double() if v.is_floating_point() else v for k, v in row.items()}
            found = torch.autograd.grad(loss(model, row), parameters, allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    w = torch.tensor(weights, dtype=torch.float64)
    parts = (w / w.sum())[:, None] * torch.stack(gradients)
    p = float((w / w.sum()).square().sum())
    return float(parts.sum(0).square().sum()), float(parts.square().sum()), p


def assert_right(readings, seen, model, rel=1e-5, **how):
    assert readings
    for reading, microbatches in zip(readings, seen.steps, strict=False):
        big, parts, p = brute(model, microbatches, **how)
        raw = reading.raw
        # The scale of the loss is free where a mean is not divided by the microbatches.
        assert raw.parts_sq_norm / raw.big_sq_norm == pytest.approx(parts / big, rel=rel)
        assert raw.sum_sq_weights == pytest.approx(p, rel=1e-6)
        assert reading.examples == sum(len(batch["labels"]) for batch in microbatches)
        assert reading.coverage == 1.0 or how.get("but")


def test_causal_language_model_weighs_by_labels_of_the_whole_step(tmp_path):
    model, data = llama(), sequences(15)  # steps of 3 + 3, 3 + 3 and 3
    trainer = make(tmp_path, model, data)
    _, readings, seen = watch(trainer)
    trainer.train()
    assert [r.examples for r in readings] == [6, 6, 3]
    assert_right(readings, seen, model)
    for reading, microbatches in zip(readings, seen.steps, strict=False):
        big, _, _ = brute(model, microbatches)
        assert reading.raw.big_sq_norm == pytest.approx(big, **TOLERANCE)
        assert reading.tokens == sum(bearing(batch, True) for batch in microbatches)


def loss_by(kind, rows, divisor):
    """Logits, labels and loss of a microbatch; `divisor` is the labels of the step."""
    logits = torch.randn(rows, T, VOCABULARY)
    labels = torch.randint(0, VOCABULARY, (rows, T))
    labels[:, 3:][torch.rand(rows, T - 3) < 0.5] = -100
    targets = F.pad(labels[:, 1:], (0, 1), value=-100) if kind.shift else labels
    total = F.cross_entropy(logits.mT, targets, reduction="sum")
    counts = targets.ne(-100).sum(1)
    of = divisor or counts.sum()
    loss = total / (of if kind.whole_step else counts.sum())
    return Seen(labels, logits, loss, items=of), counts


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("whole_step", [False, True])
def test_the_loss_itself_tells_how_the_examples_weigh(shift, whole_step):
    """Whatever is expected, and though the first step, of one microbatch, leaves it open."""
    kind, doubts = Kind(shift, whole_step), []
    weights = Weights(microbatches=2, shifts=not shift, doubt=doubts.append)
    for divisor in (None, 97, 97):
        seen, counts = loss_by(kind, 4, divisor)
        expected = counts if whole_step and divisor else counts / counts.sum()
        found = weights(seen)
        assert torch.allclose(found / found.sum(), counts / counts.sum())
        assert divisor is None or torch.allclose(found.float(), expected.float())
    assert not doubts
    weights(replace(seen, labels=None))
    weights = Weights(microbatches=2, shifts=shift, doubt=doubts.append)
    for _ in range(5):
        weights(replace(seen, loss=3 * seen.loss))
    assert doubts == [
        "the loss has no labels",
        *["the loss is not that of the logits and labels"] * 3,
    ]


def test_a_microbatch_without_labels_raises_no_doubt():
    """Its loss is 0, as it should be; the next ones tell the kind."""
    kind, doubts = Kind(True, True), []
    weights = Weights(microbatches=2, shifts=True, doubt=doubts.append)
    seen, counts = loss_by(kind, 4, 97)
    none = torch.full_like(seen.labels, -100)
    for _ in range(3):
        assert weights(replace(seen, labels=none, loss=torch.zeros(()))).tolist() == [0] * 4
    assert torch.equal(weights(seen), counts)
    assert not doubts


def test_the_norm_is_the_trainers_own_before_clipping(tmp_path):
    trainer = make(tmp_path, llama(), sequences(18), learning_rate=1e-2)
    _, readings, _ = watch(trainer)
    trainer.train()
    logged = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
    own = [reading.raw.big_sq_norm**0.5 for reading in readings]
    assert own == pytest.approx(logged, rel=1e-4) and len(own) == 3
    assert min(own) > trainer.args.max_grad_norm


class Legacy(transformers.LlamaForCausalLM):
    accepts_loss_kwargs = False


def test_a_mean_over_each_microbatch_weighs_by_shares(tmp_path):
    model = llama(Legacy)
    trainer = make(tmp_path, model, sequences(15))
    _, readings, seen = watch(trainer)
    trainer.train()
    assert_right(readings, seen, model, per="microbatch")
    big, _, _ = brute(model, seen.steps[0], per="microbatch")
    assert readings[0].raw.big_sq_norm == pytest.approx(big, **TOLERANCE)


def test_a_model_that_takes_the_count_of_items_and_ignores_it(tmp_path):
    """BART's loss is the mean over a microbatch, though its forward takes any keyword."""
    model = bart()
    trainer = make(tmp_path, model, sequences(15))
    callback, readings, seen = watch(trainer)
    with pytest.warns(RuntimeWarning, match="measured; left out"):  # positions without a batch axis
        trainer.train()
    missing = set(callback.monitor.coverage().missing)
    assert trainer.model_accepts_loss_kwargs and all("embed_positions" in name for name in missing)
    assert_right(readings, seen, model, shift=False, per="microbatch", but=missing)


def test_masked_language_model_is_not_shifted(tmp_path):
    model = encoder(transformers.BertForMaskedLM)
    trainer = make(tmp_path, model, placed(sequences(12)))
    _, readings, seen = watch(trainer)
    trainer.train()
    per = "microbatch" if not _honours(model, seen.steps[0][0]) else "step"
    assert_right(readings, seen, model, shift=False, per=per)


def _honours(model, batch):
    """Whether the model divides by num_items_in_batch."""
    with torch.no_grad():
        whole, half = (model(**batch, num_items_in_batch=torch.tensor(n)).loss for n in (50, 100))
    return not torch.equal(whole, half)


@pytest.mark.parametrize("labels", ["classes", "numbers"])
def test_sequences_weigh_alike(tmp_path, labels):
    sizes = {"num_labels": 3 if labels == "classes" else 1}
    model = encoder(transformers.BertForSequenceClassification, **sizes)
    data = labelled(14, lambda i: i % 3 if labels == "classes" else float(i))
    trainer = make(tmp_path, model, data)
    _, readings, seen = watch(trainer)
    trainer.train()
    assert [r.examples for r in readings] == [6, 6, 2]
    assert_right(readings, seen, model, shift=False, per="microbatch")
    assert all(
        reading.raw.sum_sq_weights == pytest.approx(1 / n)
        for reading, n in zip(readings, [6, 6, 2], strict=True)
    )


def test_label_smoothing(tmp_path):
    model = llama()
    trainer = make(tmp_path, model, sequences(12), label_smoothing_factor=0.2)
    _, readings, seen = watch(trainer)
    trainer.train()

    def smoothed(model, row):
        labels = row.pop("labels")
        return transformers.trainer_pt_utils.LabelSmoother(0.2)(
            model(**row), labels, shift_labels=True
        )

    assert_right(readings, seen, model, loss=smoothed)


def test_a_loss_function_of_ones_own_is_proven_or_doubted(tmp_path):
    def by_labels(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    model = llama()
    trainer = make(tmp_path, model, sequences(12), compute_loss_func=by_labels)
    _, readings, seen = watch(trainer)
    trainer.train()
    assert_right(readings, seen, model)

    trainer = make(
        tmp_path / "doubted",
        llama(),
        sequences(12),
        compute_loss_func=lambda *a, **k: 2 * by_labels(*a, **k),
    )
    watch(trainer)
    with pytest.warns(RuntimeWarning, match="cannot be proven: the loss is not that") as warned:
        trainer.train()
    assert len(warned) == 1


class OwnLoss(transformers.Trainer):
    """Each example's mean over its own labels, then the mean of these."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        each = F.cross_entropy(logits[:, :-1].mT, labels, reduction="none").sum(1)
        return (each / labels.ne(-100).sum(1)).mean()


def test_weights_by_the_user_for_a_loss_of_ones_own(tmp_path):
    model = llama()
    trainer = make(tmp_path, model, sequences(12), OwnLoss)
    _, readings, seen = watch(trainer, weights=lambda ids, attention_mask: torch.ones(len(ids)))
    trainer.train()
    for reading, microbatches in zip(readings, seen.steps, strict=False):
        assert reading.raw.sum_sq_weights == pytest.approx(1 / 6)
        assert reading.examples == sum(len(b["labels"]) for b in microbatches)

    trainer = make(tmp_path / "doubted", llama(), sequences(12), OwnLoss)
    watch(trainer)
    with pytest.warns(RuntimeWarning, match="pass weights="):
        trainer.train()


def test_values_reach_the_trainers_tensorboard_console_and_history(tmp_path, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    data = [row | {"input_ids": torch.arange(3, 3 + T)} for row in sequences(144)]  # a clear signal
    data = [row | {"labels": row["input_ids"].masked_fill(row["labels"] < 0, -100)} for row in data]
    trainer = make(tmp_path, llama(), data, report_to=["tensorboard"])
    _, readings, _ = watch(trainer, every=2)
    trainer.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    expected = {r.step + 1: r.grad_sq_norm for r in readings}  # the Trainer counts steps done
    written = {e.step: e.value for e in events.Scalars("train/gns/grad_sq_norm")}
    assert written == pytest.approx(expected)
    assert readings[-1].b_simple is not None
    assert events.Scalars("train/gns/b_simple")[-1].value == pytest.approx(readings[-1].b_simple)
    history = {
        e["step"]: e["gns/grad_sq_norm"]
        for e in trainer.state.log_history
        if "gns/grad_sq_norm" in e
    }
    assert history == expected
    assert not any("layer" in tag for tag in events.Tags()["scalars"])
    assert f"'gns/b_simple': '{readings[-1].b_simple:.4g}'" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")
def test_values_reach_the_trainers_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": tmp_path,
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, str(value))
    trainer = make(tmp_path, llama(), sequences(12), report_to=["wandb"], run_name="a")
    _, readings, _ = watch(trainer)
    trainer.train()
    assert wandb.run.summary["train/gns/tr_sigma"] == pytest.approx(readings[-1].tr_sigma)
    wandb.finish()


def weights_after(trainer):
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return losses, trainer.model.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant", "bf16"])
def test_training_with_the_monitor_is_the_same_training(tmp_path, how):
    reentrant = {"activation_checkpointing_kwargs": {"use_reentrant": how == "reentrant"}}
    settings = {
        "plain": {},
        "checkpoint": {"activation_checkpointing": True, **reentrant},
        "reentrant": {"activation_checkpointing": True, **reentrant},
        "bf16": {"bf16": True},
    }[how]
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = llama(attention_dropout=0.1)
        trainer = make(tmp_path, model, sequences(15), learning_rate=1e-2, **settings)
        if watched:
            _, readings, _ = watch(trainer)
        results.append(weights_after(trainer))
    assert [r.examples for r in readings] == [6, 6, 3] and readings[-1].coverage == 1.0
    (a, before, c), (x, after, z) = results
    assert a == x and torch.equal(c, z) and list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(tmp_path, reentrant):
    model = llama()
    trainer = make(
        tmp_path,
        model,
        sequences(12),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    _, readings, seen = watch(trainer)
    trainer.train()
    model.activation_checkpointing_disable()
    assert_right(readings, seen, model)


def test_bf16_autocast(tmp_path):
    model = llama()
    trainer = make(tmp_path, model, sequences(15), bf16=True)
    _, readings, seen = watch(trainer)
    trainer.train()
    assert_right(readings, seen, model, rel=2e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_model(tmp_path):
    """Layers without a rule, as Llama's own norms, are not replayed in a compiled graph."""
    model = llama()
    trainer = make(
        tmp_path, model, sequences(12), torch_compile=True, torch_compile_backend="aot_eager"
    )
    callback, readings, seen = watch(trainer)
    with pytest.warns(RuntimeWarning, match="not replayed in a compiled model"):
        trainer.train()
    missing = callback.monitor.coverage().missing
    assert missing and all("norm" in name for name in missing)
    assert_right(readings, seen, model, but=missing)


def test_sources_without_layers_weigh_alike(tmp_path):
    trainer = make(tmp_path, llama(), sequences(12))
    _, readings, seen = watch(trainer, method=["pepgns", "microbatch"])
    trainer.train()
    for reading, microbatches in zip(readings[1::2], seen.steps, strict=False):
        counts = [bearing(batch, True) for batch in microbatches]
        assert reading.method == "microbatch" and reading.tokens == sum(counts)
        expected = sum(n**2 for n in counts) / sum(counts) ** 2
        assert reading.raw.sum_sq_weights == pytest.approx(expected)
    assert "gns/microbatch/tr_sigma" in trainer.state.log_history[0]


def test_health_and_the_optimizers_metric_reach_the_trainers_logs(tmp_path):
    trainer = make(tmp_path, llama(), sequences(24))
    settings = {"method": ["pepgns", "microbatch"], "preconditioned": True}
    callback, _, _ = watch(trainer, diagnostics=True, clip=0.5, **settings)
    trainer.train()
    *_, last = (e for e in trainer.state.log_history if "loss" in e)
    assert last["gns/health/grad_norm"] == callback.monitor.health.grad_norm
    assert last["gns/health/relative_change"] == callback.monitor.health.relative_change
    assert {"gns/pepgns_preconditioned_factored/tr_sigma", "gns/health/clip_share"} <= last.keys()
    assert not any("/layer/" in key for key in last)


def test_the_scaler_of_half_precision(tmp_path):
    """Which Accelerate makes on a GPU only, so it is put in its place."""
    model = llama()
    trainer = make(tmp_path, model, sequences(12), max_grad_norm=0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, readings, seen = watch(trainer)
    trainer.train()
    assert_right(readings, seen, model)
    big, _, _ = brute(model, seen.steps[0])
    assert readings[0].raw.big_sq_norm == pytest.approx(big, **TOLERANCE)


def test_a_frozen_model_with_adapters(tmp_path):
    """As PEFT leaves it: nothing but small layers beside the frozen ones is trained."""

    class Adapted(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.frozen = frozen.requires_grad_(False)
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x):
            return self.frozen(x) + self.up(self.down(x))

    model = llama()
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
    trainer = make(tmp_path, model, sequences(12))
    callback, readings, seen = watch(trainer)
    trainer.train()
    assert_right(readings, seen, model)
    assert len(callback.monitor.coverage().covered) == 4


def test_evaluation_and_prediction_in_between(tmp_path):
    model = llama()
    trainer = make(
        tmp_path, model, sequences(12), eval_strategy="steps", eval_steps=1, eval_on_start=True
    )

    class Predicts(transformers.TrainerCallback):
        def on_substep_end(self, *_, **__):
            trainer.predict(trainer.eval_dataset)
            model.train()

    trainer.add_callback(Predicts())
    _, readings, seen = watch(trainer)
    trainer.train()
    seen.steps = [[b for b in step if "labels" in b] for step in seen.steps]
    assert len(readings) == 2
    assert_right(readings, seen, model)
    assert not any("gns/tr_sigma" in e for e in trainer.state.log_history if "eval_loss" in e)


def bare(model, trainer):
    return not (
        any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        or "compute_loss" in vars(trainer)
        or trainer.optimizer.optimizer._optimizer_step_post_hooks
    )


def test_training_twice_and_after_an_exception(tmp_path):
    model = llama()
    trainer = make(tmp_path, model, sequences(12))

    class Stops(transformers.TrainerCallback):
        def on_substep_end(self, args, state, *_, **__):
            if state.global_step == 1:
                raise KeyboardInterrupt

    trainer.add_callback(Stops())
    callback, readings, seen = watch(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert bare(model, trainer) and len(readings) == 1
    trainer.remove_callback(Stops)
    with pytest.warns(UserWarning, match="held an earlier run"):
        trainer.train()
    assert bare(model, trainer) and len(readings) == 3
    assert callback.monitor.reading is readings[-1] and readings[1].step == 0
    assert len(read_log(tmp_path / "out" / "gnsmon" / "gns.jsonl").readings) == 2


def log_of(path):
    """Losses and readings, but for the time they took."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("wall", "overhead")}
        for line in lines
        if line["kind"] != "header"
    ]


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_a_resumed_run_goes_on_as_if_never_interrupted(tmp_path, restored, plain):
    settings = {
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": restored,
    }

    def trained(name, resume=None):
        torch.manual_seed(0)
        callback = gnsmon.hf.GNSCallback(every=2, strict=True)
        callbacks = [callback] if plain else []
        trainer = make(tmp_path / name, llama(), sequences(36), callbacks=callbacks, **settings)
        if not plain:
            callback = gnsmon.hf.attach(trainer, every=2, strict=True)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.callback_handler.callbacks.count(callback) == 1
        assert plain or trainer.callback_handler.callbacks[0] is callback
        return callback.monitor, tmp_path / name / "out" / "gnsmon" / "gns.jsonl", trainer

    whole, log, _ = trained("a")
    before = log_of(log)
    resumed, log, trainer = trained("a", resume=str(tmp_path / "a" / "out" / "checkpoint-3"))
    assert log_of(log) == before and len(before) >= 3
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.reading.step == whole.reading.step == 4
    assert sum("gns/tr_sigma" in e for e in trainer.state.log_history) == 3


def test_advice(tmp_path):
    trainer = make(tmp_path, llama(), sequences(18))
    callback, _, _ = watch(trainer)
    with pytest.raises(ValueError, match="no training has begun"):
        callback.advice()
    trainer.train()
    assert callback.advice() == callback.monitor.advice()


def test_a_checkpoint_from_before_the_monitor(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer = make(tmp_path, llama(), sequences(18), **settings)
    trainer.train()
    trainer = make(tmp_path, llama(), sequences(18), **settings)
    callback, readings, _ = watch(trainer)
    with pytest.warns(RuntimeWarning, match="no state of the monitor"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert len(readings) == 2 and bare(trainer.model, trainer)


def test_a_plain_callback_has_its_own_sinks_and_says_what_it_cannot_see(tmp_path):
    model, readings = llama(), []
    callback = gnsmon.hf.GNSCallback(every=1, strict=True, sinks=[readings.append])
    trainer = make(tmp_path, model, sequences(15), callbacks=[callback])
    seen = Microbatches(trainer)
    trainer.train()
    assert_right(readings, seen, model)
    assert bare(model, trainer) and callback.monitor.reading is readings[-1]

    callback = gnsmon.hf.GNSCallback(every=1)
    trainer = make(
        tmp_path / "b", llama(), sequences(6), callbacks=[callback], label_smoothing_factor=0.1
    )
    with pytest.warns(RuntimeWarning, match="gnsmon.hf.attach"):
        trainer.train()


def test_settings_are_checked_at_once(tmp_path):
    trainer = make(tmp_path, llama(), sequences(6))
    with pytest.raises(ValueError, match="did you mean 'every'"):
        gnsmon.hf.attach(trainer, evry=3)
    gnsmon.hf.attach(trainer, config=gnsmon.MonitorConfig(every=3))
    with pytest.raises(ValueError, match="already"):
        gnsmon.hf.attach(trainer)
    one, other = gnsmon.hf.GNSCallback(every=2), gnsmon.hf.GNSCallback(every=5)
    assert (one.config.every, other.config.every) == (2, 5)
    assert type(one)() is one and one.config.every == 2


def in_two_processes(rank, folder, averaged, method, plain):
    """Two microbatches on each rank; the parts are those of all four."""
    for words in FILTERED:
        warnings.filterwarnings("ignore", words)
    as_launched(rank)
    torch.manual_seed(0)
    model = llama()
    settings = {"ddp_backend": "gloo", "average_tokens_across_devices": averaged}
    if plain:
        readings = []
        callback = gnsmon.hf.GNSCallback(every=1, strict=True, method=method, sinks=readings.append)
        trainer = make(folder, model, sequences(36), callbacks=[callback], **settings)
        seen = Microbatches(trainer)
    else:
        trainer = make(folder, model, sequences(36), **settings)
        callback, readings, seen = watch(trainer, method=method)
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    assert len(readings) == (3 if rank == 0 else 0)
    assert callback.monitor.step == 3 and not callback.monitor.skipped
    for i, microbatches in enumerate(seen.steps[:3]):
        everywhere = [None, None]
        dist.all_gather_object(everywhere, microbatches)
        if rank == 0:
            compare(model, readings[i], everywhere, averaged)
    assert bare(model, trainer)


def compare(model, reading, everywhere, averaged):
    """Each part by itself, in float64; a rank counts its own labels, or all do together."""
    model = copy.deepcopy(model).double()
    counts = [sum(bearing(batch, True) for batch in own) for own in everywhere]
    weights, parts = [], []
    for own, of_rank in zip(everywhere, counts, strict=True):
        whole = sum(counts) if averaged else 2 * of_rank
        for batch in own:
            size = len(batch["labels"]) if reading.method == "ranks" else 1
            for part in zip(*(tensor.split(size) for tensor in batch.values()), strict=True):
                part = dict(zip(batch, part, strict=True))
                loss = model(**part, num_items_in_batch=torch.tensor(whole)).loss
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                parts.append(torch.cat([g.flatten() for g in gradients]))
                weights.append(bearing(part, True) / whole)
    parts = torch.stack(parts)
    assert sum(weights) == pytest.approx(1)
    assert reading.examples == 12 and reading.coverage == 1.0
    assert reading.raw.big_sq_norm == pytest.approx(float(parts.sum(0).square().sum()), **TOLERANCE)
    assert reading.raw.parts_sq_norm == pytest.approx(float(parts.square().sum()), **TOLERANCE)
    assert reading.raw.sum_sq_weights == pytest.approx(sum(w**2 for w in weights), rel=1e-6)


@pytest.mark.parametrize(
    ("averaged", "method", "plain"),
    [
        (True, "ranks", False),
        (False, "ranks", True),
        (True, "pepgns", True),
        (False, "pepgns", False),
    ],
)
def test_two_processes(tmp_path, averaged, method, plain):
    in_processes(in_two_processes, tmp_path, averaged, method, plain, folder=tmp_path)


def resumed_in_two_processes(rank, folder):
    for words in FILTERED:
        warnings.filterwarnings("ignore", words)
    as_launched(rank)
    states = []
    for resume in (None, str(folder / "out" / "checkpoint-2")):
        torch.manual_seed(0)
        settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        trainer = make(folder, llama(), sequences(48), ddp_backend="gloo", **settings)
        callback, readings, _ = watch(trainer)
        trainer.train(resume_from_checkpoint=resume)
        states.append(callback.monitor.state_dict())
    assert states[0] == states[1] and states[0]["step"] == 4
    assert len(readings) == (2 if rank == 0 else 0)


def test_two_processes_go_on_from_a_checkpoint(tmp_path):
    in_processes(resumed_in_two_processes, tmp_path, folder=tmp_path)

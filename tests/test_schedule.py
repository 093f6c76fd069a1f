"""When a batch grows, and the code that follows a planned schedule."""

import json
import math
from itertools import count, islice

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gnsmon
from gnsmon.advice import BatchSizeSchedule, Goal, StepTime, export, planned
from gnsmon.sinks.jsonl import Known

KNOWN = {"status": "ok", "b_simple": 1000.0, "low": 900.0}


def reading(step, **changes):
    return Known(**{"step": step, "examples": 64, **KNOWN, **changes})


def test_it_grows_while_the_lower_end_asks_for_the_next_size():
    schedule = BatchSizeSchedule(64, dwell=10, patience=1, microbatch=16, optimizer="SGD")
    for step in range(200):
        schedule.update(reading(step))
    assert [stage.batch_size for stage in schedule.stages] == [64, 128, 256, 512]  # not 1024 > 900
    assert [stage.accumulation for stage in schedule.stages] == [4, 8, 16, 32]
    assert [stage.step for stage in schedule.stages] == [0, 10, 20, 30]
    assert [stage.examples for stage in schedule.stages] == [0, 640, 1920, 4480]
    assert schedule.accumulation == 32
    rate = (1 + 1000 / 64) / (1 + 1000 / 512)
    assert schedule.learning_rate_factor == pytest.approx(rate)


def test_a_batch_is_held_for_its_dwell():
    schedule = BatchSizeSchedule(1, dwell=50, patience=1)
    grown = [step for step in range(0, 1000, 7) if schedule.update(reading(step))]
    assert min(b - a for a, b in zip(grown, grown[1:], strict=False)) >= 50


def test_noise_around_the_threshold_does_not_move_it():
    schedule = BatchSizeSchedule(64, dwell=1, patience=3)
    for step in range(100):
        schedule.update(reading(step, low=200.0 if step % 3 else 100.0))  # 128 asked twice in a row
    assert schedule.batch_size == 64


@pytest.mark.parametrize(
    "changes", [{"status": "undefined"}, {"low": None}, {"low": 0.0}, {"low": 127.0}]
)
def test_what_does_not_ask_for_more(changes):
    schedule = BatchSizeSchedule(64, dwell=1, patience=1)
    assert not any(schedule.update(reading(step, **changes)) for step in range(20))


def test_a_lower_bound_alone_may_ask_for_more():
    schedule = BatchSizeSchedule(64, dwell=1, patience=1, optimizer="Adam")
    assert schedule.update(reading(5, status="lower_bound", b_simple=None))
    assert schedule.learning_rate_factor == pytest.approx(math.sqrt(2))


def test_limits():
    schedule = BatchSizeSchedule(64, largest=200, dwell=1, patience=1)
    for step in range(50):
        schedule.update(reading(step))
    assert schedule.batch_size == 128
    schedule = BatchSizeSchedule(64, dwell=1, patience=1, goal=Goal(data_overhead=0.2))
    for step in range(50):
        schedule.update(reading(step))
    assert schedule.batch_size == 128  # 0.2 of 900 is 180


def test_an_unknown_optimizer_has_no_factor():
    schedule = BatchSizeSchedule(64, dwell=1, patience=1)
    schedule.update(reading(3))
    assert schedule.learning_rate_factor is None
    with pytest.raises(ValueError, match="microbatch"):
        schedule.accumulation  # noqa: B018


def test_the_same_reading_counts_once():
    schedule = BatchSizeSchedule(64, dwell=1, patience=3)
    assert not any(schedule.update(reading(3)) for _ in range(10))
    assert not schedule.update(None)


def test_a_resumed_run_goes_on():
    whole, first = (BatchSizeSchedule(64, dwell=7, microbatch=8) for _ in range(2))
    second = BatchSizeSchedule(64, dwell=7, microbatch=8)
    for step in range(40):
        whole.update(reading(step))
        (first if step < 17 else second).update(reading(step))
        if step == 16:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert whole.stages == second.stages


def test_a_monitor_that_counts_anew_is_refused():
    """Else its readings would count for nothing until it had caught up."""
    schedule = BatchSizeSchedule(64)
    schedule.update(reading(500))
    with pytest.raises(ValueError, match="after step 500, got step 9; .* state_dict"):
        schedule.update(reading(9))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"start": 0}, "start"),
        ({"start": 10, "microbatch": 4}, "multiple of 4"),
        ({"start": 8, "factor": 1.5}, "factor"),
        ({"start": 8, "largest": 4}, "largest"),
        ({"start": 8, "dwell": 0}, "dwell"),
    ],
)
def test_impossible_schedules(wrong, words):
    with pytest.raises(ValueError, match=words):
        BatchSizeSchedule(**wrong)


def test_a_recorded_run_is_replayed_by_its_examples():
    # b_simple = examples seen / 10, recorded at batch 100: steps of the plan are fewer.
    log = [
        Known(step, 100, "ok", (step + 1) * 10.0, (step + 1) * 10.0) for step in range(9, 1000, 10)
    ]
    stages = planned(log, BatchSizeSchedule(100, dwell=1, patience=1))
    assert [s.batch_size for s in stages] == [100, 200, 400, 800, 1600, 3200, 6400]
    assert [s.examples for s in stages] == [0, 2000, 4000, 8000, 16000, 32000, 64000]
    assert [s.step for s in stages] == [0, 20, 30, 40, 50, 60, 70]


def test_in_a_loop_with_the_monitor(tmp_path):
    """The gradient is G + noise of tr(Sigma) = 64 |G|^2, so that the batch may grow to 64."""
    torch.manual_seed(0)
    model, seen = nn.Linear(16, 1, bias=False), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = BatchSizeSchedule(4, dwell=20, patience=2, microbatch=4, optimizer="SGD")
    mean = torch.full((16,), 0.5)  # |G|^2 = 4; noise of 16 x 16 in every example
    with gnsmon.attach(model, optimizer, every=1, run_dir=tmp_path) as gns:
        for _ in range(500):
            for _ in range(schedule.accumulation):
                x = mean + 4 * torch.randn(4, 16)
                (model(x).mean() / schedule.accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
            batch = schedule.batch_size
            grown = schedule.update(gns.reading)
            assert grown == (schedule.batch_size != batch)
            assert gns.reading is None or gns.reading.examples == batch
            seen.append(batch)
    assert seen == sorted(seen)
    assert {*seen} <= {4, 8, 16, 32, 64}
    assert seen[-1] >= 32
    assert len(seen) == gns.step


# Exported.

STAGES = [
    *planned(
        [Known(step, 8, "ok", 1e6, 40.0) for step in range(30)],
        BatchSizeSchedule(8, dwell=6, patience=1, microbatch=4, optimizer="Adam"),
    )
]


def test_json_round_trip():
    assert [s.batch_size for s in STAGES] == [8, 16, 32]
    assert export.from_json(json.loads(json.dumps(export.to_json(STAGES)))) == STAGES
    with pytest.raises(ValueError, match="schema"):
        export.from_json({"stages": []})


def expected(steps):
    """Batch and learning-rate factor of each step."""
    seen = 0
    for _ in range(steps):
        now = [s for s in STAGES if s.examples <= seen][-1]
        seen += now.batch_size
        yield now.batch_size, now.learning_rate_factor


class Recorder(torch.optim.SGD):
    """Notes how many examples each step was made of: every example adds 1 to the gradient."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        self.taken = []

    def step(self, closure=None):
        loss = None if closure is None else closure()
        (group,) = self.param_groups
        self.taken.append(group["lr"])
        return loss


def test_the_snippet_for_a_plain_loop():
    weight, sizes = nn.Parameter(torch.zeros(())), []
    optimizer = Recorder([weight], lr=1.0)
    taken = count()
    names = {
        "optimizer": optimizer,
        "steps": 25,
        "microbatches": iter(lambda: next(taken), None),
        "loss": lambda batch: (weight, sizes.append(batch))[0],
    }
    exec(export.snippet(STAGES, "loop"), names)
    want = list(expected(25))
    assert len(sizes) * 4 == sum(batch for batch, _ in want)
    assert optimizer.taken == pytest.approx([factor for _, factor in want])


@pytest.mark.parametrize(
    "made",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 10)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=60),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, cycle_momentum=False),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=3),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.LambdaLR(o, lambda _: 1.0)], [5]
        ),
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.ExponentialLR(o, 0.9)]
        ),
    ],
    ids=["lambda", "cosine", "one_cycle", "cyclic", "plateau", "sequential", "chained"],
)
def test_a_schedulers_rates_go_along(made):
    names = {}
    exec(export.snippet(STAGES, "loop").partition("\nexamples, now")[0], names)

    def rates(factor):
        optimizer, before = Recorder([nn.Parameter(torch.zeros(()))], lr=1.0), 1.0
        scheduler = made(optimizer)
        for step in range(25):
            names["rescale"](factor(step) / before, optimizer, scheduler)
            before = factor(step)
            optimizer.step()
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(1.0) if plateau else scheduler.step()
        return optimizer.taken

    own, along = rates(lambda step: 1.0), rates(lambda step: 2.0 if step >= 8 else 1.0)
    want = [rate * (2 if step >= 8 else 1) for step, rate in enumerate(own)]
    assert along == pytest.approx(want)


def lightning_run(folder, steps, resume=None):
    lightning = pytest.importorskip("lightning.pytorch")
    optimizers = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 1), []

        def training_step(self, batch, index):
            self.seen.append((self.global_step, len(batch[0])))
            return self.layer(batch[0]).sum()

        def configure_optimizers(self):
            optimizers.append(Recorder(self.parameters(), lr=1.0))
            return optimizers[0]

    names = {}
    exec(export.snippet(STAGES, "lightning"), names)
    module = Module()
    data = torch.utils.data.TensorDataset(torch.randn(4 * 1000, 3))
    trainer = lightning.Trainer(
        max_steps=steps,
        callbacks=[names["BatchWarmup"]()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accelerator="cpu",
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module.seen, optimizers[0].taken


@pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_the_snippet_for_lightning(tmp_path):
    seen, rates = lightning_run(tmp_path, 20)
    assert_follows(seen, rates, 20)
    first, second = lightning_run(tmp_path, 10), lightning_run(tmp_path, 20, tmp_path / "10.ckpt")
    assert (first[0] + second[0], first[1] + second[1]) == (seen, rates)


def assert_follows(seen, rates, steps):
    """Every step is of the planned examples, but for one where the count had yet to divide."""
    batches = [sum(n for at, n in seen if at == step) for step in range(steps)]
    want = list(islice(expected(steps + 5), steps + 5))
    for size, rate in zip(batches, rates, strict=True):
        assert (size, pytest.approx(rate)) in want
    assert batches == sorted(batches)
    assert {*batches} == {s.batch_size for s in STAGES}
    assert abs(sum(batches) - sum(n for n, _ in want[:steps])) <= 64


def hugging_face_run(folder, steps, resume=None, accumulation=2, microbatches=41):
    transformers = pytest.importorskip("transformers")
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x=None, labels=None):
            seen.append((trainer.state.global_step, len(x)))
            return {"loss": self.layer(x).sum()}

    names, model = {}, Model()
    exec(export.snippet(STAGES, "hf"), names)
    optimizer = Recorder(model.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    data = [{"x": torch.randn(3), "labels": 0} for _ in range(4 * microbatches)]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            report_to=[],
            use_cpu=True,
            save_steps=10,
            disable_tqdm=True,
            ignore_data_skip=resume is not None,
        ),
        train_dataset=torch.utils.data.ConcatDataset([data] * 10),
        callbacks=[names["BatchWarmup"]()],
        optimizers=(optimizer, constant),
    )
    trainer.train(resume_from_checkpoint=resume)
    return seen, optimizer.taken


def test_the_snippet_for_hugging_face(tmp_path):
    seen, rates = hugging_face_run(tmp_path, 20)
    assert_follows(seen, rates, 20)
    second = hugging_face_run(tmp_path, 20, str(tmp_path / "checkpoint-10"))
    assert second[1] == pytest.approx([factor for _, factor in expected(20)][10:])
    batches = [sum(n for at, n in second[0] if at == step) for step in range(10, 20)]
    assert batches == [batch for batch, _ in expected(20)][10:]


def test_the_trainer_counts_by_the_accumulation_of_the_first_stage(tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps: expected 2"):
        hugging_face_run(tmp_path, 20, accumulation=8)


def test_snippets_refuse_what_they_cannot_say():
    stages = planned([], BatchSizeSchedule(8))
    with pytest.raises(ValueError, match="microbatch"):
        export.snippet(stages, "loop")
    with pytest.raises(ValueError, match="one of loop, lightning, hf"):
        export.snippet(STAGES, "keras")


# Step times.


def test_the_line_through_the_step_times():
    times = StepTime.fit([8, 8, 8, 32, 32, 32], [0.18, 0.18, 9.0, 0.42, 0.42, 0.42])
    assert (times.step_seconds, times.example_seconds) == pytest.approx((0.1, 0.01))
    assert times.seconds(16) == pytest.approx(0.26)
    # b = 1000: B* = sqrt(b a / k) = 100
    assert times.goal().batch_size(1000.0) == pytest.approx(100)
    assert times.on(4).goal().batch_size(1000.0) == pytest.approx(200)  # examples cost a quarter


@pytest.mark.parametrize(
    ("examples", "seconds", "words"),
    [
        ([], [], "there is none"),
        ([8, 8], [0.1, 0.2], "all have 8 examples"),
        ([8, 16], [0.2, 0.1], "took no longer"),
        ([64, 128], [0.1, 0.1], "took no longer"),
        ([64, 128], [0.1, 0.1 + 1e-16], "took no longer"),
    ],
)
def test_times_that_say_nothing(examples, seconds, words):
    with pytest.raises(ValueError, match=words):
        StepTime.fit(examples, seconds)


def test_a_step_that_costs_nothing_by_itself():
    with pytest.raises(ValueError, match="smallest batch is the fastest"):
        StepTime.fit([8, 16], [0.1, 0.21]).goal()

"""A planned schedule as a file, and as code for the loop that is to follow it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from gnsmon.advice.schedule import Stage

Loop = Literal["loop", "lightning", "hf"]
SCHEMA = 1
MODULES = {"lightning": "lightning.pytorch", "hf": "transformers"}


def to_json(stages: Sequence[Stage]) -> dict[str, Any]:
    """The stages, each from `examples` on, the number of examples seen before it."""
    return {"schema": SCHEMA, "unit": "examples", "stages": [asdict(stage) for stage in stages]}


def from_json(record: dict[str, Any]) -> list[Stage]:
    """What `to_json` made.

    Raises:
        ValueError: on anything else.
    """
    if record.get("schema") != SCHEMA or record.get("unit") != "examples":
        raise ValueError(
            f"expected a schedule of schema {SCHEMA} by examples, got {json.dumps(record)[:80]}"
        )
    return [Stage(**stage) for stage in record["stages"]]


def snippet(stages: Sequence[Stage], loop: Loop) -> str:
    """Python for a plain loop, a Lightning callback or one for the Hugging Face Trainer.

    Raises:
        ValueError: on another loop, or stages without an accumulation count.
    """
    if loop not in SNIPPETS:
        raise ValueError(f"loop: expected one of {', '.join(SNIPPETS)}; got {loop!r}")
    if any(stage.accumulation is None for stage in stages):
        raise ValueError(
            "the schedule has no accumulation counts: give the examples of a worker's backward "
            "(microbatch)"
        )
    known = all(stage.learning_rate_factor is not None for stage in stages)
    rows = [
        f"    ({stage.examples}, {stage.batch_size}, {stage.accumulation}"
        + (f", {stage.learning_rate_factor:.10g})," if known else ", 1.0),")
        for stage in stages
    ]
    unknown = "" if known else "  # no rule for this optimizer: 1.0 stands for yours"
    head = "# examples seen before, batch, microbatches of a step, learning-rate factor" + unknown
    imports = "" if loop == "loop" else f"import {MODULES[loop]}\n\n"
    return imports + "\n".join([head, "STAGES = [", *rows, "]"]) + "\n" + COMMON + SNIPPETS[loop]


COMMON = """

def stage(examples):
    return [s for s in STAGES if s[0] <= examples][-1]


def rescale(ratio, optimizer, *schedulers):
    for group in optimizer.param_groups:
        group["lr"] *= ratio
    for scheduler in schedulers:
        scheduler.base_lrs = [rate * ratio for rate in scheduler.base_lrs]

"""
SNIPPETS: dict[str, str] = {
    "loop": """
examples, now = 0, STAGES[0]
for step in range(steps):
    before, now = now, stage(examples)
    rescale(now[3] / before[3], optimizer)  # and its scheduler
    for _ in range(now[2]):
        (loss(next(microbatches)) / now[2]).backward()
    optimizer.step()
    optimizer.zero_grad()
    examples += now[1]
""",
    "lightning": """
class BatchWarmup(lightning.pytorch.Callback):
    examples, now = 0, STAGES[0]

    def on_train_batch_start(self, trainer, module, batch, index):
        now = stage(self.examples)
        if index % now[2] == 0:  # a step begins where the count divides the index
            trainer.accumulate_grad_batches = now[2]
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer in trainer.optimizers:
                rescale(now[3] / self.now[3], optimizer, *schedulers)
            self.now = now

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.examples += self.now[1] // self.now[2]
""",
    "hf": """
class BatchWarmup(transformers.TrainerCallback):  # give max_steps=: epochs are counted before
    examples, microbatches, now = 0, 0, STAGES[0]

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.microbatches = 0
        self.follow(args, **kwargs)

    def on_substep_end(self, args, state, control, **kwargs):
        self.microbatches += 1
        self.examples += self.now[1] // self.now[2]

    def on_step_end(self, args, state, control, **kwargs):
        self.on_substep_end(args, state, control)
        self.follow(args, **kwargs)

    def follow(self, args, optimizer=None, lr_scheduler=None, **kwargs):
        now = stage(self.examples)
        if self.microbatches % now[2] == 0:  # a step begins where the count divides
            args.gradient_accumulation_steps = now[2]
            rescale(now[3] / self.now[3], optimizer, lr_scheduler)
            self.now = now
""",
}

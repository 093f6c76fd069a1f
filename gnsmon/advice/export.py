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

RATES = {"lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "min_lrs"}


def stage(examples):
    return [s for s in STAGES if s[0] <= examples][-1]


def rescale(ratio, optimizer, *schedulers):
    parts = [part for s in schedulers for part in getattr(s, "_schedulers", [s])]
    for rates in (*optimizer.param_groups, *map(vars, parts)):
        for name in RATES & rates.keys():
            old = rates[name]
            rates[name] = [r * ratio for r in old] if isinstance(old, list) else old * ratio

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
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer in trainer.optimizers:
                rescale(now[3] / self.now[3], optimizer, *schedulers)
            self.now = now
        trainer.accumulate_grad_batches = self.now[2]

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.examples += self.now[1] // self.now[2]

    def state_dict(self):
        return {"examples": self.examples, "now": self.now}

    def load_state_dict(self, state):
        self.examples, self.now = state["examples"], state["now"]
""",
    "hf": """
# The Trainer counts epochs, and what a resumed run skips, by the accumulation that it is given.
# So give it gradient_accumulation_steps= of the first stage, max_steps=, all passes over the data
# in one (torch.utils.data.ConcatDataset([data] * passes)), and ignore_data_skip=True to resume.
class BatchWarmup(transformers.TrainerCallback, transformers.trainer_callback.ExportableState):
    examples, microbatches, now = 0, 0, STAGES[0]

    def state(self):
        return {"args": {}, "attributes": {"examples": self.examples, "now": self.now}}

    def on_train_begin(self, args, state, control, **kwargs):
        if args.gradient_accumulation_steps != STAGES[0][2]:
            raise ValueError(f"gradient_accumulation_steps: expected {STAGES[0][2]}, see above")
        saved = state.stateful_callbacks.get("BatchWarmup", self.state())  # of a resumed run
        self.examples, self.now = saved["attributes"].values()

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
            rescale(now[3] / self.now[3], optimizer, lr_scheduler)
            self.now = now
        args.gradient_accumulation_steps = self.now[2]
""",
}

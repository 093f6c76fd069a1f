"""A small GPT-2 in the Hugging Face Trainer, with the monitor attached by one line.

    python scripts/examples/finetune_hf.py

The weights are random, for nothing is downloaded, and the text is that of Python's own manual, by
characters; with a checkpoint's name in `from_pretrained` and its tokenizer the rest stays as it is.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gnsmon.hf
from gnsmon.demo.data import topics


class Windows(Dataset):
    """Consecutive windows of a text, as a causal language model takes them."""

    def __init__(self, text: Tensor, context: int):
        self.windows = text[: len(text) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 150,
    batch_size: Annotated[int, typer.Option(help="Sequences of a backward.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Backwards of a step.")] = 2,
    output: Annotated[str, typer.Option(help="Folder of logs and checkpoints.")] = "runs/hf",
) -> None:
    torch.manual_seed(0)
    text = topics()
    config = GPT2Config(
        vocab_size=len(text.vocabulary),
        n_positions=128,
        n_embd=128,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    arguments = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=3e-3,
        warmup_steps=20,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Windows(text.train, 128))
    # GPT-2 adds its positions to all examples at once; microbatches tell their noise nevertheless.
    callback = gnsmon.hf.attach(trainer, every=2, method="pepgns+microbatch")
    trainer.train()
    print(f"\n{callback.monitor.advice()}")


if __name__ == "__main__":
    typer.run(main)

"""A character GPT from scratch, one process or several, with the monitor attached.

    python scripts/examples/train_gpt.py
    torchrun --standalone --nproc_per_node 2 scripts/examples/train_gpt.py

The loop is the usual one: AdamW with warm-up and cosine, accumulation without synchronising every
microbatch, clipping. Everything that gnsmon needs stands between the two marks.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch.nn.parallel import DistributedDataParallel

import gnsmon
from gnsmon.demo.data import topics, windows
from gnsmon.demo.models import CharGPT


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step, over all ranks.")] = 32,
    microbatch: Annotated[int, typer.Option(help="Sequences of a backward.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 3e-3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    run_dir: Annotated[str | None, typer.Option(help="Where to write.")] = None,
) -> None:
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if ranks > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.manual_seed(0)
    text = topics()
    model = CharGPT(len(text.vocabulary), dropout=0.1).to(device)
    torch.manual_seed(1 + rank)  # dropout differs from rank to rank
    net = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95))
    accumulation = batch_size // (microbatch * ranks)
    if accumulation * microbatch * ranks != batch_size:
        raise ValueError(
            f"batch_size: expected a multiple of {microbatch * ranks}, microbatch times ranks; got "
            f"{batch_size}"
        )
    # --- gnsmon
    gns = gnsmon.attach(net, optimizer, every=2, sinks=["console", "tensorboard"], run_dir=run_dir)
    # ---
    batches = windows(text.train, batch_size, 128, torch.Generator().manual_seed(0))
    for step, (inputs, targets) in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps)
        x = inputs.chunk(ranks)[rank].to(device).split(microbatch)
        y = targets.chunk(ranks)[rank].to(device).split(microbatch)
        total = 0.0
        for i in range(accumulation):
            last = i == accumulation - 1
            with nullcontext() if last or ranks == 1 else net.no_sync():
                loss = F.cross_entropy(net(x[i]).flatten(0, 1), y[i].flatten()) / accumulation
                loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gns.log_loss(total)
    # --- gnsmon
    gns.close()  # the console sink prints the advice
    # ---
    if ranks > 1:
        dist.destroy_process_group()


def rate(step: int, steps: int) -> float:
    """Warm-up over 20 steps, then a cosine down to a tenth."""
    return min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * step / steps))


if __name__ == "__main__":
    typer.run(main)

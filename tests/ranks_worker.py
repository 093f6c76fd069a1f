"""Runs a function in several real gloo processes, and fails if one fails or hangs."""

import multiprocessing
import os
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing

multiprocessing.set_forkserver_preload(["torch.distributed", "gnsmon.monitor"])


def in_processes(fn, *args, folder, ranks=2, seconds=120):
    """Run `fn(rank, *args)` in each rank; an exception there is one here."""
    processes = torch.multiprocessing.start_processes(
        _rank,
        (fn, ranks, str(folder), args),
        nprocs=ranks,
        join=False,
        start_method="forkserver",
    )
    end = time.monotonic() + seconds
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, f"{fn.__name__} hangs"
    finally:
        for process in processes.processes:
            process.kill()


def as_launched(rank, ranks=2):
    """What torchrun tells its processes, for libraries that ask the environment."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in told.items()}


def _rank(rank, fn, ranks, folder, args):
    warnings.simplefilter("error")
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    try:
        fn(rank, *args)
    finally:
        dist.destroy_process_group()

"""Measures what finding the gradient noise scale costs, beside the peers that can be installed.

    pip install -e ".[bench]"          # where your torch has its torchvision, which BackPACK names
    pip install -e ".[report]" opacus  # elsewhere; BackPACK works without it
    pip install --no-deps backpack-for-pytorch unfoldNd einops

    python scripts/bench_overhead.py --quick
    python scripts/bench_overhead.py --out results.json --markdown docs/benchmarks.md
    python scripts/bench_overhead.py --scaling --markdown docs/benchmarks.md
    python scripts/bench_overhead.py --load results.json --markdown docs/benchmarks.md

A step is zero_grad, forward, backward and SGD on one fixed batch. Bare, measured and bare steps, of
each as many as the bare ones take 0.1 s for, alternate in one process, and each round gives one
ratio, 2 own / (before + after); the tables have the median and the quartiles. "bare, again" is a
second bare step: how far it is from 1 is what the machine's noise does. "a floor, hooks alone"
reads what any method reads, and makes nothing of it. "microbatch" is measured on steps of two
microbatches, against bare ones of two; every="auto", whose steps are unlike one another, in blocks
of many steps after the first, by the total time.

The error is that of the mean squared norm over the examples, of the parameters that are covered,
against brute force in float64 (of the whole batch, at initialisation: the learning rate is 0, so
that all steps see the same weights); "of grad²" is the share of the batch gradient's squared norm
that is covered. Peak memory is by how much a fresh process grows over a few steps, on CUDA by how
much the allocator does, over the same of the bare step.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench.measure import Effort, measured, truths, variants
from bench.scaling import points
from bench.steps import PEERS
from bench.tables import Results, markdown, write
from bench.workloads import workloads

QUICK = Effort(rounds=5, limit=1, least=1, blocks=2, block=0.5, learning=1, memory=False)
PEAKS = ("gpt", "resnet")  # whose peaks are worth a process for each; on CUDA they cost nothing
OF_SCALING = Effort(rounds=15, limit=4, least=3, blocks=1, block=0, learning=1, memory=False)


def main(
    rounds: Annotated[int, typer.Option(help="Ratios per figure.")] = 30,
    limit: Annotated[float, typer.Option(help="Seconds per figure; three ratios at least.")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    only: Annotated[str, typer.Option(help="Workloads, by comma; all.")] = "",
    methods: Annotated[str, typer.Option(help="Steps, by comma; all.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rounds, nothing compiled, no peaks.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda, with a GPT-2 besides.")] = "cpu",
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Cost over each size instead.")
    ] = False,
    tiny: Annotated[bool, typer.Option("--tiny", hidden=True)] = False,
    out: Annotated[Path | None, typer.Option(help="Results as JSON.")] = None,
    load: Annotated[list[Path], typer.Option(help="Earlier results; measure nothing.")] = [],  # noqa: B006
    into: Annotated[Path | None, typer.Option("--markdown", help="Document to update.")] = None,
) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    quick = quick or tiny
    results: Results = {"device": device, "machine": machine(device), "rows": [], "scaling": []}
    if load:
        results = joined([json.loads(path.read_text()) for path in load])
    elif scaling:
        found = points(device, QUICK if quick else OF_SCALING, tiny=tiny)
        results["scaling"] = [asdict(point) for point in found]
    else:
        effort = (
            QUICK
            if quick
            else Effort(rounds, limit, 3, blocks=6, block=3.0, learning=64, memory=True)
        )
        for workload in chosen(workloads(device, tiny=tiny), only).values():
            if quick and workload.compiled and not only:
                continue
            peaks = effort.memory and (device == "cuda" or workload.name in PEAKS)
            truth = truths(workload)
            for step in chosen(variants(workload), methods):
                typer.echo(f"{workload.name}: {step}", err=True)
                row = measured(workload, step, truth, replace(effort, memory=peaks))
                results["rows"].append(asdict(row))
                if out:  # as far as it is, should the run be ended
                    out.write_text(json.dumps(results, indent=1))
    print("\n\n".join(markdown(results).values()))
    if out:
        out.write_text(json.dumps(results, indent=1))
    if into:
        write(into, results)


def chosen(known: dict[str, Any], names: str) -> dict[str, Any]:
    """Those of the comma-separated names, of which what comes after a comma may be left out."""
    names = names.lower().split(",") if names else []
    found = {n: v for n, v in known.items() if not names or n.partition(",")[0].lower() in names}
    if not found:
        raise typer.BadParameter(f"expected some of {'; '.join(known)}; got {', '.join(names)}")
    return found


def machine(device: str) -> str:
    """Its kind, and the versions."""
    cores = f"{torch.get_num_threads()} threads on {os.cpu_count()} CPU cores"
    kind = f"{cores} ({platform.machine()})" if device == "cpu" else torch.cuda.get_device_name()
    packages = dict.fromkeys(["torch", "gnsmon", *(package for _, package in PEERS.values())])
    return ", ".join([kind, *(f"{name} {version_of(name)}" for name in packages)])


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def joined(parts: list[Results]) -> Results:
    """The rows of several runs of one machine."""
    kinds = {(part["device"], part["machine"]) for part in parts}
    if len(kinds) > 1:
        raise typer.BadParameter(f"expected results of one machine, got those of {sorted(kinds)}")
    return {**parts[0], **{k: [r for p in parts for r in p[k]] for k in ("rows", "scaling")}}


if __name__ == "__main__":
    typer.run(main)

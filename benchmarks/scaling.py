"""Weak scaling: one process against two with as much work each, the share of communication, and what `ligature plan` predicts.

    python -m benchmarks.scaling [--config pretrain/flickr8k_cpu.yaml] [--batch 16] [--steps 6] [--key value …]

Both are started as `ligature launch local` does, with one thread a process. They take the full training step on made-up batches
(benchmarks/pretrain_step.py). Seconds are of the wall, so another busy process on the machine shows. Communication is the time
within collectives, including the wait for the other process. `ligature plan` gets what is measured here: the rate of a matrix
product in each of the two, the utilisation of the single process, and the bandwidth of an all-reduce. Its overlap is 0, as gloo
has none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
from torch import distributed

from benchmarks.pretrain_step import Step, read_step_recipe
from benchmarks.ratios import MatrixProduct, Ratios
from launch.plan import Cluster, Pace
from launch.start.local import run_ranks
from pretrain.budget import Budget
from runtime.ranks import join

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce", "broadcast")
EFFICIENCY_AIM, PLAN_AIM = 0.6, 0.35
"""Samples a second of two processes as a share of twice one's; how far the planned step may be from the measured one."""


class CollectiveTimer:
    """Counts the seconds spent within collectives, by wrapping torch.distributed's functions."""

    def __init__(self) -> None:
        self.seconds = 0.0
        # DeepSpeed looks the functions up at each call, or when it is imported, which comes later than this.
        for name in COLLECTIVES:
            setattr(distributed, name, self.timed(getattr(distributed, name)))

    def timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """Return the collective with its time counted."""

        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = collective(*arguments, **named)
            self.seconds += time.perf_counter() - start
            return result

        return run


def run_rank(options: argparse.Namespace, changes: list[str]) -> None:
    """Run one process; the first rank writes its figures to the file of --rank."""
    torch.set_num_threads(1)
    timer = CollectiveTimer()
    ranks, device = join("cpu")
    recipe = read_step_recipe(options.config, options.batch, changes, "cpu")
    recipe.training.global_batch = options.batch * ranks.world
    step = Step(recipe, ranks, device)
    for _ in range(2):
        step.ready().take()
    product = MatrixProduct()
    times, waits, rates = [], [], []
    for _ in range(options.steps):
        rates.append(product.rate(1))
        step.ready()
        distributed.barrier()
        waited, start = timer.seconds, time.perf_counter()
        step.take()
        times.append(time.perf_counter() - start)
        waits.append(timer.seconds - waited)
    payload = torch.zeros(8_000_000)
    bandwidths = []
    for _ in range(4):
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(payload)
        bandwidths.append(2 * (ranks.world - 1) / ranks.world * payload.nbytes / (time.perf_counter() - start))
    if ranks.first:
        figures = {"step": statistics.median(times), "communication": statistics.median(waits)}
        figures |= {"rate": statistics.median(rates), "bytes_per_second": max(bandwidths), "stage": step.engine.stage}
        Path(options.rank).write_text(json.dumps(figures))
    distributed.barrier()


def measure_world(count: int, arguments: list[str]) -> dict[str, float]:
    """Return what `count` processes measure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        code = run_ranks([sys.executable, "-m", "benchmarks.scaling", "--rank", str(path), *arguments], count)
        if code:
            sys.exit(f"{count} processes stopped with exit code {code}")
        return json.loads(path.read_text())


def main() -> int:
    """Measure one and two processes; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pretrain/flickr8k_cpu.yaml")
    parser.add_argument("--batch", type=int, default=16, help="samples of each process a step (default 16)")
    parser.add_argument("--steps", type=int, default=6, help="steps that count (default 6); two more warm up")
    parser.add_argument("--short", action="store_true", help="take three steps")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options, changes = parser.parse_known_args()
    options.steps = 3 if options.short else options.steps
    if options.rank:
        run_rank(options, changes)
        return 0
    arguments = [*sys.argv[1:]]
    one, two = measure_world(1, arguments), measure_world(2, arguments)
    recipe = read_step_recipe(options.config, options.batch, changes, "cpu")
    recipe.training.global_batch = 2 * options.batch
    budget = Budget(recipe, options.batch)
    work = budget.flops_per_sample * options.batch
    utilisation = work / one["step"] / one["rate"]
    machines = Cluster(1, 2, 0.0, two["rate"] / 1e12, utilisation, two["bytes_per_second"] * 8 / 1e9, 0.0, 0.0, 1.0)
    planned = 2 * options.batch / Pace.of(budget, int(two["stage"]), machines).samples_per_second
    print(f"{recipe.name}, {budget.total_parameters / 1e6:.1f} M parameters, {options.batch} samples a process, fp32, gloo; "
          f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")  # fmt: skip
    print(f"one process (ZeRO {one['stage']:.0f}): {one['step']:.2f} s a step; two (ZeRO {two['stage']:.0f}): {two['step']:.2f} s, of which "
          f"{two['communication']:.2f} s in collectives; an all-reduce carries {two['bytes_per_second'] / 1e9:.2f} GB/s")  # fmt: skip
    ratios = Ratios()
    ratios.record(
        "weak scaling, share of twice the samples a second", one["step"] / two["step"], at_least=EFFICIENCY_AIM
    )
    ratios.record("communication, share of the step", two["communication"] / two["step"])
    ratios.record("matrix product in each of two / in one alone", two["rate"] / one["rate"])
    ratios.record("the plan's step / the measured one", planned / two["step"], 1 - PLAN_AIM, 1 + PLAN_AIM)
    return ratios.close()


if __name__ == "__main__":
    sys.exit(main())

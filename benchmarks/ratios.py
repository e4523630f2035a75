"""What the benchmarks share: figures beside their aims, the rate of a plain matrix product, and a clock that ignores other work.

Tested in tests/test_benchmarks.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Ratios:
    """The figures of one benchmark: `record` prints and keeps one, `close` writes them and returns the exit code."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.short: list[str] = []

    def record(
        self, name: str, value: float, at_least: float | None = None, at_most: float | None = None, unit: str = ""
    ) -> None:
        """Print a figure beside its aim and keep it.

        Args:
            name: the same words at every run, without figures; `expected.json` knows it by them.
            value: the figure.
            at_least: lower aim of the full form on a quiet machine; None: there is none.
            at_most: upper aim, likewise.
            unit: printed after the value.
        """
        aims = [f"{word} {aim:g}" for word, aim in (("at least", at_least), ("at most", at_most)) if aim is not None]
        missed = (at_least is not None and value < at_least) or (at_most is not None and value > at_most)
        line = f"{name}: {value:.3g}{' ' * bool(unit)}{unit}"
        print(line + f" (aim: {' and '.join(aims)}{', short of it' if missed else ''})" * bool(aims), flush=True)
        self.values[name] = value
        self.short += [name] * missed

    def close(self) -> int:
        """Write the figures to the file that LIGATURE_RATIOS names; return 1 where one falls short of its aim, else 0."""
        if path := os.environ.get("LIGATURE_RATIOS"):
            Path(path).write_text(json.dumps(self.values))
        return int(bool(self.short))


def clock() -> float:
    """Return seconds: of this process alone where it has one thread, so that other work does not count; else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(
    work: Callable[[], object], device: torch.device | None = None, clock: Callable[[], float] = clock
) -> float:
    """Return how long `work` takes once by that clock; on a GPU, by the wall until the GPU is done."""
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = clock()
    work()
    return clock() - start


class MatrixProduct:
    """A large matrix product in one precision: its rate is what the hardware can do, in this process, at this moment."""

    def __init__(self, precision: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.size = 8192 if self.device.type == "cuda" else 2560
        self.a, self.b, self.out = (
            torch.randn(self.size, self.size, device=self.device).to(precision) for _ in range(3)
        )
        self.rate()

    def rate(self, repeats: int = 3) -> float:
        """Return FLOP/s, the best of `repeats` products."""
        times = [seconds(lambda: torch.mm(self.a, self.b, out=self.out), self.device) for _ in range(repeats)]
        return 2 * self.size**3 / min(times)

"""What page faults cost on a CPU: the same work while glibc returns freed memory to the system, and while it keeps it.

    python -m benchmarks.freed_memory [--images 64] [--size 224] [--rounds 3]

Works: a frozen EfficientNet-lite0 encodes images, all at once and in chunks of 8; HAT's scores of 32 images with 32 captions, forward and
backward. Both sides run in one process, glibc's default first, as a process cannot return to it. Each side has one warm-up round.
Seconds are the process's own, user and system, on one thread; the least of the rounds counts.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch

from benchmarks.ratios import Ratios
from finetune.heads.stacked_attention import pair_scores
from runtime.host_memory import keep_freed_memory


class Cost(NamedTuple):
    """The cost of one round."""

    seconds: float
    """User and system seconds."""
    system: float
    """System seconds alone."""
    faults: int
    """Page faults."""


def cost(work: Callable[[], object], rounds: int) -> Cost:
    """Return the least cost of a round, after one that warms up."""
    work()
    costs = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF)
        work()
        after = resource.getrusage(resource.RUSAGE_SELF)
        system = after.ru_stime - before.ru_stime
        costs.append(Cost(after.ru_utime - before.ru_utime + system, system, after.ru_minflt - before.ru_minflt))
    return min(costs)


def works(images: int, size: int) -> dict[str, Callable[[], object]]:
    """Return the works, by name."""
    tower = timm.create_model("tf_efficientnet_lite0").eval()
    pixels = torch.randn(images, 3, size, size)
    regions, words = torch.randn(32, 196, 256, requires_grad=True), torch.randn(32, 24, 256, requires_grad=True)
    mask = torch.ones(32, 24, dtype=torch.bool)

    def encode(chunk: int) -> None:
        with torch.no_grad():
            torch.cat([tower.forward_features(part) for part in pixels.split(chunk)])

    return {
        "frozen tower, all images at once": lambda: encode(images),
        "frozen tower, chunks of 8": lambda: encode(8),
        "HAT's scores and gradients": lambda: pair_scores(regions, words, mask, "image_to_text").sum().backward(),
    }


def main() -> int:
    """Measure both sides; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    named = works(options.images, options.size)
    default = {name: cost(work, options.rounds) for name, work in named.items()}
    if not keep_freed_memory():
        print("the environment sets glibc's memory already, or this is another C library; nothing to compare")
        return 2
    ratios = Ratios()
    for name, work in named.items():
        before, after = default[name], cost(work, options.rounds)
        print(f"{name}: {before.seconds:.2f} s ({before.system:.2f} of the system), {before.faults:,} faults by default; "
              f"{after.seconds:.2f} s ({after.system:.2f}), {after.faults:,} faults with memory kept")  # fmt: skip
        ratios.record(f"{name}: time with memory kept / by default", after.seconds / before.seconds, at_most=1.0)
        ratios.record(
            f"{name}: faults with memory kept / by default", after.faults / max(before.faults, 1), at_most=0.1
        )
    return ratios.close()


if __name__ == "__main__":
    sys.exit(main())

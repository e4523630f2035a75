"""How long training waits for a checkpoint: the copy to host memory, beside the write that it does not wait for.

python -m benchmarks.checkpoint_stall [--millions 10]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.ratios import Ratios
from runtime.checkpoint import CheckpointFolder, write_checkpoint
from runtime.checkpoint_writer import CheckpointWriter, host_copies

AIM = 0.2
"""The wait is at most this share of the write."""


def main() -> int:
    """Measure waits and writes; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--millions", type=float, default=10, help="millions of parameters, saved at 16 bytes each (default 10)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="checkpoints to write (default 5)")
    options = parser.parse_args()
    parameters = int(options.millions * 1e6 / 40)
    parts = {f"part-{name}": {f"w{number}": torch.randn(parameters) for number in range(40)} for name in range(4)}
    stalls, writes = [], []
    with tempfile.TemporaryDirectory(dir=".") as scratch, CheckpointWriter() as writer:
        folder = CheckpointFolder(Path(scratch), keep_last=1)
        for step in range(1, options.rounds + 1):
            start = time.monotonic()
            copies = {name: host_copies(group.items(), keep=True) for name, group in parts.items()}

            def write(path: Path, staging: Path, copies: dict = copies) -> None:
                write_checkpoint(path, copies, {}, lambda folder: None, staging)

            writer.start(lambda step=step, write=write: folder.try_commit(step, False, write))
            stalls.append(time.monotonic() - start)
            assert writer.finish()
            writes.append(time.monotonic() - start - stalls[-1])
    stall, whole = statistics.median(stalls), statistics.median(writes)
    size = 16 * options.millions / 1e3
    print(f"{size:.2f} GB: training waits {stall:.2f} s ({size / stall:.1f} GB/s), the write takes {whole:.2f} s more")
    ratios = Ratios()
    ratios.record("stall / write", stall / whole, at_most=AIM)
    return ratios.close()


if __name__ == "__main__":
    sys.exit(main())

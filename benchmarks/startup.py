"""From the command to the first training step of the demo's recipe, and to `--help`'s answer.

    python -m benchmarks.startup

Seconds of the processes' own time (user and system; one thread each), beside those of the wall, which other work on the machine
lengthens. The step is there when its figures are in the run's metrics. Then: which imports take longest.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.ratios import Ratios
from data_tools.shapes.source import write_source

HELP_AIM, STEP_AIM = 0.5, 15.0
SHOWN = (
    "torch",
    "timm",
    "torchvision",
    "torch._dynamo",
    "deepspeed",
    "torch.utils.tensorboard",
    "pyarrow",
    "pretrain.train",
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def own_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(arguments: list[str], errors: Path | None = None, flags: tuple[str, ...] = ()) -> tuple[float, float]:
    """-> seconds of its own, of the wall."""
    before, began = own_time(), time.monotonic()
    with open(errors or os.devnull, "w") as place:
        subprocess.run(
            [sys.executable, *flags, "-m", "launch.cli", *arguments],
            check=True, stdout=subprocess.DEVNULL, stderr=place, env=ENVIRONMENT,
        )  # fmt: skip
    return own_time() - before, time.monotonic() - began


def imports(log: Path) -> dict[str, float]:
    """Cumulative seconds of SHOWN modules, from `-X importtime`'s lines."""
    found = {}
    for line in log.read_text().splitlines():
        if line.startswith("import time:") and (name := line.split("|")[2].strip()) in SHOWN:
            found[name] = int(line.split("|")[1]) / 1e6
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="without the list of imports")
    options = parser.parse_args()
    told = Ratios()
    run(["--help"])
    told.record("ligature --help, s", run(["--help"])[0], at_most=HELP_AIM)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_source(folder / "source", {"train": 128}, size=32)
        images = ["--images", str(folder / "source" / "images"), "--out", str(folder / "shards")]
        run(["shard", str(folder / "source" / "captions_train.json"), *images])
        recipe = [
            "pretrain",
            "--config",
            "pretrain/demo.yaml",
            "--data.train",
            str(folder / "shards"),
            "--runs",
            scratch,
        ]
        # The figures of a one-step run come after its step; its last checkpoint is written after them and counts too.
        own, wall = run([*recipe, "--training.steps", "1", "--training.log_every", "1"])
        told.record("command to first training step, s of its own", own, at_most=STEP_AIM)
        print(f"  {wall:.1f} s of the wall, load {os.getloadavg()[0]:.1f}")
        if not options.short:
            log = folder / "imports"
            run([*recipe, "--name", "again", "--training.steps", "1"], log, ("-X", "importtime"))
            for name, seconds in sorted(imports(log).items(), key=lambda pair: -pair[1]):
                print(f"  import {name}: {seconds:.2f} s, all it imports first included")
    return told.close()


if __name__ == "__main__":
    sys.exit(main())

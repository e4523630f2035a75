"""How long `ligature --help` takes, and the way from the command to the first training step of the demo's recipe.

    python -m benchmarks.startup

Figures are the processes' own seconds (user and system, one thread each). Seconds of the wall stand beside them; other work on
the machine lengthens those. The step counts as done when its figures are in the run's metrics. Without `--short` the imports
that take longest follow.
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
    """Return the seconds that ended child processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(arguments: list[str], errors: Path | None = None, flags: tuple[str, ...] = ()) -> tuple[float, float]:
    """Run a `ligature` command; return its own seconds and those of the wall."""
    own_start, wall_start = own_time(), time.monotonic()
    with open(errors or os.devnull, "w") as error_file:
        subprocess.run(
            [sys.executable, *flags, "-m", "launch.cli", *arguments],
            check=True, stdout=subprocess.DEVNULL, stderr=error_file, env=ENVIRONMENT,
        )  # fmt: skip
    return own_time() - own_start, time.monotonic() - wall_start


def import_times(log: Path) -> dict[str, float]:
    """Return the cumulative seconds of SHOWN modules, from the lines of `-X importtime`."""
    times = {}
    for line in log.read_text().splitlines():
        if line.startswith("import time:") and (name := line.split("|")[2].strip()) in SHOWN:
            times[name] = int(line.split("|")[1]) / 1e6
    return times


def main() -> int:
    """Measure both commands; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="leave out the list of imports")
    options = parser.parse_args()
    ratios = Ratios()
    run(["--help"])  # the first reads files into the page cache
    ratios.record("ligature --help, s", run(["--help"])[0], at_most=HELP_AIM)
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
        # The run logs its figures after its one step, and writes its last checkpoint after them: that counts too.
        own, wall = run([*recipe, "--training.steps", "1", "--training.log_every", "1"])
        ratios.record("command to first training step, s of its own", own, at_most=STEP_AIM)
        print(f"  {wall:.1f} s of the wall, load {os.getloadavg()[0]:.1f}")
        if not options.short:
            log = folder / "imports"
            run([*recipe, "--name", "again", "--training.steps", "1"], log, ("-X", "importtime"))
            for name, seconds in sorted(import_times(log).items(), key=lambda pair: -pair[1]):
                print(f"  import {name}: {seconds:.2f} s, with everything it imports first")
    return ratios.close()


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark, one after another: `make bench` runs their short forms and compares their figures with `expected.json`.

    python -m benchmarks [--full] [NAME …]

`expected.json` holds, by benchmark and figure, bounds that are generous: they are there to catch what has become several times
slower, on a busy machine too. `--full` runs the full forms and holds them against their own aims instead, on a quiet machine.
Exits 1 where a figure is outside its bounds (short of its aim), is missing, or a benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SHORT = {
    "startup": ["--short"],
    "pretrain_step": ["--short"],
    "scaling": ["--short"],
    "transport": ["--short"],
    "checkpoint_stall": ["--millions", "2", "--rounds", "3"],
    "reading": ["--seconds", "0.7", "--shards", "3", "--samples", "300"],
    "scale": ["--shards", "5000"],
    "streaming": ["--rounds", "2", "--without-sharding"],
    "hat_scoring": ["--images", "4", "--captions", "32", "--width", "256", "--repeats", "1"],
    "retrieval_speed": ["--rounds", "1", "--queries", "20", "--batch", "12", "--query_batches", "25"],
}
"""The arguments of each one's short form."""


def outside(values: dict[str, float], expected: dict[str, dict[str, float]]) -> list[str]:
    """One line for each figure that is missing or outside its bounds."""
    found = []
    for name, bounds in expected.items():
        if name not in values:
            found.append(f"{name}: no such figure any more")
            continue
        value = values[name]
        if not bounds.get("at_least", -float("inf")) <= value <= bounds.get("at_most", float("inf")):
            found.append(f"{name}: {value:.3g}, expected {json.dumps(bounds)}")
    return found


def run(name: str, full: bool, expected: dict[str, dict[str, float]]) -> list[str]:
    """-> what is wrong with one benchmark, a line each."""
    print(f"\n== {name}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "ratios.json"
        environment = os.environ | {"LIGATURE_RATIOS": str(place)}
        command = [sys.executable, "-m", f"benchmarks.{name}", *([] if full else SHORT[name])]
        code = subprocess.run(command, env=environment, cwd=HERE.parent, check=False).returncode
        values = json.loads(place.read_text()) if place.exists() else None
    print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)
    if values is None or code not in (0, 1):
        return [f"stopped with exit code {code} before its figures were told"]
    if full:
        return ["short of an aim, see above"] * code
    return outside(values, expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHORT)} (default: all)")
    parser.add_argument("--full", action="store_true", help="the full forms, held against their aims")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(SHORT)):
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(SHORT)}")
    expected = json.loads((HERE / "expected.json").read_text())
    names = options.names or list(SHORT)
    wrong = [f"{name}: {line}" for name in names for line in run(name, options.full, expected.get(name, {}))]
    print("\n" + ("\n".join(wrong) or f"{len(names)} benchmarks, every figure as expected"), flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""Run every benchmark, one after another. `make bench` runs their short forms and compares their figures with `expected.json`.

    python -m benchmarks [--full] [NAME …]

`expected.json` holds generous bounds, by benchmark and figure. They catch what has become several times slower, on a busy
machine too. `--full` runs the full forms on a quiet machine and compares their figures with the benchmarks' own aims.
The exit code is 1 where a figure is outside its bounds or short of its aim, where one is missing, or where a benchmark fails.

Tested in tests/test_benchmarks.py.
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
    "freed_memory": ["--images", "16", "--rounds", "1"],
    "scaling": ["--short"],
    "transport": ["--short"],
    "checkpoint_stall": ["--millions", "2", "--rounds", "3"],
    "reading": ["--seconds", "0.7", "--shards", "3", "--samples", "300"],
    "scale": ["--shards", "5000"],
    "streaming": ["--rounds", "2", "--without-sharding"],
    "hat_scoring": ["--images", "4", "--captions", "32", "--width", "256", "--repeats", "1"],
    "retrieval_speed": ["--rounds", "1", "--queries", "20", "--batch", "12", "--query_batches", "25"],
}
"""Arguments of each benchmark's short form."""


def list_outside(values: dict[str, float], expected: dict[str, dict[str, float]]) -> list[str]:
    """Return one line for each figure that is missing or outside its bounds.

    Args:
        values: name of a figure -> its value.
        expected: name of a figure -> `at_least`, `at_most` or both.
    """
    lines = []
    for name, bounds in expected.items():
        if name not in values:
            lines.append(f"{name}: the benchmark no longer gives this figure")
            continue
        value = values[name]
        if not bounds.get("at_least", -float("inf")) <= value <= bounds.get("at_most", float("inf")):
            lines.append(f"{name}: {value:.3g}, expected {json.dumps(bounds)}")
    return lines


def run(name: str, full: bool, expected: dict[str, dict[str, float]]) -> list[str]:
    """Run one benchmark and return one line for each thing that is wrong with it."""
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ratios.json"
        environment = os.environ | {"LIGATURE_RATIOS": str(path)}
        command = [sys.executable, "-m", f"benchmarks.{name}", *([] if full else SHORT[name])]
        code = subprocess.run(command, env=environment, cwd=HERE.parent, check=False).returncode
        values = json.loads(path.read_text()) if path.exists() else None
    print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    if values is None or code not in (0, 1):
        return [f"stopped with exit code {code} before it gave its figures"]
    if full:
        return ["short of an aim (see above)"] * code
    return list_outside(values, expected)


def main() -> int:
    """Run the benchmarks that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"benchmarks to run: {', '.join(SHORT)} (default: all)"
    )
    parser.add_argument("--full", action="store_true", help="run the full forms and compare with their own aims")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(SHORT)):
        parser.error(f"there is no benchmark {unknown[0]}; name one of {', '.join(SHORT)}")
    expected = json.loads((HERE / "expected.json").read_text())
    names = options.names or list(SHORT)
    wrong = [f"{name}: {line}" for name in names for line in run(name, options.full, expected.get(name, {}))]
    print("\n" + ("\n".join(wrong) or f"{len(names)} benchmarks, every figure as expected"), flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

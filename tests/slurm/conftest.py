"""A cluster of real daemons for these tests, which fail rather than skip where it cannot start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster

from runtime.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TINY = """
name: run
data:
  vocabulary: 400
  caption_tokens: 40
  workers: 0
  augment: {crop_scale: [1.0, 1.0], flip: false, operations: 0}
model:
  image: {architecture: vit_tiny_patch16_224, image_size: 32, patch: 8, width: 48, depth: 2, heads: 4}
  text: {width: 48, layers: 1, heads: 4, feed_forward: 96, positions: 48} # with dropout: it must come back after a stop
  fusion: {layers: 1}
  feature_dim: 32
  codewords: 16
teacher: {queue: 64}
optimizer: {lr: 1.0e-3, min_lr: 1.0e-5, warmup_steps: 10}
training: {global_batch: 32, micro_batch: 4, steps: 150, precision: fp32, device: cpu, log_every: 1, checkpoint_every: 20}
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of this machine, two of which a job can lose."""
    daemons = Cluster(tmp_path_factory.mktemp("cluster"), nodes=3)
    daemons.start()
    yield daemons
    daemons.stop()


class Launcher:
    """`ligature` as a user of the cluster types it, in a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "tiny.yaml").write_text(
            TINY.replace("data:", f"runs: {folder}/runs\ndata:\n  train: {data}/train", 1)
        )
        self.environment = cluster.environment | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run it; its code must be `code`. -> what it printed."""
        command = [sys.executable, "-m", "launch.cli", *arguments]
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout + result.stderr

    def submit(self, *arguments: str) -> int:
        """Launch on CPUs over this machine's own network. -> the job's number."""
        output = self("launch", "slurm", *arguments, "--gpus-per-node", "0", "--network-interface", "lo")
        return int(output.split()[1])

    def run_folder(self, name: str = "run") -> Path:
        return self.folder / "runs" / name

    def step(self, name: str = "run") -> int:
        return int(max((line["step"] for line in read_metrics(self.run_folder(name))), default=0))

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Until `condition()`; a failure shows the run's logs."""
        try:
            self.cluster.wait_for(condition, what, seconds)
        except Exception as error:
            logs = [path for path in self.folder.glob("runs/*/*/*") if path.suffix == ".log"]
            output = "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)
            raise AssertionError(f"{error}\n{output}") from None


@pytest.fixture
def ligature(cluster: Cluster, tmp_path: Path, drawn: Path) -> Launcher:
    return Launcher(cluster, tmp_path, drawn)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


os.environ.setdefault("DS_ACCELERATOR", "cpu")

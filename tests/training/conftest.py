"""Tests of the loop use the pretraining tests' tiny recipe."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "pretrain"))

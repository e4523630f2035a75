"""The recipe of an ablation: a base recipe, the keys that each arm changes, the seeds. `configs/ablate/` holds recipes.

Tested in tests/launch/ablation/test_ablation.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runtime.checks import check_given, check_name
from runtime.errors import RecipeError


@dataclass
class Comparison:
    """A comparison of some arms with one of them, the baseline. It becomes a table."""

    baseline: str
    """Name of the arm that the others are compared with."""
    arms: dict[str, str]
    """Name of an arm -> the result predicted for it. Predictions are written before anything runs, and shown beside the results."""


@dataclass
class AblateRecipe:
    """Pretrain every arm with the same seeds, score it, and compare the arms in pairs.

    Arms of one seed share starting weights, data order and random draws.
    """

    name: str = "ablation"
    """Name of the folder for runs, records and table."""
    runs: str = "runs"
    """Folder that holds that folder."""
    base: str = ""
    """Path of the pretraining recipe that all arms share."""
    data: str = ""
    """Shard folder to score on."""
    scenes: str = ""
    """`scenes.jsonl` of drawn shapes, to measure the mutual information of codewords and scenes. Empty: not measured."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of an arm -> dotted keys of the base recipe that it changes, and their values."""
    conditions: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    """Name of a condition -> dotted keys and values for every arm in it, such as the data. Arms are compared within a condition."""
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Name of a comparison -> its baseline and arms. An arm in several comparisons runs once."""
    seeds: list[int] = field(default_factory=lambda: list(range(8)))
    """Seeds that every arm runs with: two or more."""
    processes: int = 1
    """Ranks of each run, on this machine."""
    jobs: int = 1
    """Runs at the same time. For small models on a CPU: one a core, with OMP_NUM_THREADS=1. On a GPU: 1."""

    def __post_init__(self) -> None:
        check_given(self, "base", "data", "arms", "conditions", "comparisons")
        if self.jobs < 1 or self.processes < 1:
            raise RecipeError(f"jobs is {self.jobs} and processes is {self.processes}; both must be 1 or more")
        if len(self.seeds) < 2 or len(set(self.seeds)) != len(self.seeds):
            raise RecipeError(f"seeds is {self.seeds}; paired differences need two or more different seeds")
        for name, comparison in self.comparisons.items():
            if not comparison.arms:
                raise RecipeError(
                    f"comparison {name} has no arms to compare with {comparison.baseline!r}; name one or more"
                )
            for arm in (comparison.baseline, *comparison.arms):
                if arm not in self.arms:
                    raise RecipeError(
                        f"comparison {name} names {arm!r}, which is none of the arms: {', '.join(self.arms)}"
                    )
        for name in [*self.arms, *self.conditions]:
            if name:
                check_name("an arm or condition", name)

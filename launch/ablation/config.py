"""The recipe of a comparison of arms: a base recipe, what each arm changes, seeds. `configs/ablate/` holds recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runtime.errors import RecipeError
from runtime.recipe import check_name


@dataclass
class Comparison:
    """A table: some arms against one of them, the baseline."""

    baseline: str
    arms: dict[str, str]
    """Arm -> what is expected of it; written before anything runs, and shown beside what was found."""


@dataclass
class AblateRecipe:
    """Pretrain every arm with the same seeds (so the same starting weights, data order and draws), score it, and compare in pairs."""

    name: str = "ablation"
    """Names the folder of runs, records and table."""
    runs: str = "runs"
    base: str = ""
    """Pretraining recipe that all arms share."""
    data: str = ""
    """Shard folder to score on."""
    scenes: str = ""
    """`scenes.jsonl` of drawn shapes, for the mutual information of codewords with what is drawn; none: left out."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of an arm -> dotted keys of the base recipe and their values."""
    conditions: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    """Name of a condition -> dotted keys that hold for every arm in it (the data, for one); arms are compared within a condition."""
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Name of a comparison -> its baseline and arms. An arm may stand in several, and is run once."""
    seeds: list[int] = field(default_factory=lambda: list(range(8)))
    processes: int = 1
    """Ranks of each run, on this machine."""
    jobs: int = 1
    """Runs at a time: of small models on a CPU's cores, one a core (OMP_NUM_THREADS=1). On a GPU leave it at 1."""

    def __post_init__(self) -> None:
        for key in ("base", "data", "arms", "conditions", "comparisons"):
            if not getattr(self, key):
                raise RecipeError(f"{key} is not set; an ablation needs it")
        if self.jobs < 1 or self.processes < 1:
            raise RecipeError(f"jobs {self.jobs}, processes {self.processes}: 1 or more")
        if len(self.seeds) < 2 or len(set(self.seeds)) != len(self.seeds):
            raise RecipeError(f"seeds is {self.seeds}; paired differences need two or more, each once")
        for name, comparison in self.comparisons.items():
            if not comparison.arms:
                raise RecipeError(f"comparison {name} has no arms to hold against {comparison.baseline!r}")
            for arm in (comparison.baseline, *comparison.arms):
                if arm not in self.arms:
                    raise RecipeError(
                        f"comparison {name} names {arm!r}, which is none of the arms: {', '.join(self.arms)}"
                    )
        for name in [*self.arms, *self.conditions]:
            if name:
                check_name("an arm or condition", name)

"""The objectives there are, by their recipe key. An objective is added here and nowhere else in the code that runs.

To add one:

1. Copy `pretrain/objectives/levels.py`, the shortest objective, and write your loss in it. The constructor takes the config.
   A call takes a `StudentState` and returns named tensors: its loss under its recipe key, and figures to log under other names.
2. Copy `LevelsConfig` in `pretrain/config.py`, and add a field for it, named by the recipe key, to `ObjectivesConfig`. A `weight` of 0
   turns the objective off. Make 0 the default, so that existing recipes keep their meaning.
3. Add one line to `OBJECTIVES` below.
4. Add a test: copy `tests/pretrain/objectives/test_levels.py`, and state in `tests/pretrain/test_task.py` which parameters the loss reaches.
5. If it is expensive, count its arithmetic in `pretrain/budget.py`, so that `ligature plan` knows what it costs.

An objective has no parameters of its own. If it needs more inputs than `MicroBatch` offers, write a function that makes them in its
file, and call that function in `PretrainTask.prepare`. `mask_captions` in `masked_language.py` is an example.

An objective that lives outside this package needs none of these steps: the recipe names its class (`objectives.others`, docs/codis.md).

Tested in tests/pretrain/objectives/test_objective_registry.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

from pretrain.config import ObjectivesConfig, OtherObjective
from pretrain.objectives.codebook import Codebook
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.levels import Levels
from pretrain.objectives.masked_language import MaskedLanguage
from pretrain.objectives.matching import Matching
from pretrain.objectives.state import StudentState
from runtime.errors import RecipeError

Objective = Callable[[StudentState], dict[str, Tensor]]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "contrastive": Contrastive,
    "matching": Matching,
    "masked_language": MaskedLanguage,
    "codebook": Codebook,
    "levels": Levels,
}
"""Recipe key, which is also the name of the loss -> class. Its constructor takes the config under that key."""


def objective_weights(config: ObjectivesConfig) -> dict[str, float]:
    """Return the weight of every objective by name, the recipe's own (`others`) last."""
    weights = {name: getattr(config, name).weight for name in OBJECTIVES}
    return weights | {name: other.weight for name, other in config.others.items()}


def make_objectives(config: ObjectivesConfig) -> dict[str, Objective]:
    """Make the objectives that have a weight, in the registry's order, the recipe's own (`others`) last.

    Raises:
        RecipeError: `objectives.others` names a class that cannot be made.
    """
    objectives = {
        name: kind(getattr(config, name)) for name, kind in OBJECTIVES.items() if getattr(config, name).weight
    }
    return objectives | {name: _make_other(name, other) for name, other in config.others.items() if other.weight}


def _make_other(name: str, other: OtherObjective) -> Objective:
    module, _, class_name = other.use.rpartition(".")
    try:
        return getattr(importlib.import_module(module), class_name)(**other.settings)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"objectives.others.{name}: cannot make {other.use} ({error}); name a class as module.Class, its module on PYTHONPATH"
        ) from error

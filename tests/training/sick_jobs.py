"""Jobs that each rank of the sick-step tests runs."""

from __future__ import annotations

import math
from typing import Any

import tiny
import torch

from pretrain.config import divide_batch
from pretrain.engine import Engine
from runtime.ranks import ranks_from_environment


def refuse_and_go_on(stage: int, precision: str) -> dict[str, Any]:
    """A healthy step, a NaN on rank 1, a refused large gradient, a healthy step; and the two healthy ones alone."""
    disturbed = steps(stage, precision, [(0, 1.0), (8, math.nan), (9, 1e4), (1, 1.0)])
    undisturbed = steps(stage, precision, [(0, 1.0), (1, 1.0)])
    return {
        "asked": [(math.isfinite(norm), times == 1) for norm, times in disturbed["norms"][1:3]],
        "applied": disturbed["applied"],
        "unchanged": all(same(disturbed["states"][0], state) for state in disturbed["states"][1:3]),
        "as undisturbed": same(disturbed["states"][3], undisturbed["states"][1]),
    }


def steps(stage: int, precision: str, taken: list[tuple[int, float]]) -> dict[str, Any]:
    """Steps on batch numbers, each loss of rank 1 multiplied; a norm above 1,000 or not finite is refused."""
    recipe = tiny.recipe(training__zero_stage=stage, training__precision=precision)
    ranks = ranks_from_environment()
    micro_batch, accumulation = divide_batch(recipe.training.global_batch, recipe.training.micro_batch, ranks.world)
    task = tiny.task(recipe, ranks)
    engine = Engine(task.student, recipe.optimizer, recipe.training, micro_batch, accumulation, torch.device("cpu"))
    task.gathered = engine.gathered
    results: dict[str, Any] = {"norms": [], "applied": [], "states": []}
    for number, factor in taken:
        norms: list[float] = []

        def admits(norm: float, norms: list[float] = norms) -> bool:
            norms.append(norm)
            return norm < 1000

        rows = slice(ranks.rank * micro_batch, (ranks.rank + 1) * micro_batch)
        engine.set_lr(1e-3)
        (inputs,), _ = task.prepare(tiny.batch(recipe.training.global_batch, number, rows), 1.0, micro_batch)
        loss, _ = engine.module(inputs)
        engine.backward(loss * (factor if ranks.rank == 1 else 1.0))
        engine.step(admits)
        if engine.applied:
            task.finish(engine.masters())
        results["norms"].append((norms[0], len(norms)))
        results["applied"].append(engine.applied)
        parts = [*engine.masters(), *engine.moments(), *task.teacher.averages.items(), *task.queue.state_dict().items()]
        counts = [state["step"].item() for state in engine.adamw.state.values()]
        results["states"].append(({name: value.detach().clone() for name, value in parts}, counts))
    return results


def same(one: tuple[dict[str, Any], list[float]], other: tuple[dict[str, Any], list[float]]) -> bool:
    return one[1] == other[1] and all(value.equal(other[0][name]) for name, value in one[0].items())

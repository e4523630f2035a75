"""Jobs of the tests across ranks: losses and raw gradients in float64, without DeepSpeed or optimizer."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor

from pretrain.config import divide_batch
from runtime.ranks import ranks_from_environment, sum_over_ranks

Told = tuple[dict[str, float], dict[str, Tensor], Tensor, Tensor]


def gradients(changes: dict[str, Any]) -> Told:
    """-> losses, gradients, the plan of this rank's images and the queue's image ids, on the second batch: the first fills the queue."""
    recipe = tiny.recipe(**changes)
    ranks = ranks_from_environment()
    micro_batch, accumulation = divide_batch(recipe.training.global_batch, recipe.training.micro_batch, ranks.world)
    local = micro_batch * accumulation
    task = tiny.task(recipe, ranks)
    task.student.double()
    task.teacher.model.double()
    rows = slice(ranks.rank * local, (ranks.rank + 1) * local)
    task.prepare(tiny.batch(recipe.training.global_batch, 0, rows), 1.0, micro_batch)
    # A student that has moved since: nothing of what is compared is at its starting point.
    masters = {name: parameter.detach().float() for name, parameter in tiny.model(recipe, seed=1).named_parameters()}
    task.finish(masters.items())
    task.teacher.model.double()
    inputs, _ = task.prepare(tiny.batch(recipe.training.global_batch, 1, rows), 1.0, micro_batch)
    losses: dict[str, Tensor] = {}
    for part in inputs:
        loss, named = task.student(part)
        (loss / len(inputs)).backward()
        losses = {name: losses.get(name, 0) + value.detach() / len(inputs) for name, value in named.items()}
    mean = {name: float(sum_over_ranks(value.double())) / ranks.world for name, value in losses.items()}
    found = {
        name: sum_over_ranks(torch.zeros_like(p) if p.grad is None else p.grad) / ranks.world
        for name, p in task.student.model.named_parameters()
    }
    plans = torch.cat([torch.cat([part.plans.image, part.plans.text], -1) for part in inputs if part.plans])
    return mean, found, plans, task.queue.image_ids.clone()


def moving_codebook(changes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """-> codewords and centres after three steps."""
    recipe, ranks = tiny.recipe(**changes), ranks_from_environment()
    micro_batch, accumulation = divide_batch(recipe.training.global_batch, recipe.training.micro_batch, ranks.world)
    local = micro_batch * accumulation
    task, rows = tiny.task(recipe, ranks), slice(ranks.rank * local, (ranks.rank + 1) * local)
    for step in range(3):
        task.prepare(tiny.batch(recipe.training.global_batch, step, rows), 1.0, micro_batch)
        task.finish((name, parameter.data) for name, parameter in task.student.model.named_parameters())
    return task.codebook.codewords, task.codebook.centres

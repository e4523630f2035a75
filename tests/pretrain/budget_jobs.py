"""Jobs of the planner tests: count and measure in a process of their own."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

from benchmarks.flops import flop_counter
from pretrain.config import divide_batch
from pretrain.task import PretrainTask
from pretrain.teacher import Teacher

M_MMAP_THRESHOLD = -3


def parameters(model: nn.Module) -> tuple[int, int]:
    """Of the student and of its teacher."""
    teacher = Teacher(model, 0.9)
    return tuple(sum(weight.numel() for weight in one.parameters()) for one in (model, teacher.model))


def ready(changes: dict[str, Any]) -> tuple[PretrainTask, Any, dict[str, Tensor], int]:
    """A task with a full queue, and a batch whose captions have all their words."""
    recipe = tiny.recipe(training__micro_batch=16, objectives__matching__pool=16, **changes)
    task = tiny.task(recipe)
    task.queue.filled = task.queue.length
    task.queue.image.normal_()
    task.queue.text.normal_()
    batch = tiny.batch(recipe.training.global_batch, 0)
    batch["mask"][:] = True
    batch["ids"] = batch["ids"].clamp(min=5)
    batch["ids"][:, 0], batch["ids"][:, -1] = task.tokenizer.cls, task.tokenizer.sep
    return task, recipe, batch, divide_batch(recipe.training.global_batch, 16, 1)[0]


def count_flops(changes: dict[str, Any]) -> float:
    """Of one sample in one step, by torch's counter, with the expected number of masked words."""
    task, recipe, batch, micro_batch = ready(changes)
    with flop_counter() as counter:
        micro_batches, _ = task.prepare(batch, 2.0, micro_batch)
        for inputs in micro_batches:
            loss, _ = task.student(inputs)
            loss.backward()
    return counter.get_total_flops() / recipe.training.global_batch


def saved_bytes(changes: dict[str, Any]) -> float:
    """What autograd keeps of one sample's forward pass, without the weights themselves: storages, each once."""
    task, recipe, batch, micro_batch = ready(changes)
    inputs = task.prepare(batch, 2.0, micro_batch)[0][0]
    weights = {weight.untyped_storage().data_ptr() for weight in task.student.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor stays alive, so its address is its own
        return tensor

    keys = {part.untyped_storage().data_ptr() for part in (inputs.keys.image, inputs.keys.text)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.student(inputs)
    return sum(size for place, (size, _) in kept.items() if place not in keys) / micro_batch


def peak_bytes(changes: dict[str, Any], steps: int = 2) -> float:
    """What a run's memory grows by from before its model is made to its fullest moment, in this process: resident bytes."""
    import gc

    from pretrain.engine import Engine

    # glibc keeps freed blocks for later unless they are mapped one by one; then what is resident is what is alive.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # below the activations' sizes
    tiny.task(tiny.recipe()), gc.collect()  # what is loaded at first use is no part of the run
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _resident("VmRSS")
    task, recipe, batch, micro_batch = ready(changes)
    engine = Engine(task.student, recipe.optimizer, recipe.training, micro_batch, 1, torch.device("cpu"))
    for _ in range(steps):
        (inputs,), _ = task.prepare(batch, 2.0, micro_batch)
        loss, _ = engine.module(inputs)
        engine.backward(loss)
        del loss
        engine.step()
        task.finish(engine.masters())
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

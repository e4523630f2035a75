"""Where the time of a training step goes, by part: `ligature pretrain --profile 3`.

The parts are marked in the code by `training.profile.profiled`. Modules that several parts share (encoders, heads) are marked
while a profile is taken. torch's profiler records every operation. An operation of the backward pass counts for the part
that ran its forward operation; autograd's sequence numbers connect the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.model.bert_layers import CrossAttention
from training.profile import PREFIX, profiled

if TYPE_CHECKING:
    from pretrain.model.alignment_model import AlignmentModel

JOINT = " / "
"""Separates nested parts, as in `student / images`."""
WARM_UP = 2
"""Steps before a profile begins. The first steps allocate memory, so they are slower."""
BACKWARD = "autograd::engine::evaluate_function: "
"""What the profiler's name of a backward node begins with."""


class StepProfile:
    """Profiles `steps` training steps after the warm-up, then prints the table, once."""

    def __init__(self, steps: int, student: AlignmentModel, teacher: AlignmentModel, device: torch.device) -> None:
        self.steps, self._steps_taken, self._on_gpu = steps, 0, device.type == "cuda"
        self._profile: Any = None
        self._models = (student, teacher)
        self._hooks: list[Any] = []

    def after_step(self) -> None:
        """Begin or end the profile when it is time. Call it at the end of each step."""
        self._steps_taken += 1
        if self.steps and self._steps_taken == WARM_UP:
            self.start()
        elif self.steps and self._steps_taken == WARM_UP + self.steps:
            print(self.stop(), flush=True)

    def finish(self) -> None:
        """Print the profile of the steps recorded so far, if the run ends before `steps` of them."""
        covered = self._steps_taken - WARM_UP
        if not self.steps or covered >= self.steps:
            return
        self.steps = max(1, covered)
        table = self.stop() if self._profile is not None else ""
        too_short = f"no profile: it begins after {WARM_UP} steps, and {self._steps_taken} were taken"
        print(table if covered > 0 else too_short, flush=True)

    def start(self) -> None:
        """Mark the modules and begin to record."""
        for model in self._models:
            self._mark(model)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def stop(self) -> str:
        """Stop recording, remove the marks and return the table."""
        self._profile.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        times = time_by_part(self._profile.events(), self._on_gpu)
        self._profile = None
        return format_table(times, self.steps)

    def _mark(self, model: AlignmentModel) -> None:
        """Mark the modules that several parts run, by hooks before and after their forward."""
        marks: dict[str, Iterable[nn.Module]] = {
            "images": [model.image_encoder],
            "words": [model.text_encoder],
            "fusion": [model.fusion_encoder],
            "keys and values of images": [
                module.key_value for module in model.fusion_encoder.modules() if isinstance(module, CrossAttention)
            ],
            "word head": [model.masked_language_head],
        }
        for name, modules in marks.items():
            for module in modules:
                open_marks: list[record_function] = []  # a stack: a module may be entered again inside itself

                def enter(module: nn.Module, inputs: Any, name: str = name, marks: list = open_marks) -> None:
                    marks.append(profiled(name))
                    marks[-1].__enter__()

                def leave(module: nn.Module, inputs: Any, outputs: Any, marks: list = open_marks) -> None:
                    marks.pop().__exit__(None, None, None)

                self._hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def time_by_part(events: Iterable[Any], gpu: bool) -> dict[tuple[str, str], float]:
    """Return the seconds of each (part, `forward` or `backward`).

    Args:
        events: the events of a torch profile.
        gpu: count the time of a GPU's kernels instead of the CPU's time.
    """
    events = list(events)
    # The part of each forward operation, by the thread and sequence number that its backward node will name.
    forward_part: dict[tuple[int, int], str] = {}
    for event in events:
        if event.scope == 0 and event.sequence_nr >= 0:
            forward_part.setdefault((event.thread, event.sequence_nr), _path(event))
    times: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        # The operation that launched a GPU kernel counts its time already. The kernel's own event would count it twice.
        if spent <= 0 or event.is_async or event.device_type != DeviceType.CPU:
            continue
        where, direction = _path(event), "forward"
        if (node := _backward_node(event)) is not None:
            direction = "backward"
            origin = forward_part.get((node.fwd_thread, node.sequence_nr)) if node.sequence_nr >= 0 else None
            where = origin if origin is not None else "gradients added and reduced"
        if "c10d::" in event.name or "gloo:" in event.name or "nccl" in event.name:
            where = "communication"
        times[where, direction] += spent / 1e6
    return times


def _path(event: Any) -> str:
    """Return the nested parts that an event lies in, outermost first; empty outside all parts."""
    names = []
    while event is not None:
        if event.name.startswith(PREFIX):
            names.append(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return JOINT.join(reversed(names))


def _backward_node(event: Any) -> Any:
    """Return the backward node that an operation belongs to, or None in the forward pass."""
    while event is not None:
        if event.name.startswith(BACKWARD):
            return event
        event = event.cpu_parent
    return None


def format_table(times: dict[tuple[str, str], float], steps: int) -> str:
    """Return a table of the parts: milliseconds a step, forward and backward, and the share of the whole step.

    Args:
        times: seconds of each (part, direction) over all profiled steps.
        steps: number of profiled steps.
    """
    whole = sum(times.values())
    rows = [f"{'part':48} {'forward':>10} {'backward':>10} {'share':>7}   (ms a step, {steps} steps)"]
    names = {name for name, _ in times}
    for name in sorted(names, key=lambda name: -times[name, "forward"] - times[name, "backward"]):
        seconds = [times[name, direction] for direction in ("forward", "backward")]
        columns = " ".join(f"{1e3 * value / steps:10.1f}" if value else " " * 10 for value in seconds)
        rows.append(f"{name or 'everything else':48} {columns} {sum(seconds) / whole:7.1%}")
    rows.append(f"{'all':48} {1e3 * whole / steps:10.1f}")
    return "\n".join(rows)

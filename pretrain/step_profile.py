"""Where the time of a step goes, by part: `ligature pretrain --profile 3`.

The parts are marked where they happen, by `part`; modules that all parts share (encoders, heads) are marked while a profile is
taken. torch's profiler records every operation. One of a backward pass belongs to the part whose forward operation made it, which
autograd's sequence numbers tell.
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
WARM_UP = 2
"""Steps before a profile begins: the first ones allocate."""
BACKWARD = "autograd::engine::evaluate_function: "


class StepProfile:
    """Profiles `steps` steps after the first ones, then prints the table, once."""

    def __init__(self, steps: int, student: AlignmentModel, teacher: AlignmentModel, device: torch.device) -> None:
        self.steps, self._seen, self._on_gpu = steps, 0, device.type == "cuda"
        self._profile: Any = None
        self._models = (student, teacher)
        self._hooks: list[Any] = []

    def after_step(self) -> None:
        """Called at the end of each step."""
        self._seen += 1
        if self.steps and self._seen == WARM_UP:
            self.start()
        elif self.steps and self._seen == WARM_UP + self.steps:
            print(self.stop(), flush=True)

    def finish(self) -> None:
        """No more steps come: print what there is of a profile that they were too few for."""
        covered = self._seen - WARM_UP
        if not self.steps or covered >= self.steps:
            return
        self.steps = max(1, covered)
        table = self.stop() if self._profile is not None else ""
        few = f"no profile: it begins after {WARM_UP} steps, and {self._seen} were taken"
        print(table if covered > 0 else few, flush=True)

    def start(self) -> None:
        for model in self._models:
            self._mark(model)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def stop(self) -> str:
        """-> the table."""
        self._profile.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        times = time_by_part(self._profile.events(), self._on_gpu)
        self._profile = None
        return table(times, self.steps)

    def _mark(self, model: AlignmentModel) -> None:
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
                open_marks: list[record_function] = []

                def enter(module: nn.Module, inputs: Any, name: str = name, marks: list = open_marks) -> None:
                    marks.append(profiled(name))
                    marks[-1].__enter__()

                def leave(module: nn.Module, inputs: Any, outputs: Any, marks: list = open_marks) -> None:
                    marks.pop().__exit__(None, None, None)

                self._hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def time_by_part(events: Iterable[Any], gpu: bool) -> dict[tuple[str, str], float]:
    """Seconds by (part, `forward` or `backward`), from a profile's events; on a GPU those of its kernels."""
    events = list(events)
    made: dict[tuple[int, int], str] = {}
    for event in events:
        if event.scope == 0 and event.sequence_nr >= 0:
            made.setdefault((event.thread, event.sequence_nr), _path(event))
    times: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        # A GPU's kernels are counted in the operations that launched them; as events of their own they would count again.
        if spent <= 0 or event.is_async or event.device_type != DeviceType.CPU:
            continue
        where, way = _path(event), "forward"
        if (node := _backward_node(event)) is not None:
            way = "backward"
            origin = made.get((node.fwd_thread, node.sequence_nr)) if node.sequence_nr >= 0 else None
            where = origin if origin is not None else "gradients added and reduced"
        if "c10d::" in event.name or "gloo:" in event.name or "nccl" in event.name:
            where = "communication"
        times[where, way] += spent / 1e6
    return times


def _path(event: Any) -> str:
    names = []
    while event is not None:
        if event.name.startswith(PREFIX):
            names.append(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return JOINT.join(reversed(names))


def _backward_node(event: Any) -> Any:
    """The node of the backward pass that an operation was done for, or None."""
    while event is not None:
        if event.name.startswith(BACKWARD):
            return event
        event = event.cpu_parent
    return None


def table(times: dict[tuple[str, str], float], steps: int) -> str:
    """Milliseconds a step, forward and backward, and the share of all."""
    whole = sum(times.values())
    rows = [f"{'part':48} {'forward':>10} {'backward':>10} {'share':>7}   (ms a step, {steps} steps)"]
    names = {name for name, _ in times}
    for name in sorted(names, key=lambda name: -times[name, "forward"] - times[name, "backward"]):
        ways = [times[name, way] for way in ("forward", "backward")]
        told = " ".join(f"{1e3 * value / steps:10.1f}" if value else " " * 10 for value in ways)
        rows.append(f"{name or 'everything else':48} {told} {sum(ways) / whole:7.1%}")
    rows.append(f"{'all':48} {1e3 * whole / steps:10.1f}")
    return "\n".join(rows)

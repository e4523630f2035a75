"""DeepSpeed: the optimizer step under ZeRO, and its state read and written whole. The only file that imports DeepSpeed.

DeepSpeed's own checkpoints are not used: they are pickles, tied to the number of ranks, and not crash-safe. This file gathers and
scatters float32 masters and Adam's moments through DeepSpeed's fragment functions. Where they live depends on the ZeRO stage:

stage 0, fp32   The parameters are the masters. Moments are in `optimizer.state`, by parameter.
stage 0, bf16   `FP16_UnfusedOptimizer` has the lists `fp16_groups` and `fp32_groups` side by side. Moments are in `optimizer.state`, by
                the float32 tensor.
stage 1 and 2   Flat float32 partitions. `safe_get_full_*` and `safe_set_full_*` map them to parameters. Masters are read a whole
                optimizer group at a time instead (`_gathered_masters`).
stage 3         `safe_get_full_*` reads. The parameters themselves are empty outside a forward: each rank has a slice of each, padded
                with zeros so that all slices are equal. `safe_set_full_*` fails where a parameter does not divide evenly, so
                `safe_set_local_*` writes slices.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.budget import BUCKET
from pretrain.config import TrainingConfig
from pretrain.model.parts import parameter_groups
from pretrain.task import Student
from runtime.errors import CheckpointError
from runtime.ranks import all_gather_into, ranks_from_environment
from training.config import OptimizerConfig
from training.profile import profiled

MOMENTS = ("exp_avg", "exp_avg_sq")
KEPT_WHOLE = 100_000
"""At stage 3, parameters with fewer elements stay whole on every rank: gathering them costs more than their memory."""


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device and silence its log.

    Its communication extension for CPUs is left out, because it compiles at first use.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(ranks_from_environment().local_rank))  # DeepSpeed insists on it
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renamed the collectives that DeepSpeed 0.19 calls, and warns on every call and rank: gigabytes in the logs of a long run.
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class GuardedAdamW(torch.optim.AdamW):
    """AdamW with a step that can be refused.

    At every ZeRO stage DeepSpeed knows the gradient's norm only just before it calls `step`. What it does afterwards, copying masters
    into parameters, changes nothing if the step did nothing.
    """

    allowed: Callable[[], bool] = staticmethod(lambda: True)
    frozen: frozenset[str] = frozenset()
    """Parts whose groups take no step. DeepSpeed gives them gradients of zero, by which AdamW would still count and decay."""

    def step(self, closure: Any = None) -> Any:
        """Step if `allowed()`; otherwise change nothing."""
        if not self.allowed():
            return None
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["part"] not in self.frozen]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class Engine:
    """The student under DeepSpeed.

    Attributes:
        module: DeepSpeed's engine; call it for the student's forward.
        applied: whether the last complete step was applied.
        names: the trained parameters, in the model's order.
        device: where the student runs.
        part_steps: Adam's step count of each part that learns from a later epoch on.
    """

    def __init__(
        self,
        student: Student,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        micro_batch: int,
        accumulation: int,
        device: torch.device,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        from deepspeed import utils, zero

        self._fragments, self._zero = utils, zero  # `utils` holds the fragment functions
        self.stage, self.bf16 = training.zero_stage, training.precision == "bf16"
        self.clip_norm = optimizer.clip_norm
        named = [(name, parameter) for name, parameter in student.model.named_parameters() if parameter.requires_grad]
        adamw = GuardedAdamW(
            parameter_groups(dict(named), student.model.parts(), optimizer),
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            fused=True,  # one pass over the memory: on a CPU it takes a quarter of the time of `foreach`, and no temporaries
        )
        zero_settings: dict[str, Any] = {
            "stage": self.stage,
            "stage3_param_persistence_threshold": KEPT_WHOLE,
            "overlap_comm": True,  # reduce gradients, a bucket at a time, while the backward pass continues
            "reduce_bucket_size": BUCKET,
        }
        if training.offload_optimizer:
            zero_settings["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": zero_settings,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own optimizer compiles at first use
            "bf16": {"enabled": self.bf16},
            "gradient_clipping": optimizer.clip_norm,
            "wall_clock_breakdown": False,
            "timers": {"throughput": {"enabled": False}},  # the host would wait for the GPU twice a micro-batch
        }
        # DeepSpeed makes the masters from weights that it has already cast to bf16, and at stage 0 decays them once before the first
        # step. So the float32 weights are kept here and loaded into the masters below.
        shapes = {name: parameter.shape for name, parameter in named}
        start = {name: parameter.detach().to("cpu", copy=True) for name, parameter in named} if self.bf16 else {}
        self.module, *_ = deepspeed.initialize(
            model=student, optimizer=adamw, config=settings, dist_init_required=False
        )
        if self.stage == 0 and torch.distributed.get_world_size() == 1:
            self.module.enable_backward_allreduce = False  # it would copy all gradients twice, for nothing
        self.device: torch.device = self.module.device
        self.names = [name for name, _ in named]
        self.shapes = shapes
        self.parameters = dict(student.model.named_parameters())
        self.adamw, self.applied = adamw, False
        self.part_steps = {part: 0 for group in adamw.param_groups if (part := group["part"])}
        self._make_states()
        for name, weight in start.items():
            self._load_master(name, weight)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of one micro-batch; gradients accumulate."""
        self.module.backward(loss)

    def step(self, admits: Callable[[float], bool] = math.isfinite) -> float:
        """Apply the gradients once the micro-batches of a step are complete. A collective.

        Afterwards `applied` tells whether the step was applied.

        Args:
            admits: called once with the gradients' global norm; returns whether they may be applied.

        Returns:
            The global norm before clipping; 0 while the step is incomplete.
        """
        if not self.module.is_gradient_accumulation_boundary():
            self.module.step()
            return 0.0
        plain = self._plain_norm() if self.stage == 0 and not self.bf16 else None
        verdicts: list[bool] = []

        def norm() -> float:
            return float(self.module.optimizer._global_grad_norm) if plain is None else plain

        def allowed() -> bool:  # called for each group of parameters, and all get the same answer
            if not verdicts:
                verdicts.append(admits(norm()))
            return verdicts[0]

        self.adamw.allowed = allowed
        with profiled("optimizer"):
            self.module.step()
        # Where a gradient is not finite, DeepSpeed skips the step itself and never calls `allowed`.
        self.applied = verdicts[0] if verdicts else admits(norm()) and self.module.was_step_applied()
        for part in self.part_steps.keys() - self.adamw.frozen if self.applied else ():
            self.part_steps[part] += 1
        return norm()

    def _plain_norm(self) -> float:
        """Return the gradients' global norm. Without ZeRO and bf16 DeepSpeed keeps none, but the averaged gradients are here."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; each group of parameters takes its share of it."""
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]

    def freeze(self, parts: frozenset[str]) -> None:
        """Let these parts take no step, until the next call. Their parameters have no gradient (`Freezing`)."""
        self.adamw.frozen = parts

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the whole float32 weight of every trained parameter. A collective: every rank must iterate to the end."""
        if not self.bf16 and self.stage < 3:
            # In float32 the parameters hold the masters' values on every rank.
            yield from ((name, self.parameters[name].data) for name in self.names)
        elif self.stage == 0:
            unfused = self._unfused_masters()
            yield from ((name, unfused[id(self.parameters[name])]) for name in self.names)
        elif self.stage < 3:
            gathered = self._gathered_masters()
            yield from ((name, gathered[id(self.parameters[name])]) for name in self.names)
        else:
            yield from ((name, self._fragment("safe_get_full_fp32_param", name)) for name in self.names)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Adam's moments, whole and in float32, as `exp_avg.<name>` and `exp_avg_sq.<name>`. A collective."""
        for moment in MOMENTS:
            for name in self.names:
                if self.stage == 0:
                    yield f"{moment}.{name}", self._adam_state(name)[moment]
                else:
                    yield f"{moment}.{name}", self._fragment("safe_get_full_optimizer_state", name, moment)

    def load(
        self,
        masters: dict[str, Tensor],
        moments: dict[str, Tensor],
        steps: int,
        part_steps: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Restore the optimizer's state from whole tensors, at any world size and ZeRO stage.

        Args:
            masters: float32 weights by parameter name.
            moments: Adam's moments, named as `moments` names them.
            steps: Adam's step count.
            part_steps: the step count of each part that learns from a later epoch on.

        Raises:
            CheckpointError: names or shapes are not those of the recipe's model.
        """
        if missing := sorted(set(self.names) ^ set(masters)):
            raise CheckpointError(
                f"the checkpoint and the recipe's model have different parameters, first {missing[0]}; use the checkpoint's recipe"
            )
        self.part_steps = {part: part_steps[part] for part in self.part_steps}
        for group, tensor in self._optimized():
            self.adamw.state[tensor]["step"].fill_(self.part_steps.get(group["part"], steps))
        for name in self.names:
            if masters[name].shape != self.shapes[name]:
                raise CheckpointError(
                    f"{name} is {tuple(masters[name].shape)} in the checkpoint and {tuple(self.shapes[name])} in the recipe; use the checkpoint's recipe"
                )
            self._load_master(name, masters[name])
            for moment in MOMENTS:
                self._load_moment(name, moment, moments[f"{moment}.{name}"])

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        """Return a context in which these parameters are whole, to be read outside the engine's forward. A collective."""
        return self._zero.GatheredParameters(list(parameters)) if self.stage == 3 else nullcontext()

    def copy_weights(self, network: nn.Module) -> None:
        """Copy the student's weights into `network`, a model of the same shape, in the compute precision. A collective."""
        own = dict(network.named_parameters())
        for name, buffer in self.module.module.model.named_buffers():
            network.get_buffer(name).copy_(buffer)
        for name, parameter in self.parameters.items():
            with self.gathered([parameter]):
                own[name].data = parameter.detach().clone()

    def _fragment(self, function: str, name: str, *arguments: Any) -> Any:
        """Call one of DeepSpeed's fragment functions for a parameter.

        At stage 3 they do nothing, in silence, for a parameter that takes no gradient at present.
        """
        parameter = self.parameters[name]
        learns = parameter.requires_grad
        parameter.requires_grad_(True)
        try:
            return getattr(self._fragments, function)(parameter, *arguments)
        finally:
            parameter.requires_grad_(learns)

    def _load_master(self, name: str, master: Tensor) -> None:
        parameter: Any = self.parameters[name]  # Any: DeepSpeed adds attributes of its own
        if self.stage == 3:
            own_slice = self._own_slice(parameter, master)
            self._fragment("safe_set_local_fp32_param", name, own_slice)
            parameter.ds_tensor.data.copy_(own_slice)
            if parameter.numel():  # one that stays whole (`KEPT_WHOLE`)
                parameter.data.copy_(master)
            return
        parameter.data.copy_(master)
        if self.stage > 0:
            self._fragment("safe_set_full_fp32_param", name, master.to(self.device))
        elif self.bf16:
            self._unfused_masters()[id(parameter)].data.copy_(master)

    def _load_moment(self, name: str, moment: str, value: Tensor) -> None:
        parameter = self.parameters[name]
        if self.stage == 0:
            self._adam_state(name)[moment].copy_(value)
        elif self.stage == 3:
            self._fragment("safe_set_local_optimizer_state", name, self._own_slice(parameter, value), moment)
        else:
            self._fragment("safe_set_full_optimizer_state", name, value.to(self.device), moment)

    def _own_slice(self, parameter: Any, whole: Tensor) -> Tensor:
        """Return this rank's slice of a parameter at stage 3, flat and padded with zeros."""
        length: int = parameter.ds_tensor.numel()
        padded = torch.zeros(length * torch.distributed.get_world_size())
        padded[: whole.numel()] = whole.flatten()
        return padded.narrow(0, length * torch.distributed.get_rank(), length).to(self.device)

    def _gathered_masters(self) -> dict[int, Tensor]:
        """Return whole masters by the id of their parameter, at stages 1 and 2.

        This takes one collective for each of the optimizer's groups; DeepSpeed's own function takes one for each parameter. On a
        single rank the tensors are the masters themselves, not copies.
        """
        optimizer, world, masters = self.module.optimizer, torch.distributed.get_world_size(), dict[int, Tensor]()
        groups = zip(optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups, strict=True)
        for own, parameters in groups:
            whole = own.detach().to(self.device)
            if world > 1:
                partition, whole = whole, whole.new_empty(world * own.numel())
                all_gather_into(whole, partition)
            starts = [0, *itertools.accumulate(parameter.numel() for parameter in parameters)]
            for start, parameter in zip(starts, parameters, strict=False):
                masters[id(parameter)] = whole[start : start + parameter.numel()].view(parameter.shape)
        return masters

    def _unfused_masters(self) -> dict[int, Tensor]:
        """Return whole masters by the id of their parameter, at stage 0 in bf16."""
        optimizer = self.module.optimizer
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {id(half): master for halves, masters in pairs for half, master in zip(halves, masters, strict=True)}

    def _adam_state(self, name: str) -> dict[str, Tensor]:
        parameter = self.parameters[name]
        return self.adamw.state[self._unfused_masters()[id(parameter)] if self.bf16 else parameter]

    def _optimized(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield every tensor that AdamW steps on, with its group."""
        groups, optimizer = self.adamw.param_groups, self.module.optimizer
        if self.stage == 3:  # the groups are filled only for the step
            for number, tensor in enumerate(optimizer.fp32_partitioned_groups_flat):
                yield groups[optimizer.sub_group_to_group_id[number]], tensor
        else:
            yield from ((group, tensor) for group in groups for tensor in group["params"])

    def _make_states(self) -> None:
        """Make Adam's state now; AdamW itself would make it in the first step.

        A checkpoint can then be loaded into it. Besides, DeepSpeed 0.19 links only the first parameter group's moments if those
        of the other groups do not exist yet.
        """
        for group, tensor in self._optimized():
            count = torch.tensor(0.0, device=tensor.device if group["fused"] else "cpu")
            moments = {moment: torch.zeros_like(tensor, dtype=torch.float32) for moment in MOMENTS}
            self.adamw.state[tensor] = {"step": count, **moments}
        if self.stage in (1, 2):
            self.module.optimizer._lazy_init_hp_params_optimizer_state()

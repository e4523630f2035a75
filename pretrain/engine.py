"""DeepSpeed: the optimizer step under ZeRO, and its state read and written whole. The only file that imports DeepSpeed.

DeepSpeed's own checkpoints are not used (they are pickles, tied to the number of ranks, and not crash-safe). Float32 masters
and Adam's moments are gathered and scattered here through its fragment functions, whose home differs by ZeRO stage:

stage 0, fp32   the parameters are the masters; moments in `optimizer.state`
stage 0, bf16   `FP16_UnfusedOptimizer`: lists `fp16_groups` and `fp32_groups` side by side; moments by the float32 tensor
stage 1 and 2   flat float32 partitions, mapped to parameters by DeepSpeed's `safe_get_*` and `safe_set_*`
stage 3         likewise, and the parameters themselves are empty but in a forward: each rank has a slice of each, zero-padded so
                that all slices are equal. `safe_set_full_*` fails where a parameter does not divide evenly: slices are set here
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.budget import BUCKET
from pretrain.config import TrainingConfig
from pretrain.task import Student
from runtime.errors import CheckpointError
from runtime.ranks import all_gather_into, ranks_from_environment
from training.config import OptimizerConfig
from training.profile import profiled

MOMENTS = ("exp_avg", "exp_avg_sq")
KEPT_WHOLE = 100_000
"""At stage 3, parameters below this size are kept whole on every rank: gathering them costs more than their memory."""


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, for this device, and without its compile-at-first-use communication extension for CPUs."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(ranks_from_environment().local_rank))  # DeepSpeed insists on it
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def has_weight_decay(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices: biases, norms and the temperature take none (ALBEF's rule, its 0-d temperature mended)."""
    return parameter.ndim > 1 and not name.endswith(".bias")


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose step can be refused: at every ZeRO stage DeepSpeed knows the gradient's norm before it calls `step` and not
    sooner, and what it does after it (copying masters into parameters) changes nothing then."""

    allowed: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.allowed() else None


class Engine:
    """The student under DeepSpeed."""

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

        self._fragments, self._zero = utils, zero
        self.stage, self.bf16 = training.zero_stage, training.precision == "bf16"
        self.clip_norm = optimizer.clip_norm
        named = [(name, parameter) for name, parameter in student.model.named_parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for n, p in named if has_weight_decay(n, p)], "weight_decay": optimizer.weight_decay},
            {"params": [p for n, p in named if not has_weight_decay(n, p)], "weight_decay": 0.0},
        ]
        adamw = GuardedAdamW(
            groups,
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            fused=True,  # one pass over the memory: on a CPU a quarter of the time of `foreach`, and no temporaries
        )
        zero_settings: dict[str, Any] = {
            "stage": self.stage,
            "stage3_param_persistence_threshold": KEPT_WHOLE,
            "overlap_comm": True,  # gradients travel while the backward pass goes on, a bucket at a time
            "reduce_bucket_size": BUCKET,
        }
        if training.offload_optimizer:
            zero_settings["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": zero_settings,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own is compiled at first use
            "bf16": {"enabled": self.bf16},
            "gradient_clipping": optimizer.clip_norm,
            "wall_clock_breakdown": False,
            "timers": {"throughput": {"enabled": False}},  # it would have the host wait for the GPU twice a micro-batch
        }
        # DeepSpeed makes the masters from weights it has cast already, and at stage 0 has_weight_decay them once before the first step.
        shapes = {name: parameter.shape for name, parameter in named}
        start = {name: parameter.detach().to("cpu", copy=True) for name, parameter in named} if self.bf16 else {}
        self.module, *_ = deepspeed.initialize(
            model=student, optimizer=adamw, config=settings, dist_init_required=False
        )
        if self.stage == 0 and torch.distributed.get_world_size() == 1:
            self.module.enable_backward_allreduce = False  # two copies of all gradients, for nothing
        self.device: torch.device = self.module.device
        self.names = [name for name, _ in named]
        self.shapes = shapes
        self.parameters = dict(student.model.named_parameters())
        self.adamw, self.applied = adamw, False
        self._make_states()
        for name, weight in start.items():
            self._load_master(name, weight)

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)

    def step(self, admits: Callable[[float], bool] = math.isfinite) -> float:
        """Apply the gradients where the micro-batches of a step are complete; -> their global norm before clipping.

        admits: asked once, with that norm, whether they may be applied; `applied` tells afterwards whether they were.
        """
        if not self.module.is_gradient_accumulation_boundary():
            self.module.step()
            return 0.0
        plain = self._plain_norm() if self.stage == 0 and not self.bf16 else None
        verdicts: list[bool] = []

        def norm() -> float:
            return float(self.module.optimizer._global_grad_norm) if plain is None else plain

        def allowed() -> bool:  # asked for each group of parameters
            if not verdicts:
                verdicts.append(admits(norm()))
            return verdicts[0]

        self.adamw.allowed = allowed
        with profiled("optimizer"):
            self.module.step()
        # Where a gradient is not finite DeepSpeed skips the step by itself and never asks.
        self.applied = verdicts[0] if verdicts else admits(norm()) and self.module.was_step_applied()
        return norm()

    def _plain_norm(self) -> float:
        """Without ZeRO or bf16 DeepSpeed keeps no norm; the averaged gradients are at hand before the step."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def set_lr(self, lr: float) -> None:
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 weight, whole) of every trained parameter. A collective: every rank must walk it."""
        if not self.bf16 and self.stage < 3:
            # In float32 the parameters hold the masters' values on every rank.
            yield from ((name, self.parameters[name].data) for name in self.names)
        elif self.stage == 0:
            halves = self._unfused_masters()
            yield from ((name, halves[id(self.parameters[name])]) for name in self.names)
        elif self.stage < 3:
            wholes = self._gathered_masters()
            yield from ((name, wholes[id(self.parameters[name])]) for name in self.names)
        else:
            yield from ((name, self._fragments.safe_get_full_fp32_param(self.parameters[name])) for name in self.names)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """(`exp_avg.name` or `exp_avg_sq.name`, float32, whole). A collective."""
        for moment in MOMENTS:
            for name in self.names:
                if self.stage == 0:
                    yield f"{moment}.{name}", self._adam_state(name)[moment]
                else:
                    yield (
                        f"{moment}.{name}",
                        self._fragments.safe_get_full_optimizer_state(self.parameters[name], moment),
                    )

    def load(self, masters: dict[str, Tensor], moments: dict[str, Tensor], steps: int) -> None:
        """Restore masters, moments and Adam's step count from whole tensors, at any world size and ZeRO stage."""
        if missing := sorted(set(self.names) ^ set(masters)):
            raise CheckpointError(
                f"the checkpoint and the recipe's model differ, first in {missing[0]}; use the recipe it was made with"
            )
        for state in self.adamw.state.values():
            state["step"].fill_(steps)
        for name in self.names:
            if masters[name].shape != self.shapes[name]:
                raise CheckpointError(
                    f"{name} is {tuple(masters[name].shape)} in the checkpoint and {tuple(self.shapes[name])} in the recipe; use the recipe it was made with"
                )
            self._load_master(name, masters[name])
            for moment in MOMENTS:
                self._load_moment(name, moment, moments[f"{moment}.{name}"])

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        """Within it these parameters are whole, to be read outside the engine's forward. A collective."""
        return self._zero.GatheredParameters(list(parameters)) if self.stage == 3 else nullcontext()

    def copy_weights(self, network: nn.Module) -> None:
        """Give `network`, of the student's shape, the student's weights in the compute precision. A collective."""
        own = dict(network.named_parameters())
        for name, parameter in self.parameters.items():
            with self.gathered([parameter]):
                own[name].data = parameter.detach().clone()

    def _load_master(self, name: str, master: Tensor) -> None:
        parameter: Any = self.parameters[name]  # DeepSpeed hangs its own attributes on it
        if self.stage == 3:
            part = self._own_slice(parameter, master)
            self._fragments.safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.data.copy_(part)
            if parameter.numel():  # kept whole
                parameter.data.copy_(master)
            return
        parameter.data.copy_(master)
        if self.stage > 0:
            self._fragments.safe_set_full_fp32_param(parameter, master.to(self.device))
        elif self.bf16:
            self._unfused_masters()[id(parameter)].data.copy_(master)

    def _load_moment(self, name: str, moment: str, value: Tensor) -> None:
        parameter = self.parameters[name]
        if self.stage == 0:
            self._adam_state(name)[moment].copy_(value)
        elif self.stage == 3:
            self._fragments.safe_set_local_optimizer_state(parameter, self._own_slice(parameter, value), moment)
        else:
            self._fragments.safe_set_full_optimizer_state(parameter, value.to(self.device), moment)

    def _own_slice(self, parameter: Any, whole: Tensor) -> Tensor:
        """This rank's slice of a parameter at stage 3, flat."""
        length: int = parameter.ds_tensor.numel()
        padded = torch.zeros(length * torch.distributed.get_world_size())
        padded[: whole.numel()] = whole.flatten()
        return padded.narrow(0, length * torch.distributed.get_rank(), length).to(self.device)

    def _gathered_masters(self) -> dict[int, Tensor]:
        """Stages 1 and 2: whole masters by the id of their parameter, in one collective for each of the optimizer's groups;
        DeepSpeed's own function takes one for each parameter. At a world of one they are the masters themselves."""
        optimizer, world, found = self.module.optimizer, torch.distributed.get_world_size(), dict[int, Tensor]()
        groups = zip(optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups, strict=True)
        for own, parameters in groups:
            whole = own.detach().to(self.device)
            if world > 1:
                parts, whole = whole, whole.new_empty(world * own.numel())
                all_gather_into(whole, parts)
            starts = [0, *itertools.accumulate(parameter.numel() for parameter in parameters)]
            for start, parameter in zip(starts, parameters, strict=False):
                found[id(parameter)] = whole[start : start + parameter.numel()].view(parameter.shape)
        return found

    def _unfused_masters(self) -> dict[int, Tensor]:
        optimizer = self.module.optimizer
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {id(half): master for halves, masters in pairs for half, master in zip(halves, masters, strict=True)}

    def _adam_state(self, name: str) -> dict[str, Tensor]:
        parameter = self.parameters[name]
        return self.adamw.state[self._unfused_masters()[id(parameter)] if self.bf16 else parameter]

    def _make_states(self) -> None:
        """Make Adam's state, which is lazy, before the first step: there is something to load into, and DeepSpeed 0.19 links
        the moments of the first parameter group alone where it finds the others' not made yet."""
        if self.stage == 3:  # its groups are filled for the step alone
            groups = [(self.adamw.defaults["fused"], self.module.optimizer.fp32_partitioned_groups_flat)]
        else:
            groups = [(group["fused"], group["params"]) for group in self.adamw.param_groups]
        for fused, tensors in groups:
            for tensor in tensors:
                count = torch.tensor(0.0, device=tensor.device if fused else "cpu")
                moments = {moment: torch.zeros_like(tensor, dtype=torch.float32) for moment in MOMENTS}
                self.adamw.state[tensor] = {"step": count, **moments}
        if self.stage in (1, 2):
            self.module.optimizer._lazy_init_hp_params_optimizer_state()

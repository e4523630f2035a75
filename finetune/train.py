"""Fine-tuning for retrieval, with accelerate: the dual head by contrast, the fusion head by matching."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data_tools.collection import Collection
from data_tools.order import derived_seed, uniforms
from data_tools.packed import views_on
from data_tools.stream import ShardStream
from data_tools.transforms import TrainTransform
from finetune.config import FinetuneRecipe
from finetune.heads.dual import dual_loss
from pretrain.load import ImageTextModel, load_model, load_weights
from pretrain.loop import Stage, run_loop
from pretrain.model.alignment_model import AlignmentModel, TextBatch
from pretrain.objectives.matching import Matching
from pretrain.objectives.state import Keys, MicroBatch, StudentState
from pretrain.sick_steps import SickSteps
from pretrain.task import NEGATIVES
from pretrain.train import describe_model, find_resume, validate
from runtime.checkpoint import read_tensors, write_checkpoint
from runtime.errors import RecipeError, SickRun
from runtime.files import read_json
from runtime.ranks import Ranks, any_rank, join, sum_over_ranks
from runtime.recipe import write_recipe
from runtime.run_folder import RunFolder
from runtime.watchdog import Watchdog, watch_ranks


class RetrievalLosses(nn.Module):
    """The module that accelerate prepares: one forward from a batch to the losses."""

    def __init__(self, model: AlignmentModel, recipe: FinetuneRecipe) -> None:
        super().__init__()
        self.model = model
        self.contrastive_weight, self.matching_weight = recipe.contrastive_weight, recipe.matching_weight
        self.matching = Matching(recipe.matching)

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """-> the weighted sum of the losses, and every named loss, detached."""
        tokens = self.model.image_encoder(batch.images)
        state = StudentState(self.model, batch, tokens, self.model.text_encoder(batch.text.ids, batch.text.mask))
        losses = {"contrastive": dual_loss(state.image, state.text, batch.image_ids, self.model.temperature())}
        total = self.contrastive_weight * losses["contrastive"]
        if self.matching_weight:
            # There is no teacher: negatives are drawn by the model's own similarities.
            batch.keys = Keys(state.image.detach(), state.text.detach(), batch.image_ids)
            losses |= self.matching(state)
            total = total + self.matching_weight * losses["matching"]
        return total, {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}


def finetune(recipe: FinetuneRecipe) -> Path:
    """Fine-tune by the recipe, or go on from its last checkpoint. -> the run's folder."""
    run = RunFolder(recipe)
    run.check(recipe)
    if not run.finished():
        ranks, device = join(recipe.training.device, recipe.training.rank_timeout)
        try:
            with watch_ranks(ranks, recipe.training.rank_timeout) as watchdog:
                train(recipe, run, ranks, device, watchdog)
        finally:
            run.close()
    return run.path


def train(recipe: FinetuneRecipe, run: RunFolder, ranks: Ranks, device: torch.device, watchdog: Watchdog) -> None:
    """One rank's part of the run, from what is saved of it to its end."""
    if recipe.training.global_batch % ranks.world:
        raise RecipeError(
            f"training.global_batch {recipe.training.global_batch} does not divide over {ranks.world} ranks"
        )
    start = load_model(recipe.checkpoint)
    if recipe.image_size:
        start = at_resolution(start, recipe.image_size)
    model = start.network.requires_grad_(True).train()
    model.codebook = None  # retrieval does not read it
    if not recipe.matching_weight:  # nothing trains these then, and DDP would wait for their gradients
        model.fusion_encoder.requires_grad_(False)
        model.matching_head.requires_grad_(False)
    model.masked_language_head.requires_grad_(False)
    validation = Collection(recipe.data.validation) if recipe.data.validation else None
    run.open(recipe, ranks)
    stream = ShardStream(
        recipe.data.train,
        recipe.training.global_batch // ranks.world,
        ranks.rank,
        ranks.world,
        recipe.data.workers,
        recipe.training.seed,
        TrainTransform(model.config.image.image_size, recipe.data.augment, views=1),
        start.tokenizer,
        run.quarantine,
        recipe.data.max_bad_share,
    )
    mixed = "bf16" if recipe.training.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = [parameter for parameter in named.values() if parameter.ndim > 1]
    others = [parameter for parameter in named.values() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(recipe.optimizer.betas[0], recipe.optimizer.betas[1]),
    )
    losses, prepared = accelerator.prepare(RetrievalLosses(model, recipe), optimizer)
    sick = SickSteps(recipe.training.sick_steps)
    step, best = 0, -1.0
    if (resumed := find_resume(run, ranks)) is not None:
        state = resume(resumed, model, optimizer, named, sick)
        stream.load_state_dict(state["stream"])
        step, best = state["step"], state["best_rsum"]
        if ranks.first:
            print(f"going on from {resumed} at step {step}", flush=True)
    elif ranks.first:
        print(
            f"fine-tuning {start.folder} ({start.training}) on {recipe.dataset}, {ranks.world} x {device.type}",
            flush=True,
        )

    def take_step(batch: dict[str, Any], epoch: float, step: int) -> dict[str, Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr_at(step, steps)
        torch.manual_seed(derived_seed(recipe.training.seed, step, ranks.rank))
        watchdog.meet()
        loss, figures = losses(retrieval_batch(batch, recipe.training.seed, device))
        accelerator.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(named.values(), recipe.optimizer.clip_norm or math.inf)
        mean_loss = float(sum_over_ranks(figures["loss"])) / ranks.world
        if sick.admits(mean_loss, float(norm)):
            prepared.step()
        prepared.zero_grad()
        return figures | {
            "lr": torch.tensor(group["lr"]),
            "gradient_norm": norm,
            "temperature": model.temperature().detach(),
        }

    def measure() -> dict[str, float]:
        assert validation is not None
        return validate(model, start.tokenizer, validation, ranks, device, 64, recipe.data.workers)

    def commit(step: int, best: float, improved: bool) -> bool:
        saved = not ranks.first or save(run, recipe, start, optimizer, named, stream, sick, step, best, improved)
        return not any_rank(not saved)

    def go_back(healthy: int) -> int:
        folder = find_resume(run, ranks, healthy)
        if folder is None:
            raise SickRun(
                f"no checkpoint of step {healthy} or before to go back to; start again with a lower optimizer.lr"
            )
        return resume(folder, model, optimizer, named, sick)["step"]

    steps = recipe.training.total_steps(len(stream.reader))
    stage = Stage(take_step, measure if validation else None, commit, go_back)
    run_loop(run, recipe.training, stream, stage, sick, watchdog, ranks, device, step, best)


def retrieval_batch(batch: dict[str, Any], seed: int, device: torch.device) -> MicroBatch:
    """A batch of the stream as the heads read it; its keys are the model's own features, which come later."""
    ids = batch["image_ids"].to(device)
    draws = torch.from_numpy(uniforms(derived_seed(seed, NEGATIVES), batch["positions"].numpy(), 2)).to(device)
    nothing = torch.empty(0, device=device)
    return MicroBatch(
        images=views_on(batch["images"], device)[0],
        text=TextBatch(batch["ids"].to(device), batch["mask"].to(device)),
        image_ids=ids,
        rows=torch.arange(len(ids), device=device),
        draws=draws,
        keys=Keys(nothing, nothing, nothing),
        distill_weight=0.0,
    )


def at_resolution(start: ImageTextModel, image_size: int) -> ImageTextModel:
    """The same model for images of another size, its position embeddings interpolated (bicubic, as ALBEF)."""
    config = dataclasses.replace(
        start.network.config, image=dataclasses.replace(start.network.config.image, image_size=image_size)
    )
    start.network.image_encoder.vit.set_input_size(image_size)
    network = AlignmentModel(config, start.tokenizer.vocabulary)
    network.load_state_dict(start.network.state_dict())
    return ImageTextModel(network, start.tokenizer, start.folder, start.training, start.device)


def resume(
    folder: Path,
    model: AlignmentModel,
    optimizer: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    sick: SickSteps,
) -> dict[str, Any]:
    """Restore everything but the data's cursor from a checkpoint. -> its `state.json`."""
    state = read_json(folder / "state.json")
    sick.load(state.get("sick"))
    load_weights(model, read_tensors(folder, "model"), folder)
    load_moments(optimizer, named, read_tensors(folder, "optimizer"), state["step"] - sick.skipped)
    return state


def load_moments(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], moments: dict[str, Tensor], steps: int
) -> None:
    """Restore Adam's state by parameter name."""
    for name, parameter in named.items():
        restored = {moment: moments[f"{moment}.{name}"].to(parameter.device) for moment in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **restored}


def save(
    run: RunFolder,
    recipe: FinetuneRecipe,
    start: ImageTextModel,
    optimizer: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    stream: ShardStream,
    sick: SickSteps,
    step: int,
    best: float,
    improved: bool,
) -> bool:
    """Commit a checkpoint of the model, Adam's moments and the cursor. -> whether it stands."""
    config = dataclasses.replace(start.network.config, codewords=0)
    about = describe_model(config, start.tokenizer.caption_tokens, f"fine-tuned-on {recipe.dataset}")
    weights = dict(start.network.named_parameters())
    moments = {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in named.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }

    def write_more(folder: Path) -> None:
        start.tokenizer.save(folder)
        write_recipe(folder / "config.yaml", recipe)

    state = {"step": step, "best_rsum": best, "stream": stream.state_dict(), "sick": sick.state_dict()}
    tensors, values = {"model": weights, "optimizer": moments}, {"state": state, "model": about}
    return run.checkpoints.try_commit(
        step, improved, lambda folder, staging: write_checkpoint(folder, tensors, values, write_more, staging)
    )

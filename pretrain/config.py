"""The pretraining recipe: dataclasses that describe a run and import no torch. `configs/pretrain/` holds recipes.

Each class checks its own fields when it is made, and `PretrainRecipe` checks how they go together.

Tested in tests/runtime/test_recipe.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from data_tools.config import DataConfig
from pretrain.model.config import ModelConfig
from runtime.checks import check_name, check_range
from runtime.errors import RecipeError
from runtime.recipe import free
from training.config import LoopConfig, OptimizerConfig


@dataclass
class ContrastiveConfig:
    """Image-text contrastive loss against teacher keys and queue (ALBEF Eq. 1-2, 6; CODIS L_ica)."""

    weight: float = 1.0
    """Factor of this loss in the total. 0: off."""
    intra_modal: bool = True
    """Add image-image and text-text terms to the two cross-modal ones. The loss is the mean of its terms."""

    def __post_init__(self) -> None:
        check_range(self, "objectives.contrastive.", 0, None, "weight")


@dataclass
class MatchingConfig:
    """Image-text matching with hard negatives (ALBEF Eq. 4)."""

    weight: float = 1.0
    """Factor of this loss in the total. 0: off."""
    negatives: Literal["nearby", "all_ranks"] = "nearby"
    """`nearby`: drawn in the micro-batch (or its `pool`), as in ALBEF. `all_ranks`: drawn in the whole global batch; the images and
    texts drawn are encoded again, which costs a second forward, and the loss does not depend on the number of ranks."""
    same_codeword: bool = False
    """Draw negatives that share the codeword of the right image or text, where there are any (the slides' future work)."""
    pool: int | None = None
    """Negatives are drawn among this many neighbours in the global batch's order, so that the loss does not depend on how the batch
    is split. It must divide the micro-batch. null: the whole micro-batch."""

    def __post_init__(self) -> None:
        check_range(self, "objectives.matching.", 0, None, "weight")
        if self.pool is not None and self.pool < 1:
            raise RecipeError(
                f"objectives.matching.pool is {self.pool}; it must be a divisor of the micro-batch, 1 or more"
            )


@dataclass
class MaskedLanguageConfig:
    """Masked language modelling given the image (ALBEF Eq. 3, 7)."""

    weight: float = 1.0
    """Factor of this loss in the total. 0: off."""
    share: float = 0.15
    """Share of the words to predict. 80 % of them are masked, 10 % replaced, 10 % kept."""
    separators: bool = False
    """Let [SEP] be chosen too, as ALBEF's code does. It can be predicted without reading anything."""

    def __post_init__(self) -> None:
        check_range(self, "objectives.masked_language.", 0, None, "weight")
        if not 0 <= self.share <= 1:
            raise RecipeError(
                f"objectives.masked_language.share is {self.share}; it must be a share of the words, 0 to 1"
            )


@dataclass
class LevelsConfig:
    """Contrast at the inner layers that `model.levels` names (the slides' future work)."""

    weight: float = 0.0
    """Factor of this loss in the total. 0: off."""

    def __post_init__(self) -> None:
        check_range(self, "objectives.levels.", 0, None, "weight")


@dataclass
class CodebookConfig:
    """A codebook with transport plans as targets (CODIS L_code, Eq. 2)."""

    weight: float = 1.0
    """Factor of this loss in the total. 0: off."""
    temperature: float | None = 0.1
    """Temperature of the codeword prediction. null: the learned one of the contrastive losses (the slides' single gamma)."""
    pairing: Literal["cross", "self"] = "cross"
    """`cross`: the text predicts the image's plan, and the image the text's (Eq. 2). `self`: each predicts its own (the slides' last sum)."""
    features: Literal["teacher", "student"] = "teacher"
    """Whose features the plan is solved from (the slides' ablation)."""
    frozen: bool = False
    """Keep the codewords at their random start. This ablation shows what learning them is worth."""
    from_epoch: float = 0.0
    """Epoch from which this loss counts. With `model.codebook_update: average` the codewords start there from features of the plan."""
    average_momentum: float = 0.9
    """Of `model.codebook_update: average`: share of a codeword that stays in each step."""
    center_momentum: float = 0.99
    """Of `model.codebook_centered`: share of the running means that stays in each step."""

    def __post_init__(self) -> None:
        check_range(self, "objectives.codebook.", 0, None, "weight", "from_epoch")
        check_range(self, "objectives.codebook.", 0, 1, "average_momentum", "center_momentum")
        if self.temperature is not None and self.temperature <= 0:
            raise RecipeError(f"objectives.codebook.temperature is {self.temperature}; it must be above 0")


@dataclass
class OtherObjective:
    """An objective of your own, from a class outside this package (docs/codis.md)."""

    use: str = ""
    """The class, as `module.Class`. The module must be on PYTHONPATH."""
    weight: float = 1.0
    """Factor of this loss in the total. 0: off."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments that the class is made with."""

    def __post_init__(self) -> None:
        check_range(self, f"objectives.others: of {self.use}, ", 0, None, "weight")


@dataclass
class ObjectivesConfig:
    """The losses of pretraining. `pretrain/objectives/registry.py` lists their classes under the same names."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Image-text contrast."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """Image-text matching."""
    masked_language: MaskedLanguageConfig = field(default_factory=MaskedLanguageConfig)
    """Masked language modelling."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """The codebook, learned by transport."""
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    """Contrast at inner layers."""
    others: dict[str, OtherObjective] = field(default_factory=dict)
    """Objectives of your own: name of the loss, and the class it comes from."""

    def __post_init__(self) -> None:
        for name in self.others:
            if hasattr(self, name) or name in ("loss", "temperature"):
                raise RecipeError(f"objectives.others.{name} has the name of an existing figure; choose another name")


@dataclass
class TransportConfig:
    """How transport plans are solved. `pretrain/transport.py` explains the algorithm."""

    solver: Literal["ipot", "sinkhorn", "argmax"] = "ipot"
    """`ipot`: proximal point, near the exact plan. `sinkhorn`: the entropy-regularised plan. `argmax`: no transport, each sample's
    nearest codeword (the slides' open question is what the plan is for)."""
    beta: float = 0.5
    """Of `ipot`: weight of each outer step's divergence from the plan before. The plan is that of a regularisation of beta / outer_steps."""
    outer_steps: int = 200
    """Of `ipot`: proximal steps. More of them come nearer to the exact plan."""
    inner_steps: int | None = None
    """Of `ipot`: a number runs the paper's loop, with so many sweeps in each outer step (50 outer and 1 inner are usual). null takes
    many outer steps at once and then settles the columns, by Newton steps where they are cheap."""
    tolerance: float = 1e-3
    """Column error at which a plan has settled: the sum over codewords of |mass - 1 / codewords|."""
    warm_start: bool = False
    """Start from the codewords' potentials of the step before. It gives the same plan within `tolerance`, in half the time where the
    samples are mostly the same. Runs on different numbers of ranks then agree to the tolerance, no longer to rounding.
    The paper's loop (`inner_steps`) ignores it."""
    regularisation: float = 0.05
    """Of `sinkhorn`: weight of the entropy."""
    sinkhorn_steps: int = 100
    """Of `sinkhorn`: most sweeps."""
    samples: Literal["batch", "batch+queue"] = "batch"
    """Features the plan is solved over: the global batch's, or the queue's as well. A target is at most samples / codewords, so more
    samples give sharper targets."""
    queue_samples: int | None = None
    """Of `samples: batch+queue`: the newest so many pairs of the queue. null: all of it."""
    queue_from_epoch: float | None = None
    """Of `samples: batch+queue`: epoch from which the queue joins the plan. null: as `teacher.queue_from_epoch`."""

    def __post_init__(self) -> None:
        check_range(self, "transport.", 0, None, "queue_samples", "queue_from_epoch")
        for name in ("beta", "tolerance", "regularisation"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"transport.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("outer_steps", "inner_steps", "sinkhorn_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"transport.{name} is {value}; it must be 1 or more")


@dataclass
class TeacherConfig:
    """The momentum teacher, and the keys and targets that come from it."""

    ema_momentum: float = 0.995
    """Share of its weights that the teacher keeps in each step."""
    distill_weight: float = 0.4
    """Share of the teacher's soft targets (ALBEF's alpha). It ramps up from 0 over the first epoch."""
    queue: int = 65536
    """Past image-text pairs kept as keys. 0: none."""
    queue_from_epoch: float = 0.0
    """Epoch from which the queue's keys join. A model from random weights needs a while without them: while the features of a batch
    lie closer together than the teacher moves between batches, the queue only teaches to tell old keys from new."""
    keys: Literal["global", "local"] = "global"
    """Keys besides the queue: the teacher's features of the whole global batch, or of a sample's own micro-batch alone (ALBEF)."""
    second_view: bool = True
    """The teacher sees another augmentation of the image than the student (CODIS). Off: the same one (ALBEF)."""

    def __post_init__(self) -> None:
        check_range(self, "teacher.", 0, None, "queue_from_epoch")
        if not 0 <= self.ema_momentum <= 1:
            raise RecipeError(f"teacher.ema_momentum is {self.ema_momentum}; it must lie between 0 and 1")
        if self.queue < 0:
            raise RecipeError(f"teacher.queue is {self.queue}; it must be a number of pairs, 0 for none")
        if not 0 <= self.distill_weight <= 1:
            raise RecipeError(f"teacher.distill_weight is {self.distill_weight}; it must be a share, 0 to 1")


@dataclass
class TrainingConfig(LoopConfig):
    """Pretraining under DeepSpeed. Micro-batch and accumulation steps follow from the world size."""

    micro_batch: int = free(64)
    """Most samples that a device takes at once."""
    zero_stage: Literal[0, 1, 2, 3] = free(1)
    """What DeepSpeed divides among the ranks: 0 nothing, 1 masters and moments, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = free(False)
    """Keep masters and moments in host memory and step there. It is slower, and leaves room for a larger model."""
    compile: bool = free(False)
    """Compile each layer with torch.compile. Steps are faster, and the first one is slow."""

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)
        if self.micro_batch < 1:
            raise RecipeError(f"training.micro_batch is {self.micro_batch}; it must be 1 or more")
        if self.offload_optimizer and not self.zero_stage:
            raise RecipeError("training.offload_optimizer needs training.zero_stage 1, 2 or 3; stage 0 cannot offload")
        if self.compile and self.zero_stage == 3:
            raise RecipeError("training.compile does not work with training.zero_stage 3; use stage 0, 1 or 2 with it")

    def for_world_size(self, world: int) -> TrainingConfig:
        """Return the settings that `world` ranks really use: a single rank in float32 trains without ZeRO.

        It has nothing to divide. Without ZeRO the parameters are the masters, and gradients stay where autograd put them. On a CPU
        that takes a quarter less time and half the memory besides activations.
        """
        if world == 1 and self.precision == "fp32" and not self.offload_optimizer:
            return replace(self, zero_stage=0)
        return self


@dataclass
class PretrainRecipe:
    """A whole pretraining run."""

    name: str = "codis"
    """Name of the run and its folder. The same name is the same run, and resumes where it stopped."""
    runs: str = free("runs")
    """Folder of run folders."""
    checkpoint: str = ""
    """Model that a fresh run begins from: another run's folder, a checkpoint, an export or an import (ALBEF). Its weights replace
    `model.image.weights` and `model.text.weights`, and its tokenizer `data.tokenizer`. Its teacher comes along."""
    data: DataConfig = field(default_factory=DataConfig)
    """The training and validation data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model's architecture and starting weights."""
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    """The losses and their weights."""
    transport: TransportConfig = field(default_factory=TransportConfig)
    """How the codebook's transport plans are solved."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The momentum teacher and the queue."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning-rate schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Batch size, length, precision and DeepSpeed."""
    profile: int = free(0)
    """Steps to profile, after the first ones. The first rank prints where their time went, part by part. 0: no profile."""

    def __post_init__(self) -> None:
        self.model.text.settle_pooling()
        for side in ("image", "text"):
            encoder = getattr(self.model, side)
            waits = self.optimizer.freeze_until.of(side)
            if (encoder.frozen or waits) and encoder.weights == "none" and not self.checkpoint:
                key = (
                    f"model.{side}.frozen is true" if encoder.frozen else f"optimizer.freeze_until.{side} is {waits:g}"
                )
                raise RecipeError(f"{key}, but model.{side}.weights is none; random weights must learn")
            if encoder.frozen and waits:
                raise RecipeError(
                    f"optimizer.freeze_until.{side} is {waits:g}, but model.{side}.frozen is true for the whole run; set one of them"
                )
        if self.checkpoint and self.model.text.stretch_positions:
            raise RecipeError(
                "model.text.stretch_positions is for the BERT of model.text.weights, but checkpoint is set, and its positions are taken as "
                "they are; leave one of them out"
            )
        if self.checkpoint:  # so that the run's config.yaml says what the run began from
            self.model.image.weights = self.model.text.weights = "none"
            self.data.tokenizer = self.checkpoint
        text = self.model.text
        if not text.is_described and text.weights == "none" and not self.checkpoint:
            raise RecipeError(
                "model.text.kind is transformers, but neither model.text.weights nor model.text.arguments says which; name its weights"
            )
        if text.kind == "transformers" and text.weights != "none" and self.data.tokenizer == "train":
            raise RecipeError(
                f"data.tokenizer is train, but the words of model.text.weights are known; set it to {text.weights}"
            )
        if self.profile < 0:
            raise RecipeError(f"profile is {self.profile}; it must be a number of steps, or 0 for none")
        self._check_objectives()
        if self.data.features.kind != "live":
            self._check_features()
        if not self.model.text.layers:
            self._check_without_text_layers()
        if self.model.text.is_described and self.data.caption_tokens > self.model.text.positions:
            raise RecipeError(
                f"data.caption_tokens {self.data.caption_tokens} is more than model.text.positions {self.model.text.positions}; lower it"
            )
        check_name("name", self.name)

    def _check_objectives(self) -> None:
        """Check that the objectives find what they need in the model, the teacher and the engine."""
        objectives, model = self.objectives, self.model
        if objectives.codebook.features == "student" and self.training.zero_stage == 3:
            raise RecipeError(
                "objectives.codebook.features is student, which does not work with training.zero_stage 3; use stage 0, 1 or 2"
            )
        if objectives.codebook.weight and not model.codewords:
            raise RecipeError(
                "objectives.codebook.weight is set but model.codewords is 0; set the weight to 0 or give the model codewords"
            )
        if self.teacher.keys == "local" and (objectives.levels.weight or objectives.matching.negatives == "all_ranks"):
            raise RecipeError(
                "teacher.keys is local, but objectives.levels and negatives from all ranks need the global batch's keys; set it to global"
            )
        if objectives.levels.weight and not model.levels:
            raise RecipeError(
                "objectives.levels.weight is set but model.levels is empty; name the pairs of layers to align"
            )
        if objectives.matching.same_codeword and not model.codewords:
            raise RecipeError(
                "objectives.matching.same_codeword needs codewords, but model.codewords is 0; set it to false"
            )
        if not model.fusion.layers and (objectives.matching.weight or objectives.masked_language.weight):
            raise RecipeError(
                "model.fusion.layers is 0, but matching and masked_language need the fusion encoder; set their weights to 0"
            )

    def _check_features(self) -> None:
        """Check that the objectives can read cached features."""
        kind, objectives = self.data.features.kind, self.objectives
        if not self.model.image.frozen:
            raise RecipeError(
                f"data.features.kind is {kind}, but the image tower learns; set model.image.frozen to true, or the kind to live"
            )
        if self.model.levels:
            raise RecipeError(f"data.features.kind is {kind}, but model.levels reads inner layers; set it to live")
        if kind == "pooled" and (
            objectives.matching.weight or objectives.masked_language.weight or self.model.image.pooling == "query"
        ):
            raise RecipeError(
                "data.features.kind is pooled, but matching, masked_language and a learned query read image tokens; set it to tokens"
            )

    def _check_without_text_layers(self) -> None:
        """Without text layers (ViLT, VinVL) a caption has no feature of its own, so nothing can compare features."""
        if self.model.fusion.kind != "single_stream":
            raise RecipeError("model.text.layers is 0, which needs model.fusion.kind single_stream; set one of them")
        for name in ("contrastive", "codebook", "levels"):
            if getattr(self.objectives, name).weight:
                raise RecipeError(
                    f"model.text.layers is 0, so captions have no feature that objectives.{name} could compare; set its weight to 0"
                )
        if self.data.validation:
            raise RecipeError(
                "model.text.layers is 0, so there is no feature to validate by; leave data.validation empty and score "
                "checkpoints with `ligature evaluate --heads '[fusion]'`"
            )


def divide_batch(global_batch: int, micro_batch: int, world: int) -> tuple[int, int]:
    """Divide the global batch over ranks and accumulation steps.

    Args:
        global_batch: samples in an optimizer step.
        micro_batch: most samples that a device takes at once.
        world: ranks.

    Returns:
        The micro-batch, the largest that divides a rank's share, and the accumulation steps of a rank.

    Raises:
        RecipeError: the global batch does not divide over the ranks.
    """
    if global_batch % world:
        raise RecipeError(
            f"training.global_batch {global_batch} does not divide over {world} ranks; use a multiple of {world}"
        )
    local = global_batch // world
    micro = next(size for size in range(min(local, micro_batch), 0, -1) if local % size == 0)
    return micro, local // micro

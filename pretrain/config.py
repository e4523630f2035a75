"""The pretraining recipe: dataclasses that describe a run and import nothing heavy. `configs/pretrain/` holds recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from data_tools.config import DataConfig
from runtime.errors import RecipeError
from runtime.recipe import check_name, free
from training.config import LoopConfig, OptimizerConfig


@dataclass
class ImageEncoderConfig:
    """A timm Vision Transformer. Sizes left out are the architecture's own."""

    architecture: str = "vit_base_patch16_224"
    """Any timm ViT with a class token."""
    image_size: int = 256
    """Pixels a side. Position embeddings of starting weights are interpolated to it."""
    patch: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    position_std: float = 0.02
    """Deviation of fresh position embeddings. 1.0 lets a small model from random weights learn where things are (docs/decisions.md)."""
    drop_path: float = 0.0
    """Share of residual branches left out in training (stochastic depth)."""
    weights: str = "none"
    """Starting weights: `none` (random), `timm` (the architecture's own, downloaded), or a safetensors or .pth file."""


@dataclass
class TextEncoderConfig:
    """BERT layers on words alone; the fusion encoder goes on from them."""

    width: int = 768
    layers: int = 6
    heads: int = 12
    feed_forward: int = 3072
    dropout: float = 0.1
    positions: int = 512
    """Longest text there is a position embedding for."""
    weights: str = "none"
    """Starting weights: `none` (random), or a BERT's folder or name on the hub. Its layers after `layers` start the fusion encoder."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise RecipeError(f"model.text.width {self.width} does not divide into model.text.heads {self.heads}")


@dataclass
class FusionEncoderConfig:
    """BERT layers that join words and image tokens; width, heads and dropout are the text encoder's."""

    kind: Literal["cross_attention", "single_stream"] = "cross_attention"
    """`cross_attention`: words attend to image tokens (CODIS, ALBEF); `single_stream`: one self-attention stack over both (ViLT,
    VinVL), which VLDeformer takes apart."""
    layers: int = 6


@dataclass
class ModelConfig:
    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    fusion: FusionEncoderConfig = field(default_factory=FusionEncoderConfig)
    feature_dim: int = 256
    """Width of the projected, unit-norm features."""
    codewords: int = 4000
    """Rows of the codebook; 0 for a model without one."""
    temperature: float = 0.07
    """Starting temperature of the contrastive losses; learned, within [0.001, 0.5]."""
    levels: list[list[int]] = field(default_factory=list)
    """Pairs of [text layer, image layer], counted from 1, that `objectives.levels` aligns besides the last ones."""

    def __post_init__(self) -> None:
        if not 0.001 < self.temperature < 0.5:
            raise RecipeError(f"model.temperature is {self.temperature}; it lies between 0.001 and 0.5")
        if self.codewords < 0 or self.feature_dim < 1:
            raise RecipeError(
                f"model.codewords is {self.codewords}, model.feature_dim {self.feature_dim}; codewords are 0 or more, a feature has a width"
            )
        for pair in self.levels:
            if len(pair) != 2 or min(pair) < 1 or pair[0] > self.text.layers:
                raise RecipeError(
                    f"model.levels holds {pair}; a level is a pair [text layer, image layer], counted from 1, of layers that there are"
                )


@dataclass
class ContrastiveConfig:
    """Image-text contrastive loss against teacher keys and queue (ALBEF Eq. 1-2, 6; CODIS L_ica)."""

    weight: float = 1.0
    intra_modal: bool = True
    """Image-image and text-text terms beside the two cross-modal ones; the terms are averaged."""


@dataclass
class MatchingConfig:
    """Image-text matching with hard negatives (ALBEF Eq. 4)."""

    weight: float = 1.0
    negatives: Literal["nearby", "all_ranks"] = "nearby"
    """`nearby`: drawn among the micro-batch (or its `pool`), as in ALBEF; `all_ranks`: among the whole global batch, whose chosen
    images and texts this rank encodes once more. That costs a second forward, and does not depend on the world."""
    same_codeword: bool = False
    """Negatives share the codeword of the right image or text, where there are such (the slides' future work)."""
    pool: int | None = None
    """Negatives are drawn among this many neighbours in the global batch's order (a divisor of the micro-batch), so that
    losses do not depend on how the batch is split. None: among the micro-batch."""

    def __post_init__(self) -> None:
        if self.pool is not None and self.pool < 1:
            raise RecipeError(f"matching.pool is {self.pool}; it is a divisor of the micro-batch, 1 or more")


@dataclass
class MaskedLanguageConfig:
    """Masked language modelling given the image (ALBEF Eq. 3, 7)."""

    weight: float = 1.0
    share: float = 0.15
    """Share of the words to predict; of them 80 % are masked, 10 % replaced, 10 % kept."""
    separators: bool = False
    """[SEP] may be chosen too, as in ALBEF's code; it is predicted without reading anything."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise RecipeError(f"objectives.masked_language.share is {self.share}; it is a share of the words, 0 to 1")


@dataclass
class LevelsConfig:
    """Contrast at inner layers, `model.levels` (the slides' future work)."""

    weight: float = 0.0


@dataclass
class CodebookConfig:
    """Codebook with transport plans as targets (CODIS L_code, Eq. 2)."""

    weight: float = 1.0
    temperature: float = 0.1
    pairing: Literal["cross", "self"] = "cross"
    """`cross`: the text predicts the image's plan and the other way (Eq. 2); `self`: each its own (the slides' last sum)."""
    features: Literal["teacher", "student"] = "teacher"
    """Whose features the plan is solved from (the slides' ablation)."""
    frozen: bool = False
    """The codewords stay where they began, at random: what the learning of them is worth (an ablation)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise RecipeError(f"objectives.codebook.temperature is {self.temperature}; it is above 0")


@dataclass
class OtherObjective:
    """An objective that is not among these: a class of yours (docs/codis.md)."""

    use: str = ""
    """`module.Class`, the module on PYTHONPATH."""
    weight: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    """What the class is made with."""


@dataclass
class ObjectivesConfig:
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    masked_language: MaskedLanguageConfig = field(default_factory=MaskedLanguageConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    others: dict[str, OtherObjective] = field(default_factory=dict)
    """Name of a loss -> the class that it comes from."""

    def __post_init__(self) -> None:
        for name in self.others:
            if hasattr(self, name) or name in ("loss", "temperature"):
                raise RecipeError(f"objectives.others.{name} has the name of a figure that there is; choose another")


@dataclass
class TransportConfig:
    """How plans are solved; `pretrain/transport.py`."""

    solver: Literal["ipot", "sinkhorn", "argmax"] = "ipot"
    """`ipot`: proximal point, near the exact plan; `sinkhorn`: the entropy-regularised one; `argmax`: no transport at all, each
    sample's nearest codeword (the slides' open question is what the plan is for)."""
    beta: float = 0.5
    outer_steps: int = 200
    """The plan's entropy is that of a regularisation of beta / outer_steps."""
    inner_steps: int | None = None
    """A number is the paper's loop, every outer step by itself with so many sweeps (50 outer and 1 inner are usual); none takes
    many outer steps at once and then settles the columns, by Newton steps where they are cheap."""
    tolerance: float = 1e-3
    """Column error at which a plan is settled: the sum over codewords of |mass - 1 / codewords|."""
    warm_start: bool = False
    """Begin from the codewords' potentials that the step before left: the same plan by `tolerance`, in half of the time where the
    samples are mostly the same. How it comes there hangs on the last bits: ranks in another number then agree to the tolerance, no
    longer to rounding. Not of the paper's loop, which is a number of steps."""
    regularisation: float = 0.05
    """Of `sinkhorn`."""
    sinkhorn_steps: int = 100
    samples: Literal["batch", "batch+queue"] = "batch"
    """Features the plan is solved over: the global batch's, or the queue's as well (sharper targets: at most samples / codewords)."""

    def __post_init__(self) -> None:
        for name in ("beta", "tolerance", "regularisation"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"transport.{name} is {getattr(self, name)}; it is above 0")
        for name in ("outer_steps", "inner_steps", "sinkhorn_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"transport.{name} is {value}; it must be 1 or more")


@dataclass
class TeacherConfig:
    ema_momentum: float = 0.995
    distill_weight: float = 0.4
    """Share of the teacher's soft targets (ALBEF's alpha); ramps up from 0 over the first epoch."""
    queue: int = 65536
    """Past image-text pairs kept as keys."""
    queue_from_epoch: float = 0.0
    """The queue's keys join from this epoch on. A model from random weights needs a while without them: as long as the features
    of a batch lie closer together than the teacher moves between batches, telling old keys from new is all the queue teaches."""
    keys: Literal["global", "local"] = "global"
    """Keys beside the queue: the teacher's features of the whole global batch, or of a sample's own micro-batch alone (ALBEF)."""
    second_view: bool = True
    """The teacher sees another augmentation of the image than the student (CODIS); off: the same one (ALBEF)."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_momentum <= 1:
            raise RecipeError(f"teacher.ema_momentum is {self.ema_momentum}; it lies between 0 and 1")
        if self.queue < 0:
            raise RecipeError(f"teacher.queue is {self.queue}; it is a number of pairs, 0 for none")
        if not 0 <= self.distill_weight <= 1:
            raise RecipeError(f"teacher.distill_weight is {self.distill_weight}; it is a share of the targets, 0 to 1")


@dataclass
class TrainingConfig(LoopConfig):
    """Pretraining under DeepSpeed. Micro-batch and accumulation follow from the world the run finds itself in."""

    micro_batch: int = free(64)
    """Most samples a device takes at once."""
    zero_stage: Literal[0, 1, 2, 3] = free(1)
    """What DeepSpeed divides among the ranks: 1 masters and moments, 2 gradients too, 3 parameters too, 0 nothing."""
    offload_optimizer: bool = free(False)
    """Keep masters and moments in host memory and step there: slower, and room for a larger model."""
    compile: bool = free(False)
    """torch.compile of each layer: a faster step, and a slow first one."""

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)
        if self.micro_batch < 1:
            raise RecipeError(f"training.micro_batch is {self.micro_batch}; it must be 1 or more")
        if self.offload_optimizer and not self.zero_stage:
            raise RecipeError("training.offload_optimizer needs training.zero_stage 1, 2 or 3; stage 0 cannot offload")
        if self.compile and self.zero_stage == 3:
            raise RecipeError("training.compile does not go with training.zero_stage 3; use stage 0, 1 or 2 with it")

    def for_world_size(self, world: int) -> TrainingConfig:
        """As it is carried out by so many ranks. A single one in float32 has nothing to divide: without ZeRO the parameters are the
        masters, and gradients stay where autograd put them (on a CPU a quarter less time, half the memory beside activations)."""
        if world == 1 and self.precision == "fp32" and not self.offload_optimizer:
            return replace(self, zero_stage=0)
        return self


@dataclass
class PretrainRecipe:
    """A whole pretraining run."""

    name: str = "codis"
    """Names the run folder: the same name is the same run, and goes on where it stopped."""
    runs: str = free("runs")
    """Folder of run folders."""
    checkpoint: str = ""
    """What a fresh run begins from: another run's folder, a checkpoint's, an export or an import (ALBEF). Its weights take the
    place of `model.image.weights` and `model.text.weights`, its tokenizer that of `data.tokenizer`; its teacher comes along."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    profile: int = free(0)
    """Steps, after the first ones, of which the first rank prints where their time went, part by part."""

    def __post_init__(self) -> None:
        if self.checkpoint:  # so that the run's config.yaml says what it began from
            self.model.image.weights = self.model.text.weights = "none"
            self.data.tokenizer = self.checkpoint
        if self.profile < 0:
            raise RecipeError(f"profile is {self.profile}; it is a number of steps, or 0 for none")
        if self.objectives.codebook.features == "student" and self.training.zero_stage == 3:
            raise RecipeError(
                "objectives.codebook.features is student, which does not go with training.zero_stage 3; use stage 0, 1 or 2"
            )
        if self.objectives.codebook.weight and not self.model.codewords:
            raise RecipeError(
                "objectives.codebook.weight is set but model.codewords is 0; set the weight to 0 or give the model codewords"
            )
        if self.teacher.keys == "local" and (
            self.objectives.levels.weight or self.objectives.matching.negatives == "all_ranks"
        ):
            raise RecipeError(
                "teacher.keys is local, but objectives.levels and negatives from all ranks need the global batch's keys; set it to global"
            )
        if self.objectives.levels.weight and not self.model.levels:
            raise RecipeError(
                "objectives.levels.weight is set but model.levels is empty; name the pairs of layers to align"
            )
        if self.objectives.matching.same_codeword and not self.model.codewords:
            raise RecipeError("objectives.matching.same_codeword needs codewords, and model.codewords is 0")
        if not self.model.fusion.layers and (self.objectives.matching.weight or self.objectives.masked_language.weight):
            raise RecipeError(
                "model.fusion.layers is 0, but matching and masked_language need the fusion encoder; set their weights to 0"
            )
        if not self.model.text.layers:
            self._check_wordless()
        if self.data.caption_tokens > self.model.text.positions:
            raise RecipeError(
                f"data.caption_tokens {self.data.caption_tokens} is more than model.text.positions {self.model.text.positions}"
            )
        check_name("name", self.name)

    def _check_wordless(self) -> None:
        """Without text layers (ViLT, VinVL) a caption has no feature of its own: what compares features is impossible."""
        if self.model.fusion.kind != "single_stream":
            raise RecipeError(
                "model.text.layers is 0, which goes with model.fusion.kind single_stream alone; set one of them"
            )
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
    """(micro-batch, accumulation steps) of a rank: the largest micro-batch not above `micro_batch` that divides its share."""
    if global_batch % world:
        raise RecipeError(
            f"training.global_batch {global_batch} does not divide over {world} ranks; use a multiple of {world}"
        )
    local = global_batch // world
    micro = next(size for size in range(min(local, micro_batch), 0, -1) if local % size == 0)
    return micro, local // micro

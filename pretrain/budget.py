"""What a pretraining recipe costs, in closed form: parameters, floating-point operations, memory, traffic. Imports no torch.

Checked against the model itself: parameters exactly, operations by `torch.utils.flop_counter`, saved activations by autograd's own
hooks, memory by a measured run (tests/pretrain/test_budget.py). A multiply-add counts as two operations; a step is taken to be past its
ramps: the queue is full, the teacher distils, captions have `data.caption_tokens` words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pretrain.config import ImageEncoderConfig, PretrainRecipe, divide_batch
from runtime.errors import RecipeError
from runtime.files import read_json

VIT_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, depth, heads of timm's ViTs by their name."""
BERT_VOCABULARY = 30522
BUCKET = 50_000_000
"""Elements of a reduction buffer (`reduce_bucket_size`), which DeepSpeed allocates whole: two of them at stages 1 and 2, where one is
filled by the backward pass while the other is sent."""
FLAT = 500_000_000
"""Elements that it reduces at once without ZeRO."""


@dataclass(frozen=True)
class ImageSizes:
    """A ViT's sizes, the architecture's own where the recipe leaves them out."""

    width: int
    depth: int
    heads: int
    patch: int
    image_size: int

    @classmethod
    def of(cls, config: ImageEncoderConfig) -> ImageSizes:
        named = re.search(r"_(tiny|small|base|large)_patch(\d+)", config.architecture)
        sizes = (*VIT_SIZES[named[1]], int(named[2])) if named else (None, None, None, None)
        stated = (config.width, config.depth, config.heads, config.patch)
        found = [own or usual for own, usual in zip(stated, sizes, strict=True)]
        if None in found:
            raise RecipeError(
                f"model.image.architecture {config.architecture} has no sizes known here; state model.image.width, depth, heads and patch"
            )
        width, depth, heads, patch = (int(size or 0) for size in found)
        return cls(width, depth, heads, patch, config.image_size)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        return self.patches + 1

    @property
    def parameters(self) -> int:
        w = self.width
        embeddings = (3 * self.patch**2 + 1) * w + w + self.tokens * w
        return embeddings + self.depth * (12 * w * w + 13 * w) + 2 * w

    @property
    def patch_flops(self) -> int:
        return 2 * 3 * self.patch**2 * self.width * self.patches

    @property
    def block_flops(self) -> int:
        return self.depth * (24 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width)


def vocabulary_size(tokenizer: str) -> int | None:
    """The vocabulary of a tokenizer's folder; of one that is not at hand, BERT's; None where one is to be trained."""
    if tokenizer == "train":
        return None
    folder = Path(tokenizer)
    if (folder / "tokenizer.json").is_file():
        told = read_json(folder / "tokenizer.json")
        return len({*told["model"]["vocab"], *(added["content"] for added in told.get("added_tokens", ()))})
    if (folder / "vocab.txt").is_file():
        return len((folder / "vocab.txt").read_text(encoding="utf-8").split())
    return BERT_VOCABULARY


class Budget:
    """The cost of one recipe. FLOPs are of one sample; `micro_batch` samples are in a device at once."""

    def __init__(self, recipe: PretrainRecipe, micro_batch: int | None = None) -> None:
        self.recipe, self.model = recipe, recipe.model
        self.single_stream = self.model.fusion.kind == "single_stream"
        self.micro_batch = micro_batch or recipe.training.micro_batch
        self.image, self.text = ImageSizes.of(recipe.model.image), recipe.model.text
        self.caption_tokens = recipe.data.caption_tokens
        self.vocabulary = vocabulary_size(recipe.data.tokenizer) or recipe.data.vocabulary
        self.masked_words = recipe.objectives.masked_language.share * (self.caption_tokens - 2)
        """Words to predict in a caption; [CLS] and [SEP] are never chosen."""
        self.bytes = 2 if recipe.training.precision == "bf16" else 4
        """Of a weight or an activation in computation."""
        self.keys = recipe.training.global_batch + recipe.teacher.queue
        on = recipe.objectives
        self.matching, self.language = bool(on.matching.weight), bool(on.masked_language.weight)
        self.codebook = bool(on.codebook.weight)
        self.terms = (4 if on.contrastive.intra_modal else 2) if on.contrastive.weight else 0
        self.distils = bool(recipe.teacher.distill_weight)

    # Parameters

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Weights of the student by part."""
        w, f, image, d = self.text.width, self.text.feed_forward, self.image.width, self.model.feature_dim
        layer = 4 * w * w + 4 * w + 2 * w + 2 * w * f + f + w + 2 * w
        cross = 2 * w * w + 2 * w + 2 * image * w + 2 * w + 2 * w
        level = 2 * image + (image + 1) * d + (w + 1) * d
        return {
            "image encoder": self.image.parameters,
            "text encoder": (self.vocabulary + self.text.positions + 2 + 2) * w + self.text.layers * layer,
            "fusion encoder": (image + 1 + 2 + 2) * w + self.model.fusion.layers * layer
            if self.single_stream
            else self.model.fusion.layers * (layer + cross),
            "projections": (image + 1) * d + (w + 1) * d + len(self.model.levels) * level,
            "language head": w * w + w + 2 * w + self.vocabulary,
            "matching head and temperature": 2 * w + 2 + 1,
            "codebook": self.model.codewords * d,
        }

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def teacher(self) -> int:
        """Weights of the teacher: no matching head, temperature or codebook."""
        return self.total_parameters - self.parameters["matching head and temperature"] - self.parameters["codebook"]

    # Floating-point operations of one sample

    def _text_flops(self, words: int) -> int:
        w, f = self.text.width, self.text.feed_forward
        return self.text.layers * (2 * words * (4 * w * w + 2 * w * f) + 4 * words**2 * w)

    @property
    def _read_flops(self) -> int:
        """Keys and values of an image's tokens, for every fusion layer; their entry into a single stream."""
        if self.single_stream:
            return 2 * self.image.tokens * self.image.width * self.text.width
        return self.model.fusion.layers * 4 * self.image.tokens * self.image.width * self.text.width

    @property
    def _pair_flops(self) -> int:
        """One caption fused with one image."""
        w, f, n, t = self.text.width, self.text.feed_forward, self.caption_tokens, self.image.tokens
        if self.single_stream:
            return self.model.fusion.layers * (2 * (n + t) * (4 * w * w + 2 * w * f) + 4 * (n + t) ** 2 * w)
        return self.model.fusion.layers * (2 * n * (6 * w * w + 2 * w * f) + 4 * n * n * w + 4 * n * t * w)

    @property
    def _matched_flops(self) -> int:
        """The same where [CLS] alone is asked for: the last layer makes the keys and values of all tokens, and one token's state."""
        if not self.model.fusion.layers:
            return 0
        w, f, n, t = self.text.width, self.text.feed_forward, self.caption_tokens, self.image.tokens
        if self.single_stream:
            spared = 2 * (n + t - 1) * (w * w + 2 * w * f) + 4 * (n + t - 1) * (n + t) * w
        else:
            spared = (n - 1) * (2 * (3 * w * w + 2 * w * f) + 4 * (n + t) * w)
        return self._pair_flops - spared

    @property
    def _language_flops(self) -> float:
        """A masked caption through the text encoder, the fusion encoder and the head at its masked words."""
        w = self.text.width
        return (
            self._text_flops(self.caption_tokens)
            + self._pair_flops
            + self.masked_words * 2 * (w * w + w * self.vocabulary)
        )

    @property
    def _feature_flops(self) -> int:
        return 2 * self.model.feature_dim * (self.image.width + self.text.width)

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of one sample in one step, by what they are spent on."""
        d, codewords = self.model.feature_dim, self.model.codewords
        encoders = self.image.block_flops + self._text_flops(self.caption_tokens) + self._feature_flops
        fused = (self._read_flops if self.matching or self.language else 0) + 3 * self._matched_flops * self.matching
        fused += 3 * 4 * self.text.width * self.matching
        language = self._language_flops * self.language
        pool = self.recipe.objectives.matching.pool or self.micro_batch
        draws = 2 * 2 * d * pool * self.matching
        logits = self.terms * 2 * d * self.keys
        # Logits against keys that are constants: one product forward, one backward, and the teacher's own opinion.
        contrastive = 3 * logits
        # Both sides of the students' and the teacher's similarities to the codebook learn, but the teacher's features.
        prediction = (2 * 3 + 2 * 2) * 2 * d * codewords * self.codebook
        samples = self.recipe.training.global_batch
        samples += self.recipe.teacher.queue * int(self.recipe.transport.samples == "batch+queue")
        local = self.recipe.training.global_batch  # every rank solves the plan of the whole batch
        transport = 2 * 2 * samples * d * codewords * self.codebook / local
        teacher: float = self.image.patch_flops + encoders
        if self.language and self.distils:
            teacher += self._read_flops + self._language_flops
        again = 0
        if self.recipe.training.checkpoint_activations:
            again = self.image.block_flops + (1 + self.language) * self._text_flops(self.caption_tokens)
            if not self.model.image.drop_path:
                # A ViT block's last product is of no use to its backward pass, and left out.
                again -= 8 * self.image.depth * self.image.tokens * self.image.width**2
            again += 3 * self._matched_flops * self.matching + self._pair_flops * self.language
        return {
            # The patch embedding needs no gradient of its input.
            "student": 3 * (encoders + fused + language) + 2 * self.image.patch_flops + again,
            "teacher": teacher,
            "contrast with keys": contrastive + draws,
            "codebook": prediction + transport,
        }

    @property
    def flops_per_sample(self) -> float:
        return sum(self.flops.values())

    # Memory of one device, bytes

    @property
    def queue_bytes(self) -> int:
        return self.recipe.teacher.queue * (2 * 4 * self.model.feature_dim + 8)

    @cached_property
    def activation_bytes(self) -> float:
        """What autograd keeps of one sample's forward pass until its backward pass. Where layers are computed again it is what goes
        into each of them, and all of the largest, whose turn it is."""
        w, f, n, t, e = self.text.width, self.text.feed_forward, self.caption_tokens, self.image.tokens, self.bytes
        # Of a pair in a fusion layer: what a token keeps, its dropouts' masks, tokens, the copy of its image's keys and values; of an image.
        token, dropouts, tokens, copied, read = 12 * w + 2 * f, 3 * w, n, 2 * t * w, 2 * t * w
        if self.single_stream:
            token, dropouts, tokens, copied, read = 8 * w + 2 * f, 2 * w, n + t, 0, 0
        fusion = self.model.fusion.layers
        # How many layers, and of each the elements kept, the elements that go in, the bytes of dropouts' masks.
        words = (self.text.layers, (8 * w + 2 * f) * n, n * w, 2 * n * w)
        layers = [(self.image.depth, 16 * t * self.image.width, t * self.image.width, 0), words]
        elements: float = 3 * self.image.image_size**2 + 2 * t * self.image.width + 2 * n * w
        masks = n * w
        if self.matching:  # three pairs; the last layer makes keys and values of all tokens, the rest of [CLS] alone
            layers.append((fusion - 1, 3 * tokens * token, 3 * tokens * w, 3 * tokens * dropouts))
            layers.append((1, 3 * (4 * tokens * w + token), 3 * tokens * w, 3 * dropouts))
            elements += 3 * fusion * copied
        if self.language:
            layers += [words, (fusion, tokens * token, tokens * w, tokens * dropouts)]
            elements += 3 * n * w
            masks += n * w
        if self.matching or self.language:
            elements += fusion * read + 3 * t * w * self.single_stream
        # Logits are float32: the similarity, its log-softmax and the target of each.
        logits: float = self.terms * 12 * self.keys + 2 * 16 * self.model.codewords * self.codebook
        logits += 12 * self.masked_words * self.vocabulary * self.language
        mask = bool(self.text.dropout)  # a byte for each dropout of a layer
        outside = elements * e + masks * mask + logits
        if self.recipe.training.checkpoint_activations:
            largest = max(kept * e + dropped * mask for count, kept, _, dropped in layers if count)
            return outside + sum(count * entering * e for count, _, entering, _ in layers) + largest
        return outside + sum(count * (kept * e + dropped * mask) for count, kept, _, dropped in layers)

    def memory(self, stage: int, world: int, gpu: bool = True) -> dict[str, float]:
        """Bytes on one device by what holds them, under a ZeRO stage and a number of ranks; `fullest moment` adds to what is always
        there the most that comes and goes: activations, gradients and the buffers of reduction and of the step.

        gpu: DeepSpeed's reduction buffer counts whole; on a CPU only what is written of it is there.
        """
        share = 1 / world if stage else 1.0
        half = self.bytes == 2
        held = {
            "parameters": self.bytes * self.total_parameters * (share if stage == 3 else 1.0),
            # In float32 without ZeRO the parameters are the masters.
            "masters": 4.0 * self.total_parameters * share if half or stage else 0.0,
            "moments": 8.0 * self.total_parameters * share,
            "teacher": (4.0 + 2.0 * half) * self.teacher,
            # The keys of a step are the queue's and the batch's, joined in a copy.
            "queue": self.queue_bytes + 8.0 * self.model.feature_dim * self.keys,
        }
        gradients = self.bytes * self.total_parameters * (share if stage >= 2 else 1.0)
        activations = self.activation_bytes * self.micro_batch
        # Without ZeRO gradients are reduced in flat copies of at most the buffer's size; alone, not at all.
        whole = {0: FLAT, 1: 2 * BUCKET, 2: 2 * BUCKET, 3: BUCKET}[stage]
        reduced = whole if gpu and stage else min(whole, self.total_parameters)
        buffer = float(reduced * (4 if stage == 1 else self.bytes)) if stage or world > 1 else 0.0
        _, accumulation = self.split(world)
        backward_begins = activations + (gradients if accumulation > 1 else 0.0) + (buffer if stage else 0.0)
        backward_ends = gradients + buffer
        flat = 4 * self.total_parameters * share if half or stage else 0.0  # the masters' own gradient, float32
        step = gradients + flat
        fullest = sum(held.values()) + max(backward_begins, backward_ends, step)
        return held | {
            "gradients": gradients,
            "activations": activations,
            "reduction buffer": buffer,
            "fullest moment": fullest,
        }

    def split(self, world: int) -> tuple[int, int]:
        """(micro-batch, accumulation steps) at a world size."""
        return divide_batch(self.recipe.training.global_batch, self.micro_batch, world)

    # Traffic of one rank in one step, bytes sent

    def traffic(self, stage: int, world: int) -> dict[str, float]:
        _, accumulation = self.split(world)
        ring = (world - 1) / world
        whole = self.bytes * self.total_parameters
        reduced = {0: 2 * whole, 1: whole, 2: whole * accumulation, 3: whole * accumulation}[stage] * ring
        gathered = {0: 0, 1: whole, 2: whole, 3: 2 * whole * accumulation}[stage] * ring
        half = self.bytes == 2
        features = 2 * (4 * self.model.feature_dim + 4) * self.recipe.training.global_batch * ring
        return {
            "gradients": reduced,
            "parameters": gathered,
            # The teacher follows float32 masters, which ZeRO divides.
            "teacher": 8.0 * self.total_parameters * ring if stage and half else 0.0,
            "features": features,
        }

    # Disk

    @property
    def checkpoint_bytes(self) -> int:
        """Float32 masters and moments, the teacher, the queue."""
        return 12 * self.total_parameters + 4 * self.teacher + self.queue_bytes

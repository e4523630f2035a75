"""What a pretraining recipe costs, in closed form: parameters, floating-point operations, memory, traffic. Imports no torch.

Every formula is read off the modules in `pretrain/model/` and `pretrain/objectives/`, and checked against them by
tests/pretrain/test_budget.py: parameters exactly, operations by `torch.utils.flop_counter`, saved activations by autograd's
hooks, memory by a measured run.

A step is assumed to be past its ramps: the queue is full, the teacher distils, and captions have `data.caption_tokens` tokens.

Formulas use these letters. Products of matrices (m, k) x (k, n) take 2 m k n operations: a multiply-add counts as two.

    w   width of the encoder at hand              d   feature dimension
    f   width of its feed-forward layer           e   bytes of an element in computation (2 in bf16, 4 in fp32)
    n   tokens of a caption                       t   tokens of an image, the class token included

The terms of one transformer layer recur. Query, key, value and output are four (w, w) products: 4 w^2 weights, 8 n w^2
operations for n tokens. Scores and their weighted sum are two more products: 4 n^2 w operations. The feed-forward layer has
2 w f weights and takes 4 n w f operations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pretrain.config import PretrainRecipe, divide_batch
from pretrain.model.config import ImageEncoderConfig
from runtime.errors import RecipeError
from runtime.files import read_json

VIT_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""(width, depth, heads) of timm's ViTs by the size in their name (`timm/models/vision_transformer.py`)."""
BERT_VOCABULARY = 30522
"""Tokens of bert-base-uncased."""
BUCKET = 50_000_000
"""Elements of a reduction buffer (`reduce_bucket_size`), which DeepSpeed allocates whole. Stages 1 and 2 have two: the backward
pass fills one while the other is sent."""
FLAT = 500_000_000
"""Elements that DeepSpeed reduces at once without ZeRO."""


@dataclass(frozen=True)
class ImageSizes:
    """A ViT's sizes: the recipe's, or the architecture's own where the recipe gives none."""

    width: int
    """Elements of a token."""
    depth: int
    """Number of layers."""
    heads: int
    """Attention heads of a layer."""
    patch: int
    """Pixels a side of a patch."""
    image_size: int
    """Pixels a side of an image."""

    @classmethod
    def of(cls, config: ImageEncoderConfig) -> ImageSizes:
        """Return the sizes of a recipe's image encoder.

        Raises:
            RecipeError: neither the recipe nor the architecture's name gives a size.
        """
        if config.kind != "vit":
            raise RecipeError(
                f"model.image.kind is {config.kind}, and the plan counts ViTs of kind vit only; plan with a ViT of the size of {config.architecture}"
            )
        named = re.search(r"_(tiny|small|base|large)_patch(\d+)", config.architecture)
        sizes = (*VIT_SIZES[named[1]], int(named[2])) if named else (None, None, None, None)
        stated = (config.width, config.depth, config.heads, config.patch)
        chosen = [own or usual for own, usual in zip(stated, sizes, strict=True)]
        if None in chosen:
            raise RecipeError(
                f"model.image.architecture {config.architecture} has no sizes known here; set model.image.width, depth, heads and patch"
            )
        width, depth, heads, patch = (int(size or 0) for size in chosen)
        return cls(width, depth, heads, patch, config.image_size)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of an image: its patches and the class token."""
        return self.patches + 1

    @property
    def parameters(self) -> int:
        """Weights of the encoder: patch, class and position embeddings, layers, the last norm.

        A layer has 12 w^2 weights in matrices (f = 4 w) and 13 w in biases and its two norms.
        """
        w = self.width
        embeddings = (3 * self.patch**2 + 1) * w + w + self.tokens * w
        return embeddings + self.depth * (12 * w * w + 13 * w) + 2 * w

    @property
    def patch_flops(self) -> int:
        """Operations of the patch embedding, one product of (patches, 3 patch^2) and (3 patch^2, w), for one image."""
        return 2 * 3 * self.patch**2 * self.width * self.patches

    @property
    def block_flops(self) -> int:
        """Operations of all layers in one forward pass of one image, with f = 4 w: 24 t w^2 + 4 t^2 w a layer."""
        return self.depth * (24 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width)


def vocabulary_size(tokenizer: str) -> int | None:
    """Return the number of tokens of a tokenizer.

    Args:
        tokenizer: a folder, a Hugging Face name, or `train`.

    Returns:
        The folder's own count, BERT's for a name, and None for a tokenizer that is yet to be trained.
    """
    if tokenizer == "train":
        return None
    folder = Path(tokenizer)
    if (folder / "tokenizer.json").is_file():
        tokenizer_json = read_json(folder / "tokenizer.json")
        added = (token["content"] for token in tokenizer_json.get("added_tokens", ()))
        return len({*tokenizer_json["model"]["vocab"], *added})
    if (folder / "vocab.txt").is_file():
        return len((folder / "vocab.txt").read_text(encoding="utf-8").split())
    return BERT_VOCABULARY


class Budget:
    """The cost of one recipe. Operations are of one sample; memory is of `micro_batch` samples at once on one device."""

    def __init__(self, recipe: PretrainRecipe, micro_batch: int | None = None) -> None:
        self.recipe, self.model = recipe, recipe.model
        self.single_stream = self.model.fusion.kind == "single_stream"
        self.micro_batch = micro_batch or recipe.training.micro_batch
        self.image, self.text = ImageSizes.of(recipe.model.image), recipe.model.text
        if self.text.kind != "bert":
            raise RecipeError(
                f"model.text.kind is {self.text.kind}, and the plan counts text encoders of kind bert only; plan with a bert of its sizes"
            )
        self.caption_tokens = recipe.data.caption_tokens
        self.vocabulary = vocabulary_size(recipe.data.tokenizer) or recipe.data.vocabulary
        self.masked_words = recipe.objectives.masked_language.share * (self.caption_tokens - 2)
        """Tokens to predict in a caption. [CLS] and [SEP] are never chosen."""
        self.bytes = 2 if recipe.training.precision == "bf16" else 4
        """Bytes of a weight or an activation in computation."""
        self.keys = recipe.training.global_batch + recipe.teacher.queue
        """Teacher features that a student's feature is compared with: those of the batch and of the queue."""
        on = recipe.objectives
        self.matching, self.language = bool(on.matching.weight), bool(on.masked_language.weight)
        self.codebook = bool(on.codebook.weight)
        # Image-text contrast has two directions; intra-modal contrast adds two.
        self.terms = (4 if on.contrastive.intra_modal else 2) if on.contrastive.weight else 0
        self.distils = bool(recipe.teacher.distill_weight)

    # Parameters (counts of weights)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Weights of the student by part, biases and norms included."""
        w, f, image, d = self.text.width, self.text.feed_forward, self.image.width, self.model.feature_dim
        # A BERT layer: attention with four biases and a norm, feed-forward with two biases and a norm.
        layer = 4 * w * w + 4 * w + 2 * w + 2 * w * f + f + w + 2 * w
        # Cross-attention in it: query and output of the text's width, key and value read the image's, and a norm.
        cross = 2 * w * w + 2 * w + 2 * image * w + 2 * w + 2 * w
        # A pair of levels: a norm of the image's layer, and a projection with bias for each side.
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
            "codebook": self.model.codewords * d * (self.model.codebook_update == "gradient"),
        }

    @property
    def total_parameters(self) -> int:
        """Weights of the student."""
        return sum(self.parameters.values())

    @property
    def teacher(self) -> int:
        """Weights of the teacher. It has no matching head, no temperature and no codebook."""
        return self.total_parameters - self.parameters["matching head and temperature"] - self.parameters["codebook"]

    # Floating-point operations of one sample

    def _text_flops(self, words: int) -> int:
        """Return the operations of the text encoder on a caption of `words` tokens."""
        w, f = self.text.width, self.text.feed_forward
        return self.text.layers * (2 * words * (4 * w * w + 2 * w * f) + 4 * words**2 * w)

    @property
    def _read_flops(self) -> int:
        """Operations that make an image's keys and values for every fusion layer, or project its tokens into a single stream."""
        if self.single_stream:
            return 2 * self.image.tokens * self.image.width * self.text.width
        return self.model.fusion.layers * 4 * self.image.tokens * self.image.width * self.text.width

    @property
    def _pair_flops(self) -> int:
        """Operations that fuse one caption with one image. `_read_flops` counts the image's keys and values.

        A single stream has n + t tokens in its layers. Cross-attention adds query, output and 4 n t w for the scores.
        """
        w, f, n, t = self.text.width, self.text.feed_forward, self.caption_tokens, self.image.tokens
        if self.single_stream:
            return self.model.fusion.layers * (2 * (n + t) * (4 * w * w + 2 * w * f) + 4 * (n + t) ** 2 * w)
        return self.model.fusion.layers * (2 * n * (6 * w * w + 2 * w * f) + 4 * n * n * w + 4 * n * t * w)

    @property
    def _matched_flops(self) -> int:
        """Operations that fuse one pair of which only [CLS] is read.

        The last layer makes the keys and values of all tokens, but the state of one token alone.
        """
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
        """Operations of the text and fusion encoders on a masked caption, and of the word head at its masked tokens."""
        w = self.text.width
        return (
            self._text_flops(self.caption_tokens)
            + self._pair_flops
            + self.masked_words * 2 * (w * w + w * self.vocabulary)
        )

    @property
    def _feature_flops(self) -> int:
        """Operations of the two projections of [CLS] into the feature space."""
        return 2 * self.model.feature_dim * (self.image.width + self.text.width)

    @cached_property
    def flops(self) -> dict[str, float]:
        """Operations of one sample in one step, by what they are spent on.

        A backward pass takes twice its forward pass, one product for each factor of the forward's.
        """
        d, codewords = self.model.feature_dim, self.model.codewords
        encoders = self.image.block_flops + self._text_flops(self.caption_tokens) + self._feature_flops
        # Matching fuses three pairs: the caption and its image, and each with a negative. Its head has two outputs.
        fused = (self._read_flops if self.matching or self.language else 0) + 3 * self._matched_flops * self.matching
        fused += 3 * 4 * self.text.width * self.matching
        language = self._language_flops * self.language
        # Negatives are drawn by the similarity to every candidate of the pool, both ways.
        pool = self.recipe.objectives.matching.pool or self.micro_batch
        draws = 2 * 2 * d * pool * self.matching
        logits = self.terms * 2 * d * self.keys
        # Keys are constants: one product forward, one backward, and one for the teacher's own logits.
        contrastive = 3 * logits
        # Similarities to the codebook, two of the student and two of the teacher. Of the student's both factors learn
        # (three products each), of the teacher's only the codewords do (two).
        prediction = (2 * 3 + 2 * 2) * 2 * d * codewords * self.codebook
        samples = self.recipe.training.global_batch
        samples += self.recipe.teacher.queue * int(self.recipe.transport.samples == "batch+queue")
        # Two cost matrices, (samples, codewords), shared by the batch's samples. Every rank solves the whole batch's plan.
        local = self.recipe.training.global_batch
        transport = 2 * 2 * samples * d * codewords * self.codebook / local
        teacher: float = self.image.patch_flops + encoders
        if self.language and self.distils:
            teacher += self._read_flops + self._language_flops
        again = 0  # operations that activation checkpointing does a second time
        if self.recipe.training.checkpoint_activations:
            again = self.image.block_flops + (1 + self.language) * self._text_flops(self.caption_tokens)
            if not self.model.image.drop_path:
                # The backward pass does not need a ViT block's last product, so torch leaves it out.
                again -= 8 * self.image.depth * self.image.tokens * self.image.width**2
            again += 3 * self._matched_flops * self.matching + self._pair_flops * self.language
        return {
            # Twice, not three times: the patch embedding needs no gradient of its input.
            "student": 3 * (encoders + fused + language) + 2 * self.image.patch_flops + again,
            "teacher": teacher,
            "contrast with keys": contrastive + draws,
            "codebook": prediction + transport,
        }

    @property
    def flops_per_sample(self) -> float:
        """Operations of one sample in one step."""
        return sum(self.flops.values())

    # Memory of one device, bytes

    @property
    def queue_bytes(self) -> int:
        """Bytes of the queue. An entry is a float32 feature of the image, one of the text, and an int64 image id."""
        return self.recipe.teacher.queue * (2 * 4 * self.model.feature_dim + 8)

    @cached_property
    def activation_bytes(self) -> float:
        """Bytes that autograd keeps of one sample's forward pass until its backward pass.

        With activation checkpointing they are the inputs of every layer, and everything of the largest layer while it is
        computed again. The numbers of elements are those that autograd's saved-tensor hooks report.
        """
        w, f, n, t, e = self.text.width, self.text.feed_forward, self.caption_tokens, self.image.tokens, self.bytes
        # Of a fusion layer. A token keeps `token` elements and `dropouts` bytes of dropout masks; a pair has `tokens` tokens
        # and a copy of its image's keys and values (`copied`); the image's own keys and values have `read` elements.
        token, dropouts, tokens, copied, read = 12 * w + 2 * f, 3 * w, n, 2 * t * w, 2 * t * w
        if self.single_stream:
            token, dropouts, tokens, copied, read = 8 * w + 2 * f, 2 * w, n + t, 0, 0
        fusion = self.model.fusion.layers
        # Entries of `layers`: how many layers there are; of each the elements kept, the elements of its input, and the bytes
        # of its dropout masks.
        words = (self.text.layers, (8 * w + 2 * f) * n, n * w, 2 * n * w)
        layers = [(self.image.depth, 16 * t * self.image.width, t * self.image.width, 0), words]
        elements: float = 3 * self.image.image_size**2 + 2 * t * self.image.width + 2 * n * w
        masks = n * w
        if self.matching:
            # Three pairs. The last layer makes keys and values of all tokens; everything after them is for [CLS] alone.
            layers.append((fusion - 1, 3 * tokens * token, 3 * tokens * w, 3 * tokens * dropouts))
            layers.append((1, 3 * (4 * tokens * w + token), 3 * tokens * w, 3 * dropouts))
            elements += 3 * fusion * copied
        if self.language:
            layers += [words, (fusion, tokens * token, tokens * w, tokens * dropouts)]
            elements += 3 * n * w
            masks += n * w
        if self.matching or self.language:
            elements += fusion * read + 3 * t * w * self.single_stream
        # Logits are float32. Each keeps the similarity, its log-softmax and its target: 12 bytes.
        logits: float = self.terms * 12 * self.keys + 2 * 16 * self.model.codewords * self.codebook
        logits += 12 * self.masked_words * self.vocabulary * self.language
        mask = bool(self.text.dropout)  # dropout masks have a byte an element
        outside = elements * e + masks * mask + logits
        if self.recipe.training.checkpoint_activations:
            largest = max(kept * e + dropped * mask for count, kept, _, dropped in layers if count)
            return outside + sum(count * entering * e for count, _, entering, _ in layers) + largest
        return outside + sum(count * (kept * e + dropped * mask) for count, kept, _, dropped in layers)

    def memory(self, stage: int, world: int, gpu: bool = True) -> dict[str, float]:
        """Return the bytes on one device by what holds them.

        `fullest moment` is what is always there and the most that comes and goes: activations, gradients, and the buffers
        of the reduction and of the optimizer step.

        Args:
            stage: ZeRO stage, 0 to 3 (Rajbhandari et al. 2020, section 5, for what each divides).
            world: number of ranks.
            gpu: count DeepSpeed's reduction buffer whole. On a CPU only the pages that are written exist.
        """
        share = 1 / world if stage else 1.0
        half = self.bytes == 2
        held = {
            "parameters": self.bytes * self.total_parameters * (share if stage == 3 else 1.0),
            # In fp32 without ZeRO the parameters are the masters.
            "masters": 4.0 * self.total_parameters * share if half or stage else 0.0,
            "moments": 8.0 * self.total_parameters * share,
            # Float32 averages, and in bf16 a copy to compute with.
            "teacher": (4.0 + 2.0 * half) * self.teacher,
            # A step joins the keys of the queue and of the batch in a copy.
            "queue": self.queue_bytes + 8.0 * self.model.feature_dim * self.keys,
        }
        gradients = self.bytes * self.total_parameters * (share if stage >= 2 else 1.0)
        activations = self.activation_bytes * self.micro_batch
        # Without ZeRO, gradients are reduced in flat copies of at most FLAT elements; a single rank reduces nothing.
        whole = {0: FLAT, 1: 2 * BUCKET, 2: 2 * BUCKET, 3: BUCKET}[stage]
        reduced = whole if gpu and stage else min(whole, self.total_parameters)
        buffer = float(reduced * (4 if stage == 1 else self.bytes)) if stage or world > 1 else 0.0
        _, accumulation = self.split(world)
        backward_begins = activations + (gradients if accumulation > 1 else 0.0) + (buffer if stage else 0.0)
        backward_ends = gradients + buffer
        # The optimizer step needs the masters' own gradients, float32.
        flat = 4 * self.total_parameters * share if half or stage else 0.0
        step = gradients + flat
        fullest = sum(held.values()) + max(backward_begins, backward_ends, step)
        return held | {
            "gradients": gradients,
            "activations": activations,
            "reduction buffer": buffer,
            "fullest moment": fullest,
        }

    def split(self, world: int) -> tuple[int, int]:
        """Return (micro-batch size, accumulated micro-batches) at a world size."""
        return divide_batch(self.recipe.training.global_batch, self.micro_batch, world)

    def traffic(self, stage: int, world: int) -> dict[str, float]:
        """Return the bytes that one rank sends in one step, by what they carry.

        In a ring of N ranks a reduce-scatter or an all-gather of B bytes sends B (N - 1) / N, and an all-reduce twice that.
        What each ZeRO stage exchanges is section 7 of Rajbhandari et al. 2020.

        Args:
            stage: ZeRO stage, 0 to 3.
            world: number of ranks.
        """
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
            # The teacher averages whole float32 masters, which ZeRO divides over the ranks.
            "teacher": 8.0 * self.total_parameters * ring if stage and half else 0.0,
            "features": features,
        }

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint on disk: float32 masters and two moments (12 a weight), the teacher (4), the queue."""
        return 12 * self.total_parameters + 4 * self.teacher + self.queue_bytes

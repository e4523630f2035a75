"""Import ALBEF's published checkpoints (salesforce/ALBEF, `.pth`) as our own, to pretrain, fine-tune or evaluate.

- The ViT has timm's names already (fused query, key and value).
- BERT's first layers become the text encoder, and those with cross-attention the fusion encoder.
- Query, key and value are joined. The decoder of the MLM head is tied to the word embeddings.
- The momentum teacher (`*_m`) and the queues are imported too.

Checkpoints fine-tuned for retrieval are read as well. Their text encoder has no `bert.` in its names, and no MLM head.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.tokenizer import CaptionTokenizer, load_tokenizer
from pretrain.model.alignment_model import AlignmentModel, Temperature
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.model.image_encoder import interpolate_positions
from pretrain.weights.load import describe_model
from pretrain.weights.starting import from_bert
from runtime.checkpoint import write_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json

HEADS = {"vision_proj": "image_projection", "text_proj": "text_projection", "itm_head": "matching_head"}
"""ALBEF's names of the projections and the matching head, and ours."""
NOT_WEIGHTS = ("image_queue", "text_queue", "queue_ptr", "idx_queue", "ptr_queue", "temp")
"""Tensors that are no weights of a module: the queues, their pointers and the temperature."""

CROSS_ATTENTION = {"self.query": "query", "output.dense": "output", "output.LayerNorm": "norm"}
"""ALBEF's names within a cross-attention, and ours. Its key and value are joined into `key_value`."""


PUBLISHED = {("image", 768, 12): (12, "ViT-B's"), ("text", 768, 12): (12, "BERT-base's")}
"""Heads, and whose they are, by encoder, width and layers: ALBEF's published checkpoints are a ViT-B/16 and a BERT-base."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Numbers of attention heads, which no tensor's shape shows. None: not stated."""

    image: int | None = None
    """Of the image encoder."""
    text: int | None = None
    """Of the text and the fusion encoder."""


@dataclasses.dataclass
class Albef:
    """The content of an ALBEF checkpoint, under our names."""

    config: ModelConfig
    student: dict[str, Tensor]
    """Weights by name, without the temperature's parameter, which is a function of `temperature`."""
    teacher: dict[str, Tensor]
    """The momentum model's weights by name; empty if the checkpoint has none."""
    queue: dict[str, Tensor] | None
    """The state of `FeatureQueue`, if the checkpoint has queues."""
    temperature: float
    """Divides the contrastive logits."""
    vocabulary: int
    """Tokens of its tokenizer."""
    unused: list[str]
    """Names of the tensors that were not read."""
    heads: str
    """Attention heads of both encoders and where their numbers come from, for the report."""


def import_albef(
    checkpoint: Path,
    out: Path,
    tokenizer: str = "bert-base-uncased",
    bert_config: Path | None = None,
    image_size: int | None = None,
    caption_tokens: int = 30,
    training: str = "pretrained",
    heads: Heads | None = None,
) -> list[str]:
    """Write an ALBEF checkpoint as a checkpoint folder of ours.

    Args:
        checkpoint: ALBEF's `.pth` file.
        out: the folder to write; it must not exist.
        tokenizer: folder or Hugging Face name of the tokenizer it was trained with.
        bert_config: ALBEF's `config_bert.json`, for the number of text heads. Default: the file of that name beside
            `checkpoint`, if there is one.
        image_size: pixels a side to interpolate position embeddings to. Default: the checkpoint's own.
        caption_tokens: tokens that a caption is cut to.
        training: what score records say of the model, `pretrained` or `fine-tuned-on X`.
        heads: attention heads. What is not stated here or in `bert_config` is known for the published sizes alone.

    Returns:
        Lines that report what was and was not used.

    Raises:
        CheckpointError: the file is no ALBEF checkpoint, lacks tensors, does not fit the tokenizer or the configuration, has
            sizes that leave its heads unknown, or is fine-tuned although `training` says `pretrained`.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another folder, or remove it")
    albef = read_albef(checkpoint, bert_config, heads)
    if caption_tokens > albef.config.text.positions:
        raise CheckpointError(
            f"--caption-tokens {caption_tokens} is more than the {albef.config.text.positions} positions of {checkpoint}"
        )
    text_tokenizer = load_tokenizer(tokenizer, caption_tokens).drop_punctuation()
    if text_tokenizer.vocabulary != albef.vocabulary:
        raise CheckpointError(
            f"{checkpoint} has {albef.vocabulary} words and the tokenizer {tokenizer} has {text_tokenizer.vocabulary}; "
            "give the tokenizer it was trained with (--tokenizer)"
        )
    if training == "pretrained" and not any(name.startswith("masked_language_head.") for name in albef.student):
        raise CheckpointError(
            f"{checkpoint} has no head for masked words, so it looks fine-tuned for retrieval; say on which dataset with "
            "--fine-tuned-on, or its scores would pass for zero-shot"
        )
    if image_size is not None:
        resize(albef, image_size)
    model, random = build_model(albef)
    write(out, model, albef, text_tokenizer, training)
    extras = [name for name, content in (("teacher", albef.teacher), ("queue", albef.queue)) if content]
    return [
        f"{len(albef.student)} tensors and the temperature {albef.temperature:.4f} from {checkpoint}; with them: {', '.join(extras) or 'no teacher, no queue'}",
        f"random, because it has none: {', '.join(random) or 'nothing'}",
        f"not used of it: {', '.join(albef.unused) or 'nothing'}",
        f"{out}: image {albef.config.image.image_size} px, text {albef.config.text.layers} + {albef.config.fusion.layers} layers, {caption_tokens} tokens a caption; heads: {albef.heads}",
    ]


def read_albef(checkpoint: Path, bert_config: Path | None = None, heads: Heads | None = None) -> Albef:
    """Read an ALBEF file, and find the model's sizes from its tensors' shapes. No code in the file is run.

    Args:
        checkpoint: ALBEF's `.pth` file.
        bert_config: see `import_albef`.
        heads: see `import_albef`.

    Raises:
        CheckpointError: the file is no ALBEF checkpoint, does not fit `bert_config`, or leaves its heads unknown.
    """
    theirs = _load(checkpoint)
    # DDP leaves a `module.` prefix. Retrieval checkpoints have `text_encoder.encoder`, others `text_encoder.bert.encoder`.
    theirs = {_plain_name(name): tensor for name, tensor in theirs.items()}
    beside = Path(checkpoint).with_name("config_bert.json")
    bert = read_json(bert_config or beside) if bert_config or beside.is_file() else {}
    config, heads_told = _find_sizes(theirs, bert, heads or Heads(), checkpoint)
    student, unused = translate_names(
        {name: tensor for name, tensor in theirs.items() if not _of_teacher(name)}, config.text.layers
    )
    teacher, _ = translate_names(
        {re.sub(r"^(\w+?)_m\.", r"\1.", name): tensor for name, tensor in theirs.items() if _of_teacher(name)},
        config.text.layers,
    )
    queue = None
    if "image_queue" in theirs and "text_queue" in theirs:
        length = theirs["image_queue"].shape[1]
        queue = {
            "image": theirs["image_queue"].T.contiguous(),
            "text": theirs["text_queue"].T.contiguous(),
            "image_ids": torch.full((length,), -1),  # ALBEF's pretraining queue does not keep image ids
            "counters": torch.tensor([int(theirs["queue_ptr"]) if "queue_ptr" in theirs else 0, length]),
        }
    # ALBEF clamps the temperature before a step, not after it, and in fine-tuning never. Its last value may lie beyond a
    # bound, where our parameter, a sigmoid between the bounds, has no value.
    stored = float(theirs["temp"])
    temperature = min(max(stored, 1.001 * Temperature.low), Temperature.high / 1.001)
    return Albef(
        config,
        student,
        teacher,
        queue,
        temperature,
        len(student["text_encoder.words.weight"]),
        sorted(unused),
        heads_told,
    )


def translate_names(theirs: dict[str, Tensor], text_layers: int) -> tuple[dict[str, Tensor], list[str]]:
    """Return ALBEF's tensors under our names, and the names that our model has no use for.

    Args:
        theirs: weights, or gradients of them, by ALBEF's name without the teacher's `_m`.
        text_layers: how many first BERT layers are the text encoder.
    """
    ours: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    unused = []
    for name, tensor in theirs.items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("visual_encoder."):
            ours[f"image_encoder.vit.{name.removeprefix('visual_encoder.')}"] = tensor
        elif stem in HEADS:
            ours[f"{HEADS[stem]}.{kind}"] = tensor
        elif name.startswith("text_encoder."):
            text[name.removeprefix("text_encoder.")] = tensor
        elif name not in NOT_WEIGHTS:
            unused.append(name)
    for name, tensor in from_bert(text, text_layers).items():
        layer = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.crossattention\.(.+)\.(weight|bias)", name)
        if layer is None:
            if name.startswith(("text_encoder.", "fusion_encoder.", "masked_language_head.")):
                ours[name] = tensor
            elif "position_ids" not in name and "predictions.decoder" not in name:
                unused.append(f"text_encoder.{name}")
            continue
        home = f"fusion_encoder.layers.{int(layer[1]) - text_layers}.cross_attention"
        part, kind = layer[2], layer[3]
        if part == "self.key":
            value = text[name.replace("self.key", "self.value")]
            ours[f"{home}.key_value.{kind}"] = torch.cat([tensor, value])
        elif part != "self.value":
            ours[f"{home}.{CROSS_ATTENTION[part]}.{kind}"] = tensor
    return ours, unused


def resize(albef: Albef, image_size: int) -> None:
    """Interpolate the position embeddings to an image of `image_size` pixels a side. The class token's embedding stays."""
    patch = albef.config.image.patch
    assert patch is not None
    if image_size < patch or image_size % patch:
        raise CheckpointError(
            f"--image-size {image_size} is no multiple of the patch of {patch} pixels; choose one that is"
        )
    name, side = "image_encoder.vit.pos_embed", image_size // patch
    for weights in (albef.student, albef.teacher):
        if name in weights:
            weights[name] = interpolate_positions(weights[name], side)
    albef.config.image.image_size = image_size


def build_model(albef: Albef) -> tuple[AlignmentModel, list[str]]:
    """Return the student, and the names of its parameters that the checkpoint does not have and that stay random.

    Only the head for masked words may be missing, as it is in checkpoints fine-tuned for retrieval.
    """
    albef.config.temperature = albef.temperature
    model = AlignmentModel(albef.config, albef.vocabulary)
    own = dict(model.named_parameters())
    for name, weight in albef.student.items():
        if name not in own or own[name].shape != weight.shape:
            expected = f"the model has {tuple(own[name].shape)}" if name in own else "the model has no such part"
            raise CheckpointError(f"an ALBEF tensor does not fit: {name} is {tuple(weight.shape)}, {expected}")
        own[name].data.copy_(weight)
    random = [name for name in own if name not in albef.student and name != "temperature.logit"]
    if missing := [name for name in random if not name.startswith("masked_language_head.")]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise CheckpointError(
            f"the ALBEF checkpoint lacks the tensors of {missing[0]}{more}, which would be random; give a complete one"
        )
    return model, random


def write(out: Path, model: AlignmentModel, albef: Albef, tokenizer: CaptionTokenizer, training: str) -> None:
    """Write the student, and the teacher and queue if there are any, as a checkpoint folder."""
    tensors: dict[str, dict[str, Tensor]] = {"model": dict(model.named_parameters())}
    if albef.teacher:
        tensors["teacher"] = albef.teacher
    if albef.queue:
        tensors["queue"] = albef.queue
    description = describe_model(albef.config, tokenizer.caption_tokens, training)
    write_checkpoint(out, tensors, {"model": description}, tokenizer.save)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no file {path}") from None
    except Exception as error:  # a file of another kind fails in many ways, KeyError among them
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path} is not a checkpoint that loads safely, with tensors alone ({reason})") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not any(name.endswith("visual_encoder.cls_token") for name in weights):
        raise CheckpointError(f"{path} is no ALBEF checkpoint: it has no visual_encoder.cls_token")
    return weights


def _plain_name(name: str) -> str:
    name = name.removeprefix("module.")
    return re.sub(r"^(text_encoder(?:_m)?)\.(embeddings|encoder|pooler)\.", r"\1.bert.\2.", name)


def _of_teacher(name: str) -> bool:
    return re.match(r"^\w+_m\.", name) is not None


def _find_sizes(
    theirs: dict[str, Tensor], bert: dict[str, Any], stated: Heads, checkpoint: Path
) -> tuple[ModelConfig, str]:
    """Return the model's sizes, from the shapes of its tensors, and where its numbers of heads come from.

    Args:
        theirs: the checkpoint's tensors.
        bert: the content of `config_bert.json`; empty if there is none.
        stated: attention heads that the user states.
        checkpoint: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing, `bert` is another model's, or the number of heads is unknown.
    """
    try:
        patches = theirs["visual_encoder.patch_embed.proj.weight"]
        width, patch = patches.shape[0], patches.shape[-1]
        words = theirs["text_encoder.bert.embeddings.word_embeddings.weight"]
        positions = theirs["text_encoder.bert.embeddings.position_embeddings.weight"]
        side = math.isqrt(theirs["visual_encoder.pos_embed"].shape[1] - 1)
        feed_forward = theirs["text_encoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0]
        feature_dim = theirs["vision_proj.weight"].shape[0]
        theirs["temp"]
    except KeyError as error:
        raise CheckpointError(f"{checkpoint} is no ALBEF checkpoint: it has no {error.args[0]}") from None
    blocks = _count(theirs, r"visual_encoder\.blocks\.(\d+)\.")
    layers = _count(theirs, r"text_encoder\.bert\.encoder\.layer\.(\d+)\.")
    # The first layer with cross-attention is the fusion encoder's first.
    cross_attention_layers = [
        int(match[1])
        for name in theirs
        if (match := re.match(r"text_encoder\.bert\.encoder\.layer\.(\d+)\.crossattention", name))
    ]
    first = min(cross_attention_layers, default=layers)
    text_width = words.shape[1]
    for name, own in (("hidden_size", text_width), ("hidden_act", "gelu")):
        if bert.get(name, own) != own:
            raise CheckpointError(
                f"{name} is {bert[name]} in config_bert.json, but {own} in {checkpoint} as it is read here"
            )
    image_heads, image_told = _find_heads(("image", width, blocks), stated.image, None, checkpoint)
    text_heads, text_told = _find_heads(
        ("text", text_width, layers), stated.text, bert.get("num_attention_heads"), checkpoint
    )
    config = ModelConfig(
        ImageEncoderConfig(
            architecture="vit_base_patch16_224",
            image_size=side * patch,
            patch=patch,
            width=width,
            depth=blocks,
            heads=image_heads,
        ),
        TextEncoderConfig(
            text_width, first, text_heads, feed_forward, float(bert.get("hidden_dropout_prob", 0.1)), len(positions)
        ),
        FusionEncoderConfig(layers=layers - first),
        feature_dim,
        codewords=0,
    )
    return config, f"image {image_heads} ({image_told}), text {text_heads} ({text_told})"


def _find_heads(
    sizes: tuple[str, int, int], stated: int | None, configured: int | None, checkpoint: Path
) -> tuple[int, str]:
    """Return an encoder's number of attention heads, and where it comes from.

    Args:
        sizes: `image` or `text`, the encoder's width and its layers.
        stated: the number that the user states.
        configured: the number in the checkpoint's own configuration.
        checkpoint: the file, for messages.

    Raises:
        CheckpointError: nothing tells the number, the two that tell it differ, or it does not divide the width.
    """
    encoder, width, layers = sizes
    option = f"--{encoder}-heads"
    if stated is not None and configured is not None and stated != configured:
        raise CheckpointError(f"{option} is {stated}, but config_bert.json says {configured}; leave out {option}")
    if stated is not None:
        heads, told = stated, option
    elif configured is not None:
        heads, told = configured, "config_bert.json"
    elif sizes in PUBLISHED:
        heads, told = PUBLISHED[sizes]
    else:
        other = " or --bert-config FILE" if encoder == "text" else ""
        raise CheckpointError(
            f"{checkpoint} does not tell how many attention heads its {encoder} encoder has, and {layers} layers of width {width} are "
            f"no published size; give {option} N{other}"
        )
    if heads < 1 or width % heads:
        raise CheckpointError(f"{told}: {heads} heads do not divide the {encoder} encoder's width of {width}")
    return heads, told


def _count(names: dict[str, Tensor], pattern: str) -> int:
    """Return how many numbered layers there are: one more than the highest number that `pattern` captures."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)

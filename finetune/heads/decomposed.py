"""A fusion encoder taken apart: its joint layers run on each modality alone, with the same weights (VLDeformer, section 3.2).

For a `single_stream` model this is the paper's own step: the layers stay as they are, and words and patches no longer see each
other. For a `cross_attention` model it is our adaptation: the layers run without their cross-attention, on words and on the
image encoder's tokens. Segment embeddings, and a projection where the widths differ, are then new.

Tested in tests/finetune/heads/test_vldeformer.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_tools.in_order.collection import Collection
from data_tools.pixels.transforms import EvaluationTransform
from data_tools.tokenizer import CaptionTokenizer, load_tokenizer
from finetune.heads.base import Workload
from finetune.heads.config import VLDeformerConfig
from pretrain.encode import gather_shares, rank_share
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.bert_layers import BertLayer
from pretrain.model.config import ModelConfig
from pretrain.model.fusion_encoder import FusionEncoder
from pretrain.model.single_stream import IMAGE, TEXT, SingleStreamEncoder
from pretrain.weights.inputs import read_images, read_texts
from pretrain.weights.load import Images, Texts, find_checkpoint, load_model, load_weights, read_weights
from runtime.checkpoint import checkpoint_hash, verify_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json
from runtime.progress import progress
from runtime.recipe import build_config


class SkippedCrossAttention(nn.Module):
    """The layers of a `cross_attention` fusion encoder without their cross-attention, with `SingleStreamEncoder`'s methods."""

    def __init__(self, fusion: FusionEncoder, width: int, image_width: int) -> None:
        super().__init__()
        self.layers = fusion.layers
        for layer in self.layers:
            assert isinstance(layer, BertLayer)
            layer.cross_attention = None
        self.entry = nn.Identity() if image_width == width else nn.Linear(image_width, width)
        self.segments = nn.Embedding(2, width)
        nn.init.zeros_(self.segments.weight)  # at first the layers read what they were trained on

    def enter_text(self, states: Tensor) -> Tensor:
        """Add the text segment to a text encoder's states, (texts, words, width)."""
        return states + self.segments.weight[TEXT]

    def prepare_images(self, image_tokens: Tensor) -> list[tuple[Tensor]]:
        """Bring image tokens to the layers' width and add the image segment; (images, tokens, width), in a list of one."""
        return [(self.entry(image_tokens) + self.segments.weight[IMAGE],)]

    def run_layers(self, states: Tensor, mask: Tensor) -> Tensor:
        """Run the layers on one modality, (batch, tokens, width); mask: (batch, tokens) bool."""
        for layer in self.layers:
            states = layer(states, mask)
        return states


class Decomposed(nn.Module):
    """Two encoders of one set of weights.

    It takes over the modules of `network`, which cannot be used as a fusion model again.
    """

    def __init__(self, network: AlignmentModel, pooling: str) -> None:
        super().__init__()
        self.pooling, self.single_stream = pooling, isinstance(network.fusion_encoder, SingleStreamEncoder)
        self.image_encoder, self.text_encoder = network.image_encoder, network.text_encoder
        fusion = network.fusion_encoder
        self.joint: SingleStreamEncoder | SkippedCrossAttention = (
            fusion
            if isinstance(fusion, SingleStreamEncoder)
            else SkippedCrossAttention(fusion, network.text_encoder.width, network.image_encoder.width)
        )
        self.width = network.text_encoder.width
        """Width of an embedding."""

    def text_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last layer's states, (texts, words, width); ids, mask: (texts, words)."""
        return self.joint.run_layers(self.joint.enter_text(self.text_encoder(ids, mask)), mask)

    def image_states(self, images: Tensor) -> Tensor:
        """Return the last layer's states, (images, 1 + patches, width); images: (images, 3, size, size) uint8."""
        ((tokens,),) = self.joint.prepare_images(self.image_encoder(images))
        return self.joint.run_layers(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return unit-norm embeddings, (texts, width) float32; ids, mask: (texts, words)."""
        return self.represent(self.text_states(ids, mask), mask)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit-norm embeddings, (images, width) float32; images: (images, 3, size, size) uint8."""
        return self.represent(self.image_states(images), None)

    def represent(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Pool states into embeddings: the mean of the tokens that are no pads (or the first token), tanh, unit norm.

        The product of two embeddings is then the paper's cosine.
        """
        states = states if states.dtype == torch.float64 else states.float()
        if self.pooling == "cls":
            pooled = states[:, 0]
        elif mask is None:
            pooled = states.mean(1)
        else:
            weights = mask[..., None].to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1)
        return functional.normalize(torch.tanh(pooled), dim=-1)

    @property
    def name(self) -> str:
        """The head's name in score records."""
        origin = "" if self.single_stream else " of cross-attention layers (an adaptation)"
        return f"vldeformer{origin}" + (", [CLS] pooling" if self.pooling == "cls" else "")


def require_fusion_encoder(config: ModelConfig, folder: Path) -> None:
    """Refuse a checkpoint without fusion layers.

    Args:
        config: the checkpoint's model.
        folder: the checkpoint, for the message.

    Raises:
        CheckpointError: there is nothing to decompose.
    """
    if not config.fusion.layers:
        raise CheckpointError(
            f"{folder} has no fusion encoder, so there is nothing to decompose; pretrain with model.fusion.layers 1 or more"
        )


class LoadedVLDeformer:
    """A VLDeformer checkpoint, or an alignment checkpoint taken apart and not tuned, ready to encode.

    It has the methods of `load_model`'s `ImageTextModel`, except `match`.
    """

    def __init__(self, source: str | Path, device: str | torch.device = "cpu") -> None:
        self.folder, self.device = find_checkpoint(source), torch.device(device)
        verify_checkpoint(self.folder)
        description = read_json(self.folder / "model.json")
        kind = description.get("head", "dual")
        if kind not in ("dual", "vldeformer"):
            raise CheckpointError(f"{self.folder} holds a {kind} head; VLDeformer's or an alignment model is needed")
        self.training: str = description["training"]
        self.tuned = kind == "vldeformer"
        if self.tuned:
            self.tokenizer: CaptionTokenizer = load_tokenizer(self.folder, description["caption_tokens"])
            network = AlignmentModel(build_config(ModelConfig, description["model"]), self.tokenizer.vocabulary)
            self.model = Decomposed(network, build_config(VLDeformerConfig, description["vldeformer"]).pooling)
            load_weights(self.model, read_weights(self.folder), self.folder)
        else:
            start = load_model(self.folder)
            require_fusion_encoder(start.network.config, self.folder)
            network, self.tokenizer = start.network, start.tokenizer
            torch.manual_seed(0)  # a projection between widths is new; it is the same each time
            self.model = Decomposed(network, "mean")
        self.model.eval().requires_grad_(False).to(self.device)
        self.transform = network.evaluation_transform()
        """Turns a PIL image into (3, size, size) uint8."""

    @property
    def hash(self) -> str:
        """Hash of the checkpoint's content, for score records."""
        return checkpoint_hash(self.folder)

    @property
    def name(self) -> str:
        """The head's name in score records."""
        return self.model.name if self.tuned else f"{self.model.name}, not tuned"

    def encode_image(self, images: Images) -> Tensor:
        """Return unit-norm embeddings, (batch, width); images as for `ImageTextModel.encode_image`."""
        return self.model.encode_image(read_images(images, self.transform).to(self.device))

    def encode_text(self, texts: Texts) -> Tensor:
        """Return unit-norm embeddings of strings, (batch, width)."""
        ids, mask = self.tokenizer(read_texts(texts))
        return self.model.encode_text(ids.to(self.device), mask.to(self.device))


@torch.no_grad()
def encode_decomposed(
    model: Decomposed, tokenizer: CaptionTokenizer, collection: Collection, work: Workload
) -> tuple[Tensor, Tensor]:
    """Encode all images and all captions, each once, the work shared by the ranks.

    Args:
        model: on the workload's device.
        tokenizer: the model's own.
        collection: images and captions.
        work: the ranks, the device and the batch size.

    Returns:
        (images, width) and (captions, width), on the CPU, the same on every rank.
    """
    ranks, batch_size = work.ranks, work.batch_size
    count, captions = len(collection), collection.captions
    own, own_captions = rank_share(count, batch_size, ranks), rank_share(len(captions), batch_size, ranks)
    images, texts = [], []
    encoder = model.image_encoder
    transform = EvaluationTransform(encoder.image_size, encoder.crop, encoder.resample)
    with progress("encoding", count + len(captions), "items", silent=work.silent or not ranks.first) as bar:
        for pixels in collection.images(transform, own, batch_size, work.workers):
            images.append(model.encode_image(pixels.to(work.device)))
            bar.advance(len(pixels) * ranks.world)
        for start in range(own_captions.start, own_captions.stop, batch_size):
            ids, mask = tokenizer(captions[start : min(start + batch_size, own_captions.stop)])
            texts.append(model.encode_text(ids.to(work.device), mask.to(work.device)))
            bar.advance(len(ids) * ranks.world)
    shape = (model.width,)
    return (
        gather_shares(images, count, batch_size, shape, work.device),
        gather_shares(texts, len(captions), batch_size, shape, work.device),
    )

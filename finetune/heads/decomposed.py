"""A fusion encoder taken apart: its joint layers run on each modality alone, with the same weights (VLDeformer, section 3.2).

Of a `single_stream` model that is the paper's own step: the layers stay as they are, words and patches no longer see each other.
Of a `cross_attention` model it is our adaptation: the layers are run with their cross-attention left out, on words and on the
image encoder's tokens; segments, and where widths differ a projection, are new.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_tools.in_order.collection import Collection
from data_tools.pixels.transforms import EvaluationTransform
from data_tools.tokenizer import CaptionTokenizer, load_tokenizer
from finetune.heads.config import VLDeformerConfig
from pretrain.config import ModelConfig
from pretrain.encode import gather_shares, rank_share
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.bert_layers import BertLayer
from pretrain.model.fusion_encoder import FusionEncoder
from pretrain.model.single_stream import IMAGE, TEXT, SingleStreamEncoder
from pretrain.weights.load import Images, Texts, find_checkpoint, load_model, load_weights
from runtime.checkpoint import checkpoint_hash, read_tensors, verify_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json
from runtime.progress import progress
from runtime.ranks import Ranks
from runtime.recipe import build_config


class SkippedCrossAttention(nn.Module):
    """The layers of a `cross_attention` fusion encoder without their cross-attention; the calls of `SingleStreamEncoder`."""

    def __init__(self, fusion: FusionEncoder, width: int, image_width: int) -> None:
        super().__init__()
        self.layers = fusion.layers
        for layer in self.layers:
            assert isinstance(layer, BertLayer)
            layer.cross_attention = None
        self.entry = nn.Identity() if image_width == width else nn.Linear(image_width, width)
        self.segments = nn.Embedding(2, width)
        nn.init.zeros_(self.segments.weight)  # at first the layers read what they are used to

    def enter_text(self, states: Tensor) -> Tensor:
        return states + self.segments.weight[TEXT]

    def prepare_images(self, image_tokens: Tensor) -> list[tuple[Tensor]]:
        return [(self.entry(image_tokens) + self.segments.weight[IMAGE],)]

    def run_layers(self, states: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states, mask)
        return states


class Decomposed(nn.Module):
    """Two encodings of one set of weights. Takes over the encoders of `network`, which cannot be used as a fusion model again."""

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
        """Of an embedding."""

    def text_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: (texts, words) -> (texts, words, width)."""
        return self.joint.run_layers(self.joint.enter_text(self.text_encoder(ids, mask)), mask)

    def image_states(self, images: Tensor) -> Tensor:
        """(images, 3, size, size) uint8 -> (images, 1 + patches, width)."""
        ((tokens,),) = self.joint.prepare_images(self.image_encoder(images))
        return self.joint.run_layers(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """-> unit-norm embeddings (texts, width), float32."""
        return self.represent(self.text_states(ids, mask), mask)

    def encode_image(self, images: Tensor) -> Tensor:
        """-> unit-norm embeddings (images, width), float32."""
        return self.represent(self.image_states(images), None)

    def represent(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the tokens that are not pads (or the first token), tanh, unit norm: a product is then the paper's cosine."""
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
        """As score records call it."""
        of = "" if self.single_stream else " of cross-attention layers (an adaptation)"
        return f"vldeformer{of}" + (", [CLS] pooling" if self.pooling == "cls" else "")


def need_fusion(config: ModelConfig, folder: Path) -> None:
    if not config.fusion.layers:
        raise CheckpointError(
            f"{folder} has no fusion encoder, so there is nothing to decompose; pretrain with model.fusion.layers 1 or more"
        )


class LoadedVLDeformer:
    """A VLDeformer checkpoint, or an alignment checkpoint taken apart and not tuned, ready to encode: the calls of `load_model`'s
    `ImageTextModel`, but for `match`."""

    def __init__(self, source: str | Path, device: str | torch.device = "cpu") -> None:
        self.folder, self.device = find_checkpoint(source), torch.device(device)
        verify_checkpoint(self.folder)
        about = read_json(self.folder / "model.json")
        kind = about.get("head", "dual")
        if kind not in ("dual", "vldeformer"):
            raise CheckpointError(f"{self.folder} holds a {kind} head; VLDeformer's or an alignment model is needed")
        self.training: str = about["training"]
        self.tuned = kind == "vldeformer"
        if self.tuned:
            self.tokenizer: CaptionTokenizer = load_tokenizer(self.folder, about["caption_tokens"])
            network = AlignmentModel(build_config(ModelConfig, about["model"]), self.tokenizer.vocabulary)
            self.model = Decomposed(network, build_config(VLDeformerConfig, about["vldeformer"]).pooling)
            load_weights(self.model, read_tensors(self.folder, "model"), self.folder)
        else:
            start = load_model(self.folder)
            need_fusion(start.network.config, self.folder)
            network, self.tokenizer = start.network, start.tokenizer
            torch.manual_seed(0)  # a projection between widths is new, and the same each time
            self.model = Decomposed(network, "mean")
        self.model.eval().requires_grad_(False).to(self.device)
        self.transform = EvaluationTransform(network.config.image.image_size)
        """A PIL image -> (3, size, size) uint8."""

    @property
    def hash(self) -> str:
        return checkpoint_hash(self.folder)

    @property
    def name(self) -> str:
        """As score records call it."""
        return self.model.name if self.tuned else f"{self.model.name}, not tuned"

    def encode_image(self, images: Images) -> Tensor:
        """images: (batch, 3, size, size) uint8, or PIL images -> unit-norm embeddings (batch, width)."""
        if not isinstance(images, Tensor):
            images = torch.stack([self.transform(image) for image in images])
        return self.model.encode_image(images.to(self.device))

    def encode_text(self, texts: Texts) -> Tensor:
        """texts: strings -> unit-norm embeddings (batch, width)."""
        ids, mask = self.tokenizer(list(texts))
        return self.model.encode_text(ids.to(self.device), mask.to(self.device))


@torch.no_grad()
def encode_decomposed(
    model: Decomposed,
    tokenizer: CaptionTokenizer,
    collection: Collection,
    ranks: Ranks,
    device: torch.device,
    batch_size: int,
    workers: int,
    silent: bool = True,
) -> tuple[Tensor, Tensor]:
    """All images and all captions, each once, the work shared by the ranks. -> (images, width) and (captions, width), on the CPU."""
    count, captions = len(collection), collection.captions
    own, own_captions = rank_share(count, batch_size, ranks), rank_share(len(captions), batch_size, ranks)
    images, texts = [], []
    transform = EvaluationTransform(model.image_encoder.vit.patch_embed.img_size[0])
    with progress("encoding", count + len(captions), "items", silent=silent or not ranks.first) as bar:
        for pixels in collection.images(transform, own, batch_size, workers):
            images.append(model.encode_image(pixels.to(device)))
            bar.advance(len(pixels) * ranks.world)
        for start in range(own_captions.start, own_captions.stop, batch_size):
            ids, mask = tokenizer(captions[start : min(start + batch_size, own_captions.stop)])
            texts.append(model.encode_text(ids.to(device), mask.to(device)))
            bar.advance(len(ids) * ranks.world)
    shape = (model.width,)
    return gather_shares(images, count, batch_size, shape, device), gather_shares(
        texts, len(captions), batch_size, shape, device
    )

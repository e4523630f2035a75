"""The single-stream fusion encoder: words and image tokens in one self-attention stack, as in ViLT, Oscar and VinVL.

VLDeformer's starting point: its layers have nothing that needs both modalities, so they run on either alone (`finetune/heads/
vldeformer.py`). Nothing of an image can be shared among the texts it is fused with beyond its entry: every pair goes through
every layer whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.config import FusionEncoderConfig, TextEncoderConfig
from pretrain.model.bert_layers import BertLayer, PreparedImages, initialize_weights

TEXT, IMAGE = 0, 1
"""Rows of the segment embedding, the paper's [T] and [V]."""


class SingleStreamEncoder(nn.Module):
    """Text states and image tokens -> fused text states; the same calls as `FusionEncoder`.

    Each side keeps the positions that its own encoder gave it: words from 0, patches by their place in the image.
    """

    def __init__(self, config: FusionEncoderConfig, text: TextEncoderConfig, image_width: int) -> None:
        super().__init__()
        self.dropout = text.dropout
        self.entry = nn.Linear(image_width, text.width)
        self.segments = nn.Embedding(2, text.width)
        self.norm = nn.LayerNorm(text.width, eps=1e-12)
        self.layers = nn.ModuleList(
            BertLayer(text.width, text.heads, text.feed_forward, text.dropout) for _ in range(config.layers)
        )
        self.apply(initialize_weights(text.width))

    def enter_text(self, states: Tensor) -> Tensor:
        """(texts, words, width) -> the same, marked [T]."""
        return self._enter(states, TEXT)

    def prepare_images(self, image_tokens: Tensor) -> PreparedImages:
        """(images, tokens, image width) -> one tensor (images, tokens, width) marked [V], in the form `forward` takes."""
        return [(self._enter(self.entry(image_tokens), IMAGE),)]

    def run_layers(self, states: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """The layers on one modality that has entered, or on both joined. states: (batch, tokens, width); mask: (batch, tokens)."""
        for layer in self.layers:
            states = layer(states, mask, first_only=first_only and layer is self.layers[-1])
        return states

    def join(
        self, states: Tensor, mask: Tensor, images: PreparedImages, image_of_text: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the layers read: words, then image tokens, (texts, words + tokens, width), and its mask. Arguments as `forward`'s."""
        ((tokens,),) = images
        if image_of_text is not None:
            tokens = tokens[image_of_text]
        joined = torch.cat([self.enter_text(states), tokens], 1)
        return joined, functional.pad(mask, (0, tokens.shape[1]), value=True)

    def forward(
        self,
        states: Tensor,
        mask: Tensor,
        images: PreparedImages,
        image_of_text: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """Fuse each text with one image.

        states: (texts, words, width), mask: (texts, words) bool; images: `prepare_images` of all the images there are;
        image_of_text: (texts,) the row of each text's image, or None where text i has image i. -> (texts, words, width);
        first_only: [CLS] alone, (texts, 1, width), for which the last layer computes no other token.
        """
        joined = self.join(states, mask, images, image_of_text)
        return self.run_layers(*joined, first_only)[:, : states.shape[1]]

    def _enter(self, states: Tensor, segment: int) -> Tensor:
        return functional.dropout(self.norm(states + self.segments.weight[segment]), self.dropout, self.training)

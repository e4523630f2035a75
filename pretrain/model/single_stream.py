"""The single-stream fusion encoder: words and image tokens in one self-attention stack, as in ViLT, Oscar and VinVL.

It is VLDeformer's starting point: its layers need neither modality, so they run on either alone (`finetune/heads/decomposed.py`).
Texts that are fused with the same image share only its entry: every pair goes through every layer whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.bert_layers import BertLayer, PreparedImages, initialize_weights
from pretrain.model.config import FusionEncoderConfig, TextEncoderConfig

TEXT, IMAGE = 0, 1
"""Rows of the segment embedding, the paper's [T] and [V]."""


class SingleStreamEncoder(nn.Module):
    """Fuses word states with image tokens; has the same two calls as `FusionEncoder`.

    Each side keeps the positions that its own encoder gave it: words count from 0, patches by their position in the image.
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
        """Return word states (texts, words, width) marked as text, [T]."""
        return self._enter(states, TEXT)

    def prepare_images(self, image_tokens: Tensor) -> PreparedImages:
        """Bring image tokens (images, tokens, image width) to the layers' width and mark them as image, [V], for `forward`."""
        return [(self._enter(self.entry(image_tokens), IMAGE),)]

    def run_layers(self, states: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """Run the layers on one modality alone, or on both joined.

        Args:
            states: (batch, tokens, width), from `enter_text`, `prepare_images` or `join`.
            mask: (batch, tokens) bool, True where a token is.
            first_only: compute the last layer for the first token alone.
        """
        for layer in self.layers:
            states = layer(states, mask, first_only=first_only and layer is self.layers[-1])
        return states

    def join(
        self, states: Tensor, mask: Tensor, images: PreparedImages, image_of_text: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the layers read, and its mask: words, then image tokens, (texts, words + tokens, width). Arguments as in `forward`."""
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

        Args:
            states: (texts, words, width), from the text encoder.
            mask: (texts, words) bool, True where a word is.
            images: `prepare_images` of all images.
            image_of_text: (texts,) int64, the row of each text's image in `images`. None: text i has image i.
            first_only: return [CLS] alone; the last layer then computes no other token.

        Returns:
            The fused word states (texts, words, width), or (texts, 1, width) with `first_only`.
        """
        joined = self.join(states, mask, images, image_of_text)
        return self.run_layers(*joined, first_only)[:, : states.shape[1]]

    def _enter(self, states: Tensor, segment: int) -> Tensor:
        return functional.dropout(self.norm(states + self.segments.weight[segment]), self.dropout, self.training)

"""The fusion encoder: BERT layers in which words attend to image tokens (CODIS, ALBEF section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.config import FusionEncoderConfig, TextEncoderConfig
from pretrain.model.bert_layers import BertLayer, KeysValues, initialize_weights


class FusionEncoder(nn.Module):
    """Text states and image tokens -> fused text states."""

    def __init__(self, config: FusionEncoderConfig, text: TextEncoderConfig, image_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            BertLayer(text.width, text.heads, text.feed_forward, text.dropout, image_width)
            for _ in range(config.layers)
        )
        self.apply(initialize_weights(text.width))

    def prepare_images(self, image_tokens: Tensor) -> list[KeysValues]:
        """Keys and values of each layer, made once per image: (images, tokens, image width) -> per layer (images, heads, tokens, …)."""
        read = []
        for layer in self.layers:
            assert isinstance(layer, BertLayer) and layer.cross_attention is not None
            read.append(layer.cross_attention.keys_values(image_tokens))
        return read

    def forward(
        self,
        states: Tensor,
        mask: Tensor,
        images: list[KeysValues],
        image_of_text: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """Fuse each text with one image.

        states: (texts, words, width), mask: (texts, words) bool; images: `prepare_images` of all the images there are;
        image_of_text: (texts,) the row of each text's image, or None where text i has image i. -> (texts, words, width);
        first_only: [CLS] alone, (texts, 1, width), for which the last layer computes no other word.
        """
        for layer, (key, value) in zip(self.layers, images, strict=True):
            chosen = (key, value) if image_of_text is None else (key[image_of_text], value[image_of_text])
            states = layer(states, mask, chosen, first_only and layer is self.layers[-1])
        return states

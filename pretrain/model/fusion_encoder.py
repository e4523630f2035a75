"""The cross-attention fusion encoder: BERT layers in which words attend to image tokens (CODIS, ALBEF section 3.1).

Tested in tests/pretrain/model/test_alignment_model.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.model.bert_layers import BertLayer, KeysValues, initialize_weights
from pretrain.model.config import FusionEncoderConfig, TextEncoderConfig


class FusionEncoder(nn.Module):
    """Fuses word states with image tokens, and returns word states that have seen the image.

    `SingleStreamEncoder` has the same two calls, so the rest of the model need not know which of them it has.
    """

    def __init__(self, config: FusionEncoderConfig, text: TextEncoderConfig, image_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            BertLayer(text.width, text.heads, text.feed_forward, text.dropout, image_width)
            for _ in range(config.layers)
        )
        self.apply(initialize_weights(text.width))

    def prepare_images(self, image_tokens: Tensor) -> list[KeysValues]:
        """Compute keys and values of image tokens (images, tokens, image width) for each layer, once for all texts of an image."""
        keys_values = []
        for layer in self.layers:
            assert isinstance(layer, BertLayer) and layer.cross_attention is not None
            keys_values.append(layer.cross_attention.keys_values(image_tokens))
        return keys_values

    def forward(
        self,
        states: Tensor,
        mask: Tensor,
        images: list[KeysValues],
        image_of_text: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """Fuse each text with one image.

        Args:
            states: (texts, words, width), from the text encoder.
            mask: (texts, words) bool, True where a word is.
            images: `prepare_images` of all images.
            image_of_text: (texts,) int64, the row of each text's image in `images`. None: text i has image i.
            first_only: return [CLS] alone; the last layer then computes no other word.

        Returns:
            The fused word states (texts, words, width), or (texts, 1, width) with `first_only`.
        """
        for layer, (key, value) in zip(self.layers, images, strict=True):
            image = (key, value) if image_of_text is None else (key[image_of_text], value[image_of_text])
            states = layer(states, mask, image, first_only and layer is self.layers[-1])
        return states

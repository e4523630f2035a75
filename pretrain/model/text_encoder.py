"""The text encoder of kind `bert`: BERT's embeddings and its first layers, which read words alone.

The interface that the rest of the model uses, of `transformers_text.py` too:

- `forward(ids, mask)` returns the word states (texts, words, width), [CLS] first.
- `global_state(states, mask)` pools them, and `AlignmentModel.text_features` projects the result.
- `layer_states(ids, mask)` returns the states after every layer, for levels.
- `width`, of the states, and `pooled_width`, of the global state.
- `layers`, the transformer layers, for compiling and activation checkpointing.
- `words`, the word embeddings, which the masked-language head shares.

Tested in tests/pretrain/model/test_alignment_model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.bert_layers import BertLayer, initialize_weights
from pretrain.model.config import TextEncoderConfig


class TextEncoder(nn.Module):
    """Encodes token ids into word states, [CLS] first."""

    def __init__(self, config: TextEncoderConfig, vocabulary: int) -> None:
        super().__init__()
        self.width, self.dropout = config.width, config.dropout
        self.pooling = "class" if config.pooling == "own" else config.pooling
        self.pooled_width = config.width
        self.words = nn.Embedding(vocabulary, config.width, padding_idx=0)
        self.positions = nn.Embedding(config.positions, config.width)
        # BERT's segments. Captions use only the first.
        self.segments = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.layers = nn.ModuleList(
            BertLayer(config.width, config.heads, config.feed_forward, config.dropout) for _ in range(config.layers)
        )
        self.apply(initialize_weights(config.width))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode captions.

        Args:
            ids: (texts, words) int64 token ids.
            mask: (texts, words) bool, True where a word is.

        Returns:
            (texts, words, width)
        """
        return self.layer_states(ids, mask)[-1]

    def global_state(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool states (texts, words, width) as `model.text.pooling` says, to (texts, width). Padding does not count."""
        return pool(states, mask, self.pooling)

    def layer_states(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Return the embeddings, then the states after each layer, (texts, words, width) each; arguments as in `forward`."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        states = self.norm(self.words(ids) + self.positions(positions) + self.segments.weight[0])
        states = [functional.dropout(states, self.dropout, self.training)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return states


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool states (texts, words, width) to (texts, width): the first, the last, or the mean of the words that `mask` (texts, words) counts."""
    if pooling == "class":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    words = mask[..., None].to(states.dtype)
    return (states * words).sum(1) / words.sum(1)

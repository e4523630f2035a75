"""The text encoder: BERT's embeddings and its first layers, on words alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.config import TextEncoderConfig
from pretrain.model.bert_layers import BertLayer, initialize_weights


class TextEncoder(nn.Module):
    """Token ids -> states, [CLS] first."""

    def __init__(self, config: TextEncoderConfig, vocabulary: int) -> None:
        super().__init__()
        self.width, self.dropout = config.width, config.dropout
        self.words = nn.Embedding(vocabulary, config.width, padding_idx=0)
        self.positions = nn.Embedding(config.positions, config.width)
        # BERT's segments; all of ours are the first. A decomposed model (VLDeformer) tells text from image by them.
        self.segments = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.layers = nn.ModuleList(
            BertLayer(config.width, config.heads, config.feed_forward, config.dropout) for _ in range(config.layers)
        )
        self.apply(initialize_weights(config.width))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids: (texts, words) int64; mask: (texts, words) bool, True where a word is -> (texts, words, width)."""
        return self.layer_states(ids, mask)[-1]

    def layer_states(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """The embeddings, then the states after each layer: (texts, words, width) each."""
        places = torch.arange(ids.shape[1], device=ids.device)
        states = self.norm(self.words(ids) + self.positions(places) + self.segments.weight[0])
        states = [functional.dropout(states, self.dropout, self.training)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return states

"""BERT's layer (Devlin et al. 2019), with optional cross-attention to image tokens as in ALBEF's fusion layers.

Two reasons why these are not the layers of `transformers`:

- Keys and values of the image tokens are computed once and shared by all texts that are fused with an image (matched, negative and
  masked). A ready-made decoder layer does not allow that.
- The parameters' names stay the same when `transformers` changes its internals.

Axes in tensor names: b, the batch (texts); h, the heads; q, the queries (words); k, the keys (words or image tokens); d, the width of
a head.

Tested in tests/pretrain/model/test_alignment_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of image tokens for one layer: (images, heads, tokens, width / heads) each."""
PreparedImages = Sequence[tuple[Tensor, ...]]
"""Images as a fusion encoder reads them, ready to be fused with any number of texts. The rows of every tensor are the images."""


class SelfAttention(nn.Module):
    """Multi-head self-attention, then its residual and its layer norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, states: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """Return the new states; arguments as in `BertLayer.forward`."""
        query_bhqd, key_bhkd, value_bhkd = (
            split_heads(part, self.heads) for part in self.query_key_value(states).chunk(3, dim=-1)
        )
        if first_only:
            query_bhqd, states = query_bhqd[:, :, :1], states[:, :1]
        attended = attend(
            query_bhqd, key_bhkd, value_bhkd, mask[:, None, None, :], self.dropout if self.training else 0.0
        )
        return self.norm(states + functional.dropout(self.output(attended), self.dropout, self.training))


class CrossAttention(nn.Module):
    """Multi-head attention of words to image tokens, then its residual and its layer norm."""

    def __init__(self, width: int, image_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(image_width, 2 * width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def keys_values(self, image_tokens: Tensor) -> KeysValues:
        """Return keys and values of image tokens (images, tokens, image width)."""
        key, value = self.key_value(image_tokens).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, states: Tensor, image: KeysValues) -> Tensor:
        """Return the new states (texts, words, width); image: keys and values, a row for each text."""
        query_bhqd = split_heads(self.query(states), self.heads)
        attended = attend(query_bhqd, *image, None, self.dropout if self.training else 0.0)
        return self.norm(states + functional.dropout(self.output(attended), self.dropout, self.training))


class BertLayer(nn.Module):
    """Self-attention, cross-attention if `image_width` is set, and the feed-forward part."""

    def __init__(
        self, width: int, heads: int, feed_forward: int, dropout: float, image_width: int | None = None
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attention = SelfAttention(width, heads, dropout)
        self.cross_attention = CrossAttention(width, image_width, heads, dropout) if image_width else None
        self.intermediate = nn.Linear(width, feed_forward)
        self.output = nn.Linear(feed_forward, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(
        self, states: Tensor, mask: Tensor, image: KeysValues | None = None, first_only: bool = False
    ) -> Tensor:
        """Run the layer.

        Args:
            states: (texts, words, width)
            mask: (texts, words) bool, True where a word is.
            image: keys and values, a row for each text; needed with cross-attention.
            first_only: compute the first word's new state alone, which has read all words.

        Returns:
            The new states (texts, words, width), or (texts, 1, width) with `first_only`.
        """
        states = self.self_attention(states, mask, first_only)
        if self.cross_attention is not None:
            assert image is not None, "a layer with cross-attention needs image tokens"
            states = self.cross_attention(states, image)
        widened = functional.gelu(self.intermediate(states))
        return self.norm(states + functional.dropout(self.output(widened), self.dropout, self.training))


def split_heads(states: Tensor, heads: int) -> Tensor:
    """Return (batch, heads, tokens, width / heads) from (batch, tokens, width)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query_bhqd: Tensor, key_bhkd: Tensor, value_bhkd: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return scaled dot-product attention with its heads merged, (batch, queries, width).

    Args:
        query_bhqd: (batch, heads, queries, width / heads)
        key_bhkd: (batch, heads, keys, width / heads)
        value_bhkd: (batch, heads, keys, width / heads)
        mask: bool, broadcast to (batch, heads, queries, keys), True where a query may look. None: everywhere.
        dropout: share of attention weights set to 0.
    """
    attended_bhqd = functional.scaled_dot_product_attention(query_bhqd, key_bhkd, value_bhkd, mask, dropout)
    return attended_bhqd.transpose(1, 2).flatten(2)


def initial_std(width: int) -> float:
    """Return the standard deviation of a fresh linear layer's weights: BERT's and ViT's 0.02 at width 768.

    At other widths it keeps the output as large as there. With 0.02 in a narrow model, queries and keys are so small that attention
    starts flat and stays flat (docs/decisions.md).
    """
    return 0.02 * (768 / width) ** 0.5


def initialize_weights(width: int) -> Callable[[nn.Module], None]:
    """Return BERT's initialisation for `nn.Module.apply`: normal weights (`initial_std(width)`; 0.02 for embeddings), biases 0."""

    def initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=initial_std(width) if isinstance(module, nn.Linear) else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    return initialize

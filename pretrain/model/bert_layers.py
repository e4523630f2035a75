"""BERT's layer (Devlin et al. 2019), with an optional cross-attention to image tokens as in ALBEF's fusion layers.

Our own rather than `transformers`': keys and values of the image tokens are computed once and shared by all the texts that
are fused with an image (matched, negative and masked), which a ready-made decoder layer does not allow, and the parameters'
names stay ours when `transformers` changes its internals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of image tokens for one layer: (images, heads, tokens, width / heads) each."""
PreparedImages = Sequence[tuple[Tensor, ...]]
"""What a fusion encoder made of images, to be fused with any number of texts: tensors whose rows are the images."""


class SelfAttention(nn.Module):
    """Multi-head self-attention, its residual and its layer norm after it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, states: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.query_key_value(states).chunk(3, dim=-1))
        if first_only:
            query, states = query[:, :, :1], states[:, :1]
        attended = attend(query, key, value, mask[:, None, None, :], self.dropout if self.training else 0.0)
        return self.norm(states + functional.dropout(self.output(attended), self.dropout, self.training))


class CrossAttention(nn.Module):
    """Multi-head attention of words to image tokens, its residual and its layer norm after it."""

    def __init__(self, width: int, image_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(image_width, 2 * width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def keys_values(self, image_tokens: Tensor) -> KeysValues:
        key, value = self.key_value(image_tokens).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, states: Tensor, image: KeysValues) -> Tensor:
        query = split_heads(self.query(states), self.heads)
        attended = attend(query, *image, None, self.dropout if self.training else 0.0)
        return self.norm(states + functional.dropout(self.output(attended), self.dropout, self.training))


class BertLayer(nn.Module):
    """Self-attention, cross-attention where `image_width` is given, and the feed-forward part."""

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
        """states: (texts, words, width); mask: (texts, words) bool, True where a word is; image: keys and values per text.

        -> the new states; `first_only`: the first word's, which has read all of them, (texts, 1, width).
        """
        states = self.self_attention(states, mask, first_only)
        if self.cross_attention is not None:
            assert image is not None, "a layer with cross-attention needs image tokens"
            states = self.cross_attention(states, image)
        widened = functional.gelu(self.intermediate(states))
        return self.norm(states + functional.dropout(self.output(widened), self.dropout, self.training))


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(batch, tokens, width) -> (batch, heads, tokens, width / heads)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention; mask broadcasts to (batch, heads, queries, keys), True where to look. Heads are merged."""
    return functional.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2).flatten(2)


def initial_std(width: int) -> float:
    """Of a fresh linear layer's weights: BERT's and ViT's 0.02 at width 768, and as loud an output at any other width.

    With 0.02 in a narrow model queries and keys are so small that attention starts flat and stays flat (docs/decisions.md).
    """
    return 0.02 * (768 / width) ** 0.5


def initialize_weights(width: int) -> Callable[[nn.Module], None]:
    """BERT's initialisation for `nn.Module.apply`: normal weights (`initial_std(width)`; 0.02 for embeddings), no bias."""

    def start(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=initial_std(width) if isinstance(module, nn.Linear) else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    return start

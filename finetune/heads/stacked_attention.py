"""Stacked cross attention (Lee et al. 2018), HAT's score per level, without the attended vectors.

Each query token attends to the tokens of the other side, the context, and is compared with the attended vector. Queries are
regions in direction `image_to_text`, words in `text_to_image`. With S = query · context and attention a, the attended vector
is sum_c a_c context_c. Its cosine with the query does not need that vector:

- the inner product is sum_c a_c S_c;
- the squared length is a' G a, with G the Gram matrix of the context's tokens.

So no tensor of (queries, width) exists. A cosine does not change with the scale of a either, so the softmax's
denominator is never computed. The scores are exact but for rounding.

Names of tensors end in their axes: i image, r region, c caption, w word. Brackets in a comment join two axes into one: "(ir)".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Direction = Literal["image_to_text", "text_to_image"]
Norm = Literal["clipped_l2norm", "l2norm", "clipped", "softmax", "no_norm"]
Pooling = Literal["mean", "sum", "max", "logsumexp"]

SLOPE = 0.1
"""Slope of the leaky ReLU for negative similarities."""
TINY = 1e-8
"""Added to a length, or its lower bound, before a division."""
GRAM_ROWS = 128
"""Rows of a Gram matrix in one block. Of a matrix with more than twice as many rows only the upper half is computed."""


@dataclass(frozen=True)
class Comparison:
    """How similarities become attention, and the queries' cosines one score. The defaults are HAT's."""

    norm: Norm = "clipped_l2norm"
    """How similarities are normalised over the queries, before the softmax over the context."""
    pooling: Pooling = "mean"
    """How the queries' cosines become one score."""
    sharpness: float = 9.0
    """Factor before the softmax (SCAN's lambda 1)."""
    pooling_sharpness: float = 6.0
    """Factor within `logsumexp` pooling (SCAN's lambda 2)."""


def pair_scores(
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    direction: Direction,
    comparison: Comparison | None = None,
    gram: Tensor | None = None,
) -> Tensor:
    """Score every image with every caption, differentiably. The caller chooses how many pairs fit in memory.

    Args:
        regions: (images, regions, width), not normalised.
        words: (captions, words, width); values behind a caption's end are ignored.
        mask: (captions, words) bool, True where a word is; at least one a caption.
        direction: `image_to_text` lets regions attend to words (HAT's i-t), `text_to_image` words to regions (t-i).
        comparison: None takes HAT's.
        gram: `context_gram` of the context, for several calls to share. For `text_to_image` it costs as much as the
            similarities with a caption of as many words as there are regions, so make it once an image.

    Returns:
        (images, captions), float32.
    """
    with torch.autocast(regions.device.type, enabled=False):
        regions, words = regions.float(), words.float() * mask[..., None]
        if gram is None:
            gram = context_gram(words if direction == "image_to_text" else regions)
        compare = _regions_query if direction == "image_to_text" else _words_query
        return compare(regions, words, mask, gram, comparison or Comparison())


def context_gram(tokens: Tensor) -> Tensor:
    """Return the inner products of each sample's tokens.

    A large matrix holds its upper half alone: blocks right of the diagonal are doubled, those left of it are zero.

    Args:
        tokens: (batch, n, width).

    Returns:
        (batch, n, n), float32.
    """
    tokens = tokens.float()
    size, transposed = tokens.shape[1], tokens.transpose(1, 2)
    if size <= 2 * GRAM_ROWS:
        return tokens @ transposed
    gram = tokens.new_zeros(len(tokens), size, size)
    for start in range(0, size, GRAM_ROWS):
        end = min(start + GRAM_ROWS, size)
        gram[:, start:end, start:end] = tokens[:, start:end] @ transposed[..., start:end]
        gram[:, start:end, end:] = 2 * tokens[:, start:end] @ transposed[..., end:]
    return gram


def word_attention(regions: Tensor, words: Tensor, direction: Direction, sharpness: float = 9.0) -> Tensor:
    """Return how much each word and each region attend to each other, for pictures.

    Args:
        regions: (regions, width).
        words: (words, width).
        direction: which side attends.
        sharpness: factor before the softmax.

    Returns:
        (words, regions). For `text_to_image` a word's attention, which sums to 1 over the regions; for `image_to_text` the
        share of its attention that a region gives to the word.
    """
    similarity_wr = words.float() @ regions.float().T
    if direction == "text_to_image":
        return torch.softmax(sharpness * _normalised(similarity_wr, 0, "clipped_l2norm"), 1)
    return torch.softmax(sharpness * _normalised(similarity_wr, 1, "clipped_l2norm"), 0)


def mean_scores(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Return the cosine of the mean region and the mean word, without attention; shapes are those of `pair_scores`."""
    with torch.autocast(regions.device.type, enabled=False):
        texts = (words.float() * mask[..., None]).sum(1)  # a cosine needs no division by the count
        return functional.normalize(regions.float().mean(1), dim=-1) @ functional.normalize(texts, dim=-1).T


def _regions_query(regions: Tensor, words: Tensor, mask: Tensor, gram_cww: Tensor, comparison: Comparison) -> Tensor:
    """Score in direction i-t. Images and regions are innermost: long contiguous rows, and one product for all pairs."""
    (images, region_count, width), (captions, length, _) = regions.shape, words.shape
    similarity_cwir = (words.reshape(-1, width) @ regions.reshape(-1, width).T).view(
        captions, length, images, region_count
    )
    attention_cwir = _attention(similarity_cwir, 3, 1, comparison, mask[:, :, None, None], None)
    # From here on (c, w, (ir)): the context is axis 1.
    similarity, attention = (
        part.view(captions, length, images * region_count) for part in (similarity_cwir, attention_cwir)
    )
    inner, squared_length = _weighted(similarity, attention), _quadratic(gram_cww, attention)
    cosine_cir = (inner * squared_length.clamp(min=TINY**2).rsqrt()).view(captions, images, region_count)
    cosine_cir = cosine_cir / torch.linalg.vector_norm(regions, dim=-1).clamp(min=TINY)
    return _pool(cosine_cir, 2, comparison, None).T


def _words_query(regions: Tensor, words: Tensor, mask: Tensor, gram_irr: Tensor, comparison: Comparison) -> Tensor:
    """Score in direction t-i. Captions are innermost, so that sums over words run over long rows."""
    (images, region_count, width), (captions, length, _) = regions.shape, words.shape
    words_wc, mask_wc = words.transpose(0, 1), mask.T  # words_wc has the width as its third axis
    similarity_irwc = (regions.reshape(-1, width) @ words_wc.reshape(-1, width).T).view(
        images, region_count, length, captions
    )
    attention_irwc = _attention(similarity_irwc, 2, 1, comparison, None, mask_wc)
    # From here on (i, r, (wc)): the context is axis 1.
    similarity, attention = (
        part.view(images, region_count, length * captions) for part in (similarity_irwc, attention_irwc)
    )
    inner, squared_length = _weighted(similarity, attention), _quadratic(gram_irr, attention)
    cosine_iwc = (inner * squared_length.clamp(min=TINY**2).rsqrt()).view(images, length, captions)
    cosine_iwc = cosine_iwc / torch.linalg.vector_norm(words_wc, dim=-1).clamp(min=TINY)
    return _pool(cosine_iwc, 1, comparison, mask_wc)


def _attention(
    similarity: Tensor,
    queries: int,
    context: int,
    comparison: Comparison,
    context_mask: Tensor | None,
    query_mask: Tensor | None,
) -> Tensor:
    """Return the attention up to a factor for each query, which the cosine does not see.

    Args:
        similarity: of all queries with all context tokens.
        queries: the axis of the queries.
        context: the axis of the context tokens.
        comparison: normalisation and sharpness.
        context_mask: bool, broadcast; False where the context has no token. None: all are there.
        query_mask: bool, broadcast; False where there is no query. None: all are there.
    """
    if comparison.norm in ("clipped_l2norm", "l2norm"):
        clipped = functional.leaky_relu(similarity, SLOPE) if comparison.norm == "clipped_l2norm" else similarity
        # The sharpness goes into the factor, which is small, and not over the similarities.
        factor = comparison.sharpness / (_length(clipped, queries) + TINY)
        logits = _times(clipped, factor, reuse=clipped is not similarity)
    else:
        logits = _normalised(similarity, queries, comparison.norm, query_mask) * comparison.sharpness
    if comparison.norm in ("no_norm", "clipped"):  # these are unbounded, and exp must not overflow
        if context_mask is not None:
            logits = logits.masked_fill(~context_mask, -torch.inf)
        logits = logits - logits.detach().amax(context, keepdim=True)
    attention = logits.exp() if logits.requires_grad else logits.exp_()
    return attention if context_mask is None else _times(attention, context_mask, reuse=True)


def _normalised(similarity: Tensor, queries: int, norm: Norm, query_mask: Tensor | None = None) -> Tensor:
    """Apply SCAN's first normalisation, over the axis of the queries. Absent words have similarity 0 and do not count."""
    if norm == "softmax":
        hidden = similarity if query_mask is None else similarity.masked_fill(~query_mask, -torch.inf)
        return torch.softmax(hidden, queries)
    if norm in ("clipped_l2norm", "clipped"):
        similarity = functional.leaky_relu(similarity, SLOPE)
    if norm in ("clipped_l2norm", "l2norm"):
        return similarity / (_length(similarity, queries) + TINY)
    return similarity


def _length(similarity: Tensor, axis: int) -> Tensor:
    """Return the L2 norm over an axis, which is kept. Its gradient is 0 at 0, where that of a plain root of sums is NaN."""
    if axis == similarity.ndim - 1:
        return torch.linalg.vector_norm(similarity, dim=axis, keepdim=True)
    # vector_norm is slow over an inner axis.
    return (similarity * similarity).sum(axis, keepdim=True).clamp(min=1e-30).sqrt()


def _times(large: Tensor, factor: Tensor, reuse: bool) -> Tensor:
    """Multiply, in place where `reuse` allows it and autograd does not need the first factor."""
    return large.mul_(factor) if reuse and not large.requires_grad else large * factor


def _weighted(similarity: Tensor, attention: Tensor) -> Tensor:
    """Return sum_n a_n S_n of every query, (batch, m), of two (batch, n, m). It may overwrite the similarities."""
    return _times(similarity, attention, reuse=not attention.requires_grad).sum(1)


def _quadratic(gram: Tensor, attention: Tensor) -> Tensor:
    """Return a' G a of every query.

    A large Gram matrix is read by its upper half, which saves nearly half of the products.

    Args:
        gram: `context_gram`, (batch, n, n).
        attention: (batch, n, m).

    Returns:
        (batch, m).
    """
    size = gram.shape[-1]
    if size <= 2 * GRAM_ROWS:
        return _times(gram @ attention, attention, reuse=True).sum(1)
    total: Tensor | float = 0.0
    for start in range(0, size, GRAM_ROWS):
        end = min(start + GRAM_ROWS, size)
        part = gram[:, start:end, start:] @ attention[:, start:]
        total = total + _times(part, attention[:, start:end], reuse=True).sum(1)
    assert isinstance(total, Tensor)
    return total


def _pool(cosine: Tensor, queries: int, comparison: Comparison, present_wc: Tensor | None) -> Tensor:
    """Pool the queries' cosines, on axis `queries`, into one score. `present_wc`: bool, which words count."""
    if comparison.pooling == "max":
        return (cosine if present_wc is None else cosine.masked_fill(~present_wc, -torch.inf)).amax(queries)
    if comparison.pooling == "logsumexp":
        cosine = comparison.pooling_sharpness * cosine
        hidden = cosine if present_wc is None else cosine.masked_fill(~present_wc, -torch.inf)
        return torch.logsumexp(hidden, queries) / comparison.pooling_sharpness
    if present_wc is not None:
        cosine = cosine * present_wc
    total = cosine.sum(queries)
    if comparison.pooling == "sum":
        return total
    return total / (cosine.shape[queries] if present_wc is None else present_wc.sum(0))

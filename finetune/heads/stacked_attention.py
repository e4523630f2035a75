"""Stacked cross attention (Lee et al. 2018; HAT's per-level score) without the attended vectors.

Each query token (a region, in direction `image_to_text`; a word, in `text_to_image`) attends to the tokens of the other side, the
context, and is compared with what it sees. With S = query · context and attention a, what it sees is sum_c a_c context_c, and its
cosine with the query needs no such vector: the inner product is sum_c a_c S_c, its squared length a' G a with G the Gram matrix of
the context's tokens. So no tensor of (queries, width) is ever made; and since a cosine does not change with the scale of a, the
softmax's denominator is never computed either. Exact but for rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Direction = Literal["image_to_text", "text_to_image"]
Norm = Literal["clipped_l2norm", "l2norm", "clipped", "softmax", "no_norm"]
Pooling = Literal["mean", "sum", "max", "logsumexp"]

SLOPE = 0.1
"""Of the leaky ReLU that clips negative similarities."""
TINY = 1e-8
GRAM_ROWS = 128
"""Rows of a Gram matrix taken at a time, where it has more than twice as many."""


def pair_scores(
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    direction: Direction,
    norm: Norm = "clipped_l2norm",
    pooling: Pooling = "mean",
    sharpness: float = 9.0,
    pooling_sharpness: float = 6.0,
    gram: Tensor | None = None,
) -> Tensor:
    """The score of every image with every caption, differentiable; the caller chooses how many pairs fit in memory.

    Args:
        regions: (images, regions, width), not normalised.
        words: (captions, words, width); what stands behind a caption's end is ignored.
        mask: (captions, words) bool, True where a word is; at least one a caption.
        direction: `image_to_text` lets regions attend to words (HAT's i-t), `text_to_image` words to regions.
        norm: how similarities are normalised over the queries before the softmax over the context.
        pooling: how the queries' cosines become one score; `logsumexp` with `pooling_sharpness` (SCAN's lambda 2).
        sharpness: factor before the softmax (SCAN's lambda 1; 9 in HAT).
        gram: `context_gram` of the context, where several calls share it; for `text_to_image` it costs as much as the regions'
            similarities with a caption of `regions` words, so it should be made once an image.

    Returns:
        (images, captions), float32.
    """
    with torch.autocast(regions.device.type, enabled=False):
        regions, words = regions.float(), words.float() * mask[..., None]
        if gram is None:
            gram = context_gram(words if direction == "image_to_text" else regions)
        compared = _regions_query if direction == "image_to_text" else _words_query
        return compared(regions, words, mask, gram, norm, pooling, sharpness, pooling_sharpness)


def context_gram(tokens: Tensor) -> Tensor:
    """(batch, n, width) -> (batch, n, n), inner products of the tokens, of many tokens by its upper half alone: blocks right of
    the diagonal are counted twice, those left of it are zero."""
    tokens = tokens.float()
    size, other = tokens.shape[1], tokens.transpose(1, 2)
    if size <= 2 * GRAM_ROWS:
        return tokens @ other
    gram = tokens.new_zeros(len(tokens), size, size)
    for start in range(0, size, GRAM_ROWS):
        end = min(start + GRAM_ROWS, size)
        gram[:, start:end, start:end] = tokens[:, start:end] @ other[..., start:end]
        gram[:, start:end, end:] = 2 * tokens[:, start:end] @ other[..., end:]
    return gram


def word_attention(regions: Tensor, words: Tensor, direction: Direction, sharpness: float = 9.0) -> Tensor:
    """How much word and region attend to each other, for pictures: regions (regions, width), words (words, width) -> (words, regions).

    `text_to_image`: each word's attention, summing to 1 over the regions. `image_to_text`: what each region gives to the word.
    """
    similarity = words.float() @ regions.float().T
    if direction == "text_to_image":
        return torch.softmax(sharpness * _normalised(similarity, 0, "clipped_l2norm"), 1)
    return torch.softmax(sharpness * _normalised(similarity, 1, "clipped_l2norm"), 0)


def mean_scores(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Without attention: the cosine of the mean region and the mean word; shapes as in `pair_scores`."""
    with torch.autocast(regions.device.type, enabled=False):
        texts = (words.float() * mask[..., None]).sum(1)  # a cosine needs no division by the count
        return functional.normalize(regions.float().mean(1), dim=-1) @ functional.normalize(texts, dim=-1).T


def _regions_query(
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    gram: Tensor,
    norm: Norm,
    pooling: Pooling,
    sharpness: float,
    lse: float,
) -> Tensor:
    """i-t. Everything is (captions, words, images * regions): long contiguous rows, and one product for all pairs."""
    (images, each, width), (captions, length, _) = regions.shape, words.shape
    similarity = (words.reshape(-1, width) @ regions.reshape(-1, width).T).view(captions, length, images, each)
    attention = _attention(similarity, 3, 1, norm, sharpness, mask[:, :, None, None], None)
    similarity, attention = (part.view(captions, length, images * each) for part in (similarity, attention))
    inner, seen = _weighted(similarity, attention), _quadratic(gram, attention)
    cosine = (inner * seen.clamp(min=TINY**2).rsqrt()).view(captions, images, each)
    cosine = cosine / torch.linalg.vector_norm(regions, dim=-1).clamp(min=TINY)
    return _pool(cosine, 2, pooling, lse, None).T


def _words_query(
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    gram: Tensor,
    norm: Norm,
    pooling: Pooling,
    sharpness: float,
    lse: float,
) -> Tensor:
    """t-i. Everything is (images, regions, words * captions), captions innermost, so that sums over words run over long rows."""
    (images, each, width), (captions, length, _) = regions.shape, words.shape
    words, present = words.transpose(0, 1), mask.T  # (words, captions, …)
    similarity = (regions.reshape(-1, width) @ words.reshape(-1, width).T).view(images, each, length, captions)
    attention = _attention(similarity, 2, 1, norm, sharpness, None, present)
    similarity, attention = (part.view(images, each, length * captions) for part in (similarity, attention))
    inner, seen = _weighted(similarity, attention), _quadratic(gram, attention)
    cosine = (inner * seen.clamp(min=TINY**2).rsqrt()).view(images, length, captions)
    cosine = cosine / torch.linalg.vector_norm(words, dim=-1).clamp(min=TINY)
    return _pool(cosine, 1, pooling, lse, present)


def _attention(
    similarity: Tensor,
    queries: int,
    context: int,
    norm: Norm,
    sharpness: float,
    context_mask: Tensor | None,
    query_mask: Tensor | None,
) -> Tensor:
    """Attention up to a factor that each query is free to have. Masks broadcast; `queries` and `context` are axes."""
    if norm in ("clipped_l2norm", "l2norm"):  # the sharpness goes into the small factor
        clipped = functional.leaky_relu(similarity, SLOPE) if norm == "clipped_l2norm" else similarity
        logits = _times(clipped, sharpness / (_length(clipped, queries) + TINY), clipped is not similarity)
    else:
        logits = _normalised(similarity, queries, norm, query_mask) * sharpness
    if norm in ("no_norm", "clipped"):  # unbounded: the largest must not overflow
        if context_mask is not None:
            logits = logits.masked_fill(~context_mask, -torch.inf)
        logits = logits - logits.detach().amax(context, keepdim=True)
    attention = logits.exp() if logits.requires_grad else logits.exp_()
    return attention if context_mask is None else _times(attention, context_mask, True)


def _normalised(similarity: Tensor, queries: int, norm: Norm, query_mask: Tensor | None = None) -> Tensor:
    """SCAN's first normalisation, over the queries. Words that are not there have similarity 0 and do not count."""
    if norm == "softmax":
        hidden = similarity if query_mask is None else similarity.masked_fill(~query_mask, -torch.inf)
        return torch.softmax(hidden, queries)
    if norm in ("clipped_l2norm", "clipped"):
        similarity = functional.leaky_relu(similarity, SLOPE)
    if norm in ("clipped_l2norm", "l2norm"):
        return similarity / (_length(similarity, queries) + TINY)
    return similarity


def _length(similarity: Tensor, axis: int) -> Tensor:
    """L2 norm, the axis kept, its gradient zero at zero (that of a plain root of sums is not a number there)."""
    if axis == similarity.ndim - 1:
        return torch.linalg.vector_norm(similarity, dim=axis, keepdim=True)
    # vector_norm is slow over an inner axis.
    return (similarity * similarity).sum(axis, keepdim=True).clamp(min=1e-30).sqrt()


def _times(large: Tensor, factor: Tensor, own: bool) -> Tensor:
    """The product, in place where nothing else (`own`), autograd included, needs the first factor."""
    return large.mul_(factor) if own and not large.requires_grad else large * factor


def _weighted(similarity: Tensor, attention: Tensor) -> Tensor:
    """sum_c a_c S_c of every query: (batch, context, m) -> (batch, m). The similarities are not needed afterwards."""
    return _times(similarity, attention, not attention.requires_grad).sum(1)


def _quadratic(gram: Tensor, attention: Tensor) -> Tensor:
    """a' G a of every column: a `context_gram` (batch, n, n), attention (batch, n, m) -> (batch, m).

    A large Gram matrix is read by its upper half: nearly half of the products are saved.
    """
    size = gram.shape[-1]
    if size <= 2 * GRAM_ROWS:
        return _times(gram @ attention, attention, True).sum(1)
    total: Tensor | float = 0.0
    for start in range(0, size, GRAM_ROWS):
        end = min(start + GRAM_ROWS, size)
        part = gram[:, start:end, start:] @ attention[:, start:]
        total = total + _times(part, attention[:, start:end], True).sum(1)
    assert isinstance(total, Tensor)
    return total


def _pool(cosine: Tensor, queries: int, pooling: Pooling, sharpness: float, present: Tensor | None) -> Tensor:
    """One score from the queries' cosines. `present` (words, captions) says which words count."""
    if pooling == "max":
        return (cosine if present is None else cosine.masked_fill(~present, -torch.inf)).amax(queries)
    if pooling == "logsumexp":
        cosine = sharpness * cosine
        hidden = cosine if present is None else cosine.masked_fill(~present, -torch.inf)
        return torch.logsumexp(hidden, queries) / sharpness
    if present is not None:
        cosine = cosine * present
    total = cosine.sum(queries)
    if pooling == "sum":
        return total
    return total / (cosine.shape[queries] if present is None else present.sum(0))

"""Find the images that are copies of earlier ones, by their bytes or by their looks.

An image's look is a perceptual hash of 255 bits (data_tools/making/fingerprints.py). A copy that was saved again, reduced to a
third, squashed, or made 20 % brighter differs in at most 22 bits (120 COCO images). Of Flickr8k's 24.5 million pairs, none but
its one true pair differs in fewer than 74. The limit is 32. Mirrored images, and crops of more than about 1 % a side, are not
taken for copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from data_tools.making.fingerprints import HASHED, UNREADABLE
from runtime.progress import progress

LOOK_DISTANCE = 32
"""Bits of 255 in which near-duplicates may differ."""
BLOCKS, BLOCK_BITS, AGREEING = 7, 9, 3
"""Two looks are compared when 3 of the 7 blocks, of 9 bits each, in their first word are equal. This is certain where the words
differ in at most 4 of their 63 bits, and likely (64 %) at 6."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """For each image, the earlier image that it is a copy of. That one is always kept."""

    original: np.ndarray
    """(images,) int64: number of the original, -1 for an image that is no copy."""
    distance: np.ndarray
    """(images,) int16: bits in which the looks differ, -1 where the bytes are the same."""


def find_duplicates(records: np.ndarray, rule: str = "drop_near", protected: int = 0) -> Duplicates:
    """Compare every image with the earlier ones that are kept.

    Copies of copies do not chain: an image is dropped only if it is near a kept one. Memory is the records (49 bytes per image)
    and about 210 bytes more per image. Time grows a little faster than n (ten million: 133 s of one core), unless many looks are nearly
    alike without being the same.

    Args:
        records: (images,) RECORD.
        rule: Which copies to drop among the images that are not protected: keep (none), drop_exact, or drop_near.
        protected: Number of images at the start that are always kept (an excluded dataset). Every image near one of them is dropped.
    """
    original, distance = np.full(len(records), -1, np.int64), np.full(len(records), -1, np.int16)
    readable = np.flatnonzero(records["state"] != UNREADABLE)
    first = readable[_first_equal(records["content"][readable])]
    dropped = (first != readable) & (readable >= protected) & ((first < protected) | (rule != "keep"))
    original[readable[dropped]] = first[dropped]
    if rule == "drop_near" or protected:
        # Equal looks are handled apart, so that the search for pairs sees each look once.
        hashed = np.flatnonzero((records["state"] == HASHED) & (original < 0))
        looks = records["look"][hashed]
        alike = hashed[_first_equal(looks)]
        distinct = hashed[alike == hashed]
        later, earlier, bits = _near_pairs(looks[alike == hashed])
        for a, b, differing in zip(distinct[later].tolist(), distinct[earlier].tolist(), bits.tolist(), strict=True):
            both_kept = original[a] < 0 and original[b] < 0
            if a >= protected and both_kept and (b < protected or rule == "drop_near"):
                original[a], distance[a] = b, differing
        # An image with exactly an earlier image's look is a copy of that image, or of the one that the earlier image copies.
        is_copied = (alike < protected) | (original[alike] >= 0) | (rule == "drop_near")
        selected = (alike != hashed) & (hashed >= protected) & is_copied
        twins, copies = alike[selected], hashed[selected]
        original[copies] = np.where(original[twins] < 0, twins, original[twins])
        # -1 stands for equal bytes, which a copy with an equal look need not have.
        distance[copies] = np.maximum(distance[twins], 0)
    # An image with the bytes of one that was dropped for its look is a copy of that one's original.
    copies = np.flatnonzero(original >= 0)
    indirect = copies[original[original[copies]] >= 0]
    distance[indirect] = distance[original[indirect]]
    original[indirect] = original[original[indirect]]
    return Duplicates(original, distance)


def _first_equal(words: np.ndarray) -> np.ndarray:
    """Return for each row of (n, words) the number of the first row that is equal to it."""
    order = np.lexsort(words.T[::-1])
    ordered = words[order]
    begins = np.ones(len(words), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(1)
    # The sort is stable, so a run of equal rows begins with its first.
    starts = np.maximum.accumulate(np.where(begins, np.arange(len(words)), 0))
    first = np.empty(len(words), np.int64)
    first[order] = order[starts]
    return first


def _near_pairs(looks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the pairs of looks within LOOK_DISTANCE that agree in some choice of blocks.

    Args:
        looks: (n, 4) uint64, all distinct.

    Returns:
        The later row, the earlier row, and the bits in which they differ, each (pairs,), sorted by later, then earlier.
    """
    blocks = [(looks[:, 0] >> np.uint64(BLOCK_BITS * k)) & np.uint64(2**BLOCK_BITS - 1) for k in range(BLOCKS)]
    blocks = [block.astype(np.uint32) for block in blocks]
    near: list[np.ndarray] = []
    choices = list(combinations(range(BLOCKS), AGREEING))
    with progress("comparing", len(choices), "tables", silent=len(looks) < 200_000) as bar:
        for a, b, c in choices:
            key = blocks[a] | blocks[b] << np.uint32(BLOCK_BITS) | blocks[c] << np.uint32(2 * BLOCK_BITS)
            order = np.argsort(key, kind="stable")
            ordered = key[order]
            # All pairs of a run of equal keys: first the neighbours, then those two apart, and so on.
            start, step = np.arange(len(key)), 1
            while True:
                start = start[start + step < len(key)]
                start = start[ordered[start] == ordered[start + step]]
                if not len(start):
                    break
                near.append(_within_distance(looks, order[start], order[start + step]))
                step += 1
            bar.advance()
    pairs = np.unique(np.concatenate([np.empty((0, 3), np.int64), *near]), axis=0)
    return pairs[:, 0], pairs[:, 1], pairs[:, 2]


def _within_distance(looks: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the pairs of rows that are within LOOK_DISTANCE, as (pairs, 3): later, earlier, bits."""
    near = []
    # In parts, because long runs of equal keys give many pairs at once.
    for start in range(0, len(left), 1 << 18):
        a, b = left[start : start + (1 << 18)], right[start : start + (1 << 18)]
        bits = np.bitwise_count(looks[a] ^ looks[b]).sum(1, dtype=np.int64)
        kept = bits <= LOOK_DISTANCE
        a, b = a[kept], b[kept]
        near.append(np.stack([np.maximum(a, b), np.minimum(a, b), bits[kept]], 1))
    return np.concatenate(near)

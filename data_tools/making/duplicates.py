"""Which images of many are copies of earlier ones: by their bytes, or by their looks.

Looks are 255 bits (data_tools/making/fingerprints.py). Two copies of a picture, saved again, reduced to a third, squashed, or 20 % brighter,
differ in at most 22 of them (120 COCO images); of Flickr8k's 24.5 million pairs none but its one true pair differs in fewer than 74.
The limit is 32. Mirrored images and crops of more than about 1 % a side count as others.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from data_tools.making.fingerprints import SEEN, UNREADABLE
from runtime.progress import progress

LOOK_DISTANCE = 32
"""Bits of 255 in which near-duplicates may differ."""
BLOCKS, BLOCK_BITS, AGREEING = 7, 9, 3
"""Candidates agree wholly in 3 of the 7 blocks of 9 bits of their first word, which is sure where they differ in 4 of its 63
bits or fewer, and likely (64 %) at 6."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """For each image of which earlier, kept one it is a copy."""

    of: np.ndarray
    """(images,) int64: that image, or -1."""
    distance: np.ndarray
    """(images,) int16: bits in which their looks differ; -1 where their bytes are the same."""


def find_duplicates(records: np.ndarray, rule: str = "drop_near", protected: int = 0) -> Duplicates:
    """Hold every image against the earlier ones that are kept. The first `protected` (an excluded dataset) are kept whatever they
    are like, and what is near them goes; among the others `rule` (keep, drop_exact, drop_near) says what goes.

    records: (images,) RECORD. Copies of copies do not chain: an image goes when it is near a kept one. Memory: the records (49
    bytes an image) and about 210 bytes an image beside them; time grows a little faster than n (ten million: 133 s of one core) unless many looks
    are nearly alike, without being the same.
    """
    of, distance = np.full(len(records), -1, np.int64), np.full(len(records), -1, np.int16)
    readable = np.flatnonzero(records["state"] != UNREADABLE)
    first = readable[_first_alike(records["content"][readable])]
    goes = (first != readable) & (readable >= protected) & ((first < protected) | (rule != "keep"))
    of[readable[goes]] = first[goes]
    if rule == "drop_near" or protected:
        able = np.flatnonzero((records["state"] == SEEN) & (of < 0))
        looks = records["look"][able]
        alike = able[_first_alike(looks)]
        distinct = able[alike == able]
        later, earlier, bits = _near_pairs(looks[alike == able])
        for a, b, differing in zip(distinct[later].tolist(), distinct[earlier].tolist(), bits.tolist(), strict=True):
            if a >= protected and of[a] < 0 and of[b] < 0 and (b < protected or rule == "drop_near"):
                of[a], distance[a] = b, differing
        # Those of the very same look go because of the first of them, or with it.
        same = (alike != able) & (able >= protected) & ((alike < protected) | (of[alike] >= 0) | (rule == "drop_near"))
        model, same = alike[same], able[same]
        of[same] = np.where(of[model] < 0, model, of[model])
        distance[same] = np.maximum(distance[model], 0)
    gone = np.flatnonzero(of >= 0)
    passed_on = gone[of[of[gone]] >= 0]  # the same bytes as one that went for its looks
    distance[passed_on] = distance[of[passed_on]]
    of[passed_on] = of[of[passed_on]]
    return Duplicates(of, distance)


def _first_alike(words: np.ndarray) -> np.ndarray:
    """(n, words) -> for each row the first row that is equal to it."""
    order = np.lexsort(words.T[::-1])
    ordered = words[order]
    begins = np.ones(len(words), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(1)
    # Rows that are equal stay in their order, so a run begins with its first.
    starts = np.maximum.accumulate(np.where(begins, np.arange(len(words)), 0))
    found = np.empty(len(words), np.int64)
    found[order] = order[starts]
    return found


def _near_pairs(looks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 4) distinct looks -> (later, earlier, bits) of the pairs within LOOK_DISTANCE that some choice of blocks brings together, by later, then earlier."""
    blocks = [(looks[:, 0] >> np.uint64(BLOCK_BITS * k)) & np.uint64(2**BLOCK_BITS - 1) for k in range(BLOCKS)]
    blocks = [block.astype(np.uint32) for block in blocks]
    found: list[np.ndarray] = []
    choices = list(combinations(range(BLOCKS), AGREEING))
    with progress("comparing", len(choices), "tables", silent=len(looks) < 200_000) as bar:
        for a, b, c in choices:
            key = blocks[a] | blocks[b] << np.uint32(BLOCK_BITS) | blocks[c] << np.uint32(2 * BLOCK_BITS)
            order = np.argsort(key, kind="stable")
            ordered = key[order]
            at, step = np.arange(len(key)), 1
            while True:
                at = at[at + step < len(key)]
                at = at[ordered[at] == ordered[at + step]]
                if not len(at):
                    break
                found.append(_within(looks, order[at], order[at + step]))
                step += 1
            bar.advance()
    pairs = np.unique(np.concatenate([np.empty((0, 3), np.int64), *found]), axis=0)
    return pairs[:, 0], pairs[:, 1], pairs[:, 2]


def _within(looks: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Those of the pairs that are near, as (pairs, 3): later, earlier, bits."""
    near = []
    for start in range(0, len(one), 1 << 18):
        a, b = one[start : start + (1 << 18)], other[start : start + (1 << 18)]
        bits = np.bitwise_count(looks[a] ^ looks[b]).sum(1, dtype=np.int64)
        kept = bits <= LOOK_DISTANCE
        a, b = a[kept], b[kept]
        near.append(np.stack([np.maximum(a, b), np.minimum(a, b), bits[kept]], 1))
    return np.concatenate(near)

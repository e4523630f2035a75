"""What codewords know of drawn scenes: their mutual information with colour, shape, count and relation.

Tested in tests/launch/ablation/test_ablation.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.in_order.collection import Collection
from pretrain.encode import encode_collection
from pretrain.model.alignment_model import IMAGE
from pretrain.weights.load import load_model
from runtime.errors import DataError
from runtime.ranks import Ranks

SHUFFLES = 20
"""Shuffled pairs whose mean mutual information is the chance level."""


def information_of_run(run: Path | str, data: str, scenes: str) -> dict[str, float]:
    """Measure the mutual information of each image's nearest codeword with what is drawn in the image.

    Args:
        run: Folder of a run or of a checkpoint.
        data: Shard folder of drawn scenes.
        scenes: The `scenes.jsonl` that `ligature shapes` writes.

    Returns:
        Attribute (colour, shape, count, relation) -> bits. Empty for a model without a codebook.

    Raises:
        DataError: An image of the data is not in `scenes`.
    """
    model = load_model(run)
    if model.network.codebook is None:
        return {}
    collection = Collection(data)
    encodings = encode_collection(model.network, model.tokenizer, collection, Ranks())
    image = model.network.codebook_features(encodings.image, IMAGE)
    codes = (image @ model.network.codewords().cpu().T).argmax(-1)  # (images,)
    truth_of = {}
    for line in Path(scenes).read_text(encoding="utf-8").splitlines():
        truth = json.loads(line)
        truth_of[Path(truth["file_name"]).stem] = truth
    if missing := [key for key in collection.keys if Path(key).name not in truth_of]:
        raise DataError(
            f"{scenes} does not have the image {missing[0]} of {data}; give the scenes that the data was drawn with"
        )
    truths = [truth_of[Path(key).name] for key in collection.keys]
    bits = {}
    for name in ("colour", "shape", "count"):
        # An image may show two values of an attribute, so each value is a labelling of its own: shown or not.
        values = sorted({str(group[name]) for truth in truths for group in groups(truth)})
        labels = [
            torch.tensor([int(any(str(group[name]) == value for group in groups(truth))) for truth in truths])
            for value in values
        ]
        bits[name] = sum(corrected(codes, shown) for shown in labels)
    relations = sorted({str(truth["relation"]) for truth in truths})
    bits["relation"] = corrected(codes, torch.tensor([relations.index(str(truth["relation"])) for truth in truths]))
    return bits


def groups(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the one or two groups of shapes in a scene."""
    return [group for group in (truth["scene"]["first"], truth["scene"]["second"]) if group]


def corrected(first: Tensor, second: Tensor) -> float:
    """Return the mutual information of two labellings, less its mean over shuffled pairs.

    With few samples a codeword the plain estimate is positive even for independent labellings.

    Args:
        first: (samples,) int64.
        second: (samples,) int64.

    Returns:
        Bits.
    """
    # A fixed seed, so that measuring a run again gives the same bits.
    generator = torch.Generator().manual_seed(0)
    chance = [information(first, second[torch.randperm(len(second), generator=generator)]) for _ in range(SHUFFLES)]
    return information(first, second) - sum(chance) / SHUFFLES


def information(first: Tensor, second: Tensor) -> float:
    """Return the mutual information of two labellings, estimated from counts.

    Args:
        first: (samples,) int64.
        second: (samples,) int64.

    Returns:
        Bits.
    """
    rows, columns = int(first.max()) + 1, int(second.max()) + 1
    counts = torch.bincount(first * columns + second, minlength=rows * columns).view(rows, columns)
    joint = counts.double() / len(first)
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    # Where a label never occurs, joint and expected are both 0. Unclamped, 0/0 would turn the whole sum into nan.
    return float(torch.special.xlogy(joint, joint / expected.clamp(min=1e-300)).sum()) / math.log(2)

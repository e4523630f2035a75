"""What codewords know of drawn scenes: mutual information with colour, shape, count and relation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.in_order.collection import Collection
from pretrain.encode import encode_collection
from pretrain.weights.load import load_model
from runtime.errors import DataError
from runtime.ranks import Ranks

SHUFFLES = 20


def information_of_run(run: Path | str, data: str, scenes: str) -> dict[str, float]:
    """Bits between an image's nearest codeword and what is drawn in it, by attribute; empty for a model without codebook.

    scenes: the `scenes.jsonl` that `ligature shapes` leaves. Raises DataError where it does not know an image of the data.
    """
    model = load_model(run)
    if model.network.codebook is None:
        return {}
    collection = Collection(data)
    encodings = encode_collection(model.network, model.tokenizer, collection, Ranks())
    code = (encodings.image @ model.network.codewords().cpu().T).argmax(-1)
    known = {}
    for line in Path(scenes).read_text(encoding="utf-8").splitlines():
        truth = json.loads(line)
        known[Path(truth["file_name"]).stem] = truth
    if missing := [key for key in collection.keys if Path(key).name not in known]:
        raise DataError(
            f"{scenes} does not know the image {missing[0]} of {data}; give the scenes that the data was drawn with"
        )
    truths = [known[Path(key).name] for key in collection.keys]
    found = {}
    for name in ("colour", "shape", "count"):
        values = sorted({str(group[name]) for truth in truths for group in groups(truth)})
        present = [
            torch.tensor([int(any(str(g[name]) == value for g in groups(t))) for t in truths]) for value in values
        ]
        found[name] = sum(corrected(code, one) for one in present)
    relations = sorted({str(truth["relation"]) for truth in truths})
    found["relation"] = corrected(code, torch.tensor([relations.index(str(truth["relation"])) for truth in truths]))
    return found


def groups(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """The one or two groups of a scene."""
    return [group for group in (truth["scene"]["first"], truth["scene"]["second"]) if group]


def corrected(one: Tensor, other: Tensor) -> float:
    """Mutual information less its mean over shuffled pairs: few samples a codeword make it positive without any."""
    generator = torch.Generator().manual_seed(0)
    chance = [information(one, other[torch.randperm(len(other), generator=generator)]) for _ in range(SHUFFLES)]
    return information(one, other) - sum(chance) / SHUFFLES


def information(one: Tensor, other: Tensor) -> float:
    """Mutual information in bits of two labellings (samples,) int64, by counting."""
    rows, columns = int(one.max()) + 1, int(other.max()) + 1
    joint = torch.bincount(one * columns + other, minlength=rows * columns).view(rows, columns).double() / len(one)
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.special.xlogy(joint, joint / expected.clamp(min=1e-300)).sum()) / 0.6931471805599453

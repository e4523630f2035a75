"""The worked example of docs/codis.md is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import tiny
import torch


def test_the_new_objective_of_the_docs_learns_and_splits():
    text = (Path(__file__).parents[2] / "docs" / "codis.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Uniformity:" in block)
    room: dict = {}
    exec(code, room)  # our own page
    objective = room["Uniformity"]()
    task = tiny.task(tiny.recipe())
    whole, _ = task.prepare(tiny.batch(16), 1.0, 16)
    parts, _ = task.prepare(tiny.batch(16), 1.0, 4)
    task.student.objectives["uniformity"], task.student.weights["uniformity"] = objective, 0.1
    total, figures = task.student(whole[0])
    total.backward()
    assert figures["uniformity"].isfinite() and task.student.model.image_projection.weight.grad.any()
    split = torch.stack([task.student(part)[1]["uniformity"] for part in parts]).mean()
    torch.testing.assert_close(split, figures["uniformity"])

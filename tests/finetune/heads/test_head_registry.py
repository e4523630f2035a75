"""The table of heads: every part loads, and recipes allow exactly the heads of the table."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
import torch

from finetune.heads.base import GatherRows, HeadTask, RetrievalTask, Workload
from finetune.heads.registry import DEFAULT, HEADS, ScoredHead, TrainedHead, load_part, names_with
from runtime.ranks import Ranks
from training.stage import Validation

PARTS = [
    (name, part) for name in HEADS for part in ("task", "scorer", "encoder", "first_stage") if name in names_with(part)
]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_every_part_loads(name, part):
    loaded = load_part(name, part)
    assert callable(loaded)
    if part == "task":
        assert issubclass(loaded, HeadTask)


def test_recipes_allow_the_heads_of_the_table():
    assert list(get_args(ScoredHead)) == list(HEADS)
    assert list(get_args(TrainedHead)) == names_with("task")
    assert DEFAULT in HEADS and set(names_with("scorer")) >= set(names_with("task")), "what is trained can be scored"


def test_the_table_loads_without_torch():
    program = "import sys; import finetune.heads.registry, finetune.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_retrieval_task_is_validated_by_its_recalls():
    class Perfect(RetrievalTask):
        def similarity(self, collection, work):
            return torch.eye(3).numpy()

    class Pictures:
        caption_image = torch.arange(3).numpy()

    result = Perfect().validate(Pictures(), Workload(Ranks(), torch.device("cpu")))
    assert isinstance(result, Validation) and result.best_by == "rsum"
    assert result.figures["rsum"] == 600 and result.figures["image_to_text_R@1"] == 100


def test_rows_gathered_by_one_process_keep_their_gradient():
    rows = torch.randn(3, 2, requires_grad=True)
    (GatherRows.apply(rows) * torch.arange(6.0).view(3, 2)).sum().backward()
    assert torch.equal(rows.grad, torch.arange(6.0).view(3, 2))

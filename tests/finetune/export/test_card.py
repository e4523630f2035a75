"""The model card says what is known of the run, and calls the rest unknown."""

from __future__ import annotations

import json

import pytest
import small
import yaml

from finetune.export.export import export
from finetune.export.formats import FORMATS
from launch.cli import main
from pretrain.weights.load import load_model


@pytest.fixture(scope="module")
def run(drawn, tmp_path_factory):
    """A run fine-tuned without matching, and a record of its scores beside it."""
    runs = tmp_path_factory.mktemp("runs")
    start = small.pretrain(runs, drawn)
    assert main(small.finetune(start, drawn, runs, "--name", "tuned", "--matching_weight", "0", steps=2)) == 0
    assert main(small.evaluate(runs / "tuned", drawn, runs / "scores.json")) == 0
    other = json.loads((runs / "scores.json").read_text()) | {"checkpoint": "another", "dataset": "elsewhere"}
    (runs / "tuned" / "of_another.json").write_text(json.dumps(other))
    return runs / "tuned"


def test_the_card_of_a_run_has_its_data_recipe_and_scores(run, drawn, tmp_path):
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "ligature" and "image-text-retrieval" in header["tags"]
    assert "\n# tuned\n" in card and "fine-tuned-on shapes" in card
    model = load_model(run)
    state = json.loads((model.folder / "state.json").read_text())
    assert state["stream"]["fingerprint"] in card and "16 in 2 steps" in card and model.hash in card
    record = json.loads((run.parent / "scores.json").read_text())
    low, high = record["image_to_text"]["interval"]["R@1"]
    assert f" {low:.1f}–{high:.1f} |" in card and "elsewhere" not in card
    assert "so matching no longer fits" in card
    recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert recipe["data"]["train"] == "train" and recipe["matching_weight"] == 0.0
    assert str(drawn) not in card and str(run.parent) not in card, (
        "a card is published: it names no folder of a machine"
    )


def test_a_checkpoint_without_a_run_has_a_card_that_says_unknown(run, tmp_path):
    export(run, tmp_path / "plain")
    export(tmp_path / "plain", tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "| fingerprint of the training data | unknown |" in card and "No score record" in card


def test_every_format_says_how_to_load_it_in_few_lines():
    for form in FORMATS.values():
        assert form.inputs and 1 < len([line for line in form.load.splitlines() if line]) <= 8
        compile(form.load, "card", "exec")

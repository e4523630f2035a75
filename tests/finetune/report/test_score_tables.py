"""Score tables of a page: whose records they are, what they show, and paired differences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.report.score_tables import differences_html, find_scores, pair_scores, read_scores, scores_html
from retrieval.compare import compare_records
from retrieval.records import About, score, write_record
from runtime.checkpoint import checkpoint_hash
from runtime.errors import LigatureError


def write_scores(path: Path, checkpoint: str, seed: int, head: str = "dual", split: str = "test") -> dict:
    """Write the record of random scores of 40 images with two captions each, the right ones raised by chance."""
    owner = np.repeat(np.arange(40), 2)
    generator = np.random.default_rng(seed)
    scores = generator.random((40, 80)) + generator.random(80) * (owner == np.arange(40)[:, None])
    about = About("shapes", split, "all", head, checkpoint, "pretrained")
    record, outcome = score(scores, scores.T, owner, about)
    write_record(path, record, outcome, [str(number) for number in range(40)])
    return record


@pytest.fixture
def run(tmp_path) -> Path:
    checkpoint = tmp_path / "runs" / "a" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    return tmp_path / "runs" / "a"


def test_a_run_has_the_records_of_its_checkpoints_alone(run):
    own = checkpoint_hash(run / "checkpoints" / "step-00000001")
    write_scores(run.parent / "own.json", own, 0)
    write_scores(run / "inside.json", own, 1, "fusion")
    write_scores(run.parent / "others.json", "0" * 16, 2)
    (run.parent / "notes.json").write_text("[1]")
    (run.parent / "broken.json").write_text("{")
    assert [score.path.name for score in find_scores(run)] == ["inside.json", "own.json"]
    with pytest.raises(LigatureError, match="is not a score record"):
        read_scores([run.parent / "notes.json"])


def test_a_table_shows_recalls_intervals_and_chance(run):
    record = write_scores(run / "own.json", "1", 0)
    write_scores(run / "dev.json", "1", 0, split="dev")
    text = "".join(scores_html({"a": read_scores([run / "own.json", run / "dev.json"])}))
    assert text.count("<table") == 2, "a table for each setting"
    low, high = record["text_to_image"]["interval"]["R@5"]
    assert f"{record['text_to_image']['R@5']:.1f}<small>{low:.1f}–{high:.1f}</small>" in text
    assert f"{record['chance']['image_to_text']['R@1']:.2f}" in text and f"{record['rsum']:.1f}" in text
    assert scores_html({"a": []}) == []


def test_runs_scored_alike_are_subtracted_in_pairs(run, tmp_path):
    write_scores(run / "a.json", "1", 0)
    write_scores(run / "b.json", "2", 1)
    ours, theirs = read_scores([run / "a.json"]), read_scores([run / "b.json"])
    text = "".join(differences_html({"a": ours, "b": theirs}))
    rows = compare_records(run / "a.json", run / "b.json")["differences"]
    assert text.count("<tr>") == 1 + len(rows)
    for row in rows:
        assert f"{row['difference']:+.2f}</span><small>{row['interval'][0]:+.2f} to {row['interval'][1]:+.2f}" in text
    (run / "b.ranks.npz").unlink()
    assert "a and b: no paired difference: " in "".join(differences_html({"a": ours, "b": theirs}))


def test_records_are_paired_by_setting_and_head(run):
    for name, head, split in (("a", "dual", "test"), ("b", "fusion", "test"), ("c", "fusion", "dev")):
        write_scores(run / f"{name}.json", "1", 0, head, split)
    a, b, c = read_scores([run / f"{name}.json" for name in "abc"])
    assert pair_scores([a, b], [b]) == [(b, b)]
    assert pair_scores([a], [b]) == [(a, b)], "the only ones of a setting are compared whatever their heads"
    assert pair_scores([a], [c]) == []
    assert json.loads((run / "c.json").read_text())["split"] == "dev"

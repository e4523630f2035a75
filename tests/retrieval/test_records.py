"""Records survive JSON, hold the stated keys, and make a readable table."""

import json
import subprocess
import sys

import numpy as np
import pytest

import retrieval
from retrieval.records import KEYS, About, read_outcome, read_record, score, table, write_record
from runtime.errors import LigatureError

ABOUT = {
    "dataset": "shapes",
    "split": "test",
    "captions_per_image": "all",
    "head": "dual",
    "checkpoint": "ab12",
    "training": "pretrained",
}


KEYS_OF_IMAGES = [f"image-{number}" for number in range(20)]


def scored(**about):
    scores = np.random.default_rng(0).normal(size=(20, 100)) + np.repeat(np.eye(20), 5, axis=1)
    return score(scores, scores.T, np.repeat(np.arange(20), 5), About(**{**ABOUT, **about}))


def record(**about):
    return scored(**about)[0]


def test_a_record_holds_what_the_contract_lists(tmp_path):
    written, outcome = scored(more={"truncated_captions": 3})
    assert tuple(written) == (*KEYS, "truncated_captions")
    for direction in ("image_to_text", "text_to_image"):
        assert set(written[direction]) == {
            *("R@1", "R@5", "R@10", "interval", "median_rank", "mean_rank", "mean_reciprocal_rank"),
            *(("R-precision", "mAP@R") if direction == "image_to_text" else ()),
        }
    assert (written["images"], written["captions"], written["protocol"]) == (20, 100, "full")
    path = tmp_path / "scores.json"
    write_record(path, written, outcome, KEYS_OF_IMAGES)
    read = read_record(path)
    assert read == {**written, "ranks": {"file": "scores.ranks.npz", "sha256": read["ranks"]["sha256"]}}
    again, keys = read_outcome(path, read)
    assert keys == KEYS_OF_IMAGES
    np.testing.assert_array_equal(again.ranks["text_to_image"].above, outcome.ranks["text_to_image"].above)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"rsum": 3}', "{"])
def test_refuses_files_that_are_no_record(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(LigatureError, match=r"scores\.json is not"):
        read_record(tmp_path / "scores.json")
    with pytest.raises(LigatureError, match="no file"):
        read_record(tmp_path / "absent.json")


def test_names_the_missing_keys(tmp_path):
    written = record()
    del written["training"]
    (tmp_path / "scores.json").write_text(json.dumps(written))
    with pytest.raises(LigatureError, match="lacks training"):
        read_record(tmp_path / "scores.json")


@pytest.mark.parametrize("training", ["zero-shot", "fine-tuned-on ", "fine-tuned-on", ""])
def test_only_known_kinds_of_training_are_accepted(training):
    with pytest.raises(LigatureError, match="must be untrained, pretrained or"):
        record(training=training)
    assert record(training="fine-tuned-on coco")["training"] == "fine-tuned-on coco"


def test_unknown_protocol_is_answered_with_the_known_ones():
    with pytest.raises(LigatureError, match="no protocol 'coco_5'; there is full"):
        record(protocol="coco_5")


def test_table():
    rows = [record(), record(head="fusion, shortlist 8", training="fine-tuned-on shapes"), record(split="validation")]
    tables = [part.split("\n") for part in table(rows).split("\n\n")]
    assert [len(part) for part in tables] == [2, 8, 2, 6]  # a title and a table for each split
    assert tables[0][0] == "shapes test, protocol full: 20 images, 100 captions (all)"
    assert len({len(line) for line in tables[1]}) == 1  # aligned
    rule = tables[1].pop(1)
    assert set(rule) <= set("|-: ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[1]]
    assert cells[0] == ["model", "", "R@1", "R@5", "R@10", "rank", "rsum"]
    for line, label, short, direction in (
        (cells[1], "dual", "TR", "image_to_text"),
        (cells[2], "pretrained", "IR", "text_to_image"),
    ):
        values = rows[0][direction]
        low, high = values["interval"]["R@1"]
        assert line[:3] == [label, short, f"{values['R@1']:.1f} {low:.1f}–{high:.1f}"]
        assert line[5:] == [f"{values['median_rank']:.1f}", f"{rows[0]['rsum']:.1f}" if short == "TR" else ""]
    assert [line[0] for line in cells[3:5]] == ["fusion, shortlist 8", "fine-tuned-on shapes"]
    assert cells[5][:3] == ["chance", "TR", "5.00"] and cells[6][:3] == ["", "IR", "5.00"]
    assert table([]) == ""


def test_a_table_fits_100_columns():
    row = record(head="fusion, shortlist 128", training="fine-tuned-on flickr30k")
    for direction in ("image_to_text", "text_to_image"):
        for name in ("R@1", "R@5", "R@10"):
            row[direction] |= {
                name: 88.8,
                "median_rank": 12.5,
                "interval": row[direction]["interval"] | {name: [87.7, 89.9]},
            }
    row["rsum"] = 532.8
    assert max(map(len, table([row]).splitlines())) <= 100


def test_exports_load_and_no_model_comes_with_them():
    assert {name: getattr(retrieval, name).__name__ for name in retrieval.__all__}
    with pytest.raises(AttributeError):
        _ = retrieval.nothing
    script = (
        "import sys, retrieval; assert 'numpy' not in sys.modules; import retrieval.records; "
        "floors = {'torch', 'scipy', 'pretrain', 'finetune', 'launch', 'data_tools'}; "
        "assert not floors & set(sys.modules), floors & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

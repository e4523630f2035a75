"""The written dataset holds the drawings, the captions and the truth, or nothing at all."""

import json

import pytest
from PIL import Image

from data_tools.shapes.drawing import draw
from data_tools.shapes.scenes import held_out, scenes
from data_tools.shapes.sentences import captions
from data_tools.shapes.source import write_source
from runtime.errors import DataError


def test_write_source_gives_coco_files_and_the_truth(tmp_path):
    counts = {"train": 12, "test": 5}
    write_source(tmp_path / "one", counts, size=32, seed=4)
    write_source(tmp_path / "two", counts, size=32, seed=4, workers=2)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 17 + 3
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    truth = [json.loads(line) for line in (tmp_path / "one" / "scenes.jsonl").read_text().splitlines()]
    coco = json.loads((tmp_path / "one" / "captions_test.json").read_text())
    assert [image["id"] for image in coco["images"]] == [line["id"] for line in truth if line["split"] == "test"]
    assert [len({entry["id"] for entry in coco[part]}) for part in ("images", "annotations")] == [5, 25]
    expected = scenes("test", 5, 4)
    for image, scene in zip(coco["images"], expected, strict=True):
        with Image.open(tmp_path / "one" / "images" / image["file_name"]) as drawn:
            assert drawn.tobytes() == draw(scene, 32, 4).tobytes() and drawn.size == (image["width"], image["height"])
        texts = [entry["caption"] for entry in coco["annotations"] if entry["image_id"] == image["id"]]
        line = truth[image["id"]]
        assert texts == captions(scene, 4) == [caption["text"] for caption in line["captions"]]
        assert (line["relation"], line["scene"]["place"]) == (scene.relation, scene.place)
        assert line["held_out"] == held_out(scene)
    with pytest.raises(DataError, match="exists already"):
        write_source(tmp_path / "one", counts)


def test_an_interrupted_source_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(Exception, match="No space left"):
        write_source(tmp_path / "shapes", {"test": 2})
    assert list(tmp_path.iterdir()) == []

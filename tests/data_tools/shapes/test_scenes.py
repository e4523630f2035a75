"""Drawn shapes: what is promised of scenes, splits, captions and images, checked on thousands of them."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_tools.shapes.scenes import (
    Caption,
    Group,
    Scene,
    World,
    captions,
    describe,
    draw,
    fits,
    relation_pairs,
    scenes,
    write_source,
)
from data_tools.shapes.scenes import scenes as shapes
from runtime.errors import DataError

RED_CIRCLES = Group("red", "circle", 2, "large", "plain")
BLUE_SQUARE = Group("blue", "square", 1, "small", "striped")
SCENE = Scene("white", RED_CIRCLES, "left", BLUE_SQUARE)

# The grammar's words once more, the other way round and written by hand: a caption is read back without its own tables.
READ = {
    "count": {"a": 1, "an": 1, "one": 1, "a single": 1, "two": 2, "a pair of": 2, "three": 3, "a trio of": 3},
    "size": {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"},
    "texture": {"plain": "plain", "solid": "plain", "striped": "striped", "stripy": "striped", "dotted": "dotted",
                "spotted": "dotted", " with stripes": "striped", " with dots": "dotted"},
    "colour": {"violet": "purple", "turquoise": "cyan"} | {colour: colour for colour in shapes.COLOURS},
    "shape": {"disc": "circle", "plus sign": "cross", "hoop": "ring"} | {shape: shape for shape in shapes.SHAPES},
}  # fmt: skip
NOUN_PHRASE = re.compile(
    r"\b(?P<count>a single|a pair of|a trio of|an|a|one|two|three) (?:(?P<size>small|little|tiny|large|big) )?"
    r"(?:(?P<texture>plain|solid|striped|stripy|dotted|spotted) )?"
    rf"(?:(?P<colour>{'|'.join(READ['colour'])}) )?(?P<shape>{'|'.join(READ['shape'])})(?:es|s)?\b"
    r"(?P<tail> with (?:stripes|dots))?"
)
RELATION = {"left of": "left", "right of": "right", "above": "top", "over": "top", "higher than": "top",
            "below": "bottom", "under": "bottom", "beneath": "bottom", "lower than": "bottom"}  # fmt: skip
PLACE = {"on the left": "left", "on the right": "right", "at the top": "top", "at the bottom": "bottom"}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def read(text: str) -> tuple[list[dict], str | None]:
    """The groups and the background that a caption's words tell of."""
    text = re.sub(r"^a picture of |^there (is|are) ", "", text)
    background = re.search(r" (?:on|on a|against a) (white|grey|black)(?: background)?$", text)
    text = text[: background.start()] if background else text
    said = []
    for match in NOUN_PHRASE.finditer(text):
        words = match.groupdict()
        words["texture"] = words["texture"] or words.pop("tail")
        said.append({name: READ[name][words[name]] for name in READ if words.get(name)})
    rest = NOUN_PHRASE.sub("", text)
    place = None
    if beside := re.search(r", with  (?:on (?:its|their) (left|right)|(above|below) (?:it|them))", rest):
        said.reverse()
        place = beside[1] or {"above": "top", "below": "bottom"}[beside[2]]
    elif places := re.findall("|".join(PLACE), re.sub(r"on the (left|right) of", r"\1 of", rest)):
        place = PLACE[places[0]]
        assert len(places) == len(said) and (len(said) == 1 or PLACE[places[1]] == OPPOSITE[place])
    elif relation := re.search("|".join(RELATION), rest):
        place = RELATION[relation[0]]
    if place:
        said = [facts | {"place": where} for facts, where in zip(said, (place, OPPOSITE[place]), strict=False)]
    return said, background[1] if background else None


def test_scenes_are_a_function_of_split_and_seed_and_a_longer_list_begins_with_the_shorter():
    assert scenes("test", 50, 3) == scenes("test", 80, 3)[:50]
    assert scenes("test", 50, 3) != scenes("test", 50, 4)


def test_splits_are_distinct_and_hold_out_what_they_say():
    train, test, validation = (set(scenes(*of)) for of in (("train", 5000), ("test", 500), ("validation", 500)))
    assert (len(train), len(test), len(validation)) == (5000, 500, 500)
    assert not train & test and not train & validation and not test & validation
    assert not any(map(shapes.held_out, train))
    kinds = {f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES}
    seen = {group.kind for scene in train for group in scene.groups}
    assert kinds - seen == {kind for kind in kinds if shapes.kind_held_out(kind)} != set()
    for split in (test, validation):
        share = sum(map(shapes.held_out, split)) / 500
        assert 0.4 < share < 0.7
        assert any(shapes.held_out(scene) and all(group.kind in seen for group in scene.groups) for scene in split)
    for name in vars(RED_CIRCLES):  # every single attribute is seen in train, whatever is held out
        assert {getattr(group, name) for scene in train for group in scene.groups} == {
            getattr(group, name) for scene in test for group in scene.groups
        }


def test_arranging_the_same_groups_otherwise_does_not_change_the_split():
    for scene in scenes("train", 300):
        assert {shapes.split_of(replace(scene, place=place, background="grey")) for place in shapes.PLACES} == {"train"}


def test_a_small_world_keeps_to_its_values_and_says_when_it_is_exhausted():
    world = World(colours=("red", "blue"), shapes=("cross", "square"), counts=(1,), plain_share=1.0, single_share=0.0)
    for scene in scenes("train", 100, world=world):
        assert all(group.colour in world.colours and group.shape in world.shapes for group in scene.groups)
        assert len(scene.groups) == 2 and {(group.count, group.texture) for group in scene.groups} == {(1, "plain")}
    with pytest.raises(ValueError, match="holds hardly more than .* train scenes"):
        scenes("train", 5000, world=world)
    with pytest.raises(ValueError, match="colour cannot be 'rde'"):
        scenes("train", 1, world=World(colours=("rde",)))


def test_one_scene_told_from_either_side_is_equal():
    assert Scene("white", BLUE_SQUARE, "right", RED_CIRCLES) == SCENE
    assert (SCENE.first, SCENE.relation, SCENE.places) == (BLUE_SQUARE, "right of", ("right", "left"))
    assert SCENE.swapped().relation == "left of" and SCENE.swapped().swapped() == SCENE


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Group("read", "circle", 1, "small", "plain"), "colour cannot be 'read'.*red"),
        (lambda: Group("red", "circle", 4, "small", "plain"), "count cannot be 4"),
        (lambda: Scene("pink", RED_CIRCLES, "left"), "no background 'pink'"),
        (lambda: Scene("white", RED_CIRCLES, "above"), "no place 'above'"),
        (lambda: Scene("white", RED_CIRCLES, "left", replace(RED_CIRCLES, count=1)), "both groups are red circles"),
        (lambda: scenes("dev", 1), "no split 'dev'"),
    ],
)
def test_impossible_scenes_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_captions_say_what_their_facts_say_and_it_is_true():
    for scene in scenes("train", 400, 1) + scenes("test", 400, 1):
        for caption in describe(scene, seed=5):
            assert caption.text == caption.text.lower()
            said, background = read(caption.text)
            assert (said, background) == (list(caption.groups), caption.background), caption.text
            assert fits(caption, scene)


def test_captions_are_varied_and_a_stated_share_leaves_something_out():
    assert captions(SCENE, 7) == captions(SCENE, 7) != captions(SCENE, 8)
    assert captions(SCENE, 7, 9)[:5] == captions(SCENE, 7)
    drawn = scenes("train", 1000)
    assert sum(len(set(captions(scene))) < 5 for scene in drawn) < 40
    two_groups = [(scene, caption) for scene in drawn if scene.second for caption in describe(scene)]
    complete = sum(
        len(caption.groups) == 2
        and all({"colour", "size", "place"} <= said.keys() for said in caption.groups)
        and sum("texture" in said for said in caption.groups) >= sum(group.texture != "plain" for group in scene.groups)
        for scene, caption in two_groups
    )
    assert 0.75 < complete / len(two_groups) < 0.85


def test_fits_is_exact():
    left_circles = {"shape": "circle", "colour": "red", "place": "left"}
    assert fits(Caption("", (left_circles,)), SCENE)
    assert fits(Caption("", ({"shape": "square"}, left_circles), "white"), SCENE)
    assert not fits(Caption("", ({"shape": "square"}, left_circles), "black"), SCENE)
    assert not fits(Caption("", (left_circles,)), SCENE.swapped())
    assert not fits(Caption("", ({"shape": "circle"}, {"shape": "circle"})), SCENE)
    assert not fits(Caption("", ({"shape": "circle", "count": 1},)), SCENE)
    assert not fits(Caption("", ({"shape": "circle"}, {"shape": "square"})), Scene("white", RED_CIRCLES, "top"))


def test_relation_pairs_differ_only_in_the_relation():
    pairs = relation_pairs(200, seed=2)
    assert len(pairs) == 200 and pairs == relation_pairs(200, seed=2)
    for (scene, caption), (other, answer) in pairs:
        assert shapes.split_of(scene) == shapes.split_of(other) == "test"
        assert other == scene.swapped() != scene
        assert (other.groups, other.background) == (scene.groups, scene.background)
        assert sorted(caption.text.split()) == sorted(answer.text.split())
        assert fits(caption, scene) and fits(answer, other)
        assert not fits(caption, other) and not fits(answer, scene)
        assert (read(caption.text)[0], read(answer.text)[0]) == (list(caption.groups), list(answer.groups))


def test_an_image_is_a_function_of_scene_size_and_seed():
    assert draw(SCENE, 48, 1).tobytes() == draw(SCENE, 48, 1).tobytes() != draw(SCENE, 48, 2).tobytes()
    assert draw(SCENE, 48).size == (48, 48) and draw(SCENE).mode == "RGB"


def test_groups_are_drawn_where_the_scene_places_them():
    for number, scene in enumerate(scenes("test", 400, 6)):
        pixels = np.asarray(draw(scene, 64, number), dtype=np.float32)
        distance = {"": np.abs(pixels - shapes.BACKGROUNDS[scene.background]).sum(-1)}
        distance |= {group.colour: np.abs(pixels - shapes.COLOURS[group.colour]).sum(-1) for group in scene.groups}
        nearest = np.array(list(distance))[np.argmin(list(distance.values()), axis=0)]
        if len(distance) == 3 or scene.second is None:  # groups of one colour cannot be told apart by colour
            for group, place in zip(scene.groups, scene.places, strict=True):
                rows, columns = np.nonzero((nearest == group.colour) & (distance[group.colour] < 60))
                x, y = columns.mean() / 63 - 0.5, rows.mean() / 63 - 0.5
                along = {"left": -x, "right": x, "top": -y, "bottom": y}[place]
                assert along > 0.12 and along > abs(y if place in ("left", "right") else x) - 0.06, (number, scene)


def test_objects_are_as_many_and_as_large_as_the_scene_says():
    from scipy.ndimage import label

    for count in shapes.COUNTS:
        areas = {}
        for size in shapes.SIZES:
            scene = Scene("black", Group("yellow", "square", count, size, "plain"), "top")
            lit = np.asarray(draw(scene, 64, count).convert("L")) > 120
            assert label(lit)[1] == count
            areas[size] = lit.sum() / count
        assert areas["large"] > 2 * areas["small"]


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
        told = [entry["caption"] for entry in coco["annotations"] if entry["image_id"] == image["id"]]
        line = truth[image["id"]]
        assert told == captions(scene, 4) == [caption["text"] for caption in line["captions"]]
        assert (line["relation"], line["scene"]["place"]) == (scene.relation, scene.place)
        assert line["held_out"] == shapes.held_out(scene)
    with pytest.raises(DataError, match="exists already"):
        write_source(tmp_path / "one", counts)


def test_an_interrupted_source_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(Exception, match="No space left"):
        write_source(tmp_path / "shapes", {"test": 2})
    assert list(tmp_path.iterdir()) == []


def test_scenes_need_no_torch():
    code = "import sys, data_tools.shapes.scenes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

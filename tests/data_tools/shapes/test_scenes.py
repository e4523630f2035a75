"""Scenes, worlds and splits keep their promises, checked on thousands of scenes."""

import subprocess
import sys
from dataclasses import replace

import pytest

from data_tools.shapes.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    Group,
    Scene,
    World,
    held_out,
    kind_held_out,
    scenes,
    split_of,
)

RED_CIRCLES = Group("red", "circle", 2, "large", "plain")
BLUE_SQUARE = Group("blue", "square", 1, "small", "striped")
SCENE = Scene("white", RED_CIRCLES, "left", BLUE_SQUARE)


def test_scenes_are_a_function_of_split_and_seed_and_a_longer_list_begins_with_the_shorter():
    assert scenes("test", 50, 3) == scenes("test", 80, 3)[:50]
    assert scenes("test", 50, 3) != scenes("test", 50, 4)


def test_splits_are_distinct_and_hold_out_the_stated_kinds_and_scenes():
    train, test, validation = (set(scenes(*of)) for of in (("train", 5000), ("test", 500), ("validation", 500)))
    assert (len(train), len(test), len(validation)) == (5000, 500, 500)
    assert not train & test and not train & validation and not test & validation
    assert not any(map(held_out, train))
    kinds = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    seen = {group.kind for scene in train for group in scene.groups}
    assert kinds - seen == {kind for kind in kinds if kind_held_out(kind)} != set()
    for split in (test, validation):
        share = sum(map(held_out, split)) / 500
        assert 0.4 < share < 0.7
        assert any(held_out(scene) and all(group.kind in seen for group in scene.groups) for scene in split)
    for name in vars(RED_CIRCLES):  # every single attribute is seen in train, whatever is held out
        assert {getattr(group, name) for scene in train for group in scene.groups} == {
            getattr(group, name) for scene in test for group in scene.groups
        }


def test_arranging_the_same_groups_otherwise_does_not_change_the_split():
    for scene in scenes("train", 300):
        assert {split_of(replace(scene, place=place, background="grey")) for place in PLACES} == {"train"}


def test_a_small_world_keeps_to_its_values_and_says_when_it_is_exhausted():
    world = World(colours=("red", "blue"), shapes=("cross", "square"), counts=(1,), plain_share=1.0, single_share=0.0)
    for scene in scenes("train", 100, world=world):
        assert all(group.colour in world.colours and group.shape in world.shapes for group in scene.groups)
        assert len(scene.groups) == 2 and {(group.count, group.texture) for group in scene.groups} == {(1, "plain")}
    with pytest.raises(ValueError, match="holds hardly more than .* train scenes"):
        scenes("train", 5000, world=world)
    with pytest.raises(ValueError, match="colour cannot be 'rde'"):
        scenes("train", 1, world=World(colours=("rde",)))


def test_a_scene_described_from_either_side_is_equal():
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


def test_scenes_need_no_torch():
    code = "import sys, data_tools.shapes.source; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

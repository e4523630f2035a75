"""Drawn images show the objects of their scenes at the stated positions."""

import numpy as np

from data_tools.shapes.drawing import draw
from data_tools.shapes.scenes import BACKGROUNDS, COLOURS, COUNTS, SIZES, Group, Scene, scenes

SCENE = Scene(
    "white", Group("red", "circle", 2, "large", "plain"), "left", Group("blue", "square", 1, "small", "striped")
)


def test_an_image_is_a_function_of_scene_size_and_seed():
    assert draw(SCENE, 48, 1).tobytes() == draw(SCENE, 48, 1).tobytes() != draw(SCENE, 48, 2).tobytes()
    assert draw(SCENE, 48).size == (48, 48) and draw(SCENE).mode == "RGB"


def test_groups_are_drawn_where_the_scene_places_them():
    for number, scene in enumerate(scenes("test", 400, 6)):
        pixels = np.asarray(draw(scene, 64, number), dtype=np.float32)
        distance = {"": np.abs(pixels - BACKGROUNDS[scene.background]).sum(-1)}
        distance |= {group.colour: np.abs(pixels - COLOURS[group.colour]).sum(-1) for group in scene.groups}
        nearest = np.array(list(distance))[np.argmin(list(distance.values()), axis=0)]
        if len(distance) == 3 or scene.second is None:  # groups of one colour cannot be told apart by colour
            for group, place in zip(scene.groups, scene.places, strict=True):
                rows, columns = np.nonzero((nearest == group.colour) & (distance[group.colour] < 60))
                x, y = columns.mean() / 63 - 0.5, rows.mean() / 63 - 0.5
                along = {"left": -x, "right": x, "top": -y, "bottom": y}[place]
                assert along > 0.12 and along > abs(y if place in ("left", "right") else x) - 0.06, (number, scene)


def test_objects_are_as_many_and_as_large_as_the_scene_says():
    from scipy.ndimage import label

    for count in COUNTS:
        areas = {}
        for size in SIZES:
            scene = Scene("black", Group("yellow", "square", count, size, "plain"), "top")
            lit = np.asarray(draw(scene, 64, count).convert("L")) > 120
            assert label(lit)[1] == count
            areas[size] = lit.sum() / count
        assert areas["large"] > 2 * areas["small"]

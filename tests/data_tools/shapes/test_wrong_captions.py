"""A known share of images has other images' captions, and nothing is lost."""

from __future__ import annotations

from collections import Counter

import pytest

from data_tools.shapes.wrong_captions import swap_captions
from runtime.errors import RecipeError
from runtime.files import read_json, write_json


@pytest.fixture
def source(tmp_path):
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(50)]
    annotations = [{"id": 2 * n + m, "image_id": n, "caption": f"{n} {m}"} for n in range(50) for m in range(2)]
    write_json(tmp_path / "captions.json", {"images": images, "annotations": annotations})
    return tmp_path / "captions.json"


@pytest.mark.parametrize(("share", "wrong"), [(0.0, 0), (0.2, 10), (0.4, 20), (1.0, 50)])
def test_the_stated_share_of_images_has_other_captions(source, tmp_path, share, wrong):
    assert swap_captions(source, tmp_path / "out.json", share) == wrong
    before, after = read_json(source), read_json(tmp_path / "out.json")
    assert after["images"] == before["images"]
    captions_of = {
        image: [record["caption"] for record in after["annotations"] if record["image_id"] == image]
        for image in range(50)
    }
    changed = [image for image, captions in captions_of.items() if not captions[0].startswith(f"{image} ")]
    assert len(changed) == wrong and all(len(captions) == 2 for captions in captions_of.values())
    assert Counter(record["caption"] for record in after["annotations"]) == Counter(
        record["caption"] for record in before["annotations"]
    )


def test_wrong_captions_follow_the_seed_and_impossible_shares_are_refused(source, tmp_path):
    for number, seed in enumerate((1, 1, 2)):
        swap_captions(source, tmp_path / f"{number}.json", 0.2, seed)
    first, again, other = (read_json(tmp_path / f"{number}.json") for number in range(3))
    assert first == again != other
    with pytest.raises(RecipeError, match=r"the share of wrong captions is 1\.5; it must be between 0 and 1"):
        swap_captions(source, tmp_path / "out.json", 1.5)
    with pytest.raises(RecipeError, match="none to swap captions with"):
        swap_captions(source, tmp_path / "out.json", 0.02)

"""A collection is read whole and in order, or refused, because a skipped image would change the score."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from data_tools import Collection
from data_tools.pixels.decode import decode_image
from data_tools.pixels.transforms import EvaluationTransform
from data_tools.shards.manifest import read_index
from runtime.errors import DataError


@pytest.fixture(scope="module")
def truth(drawn):
    """(file name, captions) of the test images, as they were drawn."""
    content = json.loads((drawn / "source" / "captions_test.json").read_text())
    captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return {image["file_name"]: captions[image["id"]] for image in content["images"]}


def test_images_and_captions_are_those_of_the_source_in_its_order(drawn, truth):
    collection = Collection(drawn / "test")
    assert len(collection) == 24
    assert collection.keys == [name.removesuffix(".png") for name in truth]
    assert collection.captions == [caption for captions in truth.values() for caption in captions]


def test_every_caption_knows_its_image(drawn, truth):
    collection = Collection(drawn / "test")
    names = list(truth)
    for caption, image in zip(collection.captions, collection.caption_image, strict=True):
        assert caption in truth[names[image]]


def test_the_first_captions_of_each_image_can_be_taken_alone(drawn, truth):
    collection = Collection(drawn / "test", captions_per_image=2)
    assert collection.captions == [caption for captions in truth.values() for caption in captions[:2]]
    assert collection.caption_image.tolist() == [image for image in range(24) for _ in range(2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_requested_images_in_order(drawn, workers):
    collection, transform = Collection(drawn / "test"), EvaluationTransform(16)
    batches = list(collection.images(transform, range(5, 16), 4, workers))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    expected = [transform(decode_image(collection.reader[sample].image)) for sample in range(5, 16)]
    assert torch.equal(torch.cat(batches), torch.stack(expected))


def test_a_rank_without_images_has_no_batches(drawn):
    assert list(Collection(drawn / "test").images(EvaluationTransform(16), range(24, 24), 4, 0)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_global_generator_is_left_alone(drawn, workers):
    before = torch.get_rng_state()
    list(Collection(drawn / "test").images(EvaluationTransform(16), range(8), 4, workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_stops_scoring_with_one_line(drawn, tmp_path, workers):
    shutil.copytree(drawn / "test", tmp_path / "test")
    index = read_index(tmp_path / "test" / "shard-000001.parquet")
    with open(tmp_path / "test" / "shard-000001.tar", "r+b") as tar:
        tar.seek(int(index.image_offset[2]))
        tar.write(b"\0" * int(index.image_size[2]))
    with pytest.raises(DataError) as error:
        list(Collection(tmp_path / "test").images(EvaluationTransform(16), range(24), 4, workers))
    message = str(error.value)
    assert "\n" not in message and index.key[2] in message and "mend or fetch it" in message


def test_a_missing_folder_gives_a_one_line_error(tmp_path):
    with pytest.raises(DataError, match="no shard folder"):
        Collection(tmp_path / "none")

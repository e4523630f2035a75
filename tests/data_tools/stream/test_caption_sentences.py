"""Where captions are split, and that draws are functions of the seed that reach every sentence and every run alike."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import pytest
from PIL import Image
from tiny_shards import write_shards

from data_tools import ShardStream
from data_tools.config import ReadConfig
from data_tools.sources import CaptionedImage
from data_tools.stream.caption_sentences import read_sentences, split_sentences
from data_tools.stream.order import derived_seed
from data_tools.stream.training_set import open_training_set


@pytest.mark.parametrize(
    ("caption", "sentences"),
    [
        ("a dog on a beach", ["a dog on a beach"]),
        ("A dog runs. It is brown! Is it wet?", ["A dog runs.", "It is brown!", "Is it wet?"]),
        ('He says "Stop." Then he runs.', ['He says "Stop."', "Then he runs."]),
        ("Mr. Smith and J. Doe wait at St. Paul's. 2 dogs wait too.", ["Mr. Smith and J. Doe wait at St. Paul's.", "2 dogs wait too."]),
        ("a sign that reads 3.5 km\n\nand an arrow", ["a sign that reads 3.5 km", "and an arrow"]),
        ("no capital follows. so this is one sentence", ["no capital follows. so this is one sentence"]),
        ("", [""]),
    ],
)  # fmt: skip
def test_sentences_are_split_at_their_ends(caption, sentences):
    assert split_sentences(caption) == sentences


FOUR = "One is here. Two is here. Three is here. Four is here."
WORDS = ["One", "Two", "Three", "Four"]


def test_one_sentence_is_drawn_alike_and_by_the_seed_alone():
    counts = Counter(read_sentences(FOUR, "one", seed) for seed in range(4000))
    assert counts.keys() == {f"{word} is here." for word in WORDS}
    assert all(abs(count - 1000) < 120 for count in counts.values())  # four standard deviations
    assert [read_sentences(FOUR, "one", seed) for seed in range(9)] == [
        read_sentences(FOUR, "one", seed) for seed in range(9)
    ]
    assert read_sentences(FOUR, "all", 5) == FOUR


def test_a_run_has_neighbours_in_order_and_any_length_alike():
    runs = Counter(read_sentences(FOUR, "run", seed) for seed in range(4000))
    expected = {
        " ".join(f"{word} is here." for word in WORDS[start : start + length]): 1000 / (5 - length)
        for length in range(1, 5)
        for start in range(5 - length)
    }
    assert runs.keys() == expected.keys()
    assert all(abs(runs[run] - count) < 4 * count**0.5 for run, count in expected.items())


def test_a_stream_draws_sentences_by_seed_and_position_at_any_world_size(tmp_path):
    def item(number):
        buffer = io.BytesIO()
        Image.new("RGB", (3, 2), (number, 0, 0)).save(buffer, "PNG")
        return CaptionedImage(
            f"k{number}", [f"Image {number}. It has two sentences."], str(number), buffer.getvalue, f"{number}.png"
        )

    write_shards([item(number) for number in range(6)], tmp_path / "shards", shard_samples=3, workers=1)
    recipe = ReadConfig(train=str(tmp_path / "shards"), sentences="one")

    def read(rank, world, batch):
        stream = ShardStream(open_training_set(recipe), batch, rank=rank, world_size=world, seed=3)
        return {
            int(position): (key, int(image_id), caption)
            for part in itertools.islice(stream, 24 // batch // world)
            for position, key, image_id, caption in zip(
                part["positions"], part["keys"], part["image_ids"], part["captions"], strict=True
            )
        }

    whole = read(0, 1, 6)
    assert len(whole) == 24 and read(0, 2, 3) | read(1, 2, 3) == whole
    for position, (key, _, caption) in whole.items():
        seed = derived_seed(3, position)
        assert caption == read_sentences(f"Image {key[1:]}. It has two sentences.", "one", seed)
    assert {caption.startswith("Image") for _, _, caption in whole.values()} == {True, False}
    texts = {
        image_id: {caption for _, other, caption in whole.values() if other == image_id}
        for _, image_id, _ in whole.values()
    }
    assert len(texts) == 6 and max(map(len, texts.values())) == 2, (
        "sentences of an image share its id, by which they are positives"
    )

"""Mixtures, filters and all-captions sets give the stated samples in the stated shares."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from tiny_shards import make

from data_tools import ShardStream
from data_tools.config import FilterConfig, ReadConfig
from data_tools.shards.reader import ShardReader
from data_tools.stream import selection, training_set
from data_tools.stream.mixture import CYCLE, Mixture
from data_tools.stream.training_set import TrainingSet, open_training_set, short_names
from pretrain.config import PretrainRecipe
from runtime.errors import DataError, RecipeError
from runtime.recipe import load_recipe, read_recipe, write_recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {letter: make(root / letter, letter, samples) for letter, samples in {"a": 18, "b": 7, "c": 3}.items()}


def walk(stream: ShardStream, positions: int) -> list[tuple[str, str]]:
    """(key, caption) of the first so many positions."""
    found: list[tuple[str, str]] = []
    for batch in stream:
        found += zip(batch["keys"], batch["captions"], strict=True)
        if len(found) >= positions:
            return found[:positions]
    raise AssertionError("the stream has an end")


# -- Several folders ----------------------------------------------------------------------------------------------------


def test_a_list_of_folders_is_one_set(folders):
    stream = ShardStream([folders["a"], folders["b"]], 5)
    assert len(stream) == 25
    keys = [key for key, _ in walk(stream, 75)]
    for epoch in range(3):
        part = keys[25 * epoch : 25 * epoch + 25]
        assert len(set(part)) == 25 and {key[0] for key in part[:12]} == {"a", "b"}


WEIGHTS = some.lists(some.floats(1e-3, 1e3), min_size=1, max_size=6)


@given(weights=WEIGHTS, start=some.integers(0, 10**12))
def test_a_mixture_keeps_its_shares_and_misses_no_position_of_a_dataset(weights, start):
    mixture = Mixture(weights)
    owners, places = mixture.at(start + np.arange(2 * CYCLE))
    exact = np.array(weights) / sum(weights)
    before = mixture.counts(start)
    assert before.sum() == start
    for number, share in enumerate(exact):
        mine = places[owners == number]
        assert np.array_equal(mine, before[number] + np.arange(len(mine)))  # each once, in order, none left out
        assert abs(len(mine) / (2 * CYCLE) - share) <= len(weights) / CYCLE
        # At any point along the way as well, to a position or two for each dataset.
        drift = np.cumsum(owners == number) - len(mine) / (2 * CYCLE) * (1 + np.arange(2 * CYCLE))
        assert np.abs(drift).max() < 1 + len(weights)
    assert np.array_equal(mixture.counts(start + 2 * CYCLE), before + np.bincount(owners, minlength=len(weights)))


def test_a_mapping_mixes_by_weight_and_every_dataset_has_epochs_of_its_own(folders):
    stream = ShardStream({str(folders["a"]): 1.0, str(folders["c"]): 3.0}, 8)
    keys = [key for key, _ in walk(stream, 72)]
    assert sum(key[0] == "a" for key in keys) == 18 and len(set(keys)) == 21
    a, c = ([key for key in keys if key[0] == letter] for letter in "ac")
    assert len(set(a)) == 18
    assert all(len(set(c[start : start + 3])) == 3 for start in range(0, 54, 3))
    assert stream.state_dict()["datasets"] == {"a": 18, "c": 54}


def test_a_mixture_goes_on_from_its_cursor_in_another_world(folders):
    mixed = {str(folders["a"]): 2.0, str(folders["b"]): 1.0}
    whole = walk(ShardStream(mixed, 6, seed=4), 60)
    stream = ShardStream(mixed, 6, seed=4)
    first = walk(stream, 24)
    state = json.loads(json.dumps(stream.state_dict()))
    ranks = [ShardStream(mixed, 3, rank, 2, workers=rank, seed=4) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    rest = []
    for batches in zip(*ranks, strict=False):
        rest += [pair for batch in batches for pair in zip(batch["keys"], batch["captions"], strict=True)]
        if len(rest) == 36:
            break
    assert first + rest == whole
    assert ranks[0].state_dict()["datasets"] == {"a": 40, "b": 20}


@pytest.mark.parametrize(
    "other",
    [
        lambda f: {str(f["a"]): 2.0, str(f["b"]): 1.5},
        lambda f: {str(f["b"]): 1.0, str(f["a"]): 2.0},
        lambda f: [f["a"], f["b"]],
        lambda f: TrainingSet({str(f["a"]): 2.0, str(f["b"]): 1.0}, captions="all"),
        lambda f: TrainingSet({str(f["a"]): 2.0, str(f["b"]): 1.0}, keep=FilterConfig(min_words=2)),
    ],
)
def test_a_cursor_of_another_mixture_or_filter_is_refused(folders, other):
    state = ShardStream({str(folders["a"]): 2.0, str(folders["b"]): 1.0}, 6).state_dict()
    with pytest.raises(DataError, match="not the data this run was reading"):
        ShardStream(other(folders), 6).load_state_dict(state)


def test_a_broken_sample_of_a_mixture_is_named_with_its_folder_and_replaced_from_it(folders, tmp_path):
    make(tmp_path / "a", "x", 5, 1)
    (tmp_path / "a" / "shard-000002.tar").unlink()
    stream = ShardStream(
        {str(folders["a"]): 1.0, str(tmp_path / "a"): 1.0}, 10, quarantine=tmp_path / "q.jsonl", max_bad_share=0.5
    )
    keys = [key for key, _ in walk(stream, 40)]
    (line,) = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert line["shard"] == f"{tmp_path.name}/a/shard-000002.tar" and line["key"] == "x02"
    assert sum(key[0] == "x" for key in keys) == 20 and "x02" not in keys


def test_names_are_as_short_as_they_can_be():
    assert short_names(["s3://bucket/train"]) == [""]
    assert short_names(["/data/coco/", "s3://b/cc12m"]) == ["coco", "cc12m"]
    assert short_names(["/x/coco/train", "/x/flickr/train"]) == ["coco/train", "flickr/train"]


def test_impossible_sets_give_a_one_line_error(folders, tmp_path):
    for wrong, message in (([], "set data.train"), ("", "set data.train"), ([folders["a"]] * 2, "twice")):
        with pytest.raises(DataError, match=message):
            TrainingSet(wrong)
    with pytest.raises(RecipeError, match="weight 0"):
        ReadConfig(train={"x": 0})


# -- Captions and filters -----------------------------------------------------------------------------------------------


def truth(folder) -> dict[str, list[str]]:
    reader = ShardReader(folder)
    return {reader.key(sample): reader.captions(sample) for sample in range(len(reader))}


def test_all_captions_make_an_epoch(folders):
    stream = ShardStream(TrainingSet(folders["a"], captions="all"), 6)
    captions = sorted(caption for words in truth(folders["a"]).values() for caption in words)
    assert len(stream) == len(captions) == 36
    found = walk(stream, 72)
    assert sorted(c for _, c in found[:36]) == sorted(c for _, c in found[36:]) == captions
    assert all(caption.startswith(f"a{int(key[1:])}c") for key, caption in found)


KEEP = [
    FilterConfig(min_words=3),
    FilterConfig(max_words=2),
    FilterConfig(min_words=2, max_words=4, min_side=11),
    FilterConfig(min_side=12, max_aspect=1.5),
]


@pytest.mark.parametrize("captions", ["one", "all"])
@pytest.mark.parametrize("keep", KEEP)
def test_a_filter_keeps_exactly_the_samples_it_states(folders, keep, captions):
    def fits(key: str) -> bool:
        short, long = sorted((10 + int(key[1:]), 12))
        return short >= keep.min_side and (keep.max_aspect is None or long <= keep.max_aspect * short)

    expected = {(key, c) for key, words in truth(folders["a"]).items() if fits(key) for c in words if keep.allows(c)}
    assert 0 < len(expected) < 36
    data = TrainingSet(folders["a"], captions, keep)
    assert len(data) == (len(expected) if captions == "all" else len({key for key, _ in expected}))
    found = walk(ShardStream(data, 7), 60 * len(data) if captions == "one" else len(data))
    assert set(found) == expected
    if captions == "one":
        assert len({key for key, _ in found[: len(data)]}) == len(data)


def test_a_filters_index_is_written_once_and_the_folder_stays_what_it_was(folders, tmp_path, monkeypatch):
    folder = make(tmp_path / "shards", "d", 9)
    first = TrainingSet(folder, keep=FilterConfig(min_words=2))
    (path,) = [entry for entry in (folder / "selections").iterdir() if entry.is_dir()]
    assert {file.name for file in path.iterdir()} == {"about.json", "counts.npy", "items.bin"}
    monkeypatch.setattr(selection, "_select_shard", lambda job: pytest.fail("made again"))
    again = TrainingSet(folder, keep=FilterConfig(min_words=2))
    assert again.fingerprint == first.fingerprint and len(again) == len(first)
    assert isinstance(again.datasets[0].selections[0].items, np.memmap)  # nothing of it is read at the start
    (path / "items.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="was cut short; remove that folder"):
        TrainingSet(folder, keep=FilterConfig(min_words=2))


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(folders, tmp_path, monkeypatch):
    folder = make(tmp_path / "shards", "d", 9)
    monkeypatch.setattr(os, "access", lambda path, mode: folder not in path.parents)
    config = ReadConfig(train=str(folder), captions="all")
    config.cache.folder = str(tmp_path / "cache")
    assert len(open_training_set(config)) == 18
    assert len(list((tmp_path / "cache" / "selections").glob("*/items.bin"))) == 1


def test_several_processes_make_the_same_index(folders, tmp_path, monkeypatch):
    alone = TrainingSet(folders["a"], "all", FilterConfig(min_words=2, min_side=11))
    monkeypatch.setattr(selection, "ONE_PROCESS", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    pooled = TrainingSet(make(tmp_path / "a", "a", 18), "all", FilterConfig(min_words=2, min_side=11))
    assert pooled.fingerprint == alone.fingerprint
    assert np.array_equal(pooled.datasets[0].selections[0].items, alone.datasets[0].selections[0].items)


def test_a_filter_that_leaves_nothing_gives_a_one_line_error(folders):
    with pytest.raises(DataError, match="leaves nothing"):
        TrainingSet(folders["b"], keep=FilterConfig(min_words=500))


def test_a_sample_that_the_filter_could_not_read_is_left_to_the_quarantine(tmp_path):
    folder = make(tmp_path / "shards", "d", 9)
    (folder / "shard-000001.tar").unlink()
    data = TrainingSet(folder, keep=FilterConfig(min_words=2))
    stream = ShardStream(data, 5, quarantine=tmp_path / "q.jsonl", max_bad_share=0.9)
    walk(stream, 20)
    listed = {json.loads(line)["key"] for line in (tmp_path / "q.jsonl").read_text().splitlines()}
    assert listed == {"d04", "d05", "d06", "d07"}


@pytest.mark.parametrize(
    "wrong", [{"min_words": -1}, {"min_words": 5, "max_words": 3}, {"max_aspect": 0.5}, {"min_side": -2}]
)
def test_impossible_filters_are_refused(wrong):
    with pytest.raises(RecipeError, match=r"data\.filter"):
        FilterConfig(**wrong)


def test_captions_for_a_tokenizer_come_from_everywhere(folders, monkeypatch):
    data = TrainingSet([folders["a"], folders["b"], folders["c"]])
    everything = [caption for letter in "abc" for words in truth(folders[letter]).values() for caption in words]
    assert list(data.some_captions(10**6)) == everything
    monkeypatch.setattr(training_set, "RUN", 1)
    some_of_them = list(data.some_captions(20))
    assert 10 <= len(some_of_them) <= 30 and {caption[0] for caption in some_of_them} == set("abc")


@pytest.mark.parametrize(
    ("setting", "read"),
    [("a", "a"), ('["s3://b/x", "y"]', ["s3://b/x", "y"]), ('{"s3://b/x": 2, "y": 0.5}', {"s3://b/x": 2.0, "y": 0.5})],
)
def test_a_recipe_names_folders_in_three_ways(tmp_path, setting, read):
    (tmp_path / "r.yaml").write_text(f"data: {{train: {setting}}}\n")
    for arguments in (["--config", str(tmp_path / "r.yaml")], ["--data.train", setting]):
        recipe = read_recipe(PretrainRecipe, arguments, "ligature pretrain")
        assert recipe.data.train == read and type(recipe.data.train) is type(read)
    write_recipe(tmp_path / "written.yaml", recipe)
    assert load_recipe(PretrainRecipe, tmp_path / "written.yaml").data.train == read


@pytest.mark.parametrize("value", ['{"x": "much"}', '{"x": 0}', "[]"])
def test_a_train_setting_of_another_type_gives_a_one_line_error(value):
    with pytest.raises(RecipeError, match=r"data\.train") as error:
        read_recipe(PretrainRecipe, ["--data.train", value], "ligature pretrain")
    assert "\n" not in str(error.value)

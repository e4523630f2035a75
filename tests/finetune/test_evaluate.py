"""A user's own scores and caption files are scored, and unsuitable data or splits are refused."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
from safetensors.numpy import save_file

from data_tools.in_order.collection import open_collection, validation_collection
from data_tools.shards.manifest import read_manifest
from finetune.shortlist import make_shortlists
from launch.cli import main
from retrieval.extended import extended_positives
from retrieval.records import read_record
from runtime.errors import DataError, LigatureError, RecipeError


@pytest.fixture(scope="module")
def embeddings():
    """24 images and 120 captions as `drawn / "test"` has them: made-up vectors, the right ones a little nearer."""
    random = np.random.default_rng(0)
    image = random.normal(size=(24, 16)).astype(np.float32)
    text = np.repeat(image, 5, axis=0) + random.normal(size=(120, 16)).astype(np.float32)
    return image * random.uniform(0.1, 9, size=(24, 1)).astype(np.float32), text


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def own(path, out, *more):
    return main(["evaluate", "--scores", str(path), "--dataset", "shapes", "--split", "test", "--out", str(out), *more])


def one_line(capfd):
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("ligature: ") and "Traceback" not in "".join(lines)
    return lines[-1]


# --- a user's own scores --------------------------------------------------------------------------------------------


def test_embeddings_and_their_matrix_score_the_same_in_every_format(drawn, embeddings, tmp_path):
    image, text = embeddings
    scores = unit(image) @ unit(text).T
    np.savez(tmp_path / "embeddings.npz", image=image, text=text)
    np.save(tmp_path / "matrix.npy", scores)
    save_file({"scores": scores}, tmp_path / "matrix.safetensors")
    np.savez(tmp_path / "alone.npz", scores=scores, caption_image=np.repeat(np.arange(24), 5))
    actual = []
    for name in ("embeddings.npz", "matrix.npy", "matrix.safetensors", "alone.npz"):
        data = [] if name.startswith("alone") else ["--data", str(drawn / "test")]
        assert own(tmp_path / name, tmp_path / "scores.json", *data) == 0
        actual.append(read_record(tmp_path / "scores.json"))
    right = (scores.T.argmax(1) == np.repeat(np.arange(24), 5)).mean() * 100
    for record in actual:
        assert record["text_to_image"]["R@1"] == pytest.approx(right)
        assert record["image_to_text"] == actual[0]["image_to_text"]
        assert record["training"] == "unknown"
    assert (actual[0]["head"], actual[1]["head"]) == ("own embeddings", "own scores")
    assert actual[0]["captions_per_image"] == "all"


def test_a_caption_file_stands_in_for_shards(drawn, embeddings, tmp_path):
    """ALBEF's format, gzipped, captions to be cut to the first three: the shards' own figures under the same cut."""
    annotation = json.loads((drawn / "source" / "captions_test.json").read_text())
    names = {image["id"]: image["file_name"] for image in annotation["images"]}
    lists = {name: [] for name in names.values()}
    for note in annotation["annotations"]:
        lists[names[note["image_id"]]].append(note["caption"])
    albef = [{"image": f"images/{name}", "caption": captions} for name, captions in lists.items()]
    (tmp_path / "test.json.gz").write_bytes(gzip.compress(json.dumps(albef).encode()))
    image, text = embeddings
    kept = text.reshape(24, 5, 16)[:, :3].reshape(72, 16)
    np.savez(tmp_path / "cut.npz", image=image, text=kept)
    figures = []
    for data in (tmp_path / "test.json.gz", drawn / "test"):
        assert own(tmp_path / "cut.npz", tmp_path / "s.json", "--data", str(data), "--captions_per_image", "3") == 0
        record = read_record(tmp_path / "s.json")
        assert (record["captions"], record["captions_per_image"]) == (72, "first 3")
        figures.append(record["image_to_text"])
    assert figures[0] == figures[1]
    collection = open_collection(drawn / "source" / "captions_test.json", None, str(drawn / "source" / "images"))
    shards = open_collection(drawn / "test", None)
    assert collection.captions == shards.captions and collection[3].size == shards[3].size


def test_a_checkpoint_scores_a_caption_file_as_its_shards(pretrained, drawn, tmp_path):
    assert main(small.evaluate(pretrained, drawn, tmp_path / "shards.json")) == 0
    file = ["--data", str(drawn / "source" / "captions_test.json"), "--images", str(drawn / "source" / "images")]
    assert main([*small.evaluate(pretrained, drawn, tmp_path / "file.json"), *file]) == 0
    one, other = (read_record(tmp_path / f"{name}.json") for name in ("shards", "file"))
    assert one["text_to_image"] == other["text_to_image"]
    assert main(["compare", str(tmp_path / "shards.json"), str(tmp_path / "file.json")]) == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": (24, 16), "text": (119, 16)}, "scores 24 images and 119 captions, but .* has 24 and 120"),
        ({"image": (24, 16), "text": (120, 8)}, "image embeddings are 16 wide, text embeddings 8"),
        ({"pictures": (24, 16)}, "holds pictures; it needs `scores`, or `image` and `text`"),
        ({"scores": (24,)}, "scores is float64 of shape"),
    ],
)
def test_own_scores_that_do_not_fit_give_a_one_line_error(drawn, tmp_path, capfd, arrays, message):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", **{name: random.normal(size=shape) for name, shape in arrays.items()})
    assert own(tmp_path / "own.npz", tmp_path / "s.json", "--data", str(drawn / "test")) == 1
    assert re.search(message, one_line(capfd))
    assert not (tmp_path / "s.json").exists()


def test_a_caption_file_in_another_order_than_the_data_is_refused(drawn, embeddings, tmp_path, capfd):
    image, text = embeddings
    order = np.roll(np.repeat(np.arange(24), 5), 1)
    np.savez(tmp_path / "own.npz", image=image, text=np.roll(text, 1, axis=0), caption_image=order)
    assert own(tmp_path / "own.npz", tmp_path / "s.json") == 0
    assert own(tmp_path / "own.npz", tmp_path / "s.json", "--data", str(drawn / "test")) == 1
    assert "caption_image differs from" in one_line(capfd)


def test_nan_scores_and_zero_embeddings_are_refused(drawn, embeddings, tmp_path, capfd):
    image, text = embeddings
    scores = unit(image) @ unit(text).T
    scores[3, 7] = np.nan
    np.save(tmp_path / "nan.npy", scores)
    assert own(tmp_path / "nan.npy", tmp_path / "s.json", "--data", str(drawn / "test")) == 1
    assert "nan at query 3, item 7" in one_line(capfd)
    empty = image.copy()
    empty[5] = 0
    np.savez(tmp_path / "zero.npz", image=empty, text=text)
    assert own(tmp_path / "zero.npz", tmp_path / "s.json", "--data", str(drawn / "test")) == 1
    assert "image embedding 5 has length 0, so no cosine; use --similarity dot" in one_line(capfd)
    np.savez(tmp_path / "alone.npz", scores=scores)
    assert own(tmp_path / "alone.npz", tmp_path / "s.json") == 1
    assert "does not say which image each caption describes" in one_line(capfd)
    (tmp_path / "broken.npz").write_bytes(b"PK nonsense")
    assert own(tmp_path / "broken.npz", tmp_path / "s.json") == 1
    assert "broken.npz cannot be read" in one_line(capfd)


def test_the_coco_campaign_runs_on_a_few_images_with_real_names_and_captions(shared_data, tmp_path):
    """The campaign of benchmarks/campaigns/coco_protocols.py, cut down: generated images under the real names, a HAT of random weights."""
    path = Path(__file__).parents[2] / "benchmarks" / "campaigns" / "coco_protocols.py"
    spec = importlib.util.spec_from_file_location("coco_protocols", path)
    campaign = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(campaign)
    captions = shared_data / "data" / "annotations" / "coco" / "coco_test.json.gz"
    cut, tokenizer = campaign.prepare(captions, tmp_path, 15)
    folder = campaign.save_random(tmp_path, tokenizer, ["all"])["all"]
    about = ["--data", str(cut), "--images", str(tmp_path / "images"), "--dataset", "COCO", "--split", "test"]
    command = ["evaluate", "--checkpoint", str(folder), *about, "--workers", "0", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "s.json"), "--captions_per_image", "5"]) == 0
    record = read_record(tmp_path / "s.json")
    assert (record["images"], record["captions"], record["training"]) == (15, 75, "untrained")
    keys = np.load(tmp_path / "s.ranks.npz")["keys"]
    assert keys[0] == "COCO_val2014_000000391895"


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_protocol_for_another_number_of_images_is_refused_before_scoring(pretrained, drawn, tmp_path, capfd):
    assert main(small.evaluate(pretrained, drawn, tmp_path / "s.json", "--protocol", "coco_5k")) == 1
    assert "coco_5k is defined on 5,000 images, not on 24" in one_line(capfd)


def test_tf32_is_refused_on_a_cpu(pretrained, drawn, tmp_path, capfd):
    assert main(small.evaluate(pretrained, drawn, tmp_path / "scores.json", "--precision", "tf32")) == 2
    assert "precision is tf32, which a GPU computes in, and this runs on the cpu" in capfd.readouterr().err


@pytest.mark.parametrize("more", [["--heads", "[dual, fusion]"], ["--shortlist_from", "runs/dual"]], ids=str)
def test_extended_positives_are_refused_for_shortlists_within_folds(pretrained, drawn, tmp_path, capfd, more):
    options = ["--extended", "true", "--protocol", "coco_1k", *more]
    assert main([*small.evaluate(pretrained, drawn, tmp_path / "s.json"), *options]) == 2
    assert "use --protocol coco_5k" in one_line(capfd)


def test_extended_positives_of_other_data_are_refused_before_scoring(pretrained, drawn, tmp_path, capfd):
    pytest.importorskip("eccv_caption")
    assert main(small.evaluate(pretrained, drawn, tmp_path / "s.json", "--extended", "true")) == 1
    assert "are for COCO's Karpathy test split" in capfd.readouterr().err and not (tmp_path / "s.json").exists()


def test_selecting_on_a_test_split_is_refused_unless_forced(pretrained, drawn, tmp_path, capfd):
    with pytest.raises(RecipeError, match=r"captions_test.json', a test split.*insist with --data.select_on_test true"):
        validation_collection(drawn / "test", False)
    assert len(validation_collection(drawn / "test", True)) == 24
    assert len(validation_collection(drawn / "validation", False)) == 24
    command = small.finetune(pretrained, drawn, tmp_path, "--data.validation", str(drawn / "test"))
    assert main(command) == 2
    assert "a test split" in one_line(capfd)
    assert not (tmp_path / "finetune").exists()


def test_an_image_without_captions_and_an_empty_gallery_are_refused(drawn, tmp_path):
    annotation = json.loads((drawn / "source" / "captions_test.json").read_text())
    annotation["annotations"] = [
        note for note in annotation["annotations"] if note["image_id"] != annotation["images"][2]["id"]
    ]
    (tmp_path / "captions.json").write_text(json.dumps(annotation))
    with pytest.raises(DataError, match="1 images have no caption"):
        open_collection(tmp_path / "captions.json", None, str(drawn / "source" / "images"))
    with pytest.raises(DataError, match=f"image {annotation['images'][2]['file_name']} has no caption"):
        open_collection(tmp_path / "captions.json", None, captions_only=True)
    shutil.copytree(drawn / "test", tmp_path / "empty")
    manifest = json.loads((tmp_path / "empty" / "manifest.json").read_text())
    manifest |= {"samples": 0, "captions": 0, "bytes": 0, "shards": []}
    (tmp_path / "empty" / "manifest.json").write_text(json.dumps(manifest))
    assert not read_manifest(tmp_path / "empty").shards
    with pytest.raises(DataError, match="holds no samples to score"):
        open_collection(tmp_path / "empty", None)


# --- shortlists and extended positives ------------------------------------------------------------------------------


def test_shortlists_stay_within_their_fold():
    random = np.random.default_rng(0)
    caption_image = np.repeat(np.arange(8), 2)
    similarity = random.normal(size=(8, 16)).astype(np.float32)
    folds = np.arange(8) // 4
    lists = make_shortlists(similarity, 3, folds, caption_image)
    for image in range(8):
        inside = np.flatnonzero(folds[caption_image] == folds[image])
        assert set(lists.captions[image]) == set(inside[np.argsort(-similarity[image, inside])[:3]])
    for caption in range(16):
        inside = np.flatnonzero(folds == folds[caption_image[caption]])
        assert set(lists.images[caption]) == set(inside[np.argsort(-similarity[inside, caption])[:3]])
    marked = lists.pairs()
    assert all(marked[image, lists.captions[image]].all() for image in range(8))
    assert all(marked[lists.images[caption], caption].all() for caption in range(16))
    ceiling = lists.ceiling(caption_image)
    held = [(caption_image[lists.captions[image]] == image).any() for image in range(8)]
    assert ceiling["recall"]["image_to_text"] == pytest.approx(100 * np.mean(held))


def test_extended_positives_are_numbered_in_the_test_files_order(shared_data):
    """The package numbers captions; a caption file has none. Its images are in the file's order, its captions too, as far as
    another copy of the annotations (a part of val2014) shows."""
    eccv = pytest.importorskip("eccv_caption")
    known = eccv.Metrics()
    folder = shared_data / "annotations" if (shared_data / "annotations").is_dir() else shared_data / "data/annotations"
    test = json.loads(gzip.decompress((folder / "coco/coco_karpathy_test.json.gz").read_bytes()))
    val = json.loads(gzip.decompress((folder / "coco/captions_val2014_subset4800.json.gz").read_bytes()))
    text = {note["id"]: " ".join(note["caption"].split()) for note in val["annotations"]}
    by_image: dict[int, list[int]] = {}
    for caption in known.coco_ids.tolist():
        by_image.setdefault(known.coco_gts["t2i"][caption][0], []).append(caption)
    assert list(by_image) == [int(entry["image"][-10:-4]) for entry in test]
    checked = 0
    for entry, numbers in zip(test, by_image.values(), strict=True):
        if all(number in text for number in numbers):
            checked += 1
            assert [text[number] for number in numbers] == [" ".join(c.split()) for c in entry["caption"][:5]]
    assert checked == 587


def test_extended_positives_of_other_data_are_refused():
    pytest.importorskip("eccv_caption")
    with pytest.raises(LigatureError, match="are for COCO's Karpathy test split"):
        extended_positives(np.zeros((2, 4)), np.zeros((4, 2)), np.array([0, 0, 1, 1]), ["a_1", "a_2"])
